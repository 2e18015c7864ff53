// What the overview charts: title, unit and series of each. `limit` draws a line at a promised value; `empty` says why there may be nothing.

const NO_GPU = "No GPU reports this.";

export const panels = (about) => [
  { id: "tps", title: "Output tokens", unit: "tokens/s", series: [["outputRate", "generated", 1, true]] },
  { id: "prompt", title: "Prompt tokens", unit: "tokens/s", series: [["promptRate", "admitted", 2, true], ["cachedRate", "from the prefix cache", 3]] },
  { id: "ttft", title: "Time to first token", unit: "s", series: [["ttftP50", "median", 1], ["ttftP95", "p95", 4]], limit: about.ttft_slo_seconds, empty: "No first token yet." },
  { id: "tpot", title: "Time per output token", unit: "ms", series: [["tpotP50", "median", 1], ["tpotP95", "p95", 4]], limit: about.tpot_slo_seconds * 1000, empty: "No finished request yet." },
  { id: "goodput", title: "Goodput", unit: "% of requests within the SLO", series: [["goodput", "goodput", 3, true]], limit: about.slo_target * 100, limitLabel: "target", max: 100, empty: "No request was judged yet." },
  { id: "requests", title: "Requests finished", unit: "1/s", series: [["requestRate", "all", 1], ["errorRate", "failed", 5], ["rejectedRate", "turned away", 4]] },
  { id: "queue", title: "Queue", unit: "sequences", series: [["running", "running", 1, true], ["waiting", "waiting", 4]] },
  { id: "age", title: "Oldest waiting", unit: "s", series: [["oldest", "age", 4, true]] },
  { id: "kv", title: "KV cache", unit: "%", series: [["kvUsed", "used", 1, true], ["kvCached", "cached", 3], ["kvWaste", "waste of used", 4]], max: 100, empty: "No step yet." },
  { id: "gpu", title: "GPU and CPU", unit: "% busy", series: [["gpu", "GPU", 1, true], ["cpu", "CPU", 2]], max: 100 },
  { id: "memory", title: "Memory used", unit: "GiB", series: [["gpuMemory", "GPU", 1], ["hostMemory", "host", 2]] },
  { id: "power", title: "GPU power", unit: "W", series: [["power", "power", 4, true]], empty: NO_GPU },
  { id: "energy", title: "Energy", unit: "J per output token", series: [["joulesPerToken", "energy", 3, true]], empty: NO_GPU },
];

export const RANGES = [
  [300, "5 min"],
  [900, "15 min"],
  [3600, "1 h"],
  [6 * 3600, "6 h"],
  [86400, "24 h"],
  [7 * 86400, "7 d"],
  [30 * 86400, "30 d"],
];
export const LIVE_SECONDS = 3600; // up to this range, points of the live stream are added; longer ones are read again from SQL
