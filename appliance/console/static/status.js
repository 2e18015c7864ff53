// What is true right now: the badge, the verdict, the tiles, the facts of the node, and how far a start has come.

import { $, h, setText } from "./dom.js";
import { bytes, duration, number, percent, seconds } from "./format.js";

const PHASES = [
  ["load", "Load the weights"],
  ["compile", "Compile and run the kernels once"],
  ["ready", "Serve"],
];
let tiles = null;

export function showStatus(frame, about) {
  const state = frame.engine.state;
  const badge = $("state");
  setText(badge, state);
  badge.dataset.state = state;
  showStartup(frame.engine);
  showTiles(frame, about);
}

/** Cards of the most important numbers, each with a word on whether it is well. */
function showTiles(frame, about) {
  const { fast, sample } = frame;
  const kv = sample?.kv_utilisation;
  const watts = sample?.gpu_power_watts;
  const perToken = sample && sample.gpu_joules !== null && sample.num_generated_tokens > 0 ? sample.gpu_joules / sample.num_generated_tokens : null;
  const span = `last ${duration(Math.round(fast.seconds))}`;
  const values = [
    ["Within the SLO", percent(fast.goodput), verdict(frame, about), fast.goodput === null ? "" : fast.goodput >= about.slo_target ? "good" : "bad"],
    ["Output tokens/s", number(fast.output_tokens_per_second), span, ""],
    ["First token, p95", seconds(fast.ttft_p95_seconds), ...judge(fast.ttft_p95_seconds, about.ttft_slo_seconds)],
    ["Per token, p95", seconds(fast.tpot_p95_seconds), ...judge(fast.tpot_p95_seconds, about.tpot_slo_seconds)],
    ["Running/waiting", `${frame.num_running} / ${frame.num_waiting}`, queue(frame), ""],
    ["KV cache", percent(kv), kv === null || kv === undefined ? "no step yet" : `waste ${percent(sample.kv_waste)}`, kv > 0.95 ? "bad" : ""],
    watts !== null && watts !== undefined
      ? ["Power", `${number(watts)} W`, perToken === null ? "idle" : `${number(perToken)} J per token`, ""]
      : ["CPU", percent(sample?.cpu_utilisation), sample ? `memory ${bytes(sample.memory_used_bytes)}` : "", ""],
    ["Replicas wanted", frame.scaling ? number(frame.scaling.desired_replicas) : "–", frame.scaling ? `now ${frame.scaling.current_replicas}, ${frame.scaling.mode}` : "scaling is off", ""],
  ];
  if (!tiles) {
    tiles = values.map(() => ({ name: h("span", { class: "name" }), value: h("strong"), note: h("span", { class: "muted" }) }));
    $("tiles").replaceChildren(...tiles.map((tile) => h("div", { class: "card tile" }, tile.name, tile.value, tile.note)));
  }
  values.forEach(([name, value, note, mood], index) => {
    const tile = tiles[index];
    setText(tile.name, name);
    setText(tile.value, value);
    setText(tile.note, note);
    tile.value.parentElement.dataset.mood = mood;
  });
}

/** Whether a latency keeps its promise, in words and as the tile's mood. */
function judge(value, limit) {
  if (value === null || value <= limit) return [`promised ${seconds(limit)}`, value === null ? "" : "good"];
  return [`over the ${seconds(limit)} promised`, "bad"];
}

/** How long those in the queue wait, and what one more would. */
function queue(frame) {
  const next = frame.predicted_ttft_seconds > 0 ? `; the next about ${seconds(frame.predicted_ttft_seconds)}` : "";
  return frame.num_waiting ? `oldest waits ${seconds(frame.oldest_waiting_age_seconds)}${next}` : `nobody waits${next}`;
}

