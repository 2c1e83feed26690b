"use strict";
// One picture of the model in Cytoscape. Two of them stand side by side for before and after.

const FONT = 'Inter, "Segoe UI", system-ui, "Helvetica Neue", Arial, sans-serif';
const MONO = 'ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace';

const STYLE = [
  { selector: "core", style: { "active-bg-opacity": 0, "selection-box-opacity": 0 } },
  { selector: "*", style: { "z-index-compare": "manual" } },
  {
    selector: "node",
    style: {
      shape: "round-rectangle", "corner-radius": 5, width: "data(w)", height: "data(h)", "z-index": "data(z)",
      label: "data(label)", "text-wrap": "wrap", "text-valign": "center", "text-halign": "center", "font-family": FONT,
      "font-size": 11, "line-height": 1.2, color: "data(ink)", "background-color": "data(fill)", "border-width": 1.4,
      "border-color": "data(rim)", "min-zoomed-font-size": 5, "overlay-opacity": 0,
    },
  },
  {
    selector: "node.box",
    style: {
      shape: "round-rectangle", "corner-radius": 8, "text-valign": "top", "text-margin-y": 21, "font-size": 13, "font-weight": 600,
      "border-width": 1, "background-opacity": 1, "text-wrap": "ellipsis", "text-max-width": "data(room)", "min-zoomed-font-size": 4,
    },
  },
  { selector: "node.op", style: { "font-family": MONO, "font-size": 10.5 } },
  { selector: "node.view", style: { "border-style": "dashed", "border-width": 1 } },
  { selector: "node.number", style: { "border-style": "dotted", "border-width": 1, "font-style": "italic" } },
  { selector: "node.given", style: { "corner-radius": 11, "font-family": MONO, "font-size": 9.5, "border-width": 1 } },
  { selector: "node.chip", style: { "corner-radius": 11, "font-size": 10, "border-width": 1.2 } },
  { selector: "node.collective", style: { shape: "hexagon", "border-width": 2.5 } },
  { selector: "node.added", style: { "border-width": 3, "border-color": COLOUR.added } },
  { selector: "node.changed", style: { "border-style": "double", "border-width": 4 } },
  {
    selector: "node.ghost",
    style: { "background-opacity": 0.25, "border-style": "dashed", "border-color": COLOUR.ghost, "border-width": 1.4, color: COLOUR.ghost, "text-opacity": 0.85 },
  },
  {
    selector: "edge",
    style: {
      width: "data(width)", "line-color": "data(rim)", "target-arrow-color": "data(rim)", "target-arrow-shape": "triangle", "arrow-scale": 0.75,
      "curve-style": "straight", opacity: 0.75, "z-index": 50, "overlay-opacity": 0,
    },
  },
  { selector: "edge.bent", style: { "curve-style": "round-segments", "segment-weights": "data(weights)", "segment-distances": "data(distances)", "segment-radii": 14, "edge-distances": "node-position" } },
  { selector: "edge.saved", style: { "line-style": "dashed", "line-dash-pattern": [5, 3] } },
  { selector: "edge.far", style: { opacity: 0, events: "no" } },
  { selector: "edge.given", style: { opacity: 0.4 } },
  { selector: "edge.ghost", style: { "line-style": "dotted", "line-color": COLOUR.ghost, "target-arrow-color": COLOUR.ghost, opacity: 0.45 } },
  { selector: "node.dim", style: { opacity: 0.22 } },
  { selector: "edge.dim", style: { opacity: 0.1 } },
  { selector: "node.lit", style: { "border-color": COLOUR.axis, "border-width": 4, "underlay-color": COLOUR.axis, "underlay-opacity": 0.28, "underlay-padding": 5 } },
  { selector: "edge.near", style: { opacity: 1, width: 2.6, "z-index": 150 } },
  { selector: "node.chosen", style: { "border-color": COLOUR.ink, "border-width": 3.5, "underlay-color": COLOUR.ink, "underlay-opacity": 0.12, "underlay-padding": 6 } },
  { selector: "node.box.chosen", style: { "border-width": 2, "underlay-opacity": 0 } },
];

