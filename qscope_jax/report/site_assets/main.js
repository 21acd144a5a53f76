// The page: state in the address (#feature/17) and in the three controls; keys.

const [query, show, sort, count, box, view] = ["query", "show", "order", "count", "list", "view"].map((id) => document.getElementById(id));

start().catch((error) => {
  document.body.classList.add("open");
  view.replaceChildren(...failure(error.message));
});

async function start() {
  const index = await loadIndex();
  const list = new FeatureList(box, document.getElementById("rows"), index);
  fillControls(index);
  const search = () => {
    list.show(find(index, query.value, show.value, sort.value));
    const all = `${number(site.features)} features`;
    count.textContent = list.found.length === site.features ? all : `${number(list.found.length)} of ${all}`;
  };
  for (const control of [show, sort]) control.addEventListener("change", search);
  query.addEventListener("input", () => {
    search();
    // Without a query, the feature that is open is where it was.
    if (!query.value) list.select(list.selected);
  });
  query.form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (list.found.length) location.hash = address(index, list.neighbour(0));
  });
  addEventListener("hashchange", () => open(index, list));
  followPointer(view);
  document.addEventListener("keydown", (event) => onKey(event, index, list));
  search();
  await open(index, list);
  performance.mark("site-ready");
  document.body.dataset.ready = "";
  (window.requestIdleCallback ?? setTimeout)(() => searchTexts(index));
}

function fillControls(index) {
  for (const [value, [label, passes]] of Object.entries(FILTERS)) {
    const passing = index.features.reduce((sum, _, place) => sum + passes(index, place), 0);
    const none = (value === "explained" && !passing) || (value === "unexplained" && passing === site.features);
    if (!none) show.append(element("option", { value }, value === "all" ? label : `${label}: ${number(passing)}`));
  }
  for (const [value, [label]] of Object.entries(ORDERS)) sort.append(element("option", { value }, label));
}

function address(index, place) {
  return `#feature/${index.features[place]}`;
}

// Show what the address names.
async function open(index, list) {
  const named = /^#feature\/(\d+)$/u.exec(location.hash);
  const place = named ? index.places.get(Number(named[1])) : undefined;
  document.body.classList.toggle("open", named !== null);
  list.select(place ?? null);
  const hash = location.hash;
  view.setAttribute("aria-busy", "true");
  const content = await contentOf(index, named, place);
  if (hash !== location.hash) return; // Another one was opened meanwhile.
  const fromView = view.contains(document.activeElement);
  view.replaceChildren(...navigation(index, list, named), ...content.filter(Boolean));
  view.setAttribute("aria-busy", "false");
  view.dataset.feature = named ? named[1] : "";
  view.scrollTop = 0;
  if (document.body.classList.contains("open")) window.scrollTo(0, 0);
  // Who followed a link here goes on reading here.
  if (fromView) view.querySelector("h2").focus({ preventScroll: true });
}

async function contentOf(index, named, place) {
  if (!named) return overview(index);
  if (place === undefined) return failure(`This site has no feature ${named[1]}.`);
  try {
    return featureView(index, place, await loadCard(place));
  } catch (error) {
    return failure(error.message);
  }
}

// For narrow screens, where list and feature take turns.
function navigation(index, list, named) {
  if (!named) return [];
  const there = list.found.includes(list.selected);
  const link = (steps, label) => {
    const place = list.neighbour(steps);
    return there && place !== list.selected ? element("a", { href: address(index, place) }, label) : null;
  };
  return [element("div", { class: "turns" }, element("a", { href: "#" }, "← All features"), link(-1, "↑ Previous"), link(1, "↓ Next"))];
}

function onKey(event, index, list) {
  const active = document.activeElement;
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (event.key === "/" && !["INPUT", "SELECT"].includes(active.tagName)) {
    event.preventDefault();
    query.focus();
    query.select();
  } else if (event.key === "Escape" && active === query) {
    if (query.value) {
      query.value = "";
      query.dispatchEvent(new Event("input"));
    } else box.focus();
  } else if ([query, box, document.body].includes(active)) move(event, index, list, active);
}

function move(event, index, list, active) {
  const page = Math.max(Math.floor(box.clientHeight / list.height) - 1, 1);
  const all = list.found.length;
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, ...(active === query ? {} : { Home: -all, End: all }) }[event.key];
  if (steps === undefined) return;
  event.preventDefault();
  const place = list.neighbour(steps);
  // Going through the list leaves no trail in the history.
  if (all && place !== list.selected) location.replace(address(index, place));
}
