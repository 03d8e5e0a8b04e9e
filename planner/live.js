"use strict";
// The plan's own formulas (planner/options.py, planner/latency/closed_form.py) on the figures in DATA.
const HOURS = 730, MONTH = HOURS * 3600, MTOK = 1e6;

function day(peak) {
  const raw = (k) => {
    const all = [];
    for (let h = 0; h < 24; h++) all.push(Math.exp(k * (Math.cos((2 * Math.PI * h) / 24) - 1)));
    const mean = all.reduce((a, b) => a + b) / 24;
    return all.map((v) => v / mean);
  };
  let low = 0, high = 200;
  for (let i = 0; i < 60; i++) {
    const middle = (low + high) / 2;
    if (raw(middle)[0] < Math.min(peak, 23.9)) low = middle; else high = middle;
  }
  return raw((low + high) / 2);
}

function hits(rate, hourly, ttl) {
  let sum = 0, all = 0;
  for (const f of hourly) { sum += f * -Math.expm1(-rate * f * ttl); all += f; }
  return sum / all;
}

function apiMonthly(o, rate, w, hourly) {
  const input = o.prefix + o.varying * w.varying, output = o.answer * w.answer + o.reasoning;
  const cost = (hit, write) => {
    const misses = (1 - hit) * o.held;
    return (input - o.held) * o.input + misses * (write === null ? o.input : write) + hit * o.held * o.cached
      + output * o.output;
  };
  let each = cost(o.held ? hits(rate, hourly, o.ttl) : 0, o.write);
  if (o.held && o.write_long !== null) each = Math.min(each, cost(hits(rate, hourly, o.ttl_long), o.write_long));
  return (each / MTOK) * w.api * rate * MONTH + o.recurring;
}

const kept = (s, t) => (s.windowed ? t + (Math.min(s.window - t, 0) * s.windowed) / s.layers : t);
const pairsOf = (t) => (t * (t + 1)) / 2;
const windowed = (s, t) => pairsOf(t) - (s.windowed ? (pairsOf(Math.max(t - s.window, 0)) * s.windowed) / s.layers : 0);

function capacity(s, prompt, output) {
  prompt = Math.max(prompt, s.cached + 1); output = Math.max(output, 1);
  const grown = 1 + s.output_cv ** 2, bytes = (t) => s.element_bytes * kept(s, t);
  const held = bytes(prompt + output * grown) - bytes(s.cached);
  const room = Math.max(s.room - bytes(s.cached), 0) / Math.max(held, 1);
  const limit = Math.min(Math.floor(room), s.slots), fresh = prompt - s.cached;
  if (limit < 1) return 0;
  const pairs = windowed(s, prompt) * (1 + s.prompt_cv ** 2) - windowed(s, s.cached);
  const context = kept(s, prompt + Math.max(output * grown - 1, 0) / 2);
  const iteration = (sequences, prompts) => {
    const all = whole(sequences, prompts);
    return s.gain === 1 || !sequences ? all : all - whole(sequences, 0) * (1 - 1 / s.gain);
  };
  const whole = (sequences, prompts) => {
    const tokens = prompts * fresh + sequences * s.wide;
    const chunks = Math.max((prompts * fresh) / Math.max(s.chunk - sequences, 1), Math.min(prompts, 1));
    const read = s.weights + s.experts * (1 - (1 - s.routed) ** Math.max(tokens, 1));
    return s.fixed + Math.hypot(read, tokens * s.token) + Math.hypot(s.head, (sequences * s.wide + prompts) * s.sampled)
      + tokens * s.move + sequences * context * s.context + prompts * pairs * s.pair + chunks * s.chunk_extra
      + (sequences + prompts) * s.sequence;
  };
  const steps = Math.max(output - 1, 0), wide = s.chunk / fresh;
  const inflow = Math.max(Math.min(limit / (steps + Math.max(1, 1 / wide)), wide), 1e-12);
  const joint = Math.max(inflow, Math.min(1, wide)), share = inflow / joint;
  const seconds = share * iteration(inflow * steps, joint) + (1 - share) * iteration(inflow * steps, 0);
  return 1 / Math.max(seconds / inflow, s.request);
}

function replicas(o, rate, w) {
  let top = o.capacity;
  if (w.varying !== 1 || w.answer !== 1) {
    top *= capacity(o.server, o.prefix + o.varying * w.varying, o.answer * w.answer)
      / capacity(o.server, o.server.prompt, o.server.output);
  }
  const need = (rate * w.peak) / (top * (1 - o.loss));
  return o.shared_by > 1 ? Math.max(need, w.least / o.shared_by) : Math.max(Math.ceil(need - 1e-9), w.least);
}

const hostedMonthly = (o, rate, w) =>
  replicas(o, rate, w) * HOURS * o.gpus * o.hour * w.gpu + o.operations + o.recurring;
const monthly = (o, rate, w, hourly) => ("server" in o ? hostedMonthly(o, rate, w) : apiMonthly(o, rate, w, hourly));
const once = (o, w) => ("server" in o ? o.once + o.training_once * w.gpu : o.once);

// The lowest rate above which `option` costs less than `rival` at every rate up to 10,000/s; null if there is none.
function breakEven(option, rival, w, hourly) {
  const gap = (r) => monthly(option, r, w, hourly) - monthly(rival, r, w, hourly);
  let last = -1;
  const grid = [];
  for (let i = 0; i < 341; i++) grid.push(10 ** (-4.5 + (8.5 * i) / 340));
  grid.forEach((r, i) => { if (gap(r) >= 0) last = i; });
  if (last === 340) return null;
  if (last < 0) return 0;
  let low = grid[last], high = grid[last + 1];
  for (let i = 0; i < 60; i++) {
    const middle = Math.sqrt(low * high);
    if (gap(middle) >= 0) low = middle; else high = middle;
  }
  return high;
}