class Canvas {
  /** side: which graph it shows, "before" or "after"; null: the one that the model's view says. */
  constructor(element, model, side, on) {
    this.model = model;
    this.side = side;
    this.measure = "phase";
    this.cy = cytoscape({
      container: element, style: STYLE, minZoom: 0.03, maxZoom: 3, autoungrabify: true, boxSelectionEnabled: false,
      hideEdgesOnViewport: false, textureOnViewport: false, pixelRatio: "auto",
    });
    this.cy.on("tap", (event) => on.tap(event.target === this.cy ? null : event.target.id(), event, this));
    this.cy.on("dbltap", "node", (event) => on.open(event.target.id(), this));
    this.cy.on("viewport", () => on.moved(this));
  }

  showsSide() { return this.side || (this.model.view === "before" ? "before" : "after"); }

  /** Whether an operator is drawn as one that is gone; null where it is not drawn at all. */
  ghost(op) {
    if (this.showsSide() === "before") return op.st === "added" ? null : false;
    if (op.st === "removed") return this.model.ghosts ? true : null;
    return false;
  }

  draw(places) {
    const cy = this.cy, elements = this.elements(places);
    cy.startBatch();
    cy.elements().remove();
    cy.add(elements);
    cy.endBatch();
  }

  // -- elements ----------------------------------------------------------------------------------------------------

  elements({ boxes, places, routes }) {
    const model = this.model, found = [], drawn = new Map();
    const node = (id, at, data, classes) => {
      drawn.set(id, at);
      found.push({ group: "nodes", data: { id, ...data }, position: { x: at.x, y: at.y }, classes });
    };
    for (const box of boxes) {
      const g = model.groups[box.g], open = model.open.has(box.g);
      const depth = model.chains[box.g].length;
      const fill = open ? (depth % 2 ? "#f6f8fa" : "#ffffff") : "#ffffff";
      const mark = open ? "▾" : "▸";
      node(`b${box.g}`, box, { w: box.w, h: box.h, z: depth, label: `${mark} ${g.label}`, fill, rim: open ? "#b9c2ce" : "#d3d9e1", ink: "#39424f", room: box.w - 24 }, "box");
    }
    for (const [id, at] of places) {
      if (id[0] === "o") this.operator(model.ops[+id.slice(1)], at, node);
      else if (id[0] === "s") this.chip(id, model.data.saved[+id.slice(1)], at, node);
      else this.card(id, at, node);
    }
    this.edges(found, drawn, routes);
    return found;
  }

  operator(op, at, node) {
    const ghost = this.ghost(op);
    if (ghost === null) return;
    const size = LAYOUT.opSize(op.id), given = op.k === "input" || op.k === "constant";
    const label = given ? shorten(op.n, 22) : `${shorten(op.o, 26)}\n${shorten(op.t, 30)}`;
    const { fill, ink } = this.paint(op.c, this.value(op), given || op.k === "number");
    const classes = [given ? "given" : "op", op.k];
    if (ghost) classes.push("ghost");
    else if (op.st && op.st !== "removed" && this.showsSide() === "after") classes.push(op.st);
    const rim = op.k === "collective" ? COLOUR.collective : given ? COLOUR.faint : PHASE_COLOUR[op.c];
    node(`o${op.id}`, at, { w: size.w, h: size.h, z: 200, label, fill, ink, rim }, classes.join(" "));
  }

  chip(id, saved, at, node) {
    const now = saved.sides & (this.showsSide() === "before" ? 1 : 2);
    if (!now && !this.model.ghosts && this.showsSide() === "after") return;
    if (!now && this.showsSide() === "before") return;
    node(id, at, { w: CHIP.w, h: CHIP.h, z: 200, label: bytesText(saved.bytes), fill: "#e3f3ec", ink: "#1f5c48", rim: COLOUR.saved }, now ? "chip" : "chip ghost");
  }

