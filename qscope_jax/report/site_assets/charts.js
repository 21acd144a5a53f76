// Histograms as SVG.

const CHART = { width: 280, height: 120, top: 18, bottom: 18 };

// Bars of (low, high, count); `label` says what an edge reads as.
function histogram(bins, { name, label, unit }) {
  const { width, height, top, bottom } = CHART;
  const most = Math.max(...bins.map(([, , count]) => count), 1);
  const low = bins[0][0];
  const span = bins[bins.length - 1][1] - low || 1;
  const scale = height - top - bottom;
  const bars = bins.map(([from, to, count]) => {
    const x = ((from - low) / span) * width;
    // A bin that holds anything is seen.
    const size = count ? Math.max((count / most) * scale, 1.5) : 0;
    const tip = svgElement("title", {}, `${label(from)} to ${label(to)}: ${number(count)} ${unit}`);
    const y = height - bottom - size;
    const shape = { x, y, width: Math.max(((to - from) / span) * width - 1, 1), height: size };
    return svgElement("rect", shape, tip);
  });
  const edges = [
    svgElement("text", { x: 0, y: height - 4 }, label(low)),
    svgElement("text", { x: width, y: height - 4, "text-anchor": "end" }, label(low + span)),
    svgElement("text", { x: 0, y: 10 }, `${number(most)} ${unit}`),
    svgElement("line", { x1: 0, x2: width, y1: height - bottom + 0.5, y2: height - bottom + 0.5 }),
  ];
  return svgElement("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name }, ...bars, ...edges);
}

// How many features fire how often: bins of a quarter of a power of ten.
function densityHistogram(index) {
  const bins = new Map();
  for (const density of index.densities) {
    if (!(density > 0)) continue;
    const bin = Math.floor(Math.log10(density) * 4);
    bins.set(bin, (bins.get(bin) ?? 0) + 1);
  }
  if (!bins.size) return null;
  const first = Math.min(...bins.keys());
  const last = Math.max(...bins.keys());
  const counts = Array.from({ length: last - first + 1 }, (_, i) => [(first + i) / 4, (first + i + 1) / 4, bins.get(first + i) ?? 0]);
  return histogram(counts, { name: "Features by density", label: (edge) => percent(10 ** edge), unit: "features" });
}
