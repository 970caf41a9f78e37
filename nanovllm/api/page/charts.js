// Small line charts in SVG, one for each quantity of /metrics.

import { byId, element, svg } from "./dom.js";
import { History } from "./metrics.js";
import { ServerError, errorOf, request } from "./server.js";

const EVERY_MS = 1000;
const NUM_POINTS = 120;
const WIDTH = 300;
const HEIGHT = 72;
const PAD = 3;
const ROOM = 17; // for the label of the top line

const short = new Intl.NumberFormat("en", { maximumSignificantDigits: 3, notation: "compact" });
const whole = (value) => short.format(Math.round(value * 10) / 10);
const share = (value) => `${(value * 100).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`;
const digits = (value) => Number(value.toPrecision(3));
const time = (seconds) => (seconds >= 1 ? `${digits(seconds)} s` : `${digits(seconds * 1000)} ms`);

const CHARTS = [
  { key: "tokens", title: "Tokens per second", names: ["generated", "prompts"], format: whole, least: 10 },
  { key: "requests", title: "Requests", names: ["running", "waiting"], format: whole, least: 4 },
  { key: "cache", title: "KV cache in use", names: [""], format: share, least: 0.01 },
  { key: "first", title: "Time to first token", names: ["p50", "p99"], format: time, least: 0.001 },
  { key: "between", title: "Time between tokens", names: ["p50", "p99"], format: time, least: 0.001 },
];

// The next round number: 1, 2 or 5 times a power of ten.
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((step) => step * power >= value * 0.9999);
}

class Chart {
  constructor({ key, title, names, format, least }) {
    Object.assign(this, { key, title, names, format, least });
    this.points = []; // [value of each series]
    this.hovered = null;
    this.values = names.map((name, i) => element("span", { class: `value series-${i}` }));
    this.lines = names.map((_, i) => svg("path", { class: `line series-${i}` }));
    this.area = svg("path", { class: "area" });
    this.cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT, visibility: "hidden" });
    this.picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", tabindex: 0 },
      [ROOM, (ROOM + HEIGHT - PAD) / 2, HEIGHT - PAD].map(
        (y) => svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: y, y2: y })),
      this.area, ...this.lines.toReversed(), this.cursor);
    this.top = element("span", { class: "top" });
    this.when = element("span", { class: "when" });
    this.node = element("figure", { class: "chart", "data-chart": key },
      element("figcaption", {}, element("span", { class: "title" }, title), this.when,
        element("span", { class: "values" }, this.values)),
      element("div", { class: "plot" }, this.picture, this.top));
    this.picture.addEventListener("pointermove", (event) => this.#hover(event));
    for (const leaving of ["pointerleave", "blur"]) {
      this.picture.addEventListener(leaving, () => { this.hovered = null; this.draw(); });
    }
    this.picture.addEventListener("keydown", (event) => this.#step(event));
  }

  add(values) {
    this.points.push(values);
    if (this.points.length > NUM_POINTS) this.points.shift();
    this.draw();
  }

  clear() {
    this.points = [];
    this.draw();
  }

  // The arrow keys move the cursor by a second.
  #step(event) {
    const by = { ArrowLeft: 1, ArrowRight: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    this.hovered = Math.max(0, Math.min((this.hovered ?? 0) + by, this.points.length - 1));
    this.draw();
  }

  #hover(event) {
    const box = this.picture.getBoundingClientRect();
    const fromRight = Math.round((1 - (event.clientX - box.left) / box.width) * (NUM_POINTS - 1));
    this.hovered = Math.max(0, Math.min(fromRight, this.points.length - 1));
    this.draw();
  }

  #path(i, top) {
    let path = "";
    let pen = false;
    const first = NUM_POINTS - this.points.length;
    for (const [n, values] of this.points.entries()) {
      if (values[i] === null || Number.isNaN(values[i])) { pen = false; continue; }
      const x = ((first + n) / (NUM_POINTS - 1)) * WIDTH;
      const y = HEIGHT - PAD - (Math.min(values[i], top) / top) * (HEIGHT - PAD - ROOM);
      path += `${pen ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
      // a single point is a short line
      if (!pen && (this.points[n + 1]?.[i] ?? null) === null) path += "h1.5";
      pen = true;
    }
    return path;
  }

  draw() {
    const known = this.points.flat().filter((value) => Number.isFinite(value));
    const top = roundUp(Math.max(this.least, ...known));
    this.top.textContent = known.length ? this.format(top) : "";
    for (const [i, line] of this.lines.entries()) line.setAttribute("d", this.#path(i, top));
    const solid = this.lines[0].getAttribute("d");
    const isWhole = solid && solid.lastIndexOf("M") === 0 && solid.includes("L");
    const x = isWhole ? /^M([\d.]+)/.exec(solid)[1] : 0;
    this.area.setAttribute("d", isWhole ? `${solid}L${WIDTH} ${HEIGHT - PAD}L${x} ${HEIGHT - PAD}Z` : "");
    this.#values();
  }

  #values() {
    const at = this.points.length - 1 - (this.hovered ?? 0);
    const latest = this.points[at] ?? [];
    const words = this.names.map((name, i) => {
      const value = Number.isFinite(latest[i]) ? this.format(latest[i]) : "–";
      return name ? `${name} ${value}` : value;
    });
    for (const [i, value] of this.values.entries()) value.textContent = words[i];
    this.when.textContent = this.hovered ? `${this.hovered} s ago` : "";
    this.picture.setAttribute("aria-label", `${this.title}: ${words.join(", ")}`);
    const x = ((NUM_POINTS - 1 - (this.hovered ?? 0)) / (NUM_POINTS - 1)) * WIDTH;
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    this.cursor.setAttribute("visibility", this.hovered === null ? "hidden" : "visible");
  }
}

// Reads /metrics every second while the page is visible.
export function startCharts() {
  const charts = CHARTS.map((chart) => new Chart(chart));
  const note = byId("charts-note");
  let history = new History();
  byId("chart-list").append(...charts.map((chart) => chart.node));
  for (const chart of charts) chart.draw();

  async function read() {
    const response = await request("metrics", { signal: AbortSignal.timeout(5000) });
    if (!response.ok) throw response.status === 401 ? await errorOf(response)
      : new ServerError(`/metrics answers with status ${response.status}.`, response.status);
    const values = history.add(await response.text(), performance.now() / 1000);
    for (const chart of charts) chart.add(values[chart.key]);
  }

  async function tick() {
    try {
      if (!document.hidden) await read();
      note.hidden = true;
    } catch (error) {
      history = new History(); // the next reading starts a new history
      for (const chart of charts) chart.add(chart.names.map(() => null));
      note.textContent = error.name === "TimeoutError" ? "/metrics does not answer in time." : error.message;
      note.hidden = false;
    }
    setTimeout(tick, EVERY_MS);
  }
  tick();
}
