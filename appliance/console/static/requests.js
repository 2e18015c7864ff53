// The ledger: finished requests page by page, each with a waterfall of its states.

import { get } from "./api.js";
import { $, h } from "./dom.js";
import { date, number, percent, seconds, when } from "./format.js";

// In the order in which a request comes into them first. The ledger holds how long each state took in all, so a state that came back is one bar.
export const STATES = [
  ["received", "received", "body read and checked"],
  ["admitted", "admitted", "templated and tokenized"],
  ["queued", "queued", "in the engine's queue"],
  ["grammar", "grammar", "waiting for a grammar"],
  ["prefill_wait", "prefill wait", "admitted, others fill the step"],
  ["prefill", "prefill", "its prompt is computed"],
  ["decode", "decode", "its tokens are computed"],
  ["preempted", "preempted", "lost its KV blocks"],
  ["engine_restart", "engine restart", "the engine was down"],
  ["detokenize", "detokenize", "ids become text"],
  ["write_blocked", "write blocked", "the client does not read"],
];

export class Requests {
  constructor() {
    this.list = h("tbody");
    this.more = h("button", { type: "button", click: () => this.load(false) }, "Older");
    this.told = h("p", { class: "muted", role: "status" });
    const heads = [["Received"], ["Status"], ["Key", "wide"], ["Tokens in / out"], ["First token"], ["Per token", "wide"], ["Took"], ["States"]];
    const head = h("tr", {}, heads.map(([label, name]) => h("th", { scope: "col", class: name }, label)));
    const table = h("table", { class: "ledger" }, h("caption", { class: "hidden" }, "Finished requests, newest first"), h("thead", {}, head), this.list);
    $("requests").replaceChildren(legend(), h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Finished requests" }, table), h("div", { class: "toolbar" }, this.more, this.told));
    $("request-filter").addEventListener("submit", (event) => {
      event.preventDefault();
      this.load(true);
    });
    $("failed").addEventListener("change", () => this.load(true));
    this.cursor = null;
  }

  /** Show one request by its id alone. */
  find(id) {
    $("request-id").value = id;
    return this.load(true);
  }

  /** The first page, or the next one. */
  async load(fresh) {
    const id = $("request-id").value.trim();
    const asked = { limit: 50, ...(fresh ? {} : { cursor: this.cursor }), ...($("failed").checked ? { failed: 1 } : {}) };
    const key = $("key").value.trim();
    if (key) asked.key = key;
    try {
      const path = id ? `/console/api/requests/${encodeURIComponent(id)}` : `/console/api/requests?${new URLSearchParams(asked)}`;
      const page = await get(path);
      if (fresh) this.list.replaceChildren();
      for (const { record } of page.requests) this.list.append(...row(record, Boolean(id)));
      this.cursor = page.cursor ?? null;
      this.told.textContent = this.list.children.length ? "" : "No finished request.";
    } catch (error) {
      if (fresh) this.list.replaceChildren();
      this.told.textContent = error.message;
      this.cursor = null;
    }
    this.more.hidden = this.cursor === null;
  }
}

/** The row of a request and, hidden until asked for, the row of its details. */
function row(record, opened) {
  const details = h("tr", { class: "details", hidden: !opened, id: `details-${record.id}` }, h("td", { colspan: 8 }));
  const button = h(
    "button",
    {
      type: "button",
      class: "link",
      "aria-expanded": String(opened),
      "aria-controls": details.id,
      click: () => {
        details.hidden = !details.hidden;
        button.setAttribute("aria-expanded", String(!details.hidden));
        if (!details.hidden && !details.firstChild.childNodes.length) details.firstChild.append(describe(record));
      },
    },
    when(record.received_wall),
  );
  if (opened) details.firstChild.append(describe(record));
  const state = record.status >= 500 ? "bad" : record.status >= 400 ? "warn" : "good";
  const cells = [
    [button],
    [h("span", { class: "badge", "data-mood": state }, record.status), " ", record.error_code ?? record.finish_reason ?? ""],
    [record.key_id || "–", "wide"],
    [`${number(record.num_prompt_tokens)} / ${number(record.num_generated_tokens)}`],
    [seconds(record.ttft_seconds)],
    [seconds(record.tpot_seconds), "wide"],
    [seconds(record.duration_seconds)],
    [bar(record)],
  ];
  return [h("tr", {}, cells.map(([content, name]) => h("td", { class: name }, content))), details];
}

const parts = (record) => STATES.map(([state, label, meaning]) => ({ state, label, meaning, spent: record.states[state] ?? 0 })).filter(({ spent }) => spent > 0);

/** All states in one bar, in proportion. */
function bar(record) {
  const told = parts(record).map(({ label, spent }) => `${label} ${seconds(spent)}`).join(", ");
  const strip = h("div", { class: "strip", role: "img", "aria-label": told || "no time in any state", title: told });
  for (const { state, spent } of parts(record)) {
    const segment = h("span", { "data-ledger": state });
    segment.style.flexGrow = String(spent);
    strip.append(segment);
  }
  return strip;
}

/** One line a state, each bar beginning where the one before ended. */
function waterfall(record) {
  const whole = record.duration_seconds || 1;
  let start = 0;
  const lines = parts(record).map(({ state, label, meaning, spent }) => {
    const fill = h("span", { "data-ledger": state });
    fill.style.marginInlineStart = `${(100 * start) / whole}%`;
    fill.style.width = `${Math.max(0.3, (100 * spent) / whole)}%`;
    start += spent;
    return h("tr", {}, h("th", { scope: "row", title: meaning }, label), h("td", { class: "time" }, seconds(spent)), h("td", { class: "share" }, percent(spent / whole)), h("td", { class: "lane", "aria-hidden": "true" }, fill));
  });
  return h("table", { class: "waterfall" }, h("caption", {}, "Where its time went; the states sum to its wall time, one that came back is one bar"), h("tbody", {}, lines));
}

function describe(record) {
  const facts = [
    ["Id", record.id],
    ["Client's id", record.client_request_id],
    ["Endpoint", `${record.endpoint}${record.stream ? ", streamed" : ""}`],
    ["Model", record.model],
    ["Received", date(record.received_wall)],
    ["Prompt", `${record.num_prompt_tokens} tokens, ${record.num_cached_tokens} from the prefix cache`],
    ["Output", `${record.num_generated_tokens} tokens generated, ${record.num_written_tokens} written, ${record.num_choices} choices`],
    ["Longest gap", seconds(record.max_itl_seconds)],
    ["Preemptions", record.num_preemptions],
    ["Engine restarts", record.num_engine_restarts],
    ["Seed", record.seed],
    ["Energy", record.joules === null || record.joules === undefined ? null : `${number(record.joules)} J`],
  ].filter(([, value]) => value !== null && value !== undefined && value !== "");
  return h("div", { class: "detail" }, waterfall(record), h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value))))));
}

function legend() {
  return h("ul", { class: "legend", "aria-label": "Colours of the states" }, STATES.map(([state, label, meaning]) => h("li", { title: meaning }, h("span", { "data-ledger": state, "aria-hidden": "true" }), label)));
}
