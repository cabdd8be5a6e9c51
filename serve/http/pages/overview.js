// The overview: what is promised and kept, over time; what happened; and a prompt to try.
import { Chart } from "./charts.js";
import { $, ago, count, el, every, fill, get, headers, ms, outcome, percent, phrase, promise, set, several, showServer, storyLink, storyOf } from "./page.js";

const GOOD = 0.9;
const line = (key, name, colour, more = {}) => ({ key, name, colour: "var(--" + colour + ")", ...more });
const number = value => count(value);
const charts = {
  attainment: new Chart($("chart-attainment"), { title: "Promises kept", format: percent, tick: v => 100 * v + "%", top: 1, lines: [line("strict_attainment", "strictly", "good", { area: true })] }),
  requests: new Chart($("chart-requests"), { title: "Requests", format: number, least: 2, lines: [line("running", "running", "accent", { area: true }), line("waiting", "waiting", "hidden")] }),
  ttft: new Chart($("chart-ttft"), { title: "Time to first token", format: ms, tick: ms0, log: true, lines: [line("ttft_p99_ms", "p99", "hidden"), line("ttft_p50_ms", "median", "accent")] }),
  gaps: new Chart($("chart-gaps"), { title: "Gaps between tokens", format: ms, tick: ms0, log: true, lines: [line("longest_gap_ms", "longest", "calm"), line("tbt_p99_ms", "p99", "hidden"), line("tbt_p50_ms", "median", "accent")] }),
  tokens: new Chart($("chart-tokens"), { title: "Tokens per second", format: number, least: 10, lines: [line("tokens_per_s", "all", "accent", { area: true }), line("kept_tokens_per_s", "of kept requests", "good")] }),
  cache: new Chart($("chart-cache"), { title: "Cache blocks in use", format: percent, tick: v => 100 * v + "%", top: 1, stack: true, lines: [line("kv", "KV", "kv", { area: true }), line("hidden", "hidden", "hidden", { area: true })] }),
  hits: new Chart($("chart-hits"), { title: "Prompt tokens found in the prefix cache", format: percent, tick: v => 100 * v + "%", top: 1, lines: [line("prefix_hits", "found", "accent", { area: true })] }),
  trouble: new Chart($("chart-trouble"), { title: "Refused, failed, preempted", format: number, least: 2, bars: true, lines: [line("refused", "refused", "hidden"), line("errors", "errors", "bad"), line("preemptions", "preemptions", "calm")] }),
};
function ms0(value) { return value < 1 ? value + " ms" : value < 1000 ? Math.round(value) + " ms" : value / 1000 + " s"; }
const RANGES = { "10m": "last 10 minutes", "1h": "last hour", "1d": "last day" };
const REASONS = { bad_request: "not valid", queue_full: "queue full", predicted_late: "predicted late", not_ready: "not ready", timeout: "too long", context_length_exceeded: "too long for the context", model_not_found: "other model", body_too_large: "body too large", unsupported_media_type: "not JSON" };
let slo = null;

function rate(value) { return value < 9.95 ? value.toFixed(1) : count(value); }