  card(id, at, node) {
    const model = this.model, g = +id.slice(1, -1), part = id.slice(-1);
    if (part === "S") {
      const bytes = model.savedBytes[g], now = bytes[this.showsSide()];
      const gone = this.showsSide() === "after" && bytes.before > now && model.data.compared;
      if (!now && !(gone && model.ghosts)) return;
      const label = now ? bytesText(now) : bytesText(bytes.before);
      node(id, at, { w: CHIP.w, h: CHIP.h, z: 200, label, fill: "#e3f3ec", ink: "#1f5c48", rim: COLOUR.saved }, now ? "chip" : "chip ghost");
      return;
    }
    const column = "FBU".indexOf(part), sum = model.sums[g][column];
    const before = this.showsSide() === "before";
    const gone = before ? 0 : sum.removed, left = sum.shown - (before ? sum.added : sum.removed);
    const count = plural(model.values[this.showsSide()][g][column].ops, "op");
    if (left === 0 && !(gone && model.ghosts)) return;
    const value = this.sumOf(g, column);
    const { fill, ink } = this.paint(column, value, false);
    const inputs = model.values[this.showsSide()][g][column].ops === 0 && left > 0;
    const head = inputs ? plural(left, "input") : this.measure === "phase" ? `${PHASE_NAME[column]} · ${count}` : [measureText(this.measure, value), percent(value / this.totalOf())].filter(Boolean).join(" · ");
    const marks = [];
    if (gone && model.ghosts) marks.push([`−${gone}`, "removed"]);
    if (sum.added && !before) marks.push([`+${sum.added}`, "added"]);
    if (sum.changed && !before) marks.push([`~${sum.changed}`, "changed"]);
    const second = marks.length ? marks.map(([n, word]) => (marks.length < 3 ? `${n} ${word}` : n)).join("  ") : inputs || this.measure === "phase" ? "" : `${PHASE_NAME[column]} · ${count}`;
    const ghost = left === 0;
    node(id, at, { w: CARD.w, h: CARD.h, z: 200, label: ghost ? `${PHASE_NAME[column]}\n−${gone} removed` : second ? `${head}\n${second}` : head, fill, ink, rim: PHASE_COLOUR[column] }, ghost ? "card ghost" : "card");
  }

  /** The value of the chosen measure of an operator, and of a column of a group. */
  value(op) { return this.measure === "phase" ? 0 : op[MEASURES[this.measure]] || 0; }
  sumOf(g, column) { return this.measure === "phase" ? 0 : this.model.values[this.showsSide()][g][column][MEASURES[this.measure]]; }

  /** What a full share is: all of the step; side by side that of the captured one, so that both have one scale. */
  totalOf() {
    if (this.measure === "phase") return 1;
    return this.model.sum(0, this.side ? "before" : this.showsSide(), MEASURES[this.measure]) || 1;
  }

  paint(column, value, plain) {
    if (plain) return { fill: "#f3f5f8", ink: "#39424f" };
    if (this.measure === "phase") return { fill: PHASE_FILL[column], ink: COLOUR.ink };
    const fill = heat(value / this.totalOf());
    return { fill, ink: inkOn(fill) };
  }

  // -- edges ---------------------------------------------------------------------------------------------------------

  edges(found, drawn, routes) {
    const model = this.model, closed = model.closedGroups(), merged = new Map();
    const flagOf = this.showsSide() === "before" ? 1 : 2;
    const add = (source, target, kind, alive) => {
      if (source === target || !drawn.has(source) || !drawn.has(target)) return;
      const key = `${source}>${target}>${kind}`;
      const known = merged.get(key);
      if (known) { known.count += 1; known.alive = known.alive || alive; } else merged.set(key, { source, target, kind, alive, count: 1 });
    };
    for (const [a, b, sides] of model.data.edges) {
      const source = model.ops[a], reader = model.ops[b];
      if (!model.shown(source) || !model.shown(reader)) continue;
      const alive = Boolean(sides & flagOf);
      if (!alive && (this.showsSide() === "before" || !model.ghosts)) continue;
      const kind = model.edgeKind(source, reader);
      if (kind === "saved" && source.saved) continue; // drawn through its chip
      add(model.standIn(source, closed), model.standIn(reader, closed), kind, alive);
    }
    for (const saved of model.data.saved) {
      const op = model.ops[saved.op], alive = Boolean(saved.sides & flagOf);
      if (!alive && (this.showsSide() === "before" || !model.ghosts)) continue;
      const g = closed[op.g], chip = g < 0 ? `s${saved.id}` : `g${g}S`;
      add(model.standIn(op, closed), chip, "saved", alive);
      for (const r of saved.readers) if (model.shown(model.ops[r])) add(chip, model.standIn(model.ops[r], closed), "saved", alive);
    }
    for (const [id, edge] of merged) this.edge(id, edge, routes, drawn, found);
  }

