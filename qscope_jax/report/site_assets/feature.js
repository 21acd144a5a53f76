// The view of one feature, and the overview that stands there before one is opened.

const SHOWN_GROUPS = 12;
const KEYS = [
  ["/", "search"],
  ["↑ ↓", "open the feature above or below"],
  ["Enter", "open the first one found"],
  ["Esc", "clear the search"],
];

function overview(index) {
  const dead = index.maxima.reduce((count, maximum) => count + !(maximum > 0), 0);
  const counts = [["features", number(site.features)], ["dead", `${number(dead)} (${percent(dead / site.features)})`]];
  const facts = new Map([["layer", String(site.layer)], ...counts, ...site.about]);
  const chart = densityHistogram(index);
  return [
    element("h2", { tabindex: "-1" }, "Overview"),
    factList([...facts]),
    chart && section("Features by density", chart, element("p", { class: "note" }, "Density is the share of tokens at which a feature fires.")),
    section("Keys", factList(KEYS, "kbd")),
  ];
}

function featureView(index, place, { card, tokens }) {
  const top = index.maxima[place] > 0 ? index.maxima[place] : 1;
  return [
    featureHead(index, place, card),
    tiles(
      maxima(card.histogram),
      logitTable("Promotes", card.promoted, tokens),
      logitTable("Suppresses", card.suppressed, tokens),
    ),
    ...contextSections(card, tokens, top),
    ...card.groups.map(([column, groups]) => section(`By ${column}`, groupTable(column, groups))),
    tiles(featureTable("Nearest directions", "cosine", index, card.neighbours), featureTable("Fires with", "Jaccard", index, card.cofiring)),
  ];
}

function maxima(bins) {
  const name = "Texts by maximum";
  return bins.length ? section(name, histogram(bins, { name, label: number, unit: "texts" })) : null;
}

function tiles(...sections) {
  return element("div", { class: "tiles" }, ...sections);
}

function failure(message) {
  return [element("h2", { tabindex: "-1" }, "Not found"), text("p", {}, message)];
}

function featureHead(index, place, card) {
  const facts = [
    ["density", percent(index.densities[place])],
    ["texts", percent(card.textRate)],
    ["maximum", number(index.maxima[place])],
    ["mean maximum", number(card.meanMaximum)],
    ...card.scores.map(([name, score]) => [name, number(score)]),
  ];
  const said = index.explanations[place];
  const alive = index.maxima[place] > 0;
  return element(
    "header",
    {},
    element("h2", { tabindex: "-1" }, `Feature ${card.feature}`),
    said ? text("p", { class: "said" }, said) : null,
    alive ? null : element("p", { class: "note" }, "It never fires on this corpus."),
    factList(facts),
  );
}

function factList(facts, tag = "span") {
  const pairs = facts.map(([name, value]) => element("div", {}, element("dt", {}, element(tag, {}, name)), text("dd", {}, value)));
  return element("dl", { class: tag === "kbd" ? "keys" : "facts" }, ...pairs);
}

function contextSections(card, tokens, top) {
  const sections = [];
  const maps = (contexts) => contexts.map((context) => contextElement(context, tokens, card.unit, top));
  if (card.top.length) sections.push(section("Strongest contexts", heatScale(top), ...maps(card.top)));
  for (const [low, high, texts, contexts] of card.quantiles) {
    if (!contexts.length) continue;
    const note = element("p", { class: "note" }, `${contexts.length} of ${number(texts)} texts, drawn at random`);
    sections.push(section(`Maximum ${number(low)} to ${number(high)}`, note, ...maps(contexts)));
  }
  return sections;
}

function logitTable(title, logits, tokens) {
  if (!logits.length) return null;
  const most = Math.max(...logits.map(([, logit]) => Math.abs(logit)), 1e-12);
  const rows = logits.map(([place, logit]) => [tokenWord(tokens[place]), bar(Math.abs(logit) / most, number(logit), logit < 0)]);
  return section(title, table([["token", ""], ["logit", "wide-bar"]], rows));
}

function featureTable(title, measure, index, features) {
  if (!features.length) return null;
  const rows = features.map(([feature, value]) => [featureLink(index, feature), number(value)]);
  return section(title, table([["feature", ""], [measure, "right"]], rows));
}

function featureLink(index, feature) {
  const place = index.places.get(feature);
  if (place === undefined) return String(feature);
  return element("a", { href: `#feature/${feature}`, class: "to" }, String(feature), text("span", {}, ...nameNodes(index, place)));
}

// What a feature is called in lists: its explanation, or the tokens at which it fires most.
function nameNodes(index, place) {
  if (index.explanations[place]) return [index.explanations[place]];
  return index.maxima[place] > 0 ? words(index.tokens[place]) : [element("i", {}, "never fires")];
}

function groupTable(column, groups) {
  const most = Math.max(...groups.map(([, , rate]) => rate), 1e-12);
  const columns = [[column, ""], ["of its texts", "wide-bar"], ["of its tokens", "right"], ["mean maximum", "right"], ["texts", "right"]];
  const rows = groups.map(([name, texts, rate, density, mean]) => {
    return [element("bdi", {}, name), bar(rate / most, percent(rate)), percent(density), number(mean), number(texts)];
  });
  if (rows.length <= SHOWN_GROUPS) return table(columns, rows);
  const more = element("details", {}, element("summary", {}, `${rows.length - SHOWN_GROUPS} more`), table(columns, rows.slice(SHOWN_GROUPS)));
  return element("div", {}, table(columns, rows.slice(0, SHOWN_GROUPS)), more);
}
