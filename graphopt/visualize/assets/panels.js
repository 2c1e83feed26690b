"use strict";
// The lists on the left and the details on the right. Text of the data is set as text, never as markup.

/** An element: h("div.name", {title: "..."}, child, "text", ...). */
function h(what, attributes, ...children) {
  const [tag, ...classes] = what.split(".");
  const made = document.createElement(tag);
  if (classes.length) made.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "style") made.style.cssText = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(9)) if (child !== null && child !== undefined && child !== false) made.append(child);
  return made;
}

class Panels {
  constructor(app) {
    this.app = app;
    this.model = app.model;
    this.tab = "Modules";
    this.counts = { Changes: this.model.data.changes.length, "Left alone": this.model.data.refusals.length, Axes: this.model.data.axes.length };
    this.names = ["Modules"];
    if (this.model.data.changes.length) this.names.push("Changes");
    if (this.model.data.refusals.length) this.names.push("Left alone");
    if (this.model.data.axes.length) this.names.push("Axes");
    if (this.model.data.plan) this.names.push("Plan");
  }

  list() {
    const tabs = document.getElementById("tabs");
    tabs.replaceChildren(...this.names.map((name) => h("button", {
      role: "tab", "aria-selected": String(name === this.tab), onclick: () => { this.tab = name; this.list(); },
    }, name, this.counts[name] ? h("span.count", null, String(this.counts[name])) : null)));
    const made = { Modules: () => this.modules(), Changes: () => this.changes(), "Left alone": () => this.refusals(), Axes: () => this.axes(), Plan: () => this.plan() }[this.tab]();
    document.getElementById("list").replaceChildren(...[made].flat(9).filter(Boolean));
  }

  // -- modules -----------------------------------------------------------------------------------------------------

  modules() {
    const model = this.model, rows = [], side = model.side();
    const measure = this.app.measure === "phase" ? "FLOPs" : this.app.measure, key = MEASURES[measure];
    const total = model.sum(0, side, key) || 1;
    const walk = (g, depth) => {
      for (const c of model.childrenOf(g)) {
        const open = model.open.has(c), share = model.sum(c, side, key) / total;
        const columns = model.values[side][c].map((column) => column[key] / total);
        rows.push(h(`div.row${this.app.chosen === `b${c}` ? ".chosen" : ""}`, { style: `padding-left:${8 + 14 * depth}px`, title: model.groups[c].path || model.groups[c].label, onclick: () => this.app.goTo(`b${c}`) },
          h("button.fold", { "aria-label": open ? "close" : "open", onclick: (event) => { event.stopPropagation(); this.app.toggle(c); } }, open ? "▾" : "▸"),
          h("span.name", null, model.groups[c].label),
          h("span.share", null, percent(share)),
          h("span.bar", null, columns.map((part, k) => h("i", { style: `width:${(100 * part).toFixed(2)}%;background:${PHASE_COLOUR[k]}` })))));
        if (open) walk(c, depth + 1);
      }
    };
    walk(0, 0);
    return [h("p.hint", null, `Share of ${{ seconds: "predicted time", FLOPs: "FLOPs", bytes: "bytes moved" }[measure]}, by phase. Double-click a box to open it.`), h("div.rows", null, rows)];
  }

  // -- changes -----------------------------------------------------------------------------------------------------

  changes() {
    const byPass = new Map();
    this.model.data.changes.forEach((change, k) => byPass.set(change.pass, [...(byPass.get(change.pass) || []), [change, k]]));
    return [...byPass].map(([name, rows]) => {
      const saved = { flops: 0, kept: 0, moved: 0 };
      for (const [change] of rows) for (const key of Object.keys(saved)) saved[key] += change[key];
      return h("details.pass", { open: byPass.size < 4 || rows.length < 12 },
        h("summary", null, h("b", null, words(name)), ` ${plural(rows.length, "change")}`, h("div.saving", null, savings(saved))),
        rows.map(([change, k]) => h("div.row.change", { onclick: () => this.app.lightChange(k), title: "Show where" },
          h("div", null, change.what), h("div.where", null, [change.module, change.source].filter(Boolean).join("  ·  ")), h("div.saving", null, savings(change)))));
    });
  }