  edge(id, { source, target, kind, alive, count }, routes, drawn, found) {
    const rim = { flow: "#7f9fc4", grad: "#d39a80", given: "#bcc4ce", far: "#bcc4ce", saved: "#6fb59c", update: "#a79cd0" }[kind];
    const data = { id: `e${id}`, source, target, rim, width: Math.min(1.2 + 0.5 * Math.log2(count), 4), count };
    const classes = [kind];
    if (kind === "update") classes.push("far");
    if (!alive) classes.push("ghost");
    const points = this.route(source, target, kind, routes);
    if (points) {
      classes.push("bent");
      Object.assign(data, bends(points, drawn.get(source), drawn.get(target)));
    }
    found.push({ group: "edges", data, classes: classes.join(" ") });
  }

  /** The bends of an edge that dagre led around others, on the level where its ends stand side by side. */
  route(source, target, kind, routes) {
    if (kind !== "flow" && kind !== "grad") return null;
    const direct = routes.get(`${source}>${target}`);
    if (direct) return direct;
    const up = this.chainOf(source), down = this.chainOf(target);
    let i = up.length - 1, j = down.length - 1;
    while (i > 0 && j > 0 && up[i - 1] === down[j - 1]) { i--; j--; }
    if (i === 0 || j === 0) return null;
    const [from, to] = kind === "grad" ? [down[j - 1], up[i - 1]] : [up[i - 1], down[j - 1]];
    const points = routes.get(`g${from}>g${to}`);
    if (!points) return null;
    const dx = kind === "grad" ? 7 : -7;
    const moved = points.map((p) => ({ x: p.x + dx, y: p.y }));
    return kind === "grad" ? moved.reverse() : moved;
  }

  chainOf(id) {
    const model = this.model;
    return id[0] === "o" ? model.chains[model.ops[+id.slice(1)].g] : model.chains[+id.slice(1, -1)];
  }

  // -- marks ---------------------------------------------------------------------------------------------------------

  /** Light up some elements and dim the others; null takes the light away. */
  light(ids) {
    const cy = this.cy;
    cy.batch(() => {
      cy.elements().removeClass("lit dim");
      if (ids === null) return;
      for (const node of cy.nodes()) {
        if (ids.has(node.id())) node.addClass("lit");
        else if (!node.hasClass("box")) node.addClass("dim");
      }
      cy.edges().addClass("dim");
    });
  }

  choose(id) {
    const cy = this.cy;
    cy.batch(() => {
      cy.elements().removeClass("chosen near");
      const node = id === null ? cy.collection() : cy.getElementById(id);
      if (node.empty()) return;
      node.addClass("chosen");
      node.connectedEdges().removeClass("far").addClass("near");
    });
  }

  repaint() {
    this.cy.batch(() => {
      for (const node of this.cy.nodes()) {
        const id = node.id();
        const made = [];
        const keep = (_, __, data) => made.push(data);
        if (id[0] === "o") this.operator(this.model.ops[+id.slice(1)], {}, keep);
        else if (id[0] === "g" && !id.endsWith("S")) this.card(id, {}, keep);
        if (made.length) node.data(made[0]);
      }
    });
  }

  centre(id) {
    const node = this.cy.getElementById(id);
    if (node.empty()) return;
    this.cy.zoom(Math.max(this.cy.zoom(), 0.8));
    this.cy.center(node);
  }
}

function plural(count, word) { return `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`; }

/** Cytoscape wants bends relative to the line between the ends: a weight along it and a distance from it. */
function bends(points, s, t) {
  const dx = t.x - s.x, dy = t.y - s.y, length = Math.hypot(dx, dy) || 1;
  return {
    weights: points.map((p) => ((p.x - s.x) * dx + (p.y - s.y) * dy) / length ** 2),
    distances: points.map((p) => (-(p.x - s.x) * dy + (p.y - s.y) * dx) / length),
  };
}
