// What is found, and in which order: arrays of places in the index. A place is a feature's position among the cards as they were written.

const DENSE = 0.1;

const FILTERS = {
  all: ["all", () => true],
  firing: ["firing", (index, place) => index.maxima[place] > 0],
  dead: ["dead", (index, place) => !(index.maxima[place] > 0)],
  dense: [`dense (over ${100 * DENSE} %)`, (index, place) => index.densities[place] > DENSE],
  explained: ["explained", (index, place) => index.explanations[place] !== ""],
  unexplained: ["not explained", (index, place) => index.explanations[place] === ""],
};

const ORDERS = {
  number: ["number", (index) => ascending(index, index.features)],
  densest: ["densest first", (index) => descending(index, index.densities)],
  rarest: ["rarest first", (index) => ascending(index, index.densities)],
  strongest: ["strongest first", (index) => descending(index, index.maxima)],
  weakest: ["weakest first", (index) => ascending(index, index.maxima)],
  name: ["name", byName],
};

function makeIndex(parts) {
  const column = (name) => parts.flatMap((part) => part[name]);
  const features = Int32Array.from(column("features"));
  const index = {
    features,
    densities: Float64Array.from(column("densities"), (value) => value ?? NaN),
    maxima: Float64Array.from(column("maxima"), (value) => value ?? NaN),
    explanations: column("explanations"),
    tokens: column("tokens"),
    promoted: column("promoted"),
    places: new Map(),
    orders: {},
  };
  features.forEach((feature, place) => index.places.set(feature, place));
  return index;
}

function featureName(index, place) {
  return index.explanations[place] || index.tokens[place].join("  ");
}

// Width and case of letters do not matter to a search.
function fold(text) {
  return text.normalize("NFKC").toLowerCase();
}

// Texts to search in, one a feature; made once, when the first search needs them or the page is idle.
function searchTexts(index) {
  index.texts ??= Array.from(index.features, (_, place) =>
    fold(`${index.explanations[place]}\n${index.tokens[place].join("\n")}\n${index.promoted[place].join("\n")}`),
  );
  return index.texts;
}

// Places whose texts hold every word of the query, in order; a feature whose number is the query comes first.
function find(index, query, show, order) {
  const words = fold(query).split(/\s+/u).filter(Boolean);
  const passes = FILTERS[show][1];
  const inOrder = (index.orders[order] ??= ORDERS[order][1](index));
  const texts = words.length ? searchTexts(index) : [];
  const found = inOrder.filter((place) => passes(index, place) && words.every((word) => texts[place].includes(word)));
  const digits = /^\s*#?(\d+)\s*$/u.exec(query);
  const exact = digits && index.places.get(Number(digits[1]));
  return exact == null ? found : Int32Array.from([exact, ...found.filter((place) => place !== exact)]);
}

function ascending(index, values) {
  return sorted(index, (a, b) => order(values[a], values[b]));
}

function descending(index, values) {
  return sorted(index, (a, b) => order(values[b], values[a]));
}

// Features without a name come last.
function byName(index) {
  const names = Array.from(index.features, (_, place) => fold(featureName(index, place)) || "\u{10ffff}");
  return sorted(index, (a, b) => order(names[a], names[b]));
}

function sorted(index, compare) {
  return Int32Array.from(index.features.keys()).sort((a, b) => compare(a, b) || index.features[a] - index.features[b]);
}

function order(a, b) {
  return a < b ? -1 : a > b ? 1 : 0;
}
