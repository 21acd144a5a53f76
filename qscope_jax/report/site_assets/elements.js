// Making elements. Texts become text nodes or attributes, never markup.

const SVG = "http://www.w3.org/2000/svg";

function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function svgElement(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, { variables = {}, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) if (value != null) node.setAttribute(name, value);
  // The page's policy refuses style attributes, not this.
  for (const [name, value] of Object.entries(variables)) node.style.setProperty(name, value);
  node.append(...children.filter((child) => child != null));
  return node;
}

// Its direction is that of its own text.
function text(tag, attributes, ...content) {
  return element(tag, { dir: "auto", ...attributes }, ...content);
}

// Tokens beside each other, each in its own direction; what holds them takes none from them.
function words(tokens) {
  return tokens.flatMap((token, i) => [i ? "  " : "", element("bdi", {}, token)]);
}

function section(title, ...children) {
  return element("section", {}, element("h3", {}, title), ...children);
}

function table(columns, rows) {
  const head = element("tr", {}, ...columns.map(([name, side]) => element("th", { class: side, scope: "col" }, name)));
  const body = rows.map((cells) => element("tr", {}, ...cells.map((cell, i) => element("td", { class: columns[i][1] }, cell))));
  // A narrow screen scrolls a wide table sideways, with keys too.
  const wide = columns.length > 2 ? { tabindex: "0", role: "group", "aria-label": columns[0][0] } : {};
  return element("div", { class: "wide", ...wide }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)));
}

// A number beside a bar as long as its share of the largest.
function bar(share, label, cold = false) {
  const length = Math.min(Math.max(share || 0, 0), 1);
  const strip = element("i", { "aria-hidden": "true" });
  return element("span", { class: cold ? "bar n" : "bar", variables: { "--v": length.toFixed(3) } }, strip, element("b", {}, label));
}
