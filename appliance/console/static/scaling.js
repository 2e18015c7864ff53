// What the policy wants, why, and what it decided before.

import { errorOf, get } from "./api.js";
import { $, h } from "./dom.js";
import { date, duration, number } from "./format.js";

/** The policy's state in the newest frame. */
export function showScaling(frame) {
  const view = frame.scaling;
  if (!view) {
    $("scaling-now").replaceChildren(h("p", { class: "muted" }, "scaling.mode is off."));
    return;
  }
  const why = view.hold ? `holds: ${view.hold.reason}` : "decided at its newest run";
  $("scaling-now").replaceChildren(
    h("p", { class: "big" }, `${view.desired_replicas} wanted, ${view.current_replicas} there`, view.pinned ? " (more would be wanted than may be)" : ""),
    h("p", {}, `Mode ${view.mode}. The policy ${why}.`),
    h("p", { class: "muted" }, view.age_seconds === null ? "It has not run yet." : `Its newest run was ${duration(view.age_seconds)} ago.`),
  );
}

/** The stored decisions, newest first. */
export async function showDecisions(about) {
  try {
    const { decisions } = await get("/console/api/decisions?limit=50");
    const items = decisions.map((stored) => card(stored, about));
    $("decisions").replaceChildren(items.length ? h("ol", { class: "decisions" }, items) : h("p", { class: "muted" }, "None yet."));
  } catch (error) {
    $("decisions").replaceChildren(h("p", { class: "muted" }, error.message));
  }
}

function card(stored, about) {
  const { decision } = stored;
  const inputs = Object.entries(decision.inputs).map(([name, value]) => h("div", {}, h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, typeof value === "number" ? number(value) : String(value ?? "–"))));
  const fate = stored.outcome ?? (stored.approved_wall ? `approved ${date(stored.approved_wall)}${stored.approved_by ? ` by ${stored.approved_by}` : ""}` : decision.mode === "approve" ? "waits for approval" : "on its way");
  const open = decision.mode === "approve" && !stored.approved_wall && !stored.outcome && decision.expires_wall > Date.now() / 1000;
  return h(
    "li",
    {},
    h("p", {}, h("span", { class: "badge", "data-direction": decision.direction }, `${decision.direction} to ${decision.desired_replicas}`), " from ", String(decision.current_replicas), " ", h("time", { class: "muted" }, date(decision.at_wall))),
    h("p", {}, decision.reason),
    h("p", { class: "muted" }, `${decision.mode}: ${fate}`),
    open ? h("button", { type: "button", click: (event) => approve(event.target, decision.id, about) }, "Approve") : null,
    h("details", {}, h("summary", {}, "Inputs and alternatives"), h("dl", { class: "facts" }, inputs), h("ul", {}, decision.alternatives.map((text) => h("li", {}, text)))),
  );
}

async function approve(button, id, about) {
  button.disabled = true;
  const response = await fetch(`/v1/scale/decisions/${encodeURIComponent(id)}/approve`, { method: "POST" });
  if (!response.ok) button.after(h("p", { role: "alert" }, (await errorOf(response)).message));
  else await showDecisions(about);
}