function settings(read) {
  const value = (name) => Number(read(name));
  return {
    rate: value("rate"), peak: value("peak"), varying: value("varying") / DATA.varying,
    answer: value("answer") / DATA.answer, api: value("api"), gpu: value("gpu"), least: value("least"),
    horizon: value("horizon"),
  };
}

function figures(w) {
  const hourly = day(w.peak), found = {};
  for (const o of DATA.options) {
    const each = monthly(o, w.rate, w, hourly);
    found[o.key] = { monthly: each, total: each * w.horizon + once(o, w) };
  }
  const by = (key) => DATA.options.find((o) => o.key === key);
  const keep = by(DATA.keep), tuned = by(DATA.tuned);
  const even = keep && tuned ? breakEven(tuned, keep, w, hourly) : null;
  return { options: found, even, hourly };
}

const money = (v) => (v < 0 ? "-$" : "$") + Math.abs(v).toLocaleString("en-US", { maximumFractionDigits: Math.abs(v) < 1000 ? 2 : 0 });
const perSecond = (v) => (v === null ? "never" : v === 0 ? "always" : v >= 0.1 ? `${Number(v.toPrecision(3))}/s` : `${Number((v * 3600).toPrecision(3))}/h`);

function curve(w, hourly) {
  const W = 640, H = 280, L = 84, B = 54, centre = Math.max(w.rate, 1e-4), points = 61;
  const rates = Array.from({ length: points }, (_, i) => centre * 10 ** (-1.5 + (2.5 * i) / (points - 1)));
  const lines = DATA.shown.map((key) => DATA.options.find((o) => o.key === key)).map((o) => ({
    name: o.name, y: rates.map((r) => Math.max(monthly(o, r, w, hourly), 1)),
  }));
  const all = lines.flatMap((l) => l.y), low = Math.log10(Math.min(...all)), high = Math.log10(Math.max(...all)) || 1;
  const x = (r) => L + ((W - L - 8) * (Math.log10(r / rates[0]))) / Math.log10(rates[points - 1] / rates[0]);
  const y = (v) => 10 + ((H - B - 10) * (high - Math.log10(v))) / Math.max(high - low, 1e-9);
  const path = (l) => l.y.map((v, i) => `${i ? "L" : "M"}${x(rates[i]).toFixed(1)},${y(v).toFixed(1)}`).join("");
  const ticks = [];
  for (let e = Math.floor(low); e <= high; e++) {
    for (const v of (high - low < 2 ? [1, 2, 5] : [1]).map((m) => m * 10 ** e)) {
      if (Math.log10(v) < low || Math.log10(v) > high) continue;
      ticks.push(`<path class="grid" d="M${L},${y(v)}H${W - 8}"/><text class="tick end" x="${L - 6}" y="${y(v) + 4}">${money(v)}</text>`);
    }
  }
  const marks = [[0, ""], [30, "middle"], [60, "end"]].map(([i, at]) => `<text class="tick ${at}" x="${x(rates[i])}" y="${H - B + 18}">${perSecond(rates[i])}</text>`);
  marks.push(`<text class="axislabel middle" x="${(L + W) / 2}" y="${H - 12}">mean requests per second</text>`,
    `<text class="axislabel middle" transform="translate(13 ${(H - B) / 2}) rotate(-90)">$ per month</text>`,
    `<text class="marklabel end" x="${x(w.rate) - 5}" y="${H - B - 6}">now ${perSecond(w.rate)}</text>`);
  const legend = lines.map((l, i) => `<li><svg viewBox="0 0 26 10"><path class="line s${(i % 8) + 1}" d="M0,5H26"/></svg>${l.name}</li>`);
  return `<ul class="legend">${legend.join("")}</ul><svg viewBox="0 0 ${W} ${H}" role="img" aria-label="Cost per month against request rate">${ticks.join("")}${marks.join("")}`
    + `<path class="mark" d="M${x(w.rate)},8V${H - B}"/>${lines.map((l, i) => `<path class="line s${(i % 8) + 1}" d="${path(l)}"/>`).join("")}</svg>`;
}

function draw() {
  const field = (name) => document.getElementById(`live-${name}`);
  // What nobody touched counts as planned, to its last digit.
  const exact = (input) => (input.value === input.defaultValue ? input.dataset.exact : input.value);
  const w = settings((name) => exact(field(name))), found = figures(w);
  for (const o of DATA.options) {
    const row = document.querySelector(`[data-key="${CSS.escape(o.key)}"]`);
    if (!row) continue;
    row.children[1].textContent = money(found.options[o.key].monthly);
    row.children[2].textContent = money(found.options[o.key].total);
  }
  field("months").textContent = `$ / ${w.horizon} months`;
  field("curve").innerHTML = curve(w, found.hourly);
  const keep = found.options[DATA.keep], tuned = found.options[DATA.tuned];
  if (!keep || !tuned) return;
  const saved = keep.total - tuned.total;
  field("verdict").textContent = `${saved >= 0 ? "Tuning saves" : "Tuning costs"} ${money(Math.abs(saved))}${saved >= 0 ? "" : " more"}`
    + ` over ${w.horizon} months; break-even ${perSecond(found.even)}, now ${perSecond(w.rate)}.`;
}

if (typeof document !== "undefined") {
  document.getElementById("live").hidden = false;
  for (const input of document.querySelectorAll("#live input")) input.addEventListener("input", draw);
  document.getElementById("live-reset").addEventListener("click", () => {
    for (const input of document.querySelectorAll("#live input")) input.value = input.defaultValue;
    draw();
  });
  draw();
}
