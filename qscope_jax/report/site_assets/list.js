// The list of what was found: only the rows in sight are elements.

class FeatureList {
  constructor(box, rows, index) {
    this.box = box;
    this.rows = rows;
    this.index = index;
    this.found = [];
    this.selected = null; // a place in the index
    this.fresh = true; // whether what was found is new since something was selected
    this.height = parseFloat(getComputedStyle(box).getPropertyValue("--row"));
    box.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(box);
  }

  show(found) {
    this.found = found;
    this.fresh = true;
    this.rows.style.height = `${found.length * this.height}px`;
    this.box.scrollTop = 0;
    this.draw();
  }

  // Select a feature, or none: then the one selected before stays in sight.
  select(place) {
    this.reveal(place ?? this.selected);
    this.selected = place;
    this.fresh = false;
    this.draw();
  }

  // The place `steps` below the selected one, within bounds; counted from above the first where what was found is new.
  neighbour(steps) {
    const from = this.fresh ? -1 : this.found.indexOf(this.selected);
    return this.found[Math.min(Math.max(from + steps, 0), this.found.length - 1)];
  }

  reveal(place) {
    const at = this.found.indexOf(place);
    if (at < 0) return;
    const top = at * this.height;
    const below = top + this.height - this.box.clientHeight;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (below > this.box.scrollTop) this.box.scrollTop = below;
  }

  draw() {
    const first = Math.max(Math.floor(this.box.scrollTop / this.height) - 4, 0);
    const last = Math.min(first + Math.ceil(this.box.clientHeight / this.height) + 9, this.found.length);
    const rows = [];
    for (let at = first; at < last; at++) rows.push(this.row(at));
    this.rows.replaceChildren(...rows);
    const at = this.found.indexOf(this.selected);
    if (at >= first && at < last) this.box.setAttribute("aria-activedescendant", `feature-${this.index.features[this.selected]}`);
    else this.box.removeAttribute("aria-activedescendant");
  }

  row(at) {
    const { index } = this;
    const place = this.found[at];
    const feature = index.features[place];
    const promoted = index.promoted[place];
    return element(
      "a",
      {
        id: `feature-${feature}`,
        href: `#feature/${feature}`,
        role: "option",
        tabindex: "-1",
        "aria-selected": place === this.selected,
        "aria-posinset": at + 1,
        "aria-setsize": this.found.length,
        variables: { "--top": `${at * this.height}px` },
      },
      element("span", { class: "number" }, String(feature)),
      text("span", { class: "name" }, ...nameNodes(index, place)),
      element("span", { class: "density" }, percent(index.densities[place])),
      text("span", { class: "promoted" }, promoted.length ? "→ " : "", ...words(promoted)),
    );
  }
}
