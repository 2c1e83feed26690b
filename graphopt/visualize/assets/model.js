"use strict";
// The graph of the page, what is folded, and what that makes visible. No drawing here.

const FORWARD = 0, BACKWARD = 1, UPDATE = 2;
const MEASURES = { seconds: "s", FLOPs: "f", bytes: "b" };

class Model {
  constructor(data) {
    this.data = data;
    this.ops = data.ops;
    this.groups = data.groups.map((row, id) => ({ ...row, id, children: [], ops: [], saved: [] }));
    this.open = new Set([0]);
    this.view = "after"; // which side: before, after or both
    this.ghosts = true;
    this.numbers = false; // whether arithmetic on sizes is drawn
    this.groups.forEach((g) => g.parent >= 0 && this.groups[g.parent].children.push(g.id));
    this.ops.forEach((op, id) => {
      op.id = id;
      op.readers = [];
      op.sources = [];
      this.groups[op.g].ops.push(id);
    });
    for (const [a, b, sides] of data.edges) {
      this.ops[a].readers.push([b, sides]);
      this.ops[b].sources.push([a, sides]);
    }
    data.saved.forEach((s, id) => {
      s.id = id;
      (this.ops[s.op].saved ??= []).push(s); // several results have storages of their own
      this.groups[this.ops[s.op].g].saved.push(id);
    });
    this.chains = this.groups.map((g) => this.chain(g.id));
    this.maxDepth = Math.max(...this.chains.map((c) => c.length - 1));
    this.refresh();
  }

  // -- sides: before, after, both ------------------------------------------------------------------------------------

  inBefore(op) { return op.st !== "added"; }
  inAfter(op) { return op.st !== "removed"; }

  /** Whether an operator has a place in the picture. */
  shown(op) {
    if (op.k === "number" && !this.numbers) return false;
    if (this.view === "before") return this.inBefore(op);
    return this.view === "both" || this.inAfter(op) || this.ghosts;
  }

  sideFlag() { return this.view === "before" ? 1 : this.view === "both" || this.ghosts ? 3 : 2; }

  /** Sums of each group by column, for what is shown. Called when the side changes. */
  refresh() {
    const zeros = (make) => this.groups.map(() => [0, 1, 2].map(make));
    this.sums = zeros(() => ({ shown: 0, removed: 0, added: 0, changed: 0 }));
    this.values = { before: zeros(noFigures), after: zeros(noFigures) };
    this.savedBytes = this.groups.map(() => ({ after: 0, before: 0 }));
    for (const op of this.ops) {
      if (!this.shown(op)) continue;
      for (const g of this.chains[op.g]) {
        const sum = this.sums[g][op.c];
        sum.shown += 1;
        if (op.st) sum[op.st] += 1;
        if (op.k === "input" || op.k === "constant") continue;
        if (this.inBefore(op)) addFigures(this.values.before[g][op.c], op);
        if (this.inAfter(op)) addFigures(this.values.after[g][op.c], op);
      }
    }
    for (const saved of this.data.saved) {
      for (const g of this.chains[this.ops[saved.op].g]) {
        if (saved.sides & 2) this.savedBytes[g].after += saved.bytes;
        if (saved.sides & 1) this.savedBytes[g].before += saved.bytes;
      }
    }
    this.levelEdges = null;
  }

  /** A measure of a group on one side: the sum over its columns. */
  sum(g, side, key) { return this.values[side][g].reduce((sum, column) => sum + column[key], 0); }

  /** The side that figures are of. */
  side() { return this.view === "before" ? "before" : "after"; }

  /** Groups that have something to draw, of one parent. */
  childrenOf(g) { return this.groups[g].children.filter((c) => this.count(c) > 0); }
  count(g) { return this.sums[g].reduce((sum, column) => sum + column.shown, 0); }
  opsOf(g) { return this.groups[g].ops.filter((id) => this.shown(this.ops[id])); }

  // -- folding -----------------------------------------------------------------------------------------------------

  chain(g) { // from the group up to the root
    const found = [];
    for (let at = g; at >= 0; at = this.groups[at].parent) found.push(at);
    return found;
  }

  /** The outermost closed group around (and with) a group; -1 if all are open. */
  closedAround(g) {
    const chain = this.chains[g];
    for (let i = chain.length - 1; i >= 0; i--) if (!this.open.has(chain[i])) return chain[i];
    return -1;
  }

