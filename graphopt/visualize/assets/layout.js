"use strict";
// Where everything stands. Each open group is laid out by dagre on its own and is one box in the group around it, so
// that opening a module moves boxes but lays out that module alone. Forward is the left half of a box and runs down,
// backward the right half and runs up, what is kept for backward stands between them.

const CARD = { w: 148, h: 40 }, CHIP = { w: 78, h: 22 }, GAP = 14, PAD = 14, TITLE = 26;
const CENTRE = CHIP.w + 2 * GAP;

class Layout {
  constructor(model) {
    this.model = model;
    this.cache = new Map();
  }

  clear() { this.cache.clear(); }

  /** The group's box was opened or closed: all boxes around it change their size. */
  changed(g) { for (const one of this.model.chains[g]) this.cache.delete(one); }

  /** Absolute positions: {boxes: [{g, x, y, w, h}], places: Map(element -> {x, y}), routes: Map(pair -> points)}. */
  all() {
    const found = { boxes: [], places: new Map(), routes: new Map(), size: null };
    const root = this.box(0);
    found.size = root;
    this.place(0, root, 0, 0, found);
    return found;
  }

  place(g, box, x, y, found) {
    if (g !== 0) found.boxes.push({ g, x, y, w: box.w, h: box.h });
    for (const [id, at] of box.items) found.places.set(id, { x: x + at.x, y: y + at.y });
    for (const [pair, points] of box.routes) found.routes.set(pair, points.map((p) => ({ x: x + p.x, y: y + p.y })));
    for (const [child, at] of box.children) this.place(child, this.box(child), x + at.x, y + at.y, found);
  }

  /** Size of a group's box, and where its content stands relative to its centre. */
  box(g) {
    if (!this.cache.has(g)) this.cache.set(g, this.make(g));
    return this.cache.get(g);
  }

  make(g) {
    const model = this.model;
    if (!model.open.has(g)) return model.sums[g][UPDATE].shown ? this.closedUpdate(g) : this.closed(g);
    if (model.childrenOf(g).length) return g === 0 ? this.root(g) : this.level(g, model.childrenOf(g));
    return this.leaf(g);
  }

  closed(g) {
    const [forward, backward] = this.model.sums[g];
    const items = new Map(), y = TITLE / 2, dx = (CARD.w + CENTRE) / 2;
    if (forward.shown) items.set(`g${g}F`, { x: -dx, y });
    if (backward.shown) items.set(`g${g}B`, { x: dx, y });
    if (this.savedShown(g)) items.set(`g${g}S`, { x: 0, y });
    return this.boxed({ w: 2 * CARD.w + CENTRE, h: CARD.h, items });
  }

  closedUpdate(g) {
    return this.boxed({ w: CARD.w, h: CARD.h, items: new Map([[`g${g}U`, { x: 0, y: TITLE / 2 }]]) });
  }

  savedShown(g) {
    const { after, before } = this.model.savedBytes[g];
    return this.model.view === "before" ? before > 0 : after > 0 || (before > 0 && (this.model.sideFlag() & 1) > 0);
  }

  boxed({ w, h, items = new Map(), children = new Map(), routes = new Map() }) {
    return { w: w + 2 * PAD, h: h + TITLE + PAD + 4, items, children, routes };
  }

  /** Groups one below the other, as their operators follow each other. */
  level(g, children) {
    const nodes = children.map((c) => ({ id: `g${c}`, ...this.size(c) }));
    const laid = this.dagre(nodes, this.model.orders()[g].values(), "TB", 34, 30);
    const below = { x: 0, y: TITLE / 2 - PAD / 4 };
    const found = { w: laid.w, h: laid.h, items: new Map(), children: new Map(), routes: new Map() };
    for (const c of children) {
      const at = laid.at.get(`g${c}`);
      found.children.set(c, { x: at.x + below.x, y: at.y + below.y });
    }
    for (const [pair, points] of laid.routes) found.routes.set(pair, points.map((p) => ({ x: p.x + below.x, y: p.y + below.y })));
    return this.boxed(found);
  }

  size(c) { const { w, h } = this.box(c); return { w, h }; }