/** Why users wait, in a few words. */
function verdict({ fast, engine, num_waiting: waiting, scaling }, about) {
  if (engine.state !== "ready") return `the engine is ${engine.state}`;
  if (fast.goodput === null) return "no request was judged lately";
  if (fast.goodput >= about.slo_target) return `the target is ${percent(about.slo_target)}`;
  const causes = [];
  if (fast.num_shed) causes.push(`${fast.num_shed} turned away`);
  if (fast.ttft_attainment !== null && fast.ttft_attainment < about.slo_target) causes.push(waiting ? "first tokens late, a queue" : "first tokens late");
  if (fast.tpot_attainment !== null && fast.tpot_attainment < about.slo_target) causes.push("tokens slow");
  if (fast.max_kv_utilisation > 0.95) causes.push("KV full");
  if (fast.num_errors) causes.push(`${fast.num_errors} errors`);
  if (scaling && scaling.desired_replicas > scaling.current_replicas) causes.push(`${scaling.desired_replicas} replicas would do`);
  return causes.join("; ") || `below the target of ${percent(about.slo_target)}`;
}

function showStartup(engine) {
  const card = $("startup");
  card.hidden = engine.state === "ready";
  if (card.hidden) return;
  if (engine.state === "failed" || engine.state === "stopped") {
    card.replaceChildren(h("h2", { id: "startup-title" }, `The engine has ${engine.state}`), h("p", {}, "The log and the engine events below say why."));
    return;
  }
  const beat = engine.heartbeat;
  const current = beat ? PHASES.findIndex(([phase]) => phase === beat.phase) : -1;
  const steps = PHASES.map(([phase, label], index) => {
    const here = index === current;
    const known = here && beat.phase === "load" && beat.progress > 0;
    const told = here ? `${known ? `${percent(beat.progress)}, ` : ""}${duration(beat.phase_seconds)}${beat.detail ? `, ${beat.detail}` : ""}` : index < current ? "done" : "";
    const bar = here ? h("progress", { max: 1, value: known ? beat.progress : null, "aria-label": label }) : null;
    return h("li", { class: here ? "here" : index < current ? "done" : "", "aria-current": here ? "step" : null }, h("span", {}, label), " ", h("span", { class: "muted" }, told), bar);
  });
  const waiting = engine.num_in_flight ? `${engine.num_in_flight} sequences wait and go on by themselves.` : "Requests get 503 with Retry-After until it serves.";
  const title = engine.state === "restarting" ? "The engine restarts" : "The engine starts";
  card.replaceChildren(h("h2", { id: "startup-title" }, title), h("ol", { class: "phases" }, steps), h("p", { class: "muted" }, waiting));
}

/** What the engine runs on and how it was sized. */
export function showFacts(frame, about) {
  const facts = frame.engine.ready;
  const hardware = frame.hardware;
  const rows = [["SLO", `first token within ${seconds(about.ttft_slo_seconds)}, ${seconds(about.tpot_slo_seconds)} a token, for ${percent(about.slo_target)} (${about.slo_reason})`]];
  if (facts) {
    rows.push(
      ["Device", `${facts.device}, ${facts.dtype}, quantization ${facts.quantization}`],
      ["Model", `${number(facts.num_parameters)} parameters, ${bytes(facts.weight_bytes)}`],
      ["Context", `${facts.context_length} tokens`],
      ["KV cache", `${facts.num_blocks} blocks of ${facts.block_size} tokens, ${bytes(facts.num_blocks * facts.block_size * facts.kv_bytes_per_token)}`],
      ["Batch", `${facts.max_num_seqs} sequences, ${facts.max_num_batched_tokens} tokens a step`],
      ["Loaded in", seconds(facts.load_seconds)],
      ...facts.reasons.map((reason) => ["Why", reason]),
    );
  }
  if (hardware) {
    rows.push(["Host", `${hardware.num_cpus} CPUs, ${bytes(hardware.memory_bytes)} memory, ${bytes(hardware.disk_free_bytes)} disk free`]);
    for (const gpu of hardware.gpus) {
      const throttled = gpu.throttle_reasons.length ? `, throttled: ${gpu.throttle_reasons.join(", ")}` : "";
      rows.push([`GPU ${gpu.index}`, `${gpu.name}, ${bytes(gpu.memory_bytes)}${throttled}${gpu.num_xid_errors ? `, ${gpu.num_xid_errors} XID errors` : ""}`]);
    }
  }
  rows.push(["Up", duration(frame.uptime_seconds)]);
  $("facts").replaceChildren(...rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}
