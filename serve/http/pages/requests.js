// The newest requests, and the story of one: what the scheduler did with it, why, and when its tokens came.
import { $, ago, colour, count, duration, el, every, fill, get, ms, outcome, promise, set, several, showServer, storyLink, storyOf, svg } from "./page.js";

const asked = new URLSearchParams(location.search).get("id") || null;
let listed = [];

function showList() {
  const wanted = document.querySelector("input[name=wanted]:checked").value;
  const fits = r => wanted === "all" || (wanted === "running" ? r.finish_reason === null : r.finish_reason !== null && !r.slo.attained_strict);
  const rows = listed.filter(fits).slice(0, 100);
  $("no-requests").hidden = rows.length > 0;
  set("list-note", several(listed.filter(r => r.finish_reason === null).length, "request", "requests") + " under way");
  fill($("requests"), ...rows.map(r => el("tr", {},
    el("td", { class: "id" }, storyOf(r.id)),
    el("td", {}, outcome(r), r.finish_reason === null ? el("div", { class: "soft roomy" }, r.doing) : null),
    el("td", { class: "n" }, count(r.prompt_tokens) + " → " + count(r.tokens)),
    el("td", { class: "n roomy" }, ms(r.slo.ttft_ms)), el("td", { class: "n roomy" }, ms(r.slo.longest_gap_ms)),
    el("td", { class: "roomy" }, r.slo.cache_kinds.join(" → ") || "–"),
    ago(r.arrived_ago_ms))));
}
$("wanted").addEventListener("change", showList);
$("search").addEventListener("keydown", event => { if (event.key === "Enter" && $("search").value.trim()) location.href = storyLink($("search").value.trim()); });

/** Lane of an event in the picture. */
function lane(event) {
  if (event.action === "waited") return 0;
  if (event.action !== "scheduled") return null;
  return /next token/.test(event.reason) ? 2 : 1;
}
const LANES = ["waits", "prompt", "decodes", "tokens"], LANE = 30, TOP = 26;

/** A picture of a story: lanes over the time since arrival, with the limits of its SLO. */
function picture(story) {
  const host = el("div", { class: "story" }), draw = () => {
    const width = host.clientWidth;
    if (!width) return;
    const left = 64, right = 12, slo = story.slo, tokens = story.token_ms;
    const ends = story.events.map(event => event.until_ms), end = Math.max(1, ...ends, ...tokens.slice(-1)) * 1.02;
    const x = at => left + (width - left - right) * Math.min(Math.max(at, 0) / end, 1);
    const bottom = TOP + LANES.length * LANE, image = svg("svg", { viewBox: `0 0 ${width} ${bottom + 24}`, role: "img", "aria-label": "Timeline of " + story.id + "; the list below says the same in words" });
    LANES.forEach((name, i) => {
      image.append(svg("text", { x: 0, y: TOP + i * LANE + 19 }, name));
      image.append(svg("line", { x1: left, x2: width - right, y1: TOP + (i + 1) * LANE, y2: TOP + (i + 1) * LANE, stroke: "var(--grid)" }));
    });
    const step = [1, 2, 5].flatMap(k => [-1, 0, 1, 2, 3, 4, 5, 6, 7].map(e => k * 10 ** e)).sort((a, b) => a - b).find(value => end / value <= (width < 520 ? 3 : 7)) || end;
    for (let at = 0; at <= end; at += step) {
      image.append(svg("line", { x1: x(at), x2: x(at), y1: TOP, y2: bottom, stroke: "var(--grid)" }));
      image.append(svg("text", { x: x(at), y: bottom + 16, "text-anchor": at ? "middle" : "start" }, at ? (at < 1000 ? at + " ms" : at / 1000 + " s") : "arrival"));
    }
    const limit = slo.ttft_slo_ms;
    if (limit < end) {
      image.append(svg("line", { x1: x(limit), x2: x(limit), y1: TOP - 4, y2: bottom, stroke: "var(--bad)", "stroke-dasharray": "4 4" }));
      const late = x(limit) > width / 2;
      image.append(svg("text", { x: x(limit) + (late ? -5 : 5), y: TOP - 8, "text-anchor": late ? "end" : "start" }, "limit of the first token"));
    }
    story.events.forEach((event, i) => {
      const row = lane(event), next = story.events[i + 1], colours = event.action === "finished" ? "var(--text)" : colour(event.reason);
      if (row === null) {
        image.append(svg("line", { x1: x(event.after_ms), x2: x(event.after_ms), y1: TOP, y2: bottom, stroke: colours, "stroke-width": event.action === "finished" ? 1 : 2 }));
        return;
      }
      const until = next ? next.after_ms : Math.max(event.until_ms, ...tokens.slice(-1));
      const from = i === 0 && row === 0 ? 0 : event.after_ms;
      const bar = svg("rect", { x: x(from), y: TOP + row * LANE + 7, width: Math.max(x(until) - x(from), 2), height: LANE - 14, rx: 3, fill: colours, opacity: 0.85 });
      bar.append(svg("title", {}, event.reason + ", " + ms(until - from)));
      image.append(bar);
    });
    tokens.forEach((at, i) => {
      const late = i > 0 && at - tokens[i - 1] > slo.tbt_slo_ms;
      if (late) image.append(svg("rect", { x: x(tokens[i - 1]), y: TOP + 3 * LANE + 13, width: Math.max(x(at) - x(tokens[i - 1]), 1), height: 4, fill: "var(--bad)" }));
      image.append(svg("line", { x1: x(at), x2: x(at), y1: TOP + 3 * LANE + 7, y2: TOP + 4 * LANE - 7, stroke: late ? "var(--bad)" : "var(--text)", "stroke-width": 1, opacity: late ? 1 : 0.55 }));
    });
    host.replaceChildren(image);
  };
  new ResizeObserver(draw).observe(host);
  return host;
}

