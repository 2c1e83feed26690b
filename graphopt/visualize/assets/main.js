"use strict";
// What a person does on the page, and what then changes.

let LAYOUT;

class App {
  constructor(data) {
    this.model = new Model(data);
    LAYOUT = this.layout = new Layout(this.model);
    this.measure = data.facts.after.seconds ? "seconds" : "FLOPs";
    this.chosen = null;
    this.axis = null;
    this.canvases = [];
    this.model.openUpTo(40);
    this.panels = new Panels(this);
    this.head();
    this.search = new Search(this);
    this.panes();
    this.tools();
    this.draw();
    this.fit();
    this.panels.list();
    this.panels.details(null);
  }

  // -- drawing -------------------------------------------------------------------------------------------------------

  panes() {
    this.canvases.forEach((c) => c.cy.destroy());
    const both = this.model.view === "both", host = document.getElementById("panes");
    const sides = both ? ["before", "after"] : [null];
    const panes = sides.map((side) => h("div.pane", null, both ? h("div.banner", null, side === "before" ? "as captured" : "after passes") : null, h("div.canvas")));
    host.replaceChildren(...panes);
    const on = {
      tap: (id, event, canvas) => this.tapped(id, event, canvas),
      open: (id) => this.opened(id),
      moved: (canvas) => this.moved(canvas),
    };
    this.canvases = panes.map((pane, k) => new Canvas(pane.querySelector(".canvas"), this.model, sides[k], on));
  }

  draw() {
    const places = this.layout.all();
    for (const canvas of this.canvases) {
      canvas.measure = this.measure;
      canvas.draw(places);
      canvas.choose(this.chosen);
    }
    this.marks();
    this.legend();
  }

  /** The other pane shows the same part. */
  moved(canvas) {
    if (this.following || this.canvases.length < 2) return;
    this.following = true;
    for (const other of this.canvases) if (other !== canvas) other.cy.viewport({ zoom: canvas.cy.zoom(), pan: canvas.cy.pan() });
    this.following = false;
  }

  fit() {
    for (const canvas of this.canvases) {
      canvas.cy.resize();
      canvas.cy.fit(undefined, 30);
      if (canvas.cy.zoom() > 1.1) { canvas.cy.zoom(1.1); canvas.cy.center(); }
      if (canvas.cy.zoom() < 0.45) this.top(canvas.cy); // a long step: begin at its top, readable
    }
  }

  top(cy) {
    const box = cy.elements().boundingBox({ includeLabels: false });
    cy.zoom(Math.min(0.75, (cy.width() - 40) / Math.max(box.w, 1)));
    cy.pan({ x: cy.width() / 2 - cy.zoom() * (box.x1 + box.x2) / 2, y: 50 - cy.zoom() * box.y1 });
  }

  // -- folding -----------------------------------------------------------------------------------------------------

  /** Open or close a box; it stays where it is on the screen. Gives the milliseconds until it was drawn. */
  toggle(g) {
    const start = performance.now(), cy = this.canvases[0].cy;
    const before = cy.getElementById(`b${g}`), at = before.nonempty() ? { ...before.renderedPosition(), h: before.renderedHeight() } : null;
    this.model.toggle(g);
    this.layout.changed(g);
    this.draw();
    const after = cy.getElementById(`b${g}`);
    if (at && after.nonempty()) {
      const now = after.renderedPosition();
      cy.panBy({ x: at.x - now.x, y: at.y - at.h / 2 - (now.y - after.renderedHeight() / 2) });
    }
    this.panels.list();
    if (this.chosen !== null) this.panels.details(this.chosen);
    for (const canvas of this.canvases) canvas.cy.forceRender();
    return performance.now() - start;
  }

  refold(change) {
    change();
    this.layout.clear();
    this.draw();
    this.fit();
    this.panels.list();
  }

  opened(id) {
    if (id[0] === "b") this.toggle(+id.slice(1));
    else if (id[0] === "g") this.toggle(+id.slice(1, -1));
  }

  // -- choosing ------------------------------------------------------------------------------------------------------

