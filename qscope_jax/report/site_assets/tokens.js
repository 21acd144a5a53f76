// Token heat maps: running text, each token on a background as strong as its activation.

// A token is its text, or its text and its pieces where some need more than a space's mark to be seen.
function tokenElement(token, activation, top, peak) {
  const [raw, pieces] = Array.isArray(token) ? token : [token, spaced(token)];
  const share = activation === null ? 0 : Math.min(Math.max(activation / top, -1), 1);
  const classes = ["t", share < 0 ? "n" : null, peak ? "peak" : null].filter(Boolean).join(" ");
  const variables = Math.abs(share) < 0.0005 ? {} : { "--v": Math.abs(share).toFixed(3) };
  return element("span", { class: classes, title: `${JSON.stringify(raw)}  ${number(activation)}`, variables }, ...pieces.flatMap(pieceNodes));
}

function spaced(token) {
  return token.split(/([ \u00a0]+)/u).map((part, i) => [i % 2 ? "space" : "text", part]);
}

function pieceNodes([kind, content]) {
  switch (kind) {
    case "space": // The space itself stays, so that lines break and copied text is the text.
      return Array.from(content, (space) => element("i", { class: "sp" }, space));
    case "newline":
      return [element("i", { class: "nl" }), "\n"];
    case "tab":
      return [element("i", { class: "tab" }, "\t")];
    case "partial":
      return [element("i", { class: "part" }, "□")];
    case "code":
      return [element("i", { class: "code" }, content)];
    default:
      return [content];
  }
}

function tokenWord(token) {
  return element("bdi", { class: "word" }, ...tokenElement(token, 0, 1, false).childNodes);
}

// A context, its activations in units; `top` is the activation of the strongest background, the same for all of a feature's contexts.
function contextElement(context, tokens, unit, top) {
  const activations = context.activations.map((units) => (units === null ? null : units * unit));
  const where = [...context.about.map(([name, value]) => `${name} ${value}`), `text ${number(context.text)}`];
  if (context.start) where.push(`from token ${number(context.start)}`);
  const spans = context.tokens.map((place, i) => tokenElement(tokens[place], activations[i], top, i === context.peak));
  const peak = number(activations[context.peak] ?? null);
  const value = element("bdi", { class: "value", "data-peak": peak }, peak);
  const label = element("div", { class: "label" }, text("span", {}, where.join(" · ")), value);
  return element("div", { class: "heat" }, label, element("div", { class: "tokens", dir: "auto" }, ...spans));
}

// Beside a map stands its peak's activation, or that of the token pointed at or tapped.
function followPointer(view) {
  for (const kind of ["pointerover", "click"]) {
    view.addEventListener(kind, ({ target }) => {
      const heat = target.closest(".heat");
      if (!heat) return;
      const value = heat.querySelector(".value");
      value.textContent = target.closest(".t")?.title ?? value.dataset.peak;
    });
  }
}

function heatScale(top) {
  return element("p", { class: "scale" }, "0 ", element("i", { "aria-hidden": "true" }), ` ${number(top)}`);
}
