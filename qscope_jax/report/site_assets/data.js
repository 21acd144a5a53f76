// Data come as scripts, since a page opened from disk may not read files: each calls qscopeData once with its name and a JSON text.

const site = JSON.parse(document.getElementById("site").textContent);
const KEPT_BLOCKS = 16;
const awaited = new Map();
const blocks = new Map(); // block number -> promise of it, oldest use first

window.qscopeData = (name, text) => awaited.get(name)?.(JSON.parse(text));

function load(name) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    const failed = () => reject(new Error(`data/${name}.js could not be read. Is the site's folder complete?`));
    script.src = `data/${name}.js?${site.version}`;
    script.onload = () => {
      script.remove();
      failed(); // Without effect where the script has handed over its data.
    };
    script.onerror = failed;
    awaited.set(name, resolve);
    document.head.append(script);
  }).finally(() => awaited.delete(name));
}

async function loadIndex() {
  return makeIndex(await Promise.all(Array.from({ length: site.parts }, (_, part) => load(`index${part}`))));
}

// The details of the feature at a place of the index, and its block's tokens.
async function loadCard(place) {
  const number = Math.floor(place / site.block);
  const found = blocks.get(number) ?? load(`block${number}`);
  blocks.delete(number);
  blocks.set(number, found);
  if (blocks.size > KEPT_BLOCKS) blocks.delete(blocks.keys().next().value);
  try {
    const block = await found;
    return { card: block.cards[place % site.block], tokens: block.tokens };
  } catch (error) {
    blocks.delete(number);
    throw error;
  }
}