  refusals() {
    const byWhy = new Map();
    for (const one of this.model.data.refusals) {
      const key = `${one.pass}\n${one.why}`;
      byWhy.set(key, [...(byWhy.get(key) || []), one]);
    }
    return [h("p.hint", null, "What passes looked at and left alone, and why."), ...[...byWhy.values()].map((rows) => h("details.pass", null,
      h("summary", null, h("b", null, words(rows[0].pass)), ` ${rows.length} times`, h("div.why", null, rows[0].why)),
      rows.map((one) => h("div.row.change", { onclick: () => this.app.lightPlace(one.module, one.source) }, h("div", null, one.what), h("div.where", null, [one.module, one.source].filter(Boolean).join("  ·  "))))))];
  }

  // -- axes ----------------------------------------------------------------------------------------------------------

  axes() {
    const rows = this.model.data.axes.map((axis, k) => h(`div.row.axis${this.app.axis === k ? ".chosen" : ""}`, { onclick: () => this.app.lightAxis(this.app.axis === k ? null : k), "data-axis": axis.name },
      h("div", null, h("span.axisname", null, axis.name), h("span.size", null, axis.size)),
      h("div.where", null, `${axis.kind} · ${plural(axis.places.length, "place")} · ${axis.free ? "free" : axis.reason}`)));
    return [h("p.hint", null, "An axis is one identity wherever it stands. Click one to see everything that carries it."), h("div.rows", null, rows)];
  }

  // -- plan ----------------------------------------------------------------------------------------------------------

  plan() {
    const plan = this.model.data.plan;
    const rows = plan.candidates.map((c) => {
      const times = [];
      if (c.median_seconds) times.push(`${secondsText(c.median_seconds)} measured`);
      if (c.predicted) times.push(`${secondsText(c.predicted[0])} ${c.predicted[3]}`);
      const why = c.why_not ? `left out: ${c.why_not}` : c.scheme === plan.chosen ? plan.reason : c.lost;
      return h(`div.row.change${c.scheme === plan.chosen ? ".chosen" : ""}`, null, h("b", null, c.scheme), h("div", null, times.join("  ·  ")), h("div.where", null, why));
    });
    const crossovers = plan.crossovers.map(([size, before, after]) => `${after} instead of ${before} from ${size} on`);
    return [
      h("p.hint", null, `Batches of ${plan.batch_size} are run by `, h("b", null, plan.chosen), "."), rows,
      crossovers.length ? h("p.note", null, `Over batch sizes: ${crossovers.join("; ")}.`) : null,
      plan.valid_where.length ? h("p.note", null, `The graph holds where ${plan.valid_where.join(" and ")}.`) : null,
      plan.notes.map((note) => h("p.note", null, note)),
    ];
  }

  // -- details -------------------------------------------------------------------------------------------------------

  details(id) {
    const target = document.getElementById("details");
    if (id === null) { target.replaceChildren(...this.overview()); return; }
    const made = id[0] === "o" ? this.operator(this.model.ops[+id.slice(1)]) : id[0] === "s" ? this.savedOne(this.model.data.saved[+id.slice(1)]) : this.group(+(id.match(/\d+/)[0]), id);
    target.replaceChildren(...made.flat(9).filter(Boolean));
    target.scrollTop = 0;
  }