  toggle(g) {
    if (this.open.has(g) && g !== 0) this.open.delete(g);
    else this.open.add(g);
  }

  /** Open the groups around an operator. */
  reveal(op) { for (const g of this.chains[this.ops[op].g]) this.open.add(g); }

  /** Open groups from above, breadth first, as long as no more than `most` boxes become visible. */
  openUpTo(most) {
    this.open = new Set([0]);
    let level = [0], visible = this.childrenOf(0).length;
    while (level.length) {
      const next = [];
      for (const g of level) for (const c of this.childrenOf(g)) next.push(c);
      const openable = next.filter((c) => this.groups[c].kind !== "update" && this.childrenOf(c).length);
      const more = openable.reduce((sum, c) => sum + this.childrenOf(c).length, 0);
      if (visible + more > most) return;
      openable.forEach((c) => this.open.add(c));
      visible += more;
      level = next;
    }
  }

  openDepth(depth) {
    this.open = new Set([0]);
    for (const g of this.groups) if (this.chains[g.id].length - 1 < depth) this.open.add(g.id);
  }

  // -- edges ---------------------------------------------------------------------------------------------------------

  /** What an edge of the graph is: flow (forward), grad (backward), given (of an input), saved or update. */
  edgeKind(a, b) {
    if (a.k === "input" || a.k === "constant") return a.c === b.c ? "given" : "far";
    if (b.c === UPDATE || a.c === UPDATE) return a.c === b.c ? "flow" : "update";
    if (a.c === FORWARD) return b.c === FORWARD ? "flow" : "saved";
    return b.c === BACKWARD ? "grad" : "flow";
  }

  /** For each open group, which of its entries (groups or operators) follow each other; backward turned round. */
  orders() {
    if (this.levelEdges) return this.levelEdges;
    const found = this.groups.map(() => new Map()), backward = this.groups.map(() => new Map()), given = new Set();
    const sides = this.sideFlag();
    for (const [a, b, flag] of this.data.edges) {
      const source = this.ops[a], reader = this.ops[b];
      if (!(flag & sides) || !this.shown(source) || !this.shown(reader)) continue;
      const kind = this.edgeKind(source, reader);
      if (kind === "saved" || kind === "far" || kind === "update") continue;
      const up = this.chains[source.g], down = this.chains[reader.g];
      let i = up.length - 1, j = down.length - 1;
      while (i > 0 && j > 0 && up[i - 1] === down[j - 1]) { i--; j--; }
      const level = up[i];
      let from = i > 0 ? `g${up[i - 1]}` : `o${a}`, to = j > 0 ? `g${down[j - 1]}` : `o${b}`;
      if (i === 0 && j === 0) { from = `o${a}`; to = `o${b}`; }
      if (from === to) continue;
      if (kind === "grad" && (i || j)) backward[level].set(`${to}>${from}`, [to, from]);
      else if (kind !== "given") found[level].set(`${from}>${to}`, [from, to]);
      else if (!given.has(from)) { // an input stands above its first reader
        given.add(from);
        found[level].set(`${from}>${to}`, [from, to]);
      }
    }
    backward.forEach((edges, level) => { // only where forward says nothing: its order is the one that people know
      const ordered = new Set([...found[level].values()].flat());
      for (const [key, edge] of edges) if (!ordered.has(edge[0]) || !ordered.has(edge[1])) found[level].set(key, edge);
    });
    return (this.levelEdges = found);
  }

  /** The element that stands for an operator now: itself, or the card of a closed group. */
  standIn(op, closed) {
    const g = closed[op.g];
    return g < 0 ? `o${op.id}` : `g${g}${"FBU"[op.c]}`;
  }

  closedGroups() {
    const closed = new Array(this.groups.length);
    for (const g of this.groups) { // parents come before their children
      const above = g.parent >= 0 ? closed[g.parent] : -1;
      closed[g.id] = above >= 0 ? above : this.open.has(g.id) ? -1 : g.id;
    }
    return closed;
  }
}

const noFigures = () => ({ s: 0, f: 0, b: 0, ops: 0 });

function addFigures(sum, op) {
  sum.s += op.s || 0;
  sum.f += op.f || 0;
  sum.b += op.b || 0;
  sum.ops += 1;
}
