// What the pages share: the server's address and key, the header, and how figures are written.
export const $ = id => document.getElementById(id);
export const set = (id, text) => { const node = $(id); if (node.textContent !== String(text)) node.textContent = text; };

/** An element with attributes and children; null children are left out. */
export function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") Object.assign(node.style, value);
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter(child => child !== null));
  return node;
}
/** Replace a list's children; a link or a row that the keyboard was on stays so, if it is still there. */
export function fill(node, ...children) {
  const name = one => one.dataset.name || one.getAttribute("href");
  const held = node.contains(document.activeElement) ? name(document.activeElement) : null;
  node.replaceChildren(...children);
  if (held !== null) [...node.querySelectorAll("a, summary")].find(one => name(one) === held)?.focus({ preventScroll: true });
}
export function svg(name, attributes = {}, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  return node;
}

const KEY = "apt-jax-key";
export const key = () => sessionStorage.getItem(KEY) || "";
export const headers = () => key() ? { authorization: "Bearer " + key() } : {};

/** Ask for a key, and say whether the one given was wrong. */
export function askForKey(wrong) {
  set("key-message", wrong ? "This API key is not one of this server's." : "This server asks for an API key.");
  $("key-message").className = wrong ? "bad" : "";
  $("key-form").hidden = false;
  say(wrong ? "wrong API key" : "no API key", false);
}
function say(text, good) { set("status", text); $("status").className = good ? "status good" : "status"; }

/** What GET answers; null where it is not found, undefined where there is no answer to show. */
export async function get(path) {
  let reply, body;
  if (/[^\x00-\xff]/.test(key())) { askForKey(true); return undefined; } // a browser sends no such header
  try { reply = await fetch(path, { headers: headers() }); }
  catch { say("no connection", false); return undefined; }
  if (reply.status === 401) { askForKey(key() !== ""); return undefined; }
  $("key-form").hidden = true;
  if (reply.status === 404) return null;
  try { body = await reply.json(); }
  catch { say("no answer of the server: HTTP " + reply.status, false); return undefined; } // a proxy's page, as while the server restarts
  if (reply.ok) return body;
  if (body.error) say(body.error.message, false);
  return undefined;
}

export function showServer(state) {
  set("model", state.model);
  document.title = (document.body.dataset.page || state.model) + " - apt-jax";
  say(state.trouble === undefined ? state.status : state.status + ": " + state.trouble, state.status === "ready");
  set("about", "version " + state.version + ", up " + duration(1000 * state.uptime_s));
}

/** Call `work` now and every so many ms; less often while nobody looks. */
export async function every(pause, work) {
  for (;;) {
    await work();
    await new Promise(done => setTimeout(done, document.hidden ? 5 * pause : pause));
  }
}

const known = value => value !== null && value !== undefined;
export const ms = value => !known(value) ? "–" : value < 9.95 ? value.toFixed(1) + " ms" : value < 999.5 ? Math.round(value) + " ms" : value < 99950 ? +(value / 1000).toFixed(value < 9995 ? 2 : 1) + " s" : duration(value);
export const percent = share => !known(share) ? "–" : share === 1 || share === 0 ? 100 * share + "%" : share > 0.9995 ? "> 99.9%" : (100 * share).toFixed(1) + "%";
export const count = value => !known(value) ? "–" : value < 9.95 && value % 1 ? value.toFixed(1) : Math.round(value).toLocaleString("en");
export const several = (number, one, many) => count(number) + " " + (number === 1 ? one : many);
export const clock = time => new Date(time).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });

export function duration(value) {
  const s = Math.round(value / 1000);
  if (s < 60) return s + " s";
  if (s < 600) return Math.floor(s / 60) + " min" + (s % 60 ? " " + s % 60 + " s" : "");
  if (s < 3600) return Math.floor(s / 60) + " min";
  if (s < 86400) return Math.floor(s / 3600) + " h " + Math.floor(s % 3600 / 60) + " min";
  return several(Math.floor(s / 86400), "day", "days") + " " + Math.floor(s % 86400 / 3600) + " h";
}

/** The limits of an SLO in words. */
export function promise(slo) {
  if (slo === null) return "other SLOs";
  return "first token " + ms(slo.ttft_ms) + ", tokens " + ms(slo.tbt_ms) + ", no gap over " + ms(slo.stall_ms);
}

/** The colour of a decision, by what it does. */
export function colour(reason) {
  if (/preempted|abandoned|error/.test(reason)) return "var(--bad)";
  if (/converted|hidden/.test(reason)) return "var(--hidden)";
  if (/decodes?\b.*next token/.test(reason)) return "var(--good)";
  if (/^(\d[\d,]* requests? )?wait/.test(reason)) return "var(--calm)";
  return "var(--kv)";
}
export const phrase = text => el("span", { class: "phrase" }, el("i", { class: "dot", style: { background: colour(text) } }), text);
export const storyLink = id => "requests?id=" + encodeURIComponent(id);
export const ago = at => el("td", { class: "n soft" }, duration(at), el("span", { class: "roomy" }, " ago"));
export const storyOf = id => el("a", { href: storyLink(id), title: id }, el("span", { class: "roomy" }, shortId(id)), el("span", { class: "narrow" }, id.length > 6 ? "…" + id.slice(-4) : id));
export const shortId = id => id.length > 18 ? id.slice(0, 10) + "…" + id.slice(-5) : id;

export function outcome(request) {
  const slo = request.slo;
  if (request.finish_reason === null) return el("span", { class: "tag" }, request.tokens ? "running" : request.status);
  if (slo.ttft_slo_ms >= 86400000) return el("span", { class: "tag" }, "no promise");
  if (slo.attained_strict) return el("span", { class: "tag good" }, "kept");
  return el("span", { class: "tag bad" }, { abort: "aborted", error: "error", abandoned: "given up" }[request.finish_reason] || "missed");
}

$("key-form").addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value);
  location.reload();
});