  overview() {
    const { facts, compared } = this.model.data, after = facts.after, before = facts.before;
    const row = (name, key, text) => key in after ? h("tr", null, h("th", null, name), compared ? h("td.num", null, text(before[key])) : null, h("td.num", null, text(after[key])),
      compared ? h("td.num.ratio", null, before[key] ? signed(after[key] / before[key] - 1) : "") : null) : null;
    const terms = Object.entries(after.terms || {}).filter(([, s]) => s > 0).sort((a, b) => b[1] - a[1]);
    return [
      h("h2", null, "The step"),
      h("table.facts", null, compared ? h("thead", null, h("tr", null, h("th"), h("th.num", null, "captured"), h("th.num", null, "after"), h("th"))) : null,
        h("tbody", null, row("operators", "operators", (n) => n.toLocaleString("en")), row("FLOPs", "flops", flopsText), row("kept", "bytes kept", bytesText),
          row("peak memory", "peak bytes", bytesText), row("predicted time", "seconds", secondsText))),
      after.machine ? h("p.hint", null, `Predicted for ${after.machine}, between ${secondsText(after.interval[0])} and ${secondsText(after.interval[1])}.`)
        : h("p.hint", null, "No predicted times: this machine is not calibrated. Run ", h("code", null, "graphopt calibrate"), ", or give show() a machine."),
      terms.length ? [h("h3", null, "Where the time goes"), h("table.facts", null, h("tbody", null, terms.map(([name, s]) => h("tr", null, h("th", null, name), h("td.num", null, secondsText(s)), h("td.num", null, percent(s / after.seconds))))))] : null,
      this.model.data.placements ? [h("h3", null, "Divided"), h("p", null, `The axis ${this.model.data.placements.axis} over ${this.model.data.placements.processors} processors. Each runs this graph on its part; hexagons are collectives.`)] : null,
      h("h3", null, "How to read it"),
      h("ul.key", null,
        h("li", null, h("i.f"), "forward, runs down"), h("li", null, h("i.b"), "backward, runs up beside it"), h("li", null, h("i.s"), "kept for backward between them"), h("li", null, h("i.u"), "update"),
        compared ? h("li", null, h("i.g"), "removed by a pass: click it for the reason") : null, compared ? h("li", null, h("i.n"), "added by a pass") : null),
    ].flat(9).filter(Boolean);
  }

  operator(op) {
    const model = this.model, side = this.model.side(), total = (key) => model.sum(0, side, key) || 1;
    const change = op.why && op.why[1] !== null ? model.data.changes[op.why[1]] : null;
    const link = ([id, sides]) => h(`a.ref${sides === 1 ? ".gone" : ""}`, { href: "#", onclick: (e) => { e.preventDefault(); this.app.goTo(`o${id}`); } }, model.ops[id].n);
    const row = (name, value) => value ? h("tr", null, h("th", null, name), h("td", null, value)) : null;
    const kept = (op.saved || []).filter((s) => op.st === "removed" || s.sides & (side === "before" ? 1 : 2)).reduce((sum, s) => sum + s.bytes, 0);
    return [
      h("h2", null, op.o, h("span.tag", { style: `background:${PHASE_COLOUR[op.c]}` }, PHASE_NAME[op.c]), op.st ? h(`span.tag.${op.st}`, null, op.st) : null),
      h("p.mono", null, `%${op.n}`),
      op.why ? h("div.reason", null, h("b", null, `${op.st === "changed" ? "Narrowed" : "Removed"} by ${words(op.why[0])}`), change ? h("div", null, change.what) : h("div", null, "It went because nothing reads it any more."), change ? h("div.saving", null, savings(change)) : null) : null,
      h("table.facts", null, h("tbody", null,
        row("type", h("span.mono", null, op.t)), row("is", op.in), row("gives", (op.out || []).join(", ")), row("module", op.m), row("source", op.src ? h("span.mono", null, op.src) : null),
        row("on each processor", op.p), row("predicted", op.s ? `${secondsText(op.s)}  (${percent(op.s / total("s"))} of the step)` : null),
        row("FLOPs", op.f ? `${flopsText(op.f)}  (${percent(op.f / total("f"))})` : null), row("bytes moved", op.b ? bytesText(op.b) : null),
        row("kept for backward", kept ? bytesText(kept) : null), row("results", (op.also || []).join(", ")))),
      op.a ? [h("h3", null, "Axes"), h("div.axes", null, op.a.map((k) => h("button.axischip", { onclick: () => this.app.lightAxis(k), "data-axis": model.data.axes[k].name }, model.data.axes[k].name, h("span", null, model.data.axes[k].size))))] : null,
      op.args ? [h("h3", null, "Call"), h("p.mono", null, `${op.o}(${op.args})`)] : null,
      op.was !== undefined ? [h("h3", null, "Before the passes"), h("p.mono", null, `${op.o}(${op.was})`)] : null,
      op.sources.length ? [h("h3", null, "Reads"), h("p.refs", null, op.sources.map(link))] : null,
      op.readers.length ? [h("h3", null, "Read by"), h("p.refs", null, op.readers.map(link))] : null,
    ];
  }