function facts(story) {
  const slo = story.slo, pairs = [
    ["promise", promise({ ttft_ms: slo.ttft_slo_ms, tbt_ms: slo.tbt_slo_ms, stall_ms: slo.stall_slo_ms })],
    ["first token", ms(slo.ttft_ms)], ["p99 gap", ms(slo.p99_tbt_ms)], ["longest gap", ms(slo.longest_gap_ms)], ["waited first", ms(slo.queue_ms)],
    ["tokens", count(story.prompt_tokens) + " → " + count(story.tokens) + (story.cached_tokens ? ", " + count(story.cached_tokens) + " cached" : "")],
    ["cache", slo.cache_kinds.join(" → ") || "–"], ["preemptions", count(slo.preemptions)], ["conversions", count(slo.conversions)], ["priority", String(story.priority)],
    ["came", duration(story.arrived_ago_ms) + " ago"],
  ];
  if (slo.ttft_slo_ms >= 86400000) pairs[0][1] = "none";
  if (story.replica) pairs.push(["replica", story.replica]);
  return el("dl", { class: "facts" }, ...pairs.map(([name, value]) => el("div", name === "promise" ? { class: "broad" } : {}, el("dt", {}, name), el("dd", {}, value))));
}

/** The events in words. */
function events(story) {
  const rows = [[0, "var(--text)", "arrives with " + several(story.prompt_tokens, "token", "tokens"), ""]];
  const first = story.token_ms[0];
  let told = first === undefined;
  story.events.forEach((event, i) => {
    if (!told && event.after_ms > first) { rows.push([first, "var(--good)", "has its first token", ""]); told = true; }
    const next = story.events[i + 1], lasted = (next ? next.after_ms : event.until_ms) - event.after_ms;
    const much = [event.steps > 1 ? several(event.steps, "step", "steps") : "", event.tokens && lane(event) === 1 ? several(event.tokens, "token", "tokens") : "", lasted >= 0.05 && lane(event) !== null ? "over " + ms(lasted) : ""];
    const text = event.action === "finished" ? "ends: " + ({ stop: "end of text", length: "as long as asked", abort: "aborted", abandoned: "given up" }[event.reason] || event.reason) : event.reason;
    rows.push([event.after_ms, event.action === "finished" ? "var(--text)" : colour(event.reason), text, event.action === "finished" ? several(story.tokens, "token", "tokens") : much.filter(Boolean).join(", ")]);
    if (i === 39 && story.events_forgotten) rows.push([event.until_ms, "var(--line)", several(story.events_forgotten, "event is", "events are") + " left out here", ""]);
  });
  if (!told) rows.push([first, "var(--good)", "has its first token", ""]);
  return el("ol", { class: "events" }, ...rows.map(([at, colours, text, note]) => el("li", {},
    el("time", {}, ms(at)), el("i", { style: { background: colours } }), el("span", {}, text), el("span", { class: "n" }, note))));
}

function showStories(found) {
  $("stories").hidden = false;
  if (found === null) {
    $("stories").replaceChildren(el("section", { class: "card" }, el("h2", {}, asked), el("p", {}, "No request of this id is known; only the newest that have ended are kept. "), el("a", { href: "requests" }, "All requests")));
    return;
  }
  const shown = found.samples.slice(0, 32);
  $("stories").replaceChildren(...shown.map(story => el("section", { class: "card", style: { marginBottom: "14px" } },
    el("div", { class: "head" }, el("h2", { style: { overflowWrap: "anywhere" } }, story.id), outcome(story)), facts(story),
    el("div", { style: { margin: "18px 0 20px" } }, picture(story)), events(story))));
}

const isOver = found => found === null || found.samples.every(story => story.finish_reason !== null);
every(1000, async () => { const state = await get("debug/state"); if (state) showServer(state); });
if (asked === null) {
  $("list").hidden = false;
  every(2000, async () => { const found = await get("debug/requests"); if (found) { listed = found.requests; showList(); } });
} else {
  for (let over = false; !over;) {
    let found = await get("debug/requests/" + encodeURIComponent(asked));
    if (found && !found.samples) found = null; // the id is ".": a browser takes that out of the path
    if (found !== undefined) { showStories(found); over = isOver(found); }
    if (!over) await new Promise(done => setTimeout(done, 1000));
  }
}
