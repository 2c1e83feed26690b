"use strict";
// Search by name: operators, modules, source files.

class Search {
  constructor(app) {
    this.app = app;
    this.input = document.getElementById("search");
    this.hits = document.getElementById("hits");
    this.at = 0;
    this.input.addEventListener("input", () => this.find());
    this.input.addEventListener("focus", () => this.find());
    this.input.addEventListener("blur", () => setTimeout(() => { this.hits.hidden = true; }, 150));
    this.input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && this.found.length) this.take(this.found[this.at]);
      else if (event.key === "ArrowDown") this.move(1);
      else if (event.key === "ArrowUp") this.move(-1);
    });
  }

  /** Best first: the name itself, then names that begin so, then modules, then anything that holds the words. */
  find() {
    const wanted = this.input.value.trim().toLowerCase().replace(/^%/, "");
    const model = this.app.model, scored = [];
    if (wanted) {
      for (const g of model.groups) if (g.id && g.kind === "module" && g.path.toLowerCase().includes(wanted)) scored.push([g.path.toLowerCase() === wanted ? 0 : 2, `b${g.id}`, g.path, "module"]);
      for (const op of model.ops) {
        const names = [op.n, ...(op.also || [])].map((n) => n.toLowerCase());
        const rank = names.includes(wanted) ? 0 : names.some((n) => n.startsWith(wanted)) || op.o.toLowerCase().startsWith(wanted) ? 1
          : [...names, op.o, op.m || "", op.src || "", op.in || "", ...(op.out || [])].some((t) => t.toLowerCase().includes(wanted)) ? 3 : -1;
        if (rank >= 0) scored.push([rank, `o${op.id}`, op.n, [op.o, op.m, op.src].filter(Boolean).join("  ·  ")]);
      }
    }
    scored.sort((a, b) => a[0] - b[0]);
    this.found = scored.slice(0, 40);
    this.at = 0;
    this.paint(scored.length);
  }

  move(by) {
    this.at = Math.min(Math.max(this.at + by, 0), this.found.length - 1);
    this.paint();
  }

  paint(count) {
    if (count !== undefined) this.count = count;
    this.hits.hidden = !this.found.length;
    this.hits.replaceChildren(...this.found.map((hit, k) => h(`div.hit${k === this.at ? ".at" : ""}`, { onmousedown: (e) => { e.preventDefault(); this.take(hit); } }, h("b", null, hit[2]), h("span", null, hit[3]))),
      ...(this.count > this.found.length ? [h("div.more", null, `and ${this.count - this.found.length} more`)] : []));
  }

  take([, id]) {
    this.hits.hidden = true;
    this.input.blur();
    this.app.goTo(id);
  }
}
