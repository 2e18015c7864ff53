// Charts over Points, drawn by uPlot, which is loaded when the first one is wanted. Colours are the style sheet's.

import { h, setText } from "./dom.js";
import { NONE, number, when } from "./format.js";

const HEIGHT = 168;
const { base, charts, uplotIntegrity } = document.documentElement.dataset;

/** The library, loaded once; null where the server has none. */
export function loadLibrary() {
  if (charts !== "yes") return Promise.resolve(null);
  if (globalThis.uPlot) return Promise.resolve(globalThis.uPlot);
  return new Promise((resolve) => {
    const script = h("script", { src: `${base}/uplot.js`, integrity: uplotIntegrity });
    script.addEventListener("load", () => resolve(globalThis.uPlot));
    script.addEventListener("error", () => resolve(null));
    document.head.append(script);
  });
}

export class Chart {
  /** A figure for `panel` over `points`. Without the library it shows the newest values alone. */
  constructor(library, panel, points) {
    this.library = library;
    this.panel = panel;
    this.points = points;
    this.plot = null;
    this.readout = h("span", { class: "readout" });
    this.note = h("p", { class: "muted empty", hidden: true }, panel.empty ?? "No data yet.");
    this.box = h("div", { class: "plot", role: "img" });
    this.figure = h(
      "figure",
      { class: "card chart", id: `chart-${panel.id}` },
      h("figcaption", {}, h("span", { class: "name" }, panel.title, " ", h("span", { class: "muted" }, panel.unit)), this.readout),
      this.box,
      this.note,
    );
    new ResizeObserver(() => this.resize()).observe(this.box);
  }

  /** Make it anew, for example in other colours. */
  build() {
    this.plot?.destroy();
    this.plot = null;
    if (!this.library || !this.box.clientWidth) return;
    this.plot = new this.library(this.options(), this.data(), this.box);
    this.plot.root.querySelector(".u-legend").setAttribute("aria-hidden", "true"); // the box's label says it in words
  }

  /** Show what the points hold between `from` and `to` (Unix seconds). */
  draw(from, to) {
    const { panel, points } = this;
    const known = panel.series.filter(([key]) => points.has(key));
    this.note.hidden = known.length > 0;
    this.box.classList.toggle("vacant", !known.length);
    const told = this.read(points.at.length - 1);
    if (this.plot?.cursor.idx == null) setText(this.readout, told || NONE);
    this.box.setAttribute("aria-label", `${panel.title}, ${panel.unit}: ${told || "no data"}${panel.limit ? `; the ${limitName(panel)} is ${number(panel.limit)}` : ""}`);
    if (!this.plot) this.build();
    if (!this.plot) return;
    this.window = [from, to];
    this.plot.setData(this.data());
  }

  /** The values of all series at one point, in words. */
  read(index) {
    const values = this.panel.series.map(([key, label]) => [label, this.points.columns[key][index] ?? null]).filter(([, value]) => value !== null);
    return values.map(([label, value]) => (this.panel.series.length > 1 ? `${label} ${number(value)}` : number(value))).join(" · ");
  }

  /** The pointer is over this chart or another one: show the values there, with the time. */
  hover(index) {
    const at = index === null || index === undefined ? null : this.points.at[index];
    setText(this.readout, at === null || at === undefined ? this.read(this.points.at.length - 1) || NONE : `${when(at)}: ${this.read(index) || NONE}`);
  }

  resize() {
    const width = this.box.clientWidth;
    if (this.plot && width && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
    else if (!this.plot) this.build();
  }

  data() {
    const { at, columns } = this.points;
    const data = [at, ...this.panel.series.map(([key]) => columns[key])];
    if (this.panel.limit) data.push(at.map(() => this.panel.limit));
    return data;
  }

  options() {
    const { panel } = this;
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const axis = { stroke: colour("muted"), font: "11px system-ui, sans-serif", grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false } };
    const series = panel.series.map(([, label, slot, filled]) => ({
      label,
      stroke: colour(`series-${slot}`),
      fill: filled ? colour(`fill-${slot}`) : undefined,
      width: 1.75,
      points: { size: 4 }, // drawn where points are few
    }));
    if (panel.limit) series.push({ label: limitName(panel), stroke: colour("limit"), width: 1.25, dash: [5, 4], points: { show: false } });
    return {
      width: this.box.clientWidth,
      height: HEIGHT,
      padding: [8, 8, 0, 0],
      cursor: { sync: { key: "overview" }, drag: { x: false, y: false }, points: { size: 6 } },
      legend: { show: true, live: false },
      hooks: { setCursor: [(plot) => this.hover(plot.cursor.idx)] },
      scales: { x: { time: true, range: (_, low, high) => this.window ?? [low, high] }, y: { range: (_, low, high) => [0, top(high, panel)] } },
      axes: [
        { ...axis, space: 64, size: 26, values: (_, splits, __, ___, step) => splits.map((at) => clock(at, step)) },
        { ...axis, size: 46, values: (_, splits) => splits.map((value) => number(value)) },
      ],
      series: [{}, ...series],
    };
  }
}

const limitName = (panel) => panel.limitLabel ?? "SLO";

/** The upper end of the scale: the panel's own, else a little above the data. */
function top(high, panel) {
  if (panel.max) return panel.max;
  const most = Math.max(high ?? 0, panel.limit && high > panel.limit * 0.3 ? panel.limit : 0);
  return most > 0 ? most * 1.08 : 1;
}

const two = (value) => String(value).padStart(2, "0");

function clock(at, step) {
  const time = new Date(at * 1000);
  if (step >= 86400) return `${time.getDate()} ${time.toLocaleString(undefined, { month: "short" })}`;
  const minutes = `${two(time.getHours())}:${two(time.getMinutes())}`;
  return step >= 60 ? minutes : `${minutes}:${two(time.getSeconds())}`;
}
