// The scheduler's newest plans: what each iteration did with which request, and why.
import { $, colour, count, el, every, fill, get, ms, phrase, set, several, shortId, showServer, storyLink } from "./page.js";

let plans = [], now = 0, held = false;
const open = new Set();

const interrupts = plan => plan.preempted.length + plan.converted.length + plan.abandoned.length > 0 || plan.summary.some(text => /admitted|late|past/.test(text));

/** Newest first; successive plans of one replica that say the same are one row. */
function merged(found) {
  const rows = [];
  for (const plan of found) {
    const text = plan.summary.join("; "), last = rows[rows.length - 1];
    if (last && last.text === text && last.replica === plan.replica) last.plans.push(plan);
    else rows.push({ text, replica: plan.replica, plans: [plan] });
  }
  return rows;
}

/** How many requests a plan runs, interrupts and lets wait, as a bar. */
function mix(plan) {
  const waiting = plan.waited.reduce((sum, entry) => sum + entry.requests.length, 0), decoding = plan.scheduled.filter(entry => /next token/.test(entry.reason)).length;
  const parts = [[plan.scheduled.length - decoding, "kv"], [decoding, "good"], [plan.converted.length, "hidden"], [plan.preempted.length + plan.abandoned.length, "bad"], [waiting, "calm"]];
  return el("div", { class: "mix", "aria-hidden": "true" }, ...parts.map(([share, name]) => el("i", { style: { flex: String(share), background: "var(--" + name + ")" } })));
}

function inside(plan) {
  const entries = [
    ...["abandoned", "preempted", "converted"].flatMap(kind => plan[kind].map(entry => [entry.request, entry.reason, ""])),
    ...plan.scheduled.map(entry => [entry.request, entry.reason, several(entry.tokens, "token", "tokens") + " as " + entry.cache]),
    ...plan.waited.flatMap(entry => entry.requests.map(request => [request, entry.reason, ""])),
  ];
  return el("div", { class: "inside" }, ...entries.slice(0, 200).map(([id, reason, note]) => el("div", {},
    el("i", { class: "dot", style: { background: colour(reason) } }), el("a", { href: storyLink(id) }, shortId(id)), " " + reason, note ? el("span", { class: "soft" }, ", " + note) : null)),
    entries.length > 200 ? el("div", { class: "soft" }, "and " + count(entries.length - 200) + " more") : null);
}

function show() {
  const wanted = document.querySelector("input[name=wanted]:checked").value;
  const rows = merged(wanted === "all" ? plans : plans.filter(interrupts));
  $("no-plans").hidden = rows.length > 0;
  fill($("plans"), ...rows.map(row => {
    const newest = row.plans[0], oldest = row.plans[row.plans.length - 1], name = (row.replica || "") + "#" + oldest.number;
    const tokens = newest.scheduled.reduce((sum, entry) => sum + entry.tokens, 0);
    const node = el("details", {}, el("summary", { class: "plan", "data-name": name },
      el("span", {}, (row.replica ? row.replica + " " : "") + "#" + oldest.number + (newest === oldest ? "" : "–" + newest.number)),
      el("span", { class: "soft n" }, ms(Math.max(1000 * (now - newest.now_s), 0)) + " ago"),
      el("span", {}, ...(newest.summary.length ? newest.summary.map(phrase) : ["nothing to do"])),
      el("span", {}, mix(newest), el("span", { class: "soft" }, several(tokens, "token", "tokens") + (row.plans.length > 1 ? " each" : "")))));
    node.open = open.has(name);
    if (node.open) node.append(inside(newest));
    node.addEventListener("toggle", () => {
      if (node.open === open.has(name)) return;
      if (node.open) { open.add(name); node.append(inside(newest)); hold(true); } else open.delete(name);
    });
    return node;
  }));
}

function hold(still) {
  held = still;
  $("hold").setAttribute("aria-pressed", String(still));
  set("hold", still ? "Go on" : "Hold still");
}
$("hold").addEventListener("click", () => hold(!held));
$("wanted").addEventListener("change", show);

every(1000, async () => {
  const state = await get("debug/state");
  if (state) showServer(state);
  if (!state || state.policy === undefined || held) return;
  const found = await get("debug/plans");
  if (!found || held) return;
  plans = found.plans.reverse(); now = found.now_s;
  set("note", "policy " + found.policy + ", the newest " + count(plans.length));
  show();
});