  tapped(id, event, canvas) {
    if (id === null || id[0] === "e") { this.choose(null); this.lightAxis(null); return; }
    const node = canvas.cy.getElementById(id);
    if (id[0] === "b") { // the bar with the name opens and closes the box
      const top = node.position("y") - node.height() / 2, bar = event.position.y - top < TITLE;
      const arrow = bar && event.position.x < node.position("x") + node.width() / 2;
      if (arrow && this.chosen === id) { this.toggle(+id.slice(1)); return; }
    }
    this.choose(id);
  }

  choose(id) {
    this.chosen = id;
    for (const canvas of this.canvases) canvas.choose(id);
    this.panels.details(id);
    if (this.panels.tab === "Modules") this.panels.list();
  }

  /** Show an operator ("o12") or a box ("b3"): open what is around it, move there, choose it. */
  goTo(id) {
    const model = this.model, number = +id.slice(1);
    const before = model.open.size;
    if (id[0] === "o") {
      const op = model.ops[number];
      if (op.k === "number" && !model.numbers) this.setNumbers(true);
      if (model.view === "after" && op.st === "removed" && !model.ghosts) this.setGhosts(true);
      if (!model.shown(op)) this.setView("both");
      model.reveal(number);
    } else for (const g of model.chains[number].slice(1)) model.open.add(g);
    if (model.open.size !== before) {
      this.layout.clear();
      this.draw();
      this.panels.list();
    }
    this.choose(id);
    for (const canvas of this.canvases) canvas.centre(id);
  }

  // -- light ---------------------------------------------------------------------------------------------------------

  /** Everything that carries an axis lights up, closed boxes too. */
  lightAxis(k) {
    this.axis = k;
    this.lit = k === null ? null : (op) => op.a && op.a.includes(k);
    this.marks();
    if (this.panels.tab === "Axes") this.panels.list();
  }

  lightChange(k) {
    const change = this.model.data.changes[k];
    const own = (op) => op.why && op.why[1] === k;
    const any = this.model.ops.some(own);
    this.axis = null;
    this.lit = any ? own : (op) => op.m === change.module && op.src === change.source && Boolean(op.st);
    this.showLit();
  }

  lightPlace(module, source) {
    this.axis = null;
    this.lit = (op) => (op.m || "") === module && (op.src || "") === source;
    this.showLit();
  }

  showLit() {
    const first = this.model.ops.find((op) => this.model.shown(op) && this.lit(op));
    if (first) {
      const lit = this.lit;
      this.goTo(`o${first.id}`);
      this.lit = lit;
    }
    this.marks();
  }

  marks() {
    const ids = this.lit ? this.litIds() : null;
    for (const canvas of this.canvases) canvas.light(ids);
  }

  litIds() {
    const closed = this.model.closedGroups(), ids = new Set();
    for (const op of this.model.ops) if (this.model.shown(op) && this.lit(op)) ids.add(this.model.standIn(op, closed));
    return ids;
  }

  // -- what is shown -------------------------------------------------------------------------------------------------

  head() {
    const { title, facts, compared } = this.model.data;
    document.getElementById("title").textContent = title;
    const after = facts.after, before = facts.before || after;
    const pair = (key, text) => (before[key] === after[key] ? text(after[key]) : `${text(before[key])} → ${text(after[key])}`);
    const parts = [`${pair("operators", (n) => n.toLocaleString("en"))} operators`, pair("flops", flopsText), `${pair("bytes kept", bytesText)} kept for backward`];
    if (after.seconds) parts.push(`${pair("seconds", secondsText)} predicted`);
    document.getElementById("facts").textContent = parts.join("   ·   ");
    const measures = [["seconds", "time"], ["FLOPs", "FLOPs"], ["bytes", "bytes"], ["phase", "phase"]];
    this.choice("measures", measures.filter(([key]) => key !== "seconds" || after.seconds), () => this.measure, (key) => this.setMeasure(key));
    const views = [["before", "captured"], ["after", "after passes"], ["both", "side by side"]];
    this.choice("views", compared ? views : [], () => this.model.view, (key) => this.setView(key));
  }

