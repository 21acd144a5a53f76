// Numbers as a reader wants them: few digits, thousands set off.

const formats = Array.from({ length: 8 }, (_, digits) => new Intl.NumberFormat("en-US", { maximumFractionDigits: digits }));

function number(value) {
  if (value === null || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || (size >= 1e7 && !Number.isInteger(value)))) return value.toPrecision(3);
  if (Number.isInteger(value)) return formats[0].format(value);
  return formats[Math.max(3 - Math.floor(Math.log10(size)), 0)].format(value);
}

// Densities reach from some per cent down to one token in a million.
function percent(share) {
  if (share === null || Number.isNaN(share)) return "–";
  const value = 100 * share;
  if (value === 0) return "0 %";
  if (value < 9.5e-5) return `${value.toExponential(0)} %`;
  return `${formats[Math.min(Math.max(1 - Math.floor(Math.log10(value)), 0), 6)].format(value)} %`;
}