  savedOne(saved) {
    const model = this.model, link = (id) => h("a.ref", { href: "#", onclick: (e) => { e.preventDefault(); this.app.goTo(`o${id}`); } }, model.ops[id].n);
    return [h("h2", null, "Kept for backward", h("span.tag", { style: `background:${COLOUR.saved}` }, bytesText(saved.bytes))),
      saved.sides === 1 ? h("div.reason", null, "After the passes it is not kept any more.") : null,
      h("h3", null, "Made by"), h("p.refs", null, link(saved.op)), h("p.mono", null, model.ops[saved.op].t), h("h3", null, "Read by"), h("p.refs", null, saved.readers.map(link))];
  }

  group(g, id) {
    const model = this.model, group = model.groups[g], side = model.side(), rows = [];
    const inside = model.ops.filter((op) => model.chains[op.g].includes(g) && model.shown(op));
    for (let c = 0; c < 3; c++) {
      const v = model.values[side][g][c];
      if (v.ops) rows.push(h("tr", null, h("th", null, PHASE_NAME[c]), h("td.num", null, v.ops), h("td.num", null, v.s ? secondsText(v.s) : ""), h("td.num", null, flopsText(v.f)), h("td.num", null, bytesText(v.b))));
    }
    const dear = inside.filter((op) => op.s || op.f).sort((a, b) => (b.s || 0) - (a.s || 0) || (b.f || 0) - (a.f || 0)).slice(0, 8);
    const gone = inside.filter((op) => op.st === "removed");
    const kept = model.data.saved.filter((s) => model.chains[model.ops[s.op].g].includes(g) && s.sides & (side === "before" ? 1 : 2)).sort((a, b) => b.bytes - a.bytes).slice(0, 8);
    const link = (op) => h("a.ref", { href: "#", onclick: (e) => { e.preventDefault(); this.app.goTo(`o${op.id}`); } }, op.n);
    return [
      h("h2", null, group.label), group.path ? h("p.mono", null, group.path) : null,
      h("p", null, h("button.action", { onclick: () => this.app.toggle(g) }, model.open.has(g) ? "Close this box" : "Open this box")),
      h("table.facts.wide", null, h("thead", null, h("tr", null, ["", "ops", "predicted", "FLOPs", "moved"].map((t) => h("th.num", null, t)))), h("tbody", null, rows)),
      dear.length ? [h("h3", null, "Takes most"), h("table.facts", null, h("tbody", null, dear.map((op) => h("tr", null, h("td", null, link(op)), h("td.num", null, op.s ? secondsText(op.s) : flopsText(op.f))))))] : null,
      kept.length ? [h("h3", null, "Kept for backward"), h("table.facts", null, h("tbody", null, kept.map((s) => h("tr", null, h("td", null, link(model.ops[s.op])), h("td.num", null, bytesText(s.bytes))))))] : null,
      gone.length ? [h("h3", null, `Removed: ${plural(gone.length, "operator")}`), h("p.refs", null, gone.slice(0, 40).map(link), gone.length > 40 ? ` … and ${gone.length - 40} more` : null)] : null,
    ];
  }
}

const words = (name) => name.replaceAll("_", " ");
const signed = (part) => `${part > 0 ? "+" : part < 0 ? "−" : ""}${Math.abs(100 * part).toFixed(Math.abs(part) < 0.1 ? 1 : 0)} %`;

function savings({ flops, kept, moved }) {
  const parts = [];
  if (flops) parts.push(flopsText(flops));
  if (kept) parts.push(`${bytesText(kept)} kept`);
  if (moved) parts.push(`${bytesText(moved)} moved`);
  return parts.length ? `saves ${parts.join(", ")}` : "";
}