  /** The whole step: what the model computes, and the update beside it. */
  root(g) {
    const children = this.model.childrenOf(g);
    const updates = children.filter((c) => this.model.groups[c].kind === "update");
    const found = this.level(g, children.filter((c) => !updates.includes(c)));
    let right = found.w / 2 + 90;
    for (const c of updates) {
      const box = this.box(c);
      found.children.set(c, { x: right + box.w / 2, y: -found.h / 2 + box.h / 2 + TITLE });
      right += box.w + 40;
    }
    return found;
  }

  /** Operators in two columns, forward down and backward up. */
  leaf(g) {
    const model = this.model;
    const columns = [[], [], []];
    for (const id of model.opsOf(g)) columns[model.ops[id].c].push(id);
    const laid = columns.map((ids, c) => {
      const inside = new Set(ids.map((id) => `o${id}`));
      const edges = [...model.orders()[g].values()].filter(([a, b]) => inside.has(a) && inside.has(b));
      return this.dagre(ids.map((id) => ({ id: `o${id}`, ...this.opSize(id) })), edges, c === BACKWARD ? "BT" : "TB", 16, 22);
    });
    const chips = model.groups[g].saved.filter((s) => this.chipShown(model.data.saved[s]));
    const items = new Map(), routes = new Map(), top = TITLE / 2 - PAD / 4;
    const half = Math.max(laid[FORWARD].w, laid[BACKWARD].w);
    const two = laid[FORWARD].w > 0 && laid[BACKWARD].w > 0 || chips.length > 0;
    const centre = two ? CENTRE : 0;
    const shift = [two ? -(half + centre) / 2 : 0, two ? (half + centre) / 2 : 0, 0];
    laid.forEach((one, c) => {
      for (const [id, at] of one.at) items.set(id, { x: at.x + shift[c], y: at.y + top });
      for (const [pair, points] of one.routes) routes.set(pair, points.map((p) => ({ x: p.x + shift[c], y: p.y + top })));
    });
    let height = Math.max(...laid.map((one) => one.h));
    const wanted = chips.map((s) => [s, items.get(`o${model.data.saved[s].op}`)?.y ?? 0]).sort((a, b) => a[1] - b[1]);
    let y = -Infinity;
    for (const [s, at] of wanted) {
      y = Math.max(at, y + CHIP.h + 6);
      items.set(`s${s}`, { x: 0, y });
    }
    if (y > -Infinity) height = Math.max(height, 2 * (y - top) + CHIP.h);
    return this.boxed({ w: two ? 2 * half + centre : Math.max(half, laid[UPDATE].w, CARD.w), h: height, items, routes });
  }

  chipShown(saved) {
    const sides = this.model.sideFlag();
    return Boolean(saved.sides & sides) && this.model.shown(this.model.ops[saved.op]);
  }

  opSize(id) {
    const op = this.model.ops[id];
    if (op.k === "input" || op.k === "constant") return { w: Math.max(60, 6.2 * shorten(op.n, 22).length + 18), h: 22 };
    const longest = Math.max(7.2 * shorten(op.o, 26).length, 6 * shorten(op.t, 30).length);
    return { w: Math.max(70, longest + (op.k === "collective" ? 64 : 18)), h: 38 };
  }

  /** dagre on one level: centres of the nodes around (0, 0), and the bends of edges that pass others. */
  dagre(nodes, edges, rankdir, nodesep, ranksep) {
    const found = { w: 0, h: 0, at: new Map(), routes: new Map() };
    if (!nodes.length) return found;
    const graph = new dagre.graphlib.Graph();
    const ranker = nodes.length > 40 ? "tight-tree" : "network-simplex";
    graph.setGraph({ rankdir, nodesep, ranksep, ranker, marginx: 0, marginy: 0 });
    for (const node of nodes) graph.setNode(node.id, { width: node.w, height: node.h });
    for (const [from, to] of edges) if (graph.hasNode(from) && graph.hasNode(to)) graph.setEdge(from, to, {});
    dagre.layout(graph);
    const { width, height } = graph.graph();
    found.w = width;
    found.h = height;
    const about = (p) => ({ x: p.x - width / 2, y: p.y - height / 2 });
    for (const node of nodes) found.at.set(node.id, about(graph.node(node.id)));
    for (const edge of graph.edges()) {
      const points = graph.edge(edge).points;
      if (points.length > 3) found.routes.set(`${edge.v}>${edge.w}`, points.slice(1, -1).map(about));
    }
    return found;
  }
}

function shorten(text, most) { return text.length <= most ? text : text.slice(0, most - 1) + "…"; }