function showState(s) {
  showServer(s);
  if (s.policy === undefined) return;
  slo = s.slo;
  set("policy", "policy " + s.policy + ", cache " + s.cache_mode + ", context " + count(s.max_model_len) + (s.replicas ? ", " + several(s.replicas.length, "replica", "replicas") : ""));
  const share = s.strict_attainment;
  set("attainment", percent(share));
  $("attainment").className = "figure " + (share === null ? "" : share >= GOOD ? "good" : "bad");
  const away = s.turned_away ? "; " + percent(s.turned_away) + " refused or given up" : "";
  set("ended", share === null ? "no request ended in the last minute" : "of " + several(s.requests, "request", "requests") + " in the last minute; by the p99 of gaps " + percent(s.attainment) + away);
  set("longest-gap", ms(s.longest_gap_ms));
  $("longest-gap").className = "figure " + (s.longest_gap_ms > slo.stall_ms ? "bad" : "");
  set("stall-slo", "in the last minute; limit " + ms(slo.stall_ms));
  const ttft = s.ttft_ms, tbt = s.tbt_ms;
  set("ttft", ttft ? ms(ttft.p50) : "–");
  set("ttft-more", ttft ? "median; p99 " + ms(ttft.p99) + ", limit " + ms(slo.ttft_ms) + (tbt ? "; then a token every " + ms(tbt.p50) : "") : "limit " + ms(slo.ttft_ms));
  set("tokens", rate(s.tokens_per_s));
  set("kept-tokens", "last minute; " + rate(s.kept_tokens_per_s) + " of kept requests");
  set("running", count(s.running));
  set("waiting", "running; " + several(s.waiting, "waits", "wait") + (s.batch_requests === null ? "" : "; " + s.batch_requests.toFixed(1) + " per step"));
  showPlans(s.plans.reverse());
}

/** Plans, newest first; those that say the same as the one before are one row. */
function showPlans(plans) {
  const merged = [];
  for (const plan of plans) {
    const text = plan.summary.join("; "), last = merged[merged.length - 1];
    if (last && last.text === text && last.replica === plan.replica) last.first = plan.number;
    else merged.push({ text, first: plan.number, last: plan.number, summary: plan.summary, replica: plan.replica });
  }
  $("no-plans").hidden = merged.length > 0;
  $("plans").replaceChildren(...merged.slice(0, 4).map(plan => el("div", { class: "brief" },
    el("span", { class: "soft" }, (plan.replica ? plan.replica + " " : "") + "#" + plan.first + (plan.first === plan.last ? "" : "–" + plan.last)),
    el("span", {}, ...(plan.summary.length ? plan.summary.map(phrase) : ["nothing to do"])))));
}

function showHistory(h) {
  charts.attainment.show(h); charts.requests.show(h); charts.tokens.show(h); charts.cache.show(h); charts.hits.show(h); charts.trouble.show(h);
  charts.ttft.show(h, slo ? [{ value: slo.ttft_ms, name: "default SLO" }] : []);
  charts.gaps.show(h, slo ? [{ value: slo.stall_ms, name: "default SLO, every gap" }] : []);
  showClasses(h.classes, RANGES[h.range]);
  set("sums-range", { "10m": "10 min", "1h": "1 h", "1d": "1 day" }[h.range]);
  const rows = [
    ["finished", s => count(s.finished)], ["tokens", s => count(s.tokens)], ["promises kept", s => percent(s.strict_attainment)],
    ["errors", s => count(s.errors), s => s.errors], ["refused", s => count(total(s.refused)), s => total(s.refused)],
    ...Object.keys(h.since_start.refused).map(reason => ["  " + (REASONS[reason] || reason.replaceAll("_", " ")), s => count(s.refused[reason] || 0)]),
    ["given up as late", s => count(s.abandoned), s => s.abandoned], ["preemptions", s => count(s.preemptions)], ["conversions to KV", s => count(s.conversions)],
    ["prompt tokens found cached", s => percent(s.prefix_hit_share)], ["failed steps", s => count(s.failed_steps), s => s.failed_steps],
    ["longest gap", s => ms(s.longest_gap_ms)],
  ];
  $("sums").replaceChildren(...rows.map(([name, value, bad]) => el("tr", {},
    el("td", name.startsWith(" ") ? { class: "soft", style: { paddingLeft: "14px" } } : {}, name.trim()),
    ...[h.sums, h.since_start].map(sums => el("td", { class: "n" + (bad && bad(sums) ? " bad" : "") }, value(sums))))));
}
function total(counts) { return Object.values(counts).reduce((a, b) => a + b, 0); }