  choice(id, options, current, set) {
    const host = document.getElementById(id);
    const paint = () => host.replaceChildren(...options.map(([key, text]) => h("button", {
      role: "radio", "aria-checked": String(current() === key), "data-key": key, onclick: () => { set(key); paint(); },
    }, text)));
    paint();
    (this.choices ||= []).push(paint);
  }

  setMeasure(key) {
    this.measure = key;
    for (const canvas of this.canvases) { canvas.measure = key; canvas.repaint(); }
    this.legend();
    this.panels.list();
  }

  setView(key) {
    const two = key === "both" || this.model.view === "both";
    this.model.view = key;
    this.model.refresh();
    this.layout.clear();
    if (two) this.panes();
    this.draw();
    if (two) this.fit();
    this.panels.list();
    this.panels.details(this.chosen);
    this.choices.forEach((paint) => paint());
  }

  setGhosts(on) { this.setFlag("ghosts", on); }
  setNumbers(on) { this.setFlag("numbers", on); }
  setFlag(name, on) {
    this.model[name] = on;
    document.querySelector(`#${name} input`).checked = on;
    this.model.refresh();
    this.layout.clear();
    this.draw();
    this.panels.list();
  }

  tools() {
    const on = (id, what) => document.getElementById(id).addEventListener("click", what);
    let depth = 1;
    on("fold", () => { depth = 1; this.refold(() => { this.model.open = new Set([0]); }); });
    on("deeper", () => { depth = Math.min(depth + 1, this.model.maxDepth + 1); this.refold(() => this.model.openDepth(depth)); });
    on("fit", () => { for (const c of this.canvases) { c.cy.resize(); c.cy.fit(undefined, 30); } });
    on("picture", () => this.picture());
    for (const name of ["ghosts", "numbers"]) document.querySelector(`#${name} input`).addEventListener("change", (e) => this.setFlag(name, e.target.checked));
    if (!this.model.data.compared) document.getElementById("ghosts").hidden = true;
    if (!this.model.ops.some((op) => op.k === "number")) document.getElementById("numbers").hidden = true;
    document.addEventListener("keydown", (event) => {
      const typing = event.target.tagName === "INPUT";
      if (event.key === "/" && !typing) { event.preventDefault(); document.getElementById("search").focus(); }
      else if (event.key === "Escape") { this.choose(null); this.lightAxis(null); }
      else if (event.key === "f" && !typing) this.fit();
      else if (event.key === "Enter" && !typing && this.chosen && "bg".includes(this.chosen[0])) this.opened(this.chosen);
    });
    window.addEventListener("resize", () => this.canvases.forEach((c) => c.cy.resize()));
  }

  picture() {
    const link = h("a", { href: this.canvases[this.canvases.length - 1].cy.png({ full: true, scale: 2, bg: "#ffffff", maxWidth: 8000, maxHeight: 8000 }), download: "step.png" });
    link.click();
  }

  legend() {
    const host = document.getElementById("legend");
    if (this.measure === "phase") {
      host.replaceChildren(...PHASE_NAME.map((name, k) => h("span", null, h("i.swatch", { style: `background:${PHASE_FILL[k]};border-color:${PHASE_COLOUR[k]}` }), name)));
      return;
    }
    const ramp = Array.from({ length: 7 }, (_, k) => heat(SMALLEST ** (1 - k / 6)));
    const name = { seconds: "predicted time", FLOPs: "FLOPs", bytes: "bytes moved" }[this.measure];
    host.replaceChildren(h("span", null, `${name}, share of the step`), h("span", null, "0.1 %"), h("i.ramp", { style: `background:linear-gradient(90deg, ${ramp.join(",")})` }), h("span", null, "100 %"));
  }
}

window.graphopt = { app: null, ready: null };
(() => {
  const app = new App(JSON.parse(document.getElementById("data").textContent));
  window.graphopt.app = app;
  requestAnimationFrame(() => requestAnimationFrame(() => {
    window.graphopt.ready = performance.now(); // milliseconds since the page began to load
    document.body.dataset.ready = "true";
  }));
})();
