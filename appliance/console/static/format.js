// Numbers, times and durations for people. Absent values are a dash: no data is not zero.

export const NONE = "–";

export function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e9) return `${trim(value / 1e9, digits)}G`;
  if (size >= 1e6) return `${trim(value / 1e6, digits)}M`;
  if (size >= 1e4) return `${trim(value / 1e3, digits)}k`;
  return trim(value, size >= 100 ? Math.max(digits, 4) : digits);
}

function trim(value, digits) {
  return String(Number(value.toPrecision(digits)));
}

const GAP = "\u00a0"; // keeps a number and its unit on one line

export function seconds(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  if (value === 0) return `0${GAP}s`;
  if (value < 0.001) return `${trim(value * 1e6, 3)}${GAP}µs`;
  if (value < 1) return `${trim(value * 1e3, 3)}${GAP}ms`;
  return value < 120 ? `${trim(value, 3)}${GAP}s` : duration(value);
}

export function duration(value) {
  if (value === null || value === undefined) return NONE;
  const whole = Math.floor(value);
  const [days, hours, minutes, rest] = [Math.floor(whole / 86400), Math.floor((whole % 86400) / 3600), Math.floor((whole % 3600) / 60), whole % 60];
  if (days) return `${days}${GAP}d ${hours}${GAP}h`;
  if (hours) return `${hours}${GAP}h ${minutes}${GAP}min`;
  return minutes ? `${minutes}${GAP}min ${rest}${GAP}s` : `${rest}${GAP}s`;
}

export function percent(value) {
  if (value === null || value === undefined) return NONE;
  const share = value * 100;
  return `${share === 0 || share >= 10 ? trim(share, 3) : share.toFixed(share < 1 ? 2 : 1)}${GAP}%`;
}

export function bytes(value) {
  if (value === null || value === undefined) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  let size = value;
  while (size >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${trim(size, 3)}${GAP}${units[unit]}`;
}

const CYCLE = { hourCycle: "h23" };
const DATE = new Intl.DateTimeFormat(undefined, { ...CYCLE, year: "numeric", month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit" });
const CLOCK = new Intl.DateTimeFormat(undefined, { ...CYCLE, hour: "2-digit", minute: "2-digit", second: "2-digit" });

export const date = (wall) => (wall === null || wall === undefined ? NONE : DATE.format(new Date(wall * 1000)));

/** The time of day for today, else with its date. */
export function when(wall) {
  if (wall === null || wall === undefined) return NONE;
  const then = new Date(wall * 1000);
  return then.toDateString() === new Date().toDateString() ? CLOCK.format(then) : DATE.format(then);
}
