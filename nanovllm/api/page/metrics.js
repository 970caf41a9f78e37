// The text of /metrics as numbers, and their values for the charts.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LE = /(?:^|,)le="([^"]+)"/;

// The sums over all labels: name -> value; and histograms: name -> [[bound, count], …].
export function parse(text) {
  const totals = new Map();
  const histograms = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (!match) continue;
    const [, name, labels, number] = match;
    const value = Number(number);
    if (name.endsWith("_bucket")) {
      const key = name.slice(0, -"_bucket".length);
      const bound = Number(LE.exec(labels ?? "")?.[1].replace("+Inf", "Infinity"));
      if (!histograms.has(key)) histograms.set(key, new Map());
      const buckets = histograms.get(key);
      buckets.set(bound, (buckets.get(bound) ?? 0) + value);
    } else {
      totals.set(name, (totals.get(name) ?? 0) + value);
    }
  }
  return { totals, histograms };
}

// The quantile of the observations between two readings, in seconds; null without any.
export function quantile(share, before, now) {
  if (!now) return null;
  const bounds = [...now.keys()].sort((a, b) => a - b);
  const counts = bounds.map((bound) => now.get(bound) - (before?.get(bound) ?? 0));
  const all = counts.at(-1);
  if (!(all > 0)) return null;
  const rank = share * all;
  const i = counts.findIndex((count) => count >= rank);
  if (bounds[i] === Infinity) return bounds[i - 1] ?? null;
  const [low, below] = i > 0 ? [bounds[i - 1], counts[i - 1]] : [0, 0];
  return low + (bounds[i] - low) * ((rank - below) / (counts[i] - below));
}

const WINDOW = 10; // readings over which quantiles are taken

// Keeps readings, and computes the charts' values for each.
export class History {
  constructor() {
    this.readings = []; // {time in s, totals, histograms}
  }

  // One value for each series; null where there is none.
  add(text, time) {
    const before = this.readings.at(-1);
    const now = { time, ...parse(text) };
    if (before && now.totals.get(GENERATED) < before.totals.get(GENERATED)) this.readings = []; // a new server
    this.readings.push(now);
    const oldest = this.readings.length > WINDOW ? this.readings.shift() : this.readings[0];
    const last = this.readings.length > 1 ? before : undefined;
    const rate = (name) => last
      ? (now.totals.get(name) - last.totals.get(name)) / (now.time - last.time) : null;
    const quantiles = (name) => [0.5, 0.99].map(
      (share) => this.readings.length > 1
        ? quantile(share, oldest.histograms.get(name), now.histograms.get(name)) : null);
    const value = (name) => now.totals.get(name) ?? null;
    return {
      tokens: [rate(GENERATED), rate("vllm:prompt_tokens_total")],
      requests: [value("vllm:num_requests_running"), value("vllm:num_requests_waiting")],
      cache: [value("vllm:kv_cache_usage_perc")],
      first: quantiles("vllm:time_to_first_token_seconds"),
      between: quantiles("vllm:inter_token_latency_seconds"),
    };
  }
}

const GENERATED = "vllm:generation_tokens_total";
