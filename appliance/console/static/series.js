// Points over time, as columns. A sample from SQL and one of the live stream have the same fields, so both end in the same columns.

const rate = (name) => (sample) => (sample.period_seconds > 0 && isNumber(sample[name]) ? sample[name] / sample.period_seconds : null);
const plain = (name) => (sample) => sample[name] ?? null;
const percentOf = (name) => (sample) => (isNumber(sample[name]) ? sample[name] * 100 : null);
const isNumber = (value) => typeof value === "number";

/** Every series that a chart may show: its value in one sample, null where there is none. */
export const SERIES = {
  outputRate: rate("num_generated_tokens"),
  promptRate: rate("num_prompt_tokens"),
  cachedRate: rate("num_cached_tokens"),
  requestRate: rate("num_requests"),
  errorRate: rate("num_errors"),
  rejectedRate: rate("num_rejected"),
  ttftP50: plain("ttft_p50_seconds"),
  ttftP95: plain("ttft_p95_seconds"),
  tpotP50: (sample) => (isNumber(sample.tpot_p50_seconds) ? sample.tpot_p50_seconds * 1000 : null),
  tpotP95: (sample) => (isNumber(sample.tpot_p95_seconds) ? sample.tpot_p95_seconds * 1000 : null),
  goodput: percentOf("goodput"),
  running: plain("num_running"),
  waiting: plain("num_waiting"),
  oldest: plain("oldest_waiting_age_seconds"),
  kvUsed: percentOf("kv_utilisation"),
  kvCached: percentOf("kv_cached_share"),
  kvWaste: percentOf("kv_waste"),
  gpu: percentOf("gpu_utilisation"),
  cpu: percentOf("cpu_utilisation"),
  power: plain("gpu_power_watts"),
  joulesPerToken: (sample) => (isNumber(sample.gpu_joules) && sample.num_generated_tokens > 0 ? sample.gpu_joules / sample.num_generated_tokens : null),
  gpuMemory: (sample) => (isNumber(sample.gpu_memory_used_bytes) ? sample.gpu_memory_used_bytes / 2 ** 30 : null),
  hostMemory: (sample) => (isNumber(sample.memory_used_bytes) ? sample.memory_used_bytes / 2 ** 30 : null),
};

/** The columns of a sample that SERIES reads: no others are asked for. */
export const COLUMNS = [
  ...["period_seconds", "num_generated_tokens", "num_prompt_tokens", "num_cached_tokens", "num_requests", "num_errors", "num_rejected"],
  ...["ttft_p50_seconds", "ttft_p95_seconds", "tpot_p50_seconds", "tpot_p95_seconds", "goodput"],
  ...["num_running", "num_waiting", "oldest_waiting_age_seconds", "kv_utilisation", "kv_cached_share", "kv_waste"],
  ...["gpu_utilisation", "cpu_utilisation", "gpu_power_watts", "gpu_joules", "gpu_memory_used_bytes", "memory_used_bytes"],
];

export class Points {
  constructor() {
    this.clear();
  }

  clear() {
    this.at = [];
    this.columns = Object.fromEntries(Object.keys(SERIES).map((key) => [key, []]));
  }

  /** Replace everything by what SQL holds of one instance: {at_wall, columns}. */
  load(series) {
    this.clear();
    if (!series) return;
    const names = Object.keys(series.columns);
    series.at_wall.forEach((at, index) => {
      this.push(at, Object.fromEntries(names.map((name) => [name, series.columns[name][index]])));
    });
  }

  /** Add a sample; one that is not newer than the newest is left out. */
  push(at, sample) {
    if (this.at.length && at <= this.at[this.at.length - 1]) return;
    this.at.push(at);
    for (const [key, valueOf] of Object.entries(SERIES)) this.columns[key].push(valueOf(sample));
  }

  /** Forget what is older than `wall`. */
  trim(wall) {
    let count = 0;
    while (count < this.at.length && this.at[count] < wall) count += 1;
    if (count < 64) return; // in one go now and then: every splice moves all that stays
    this.at.splice(0, count);
    for (const column of Object.values(this.columns)) column.splice(0, count);
  }

  has(key) {
    return this.columns[key].some((value) => value !== null);
  }
}
