// The overview: tiles, and charts of a time range that begin in SQL and go on live.

import { get } from "./api.js";
import { Chart, loadLibrary } from "./charts.js";
import { $, h, setText } from "./dom.js";
import { date } from "./format.js";
import { LIVE_SECONDS, panels, RANGES } from "./panels.js";
import { COLUMNS, Points } from "./series.js";

export class Overview {
  constructor(about, onProblem) {
    this.about = about;
    this.onProblem = onProblem;
    this.points = new Points();
    this.range = 900;
    this.loadedAt = 0;
    this.charts = [];
    this.pickRange();
  }

  async start() {
    const library = await loadLibrary();
    this.charts = panels(this.about).map((panel) => new Chart(library, panel, this.points));
    $("charts").replaceChildren(...this.charts.map((chart) => chart.figure));
    await this.reload();
  }

  /** A frame of the live stream. */
  onFrame(frame) {
    if (frame.sample && this.range <= LIVE_SECONDS) this.points.push(frame.sample.at_wall, frame.sample);
    const stale = this.range > LIVE_SECONDS && frame.at_wall - this.loadedAt > Math.max(this.range / 720, this.about.sample_seconds);
    if (stale) this.reload();
    else this.draw(frame.at_wall);
  }

  draw(now) {
    if ($("view-overview").hidden) return;
    const from = now - this.range;
    this.points.trim(from - this.about.sample_seconds);
    for (const chart of this.charts) chart.draw(from, now);
  }

  /** Build the charts again: the theme changed, or the view was hidden. */
  refresh() {
    for (const chart of this.charts) chart.build();
    this.draw(Date.now() / 1000);
  }

  async reload() {
    this.loadedAt = Date.now() / 1000;
    const asked = this.range;
    try {
      const history = await get(`/console/api/history?seconds=${asked}&columns=${COLUMNS.join(",")}`);
      if (asked !== this.range) return;
      this.points.load(history.series[0]);
      setText($("resolution"), asked <= LIVE_SECONDS ? "live, once a second" : `one point each ${history.resolution_seconds} s`);
    } catch (error) {
      if (error.code !== "store_off") this.onProblem(error);
      setText($("resolution"), error.code === "store_off" ? "live only: the store is off" : "live only: no history");
      this.points.clear();
    }
    this.draw(Date.now() / 1000);
  }

  pickRange() {
    for (const [seconds, label] of RANGES) {
      const radio = h("input", { type: "radio", name: "range", value: seconds, checked: seconds === this.range, change: () => this.setRange(seconds) });
      $("range").append(h("label", {}, radio, h("span", {}, label)));
    }
  }

  setRange(seconds) {
    this.range = seconds;
    this.points.clear();
    this.reload();
  }

  async showEvents() {
    try {
      const { events } = await get("/console/api/events?limit=8");
      const items = events.map(({ event }) => h("li", {}, h("time", { class: "muted" }, date(event.at_wall)), " ", h("strong", {}, event.kind), " ", event.detail));
      $("events").replaceChildren(items.length ? h("ul", { class: "log" }, items) : h("p", { class: "muted" }, "None yet."));
    } catch (error) {
      $("events").replaceChildren(h("p", { class: "muted" }, error.message));
    }
  }
}