function showClasses(classes, range) {
  const worst = classes[0];
  set("worst", worst ? percent(worst.strict_attainment) : "–");
  $("worst").className = "figure " + (worst ? worst.strict_attainment >= GOOD ? "good" : "bad" : "");
  set("worst-class", worst ? promise(worst.slo) + "; " + range : "no request ended in the " + range);
  set("classes-range", range);
  $("no-classes").hidden = classes.length > 0;
  $("classes").replaceChildren(...classes.map((entry, place) => el("tr", {},
    el("td", {}, promise(entry.slo), place === 0 && classes.length > 1 ? el("span", { class: "tag", style: { marginLeft: "8px" } }, "worst") : null,
      el("div", { class: "meter" + (entry.strict_attainment >= GOOD ? "" : " low") }, el("i", { style: { width: 100 * entry.strict_attainment + "%" } }))),
    el("td", { class: "n " + (entry.strict_attainment >= GOOD ? "good" : "bad") }, percent(entry.strict_attainment)), el("td", { class: "n" }, count(entry.requests)),
    el("td", { class: "n roomy" }, ms(entry.longest_gap_ms)), el("td", { class: "n roomy" }, ms(entry.ttft_p99_ms)))));
}

function showRequests(requests) {
  $("no-requests").hidden = requests.length > 0;
  fill($("requests"), ...requests.slice(0, 8).map(r => el("tr", {},
    el("td", { class: "id" }, storyOf(r.id)),
    el("td", {}, outcome(r)),
    el("td", { class: "n" }, count(r.prompt_tokens) + " → " + count(r.tokens)),
    el("td", { class: "n roomy" }, ms(r.slo.ttft_ms)),
    ago(r.arrived_ago_ms))));
}

async function showOverTime() {
  const range = document.querySelector("input[name=range]:checked").value, history = await get("debug/history?range=" + range);
  if (history) showHistory(history);
  const found = history && await get("debug/requests");
  if (found) showRequests(found.requests);
}
$("range").addEventListener("change", showOverTime);

let asking = null;
$("stop").addEventListener("click", () => asking && asking.abort());
$("prompt").addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("form").requestSubmit(); }
});
$("form").addEventListener("submit", async event => {
  event.preventDefault();
  if (asking) return;
  asking = new AbortController();
  $("send").disabled = true; $("stop").disabled = false;
  set("answer", ""); set("report", "");
  try {
    const body = { prompt: $("prompt").value, stream: true, max_tokens: Number($("max-tokens").value), temperature: Number($("temperature").value) };
    const reply = await fetch("v1/completions", { method: "POST", body: JSON.stringify(body), headers: { ...headers(), "content-type": "application/json" }, signal: asking.signal });
    if (!reply.ok) { set("report", (await reply.json()).error.message); return; }
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const text of events) take(text.replace(/^data: /, ""));
    }
  } catch (error) {
    set("report", error.name === "AbortError" ? "stopped" : "the connection was lost");
  } finally {
    asking = null;
    $("send").disabled = false; $("stop").disabled = true;
  }
});

function take(text) {
  if (text === "[DONE]") return;
  const chunk = JSON.parse(text);
  if (chunk.error) { set("report", chunk.error.message); return; }
  for (const choice of chunk.choices) {
    $("answer").append(choice.text);
    if (choice.finish_reason && chunk.slo) {
      const made = chunk.slo;
      $("report").replaceChildren("finished: " + choice.finish_reason + "; first token after " + ms(made.ttft_ms) + ", p99 gap " + ms(made.p99_tbt_ms) + ", longest " + ms(made.longest_gap_ms) + ", SLO " + (made.attained_strict ? "kept" : made.attained ? "kept but for a long gap" : "missed") + ", cache " + made.cache_kinds.join(" then ") + ". ", el("a", { href: storyLink(chunk.id) }, "Its story"));
    }
  }
}

every(1000, async () => { const state = await get("debug/state"); if (state) showState(state); });
every(2000, showOverTime);
