// Charts with scales, drawn as SVG at the size they have. A cursor (pointer or arrow keys) shows the values of a time.
import { clock, el, svg } from "./page.js";

const HEIGHT = 150, TOP = 8, BOTTOM = 20, LEFT = 46, RIGHT = 4;

/** 1, 2 or 5 times a power of ten: the smallest at least `value`. */
function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find(step => step * power >= value * 0.9999);
}

/**
 * A chart in `host`, a figure. `lines`: {key, name, colour, area, dash, bars}; `format` writes a value.
 * `top`: end of the scale, else it follows the data, at least `least`; `log`: a logarithmic scale; `stack`: areas on areas.
 */
export class Chart {
  constructor(host, options) {
    this.host = host; this.options = options; this.data = null; this.cursor = null;
    this.legend = el("div", { class: "legend" });
    this.figure = el("div", { class: "chart", tabindex: "0", role: "img" });
    host.append(el("div", { class: "head" }, el("h2", {}, options.title), this.legend), this.figure);
    new ResizeObserver(() => this.draw()).observe(this.figure);
    this.figure.addEventListener("pointermove", event => this.point(event.offsetX));
    this.figure.addEventListener("pointerleave", () => this.move(null));
    this.figure.addEventListener("blur", () => this.move(null));
    this.figure.addEventListener("keydown", event => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || !this.data) return;
      event.preventDefault();
      const last = this.data.length - 1;
      this.move(Math.min(Math.max((this.cursor ?? last + 1) + step, 0), last));
    });
  }

  /** `limits`: dashed lines, {value, name}. */
  show(history, limits = []) {
    this.lines = this.options.lines.map(line => ({ ...line, values: history.lines[line.key] }));
    this.data = this.lines[0].values; this.limits = limits.filter(limit => limit.value);
    this.times = this.data.map((_, i) => 1000 * (history.ends_at - history.span_s * (this.data.length - i)));
    this.draw();
  }

  get range() {
    let high = this.options.least || 1, low = Infinity;
    this.data.forEach((_, i) => {
      const values = this.lines.map(line => line.values[i]).filter(value => value !== null);
      if (!values.length) return;
      high = Math.max(high, this.options.stack ? values.reduce((a, b) => a + b, 0) : Math.max(...values));
      for (const value of values) if (value > 0) low = Math.min(low, value);
    });
    if (!this.options.log) return [0, this.options.top || nice(high)];
    for (const limit of this.limits) { high = Math.max(high, 1.5 * limit.value); low = Math.min(low, limit.value); }
    return [10 ** Math.floor(Math.log10(Math.min(low, high / 10))), 10 ** Math.ceil(Math.log10(high * 0.9999))];
  }

  y(value) {
    const [low, high] = this.scale, room = HEIGHT - TOP - BOTTOM;
    const share = this.options.log ? Math.log(Math.max(value, low) / low) / Math.log(high / low) : value / high;
    return TOP + room * (1 - Math.min(share, 1));
  }
  x(i) { return LEFT + (this.width - LEFT - RIGHT) * i / (this.data.length - 1); }

  draw() {
    this.width = this.figure.clientWidth;
    if (!this.data || !this.width) return;
    this.scale = this.range;
    const image = svg("svg", { viewBox: `0 0 ${this.width} ${HEIGHT}`, "aria-hidden": "true" });
    this.drawScales(image);
    if (this.options.bars) this.drawBars(image);
    else this.drawLines(image);
    for (const limit of this.limits) {
      const y = this.y(limit.value);
      image.append(svg("line", { x1: LEFT, x2: this.width - RIGHT, y1: y, y2: y, stroke: "var(--bad)", "stroke-width": 1, "stroke-dasharray": "4 4", opacity: 0.75 }));
      image.append(svg("text", { x: LEFT + 4, y: y - 5, class: "limit" }, limit.name));
    }
    this.mark = svg("line", { y1: TOP, y2: HEIGHT - BOTTOM, stroke: "var(--calm)", visibility: "hidden" });
    this.tip = el("div", { class: "tip", hidden: true });
    image.append(this.mark);
    this.figure.replaceChildren(image, this.tip);
    this.showLegend();
    this.move(this.cursor);
  }

  drawScales(image) {
    const [low, high] = this.scale, ticks = [];
    if (this.options.log) for (let value = low; value <= high * 1.01; value *= 10) ticks.push(value);
    else for (const share of [0, 0.5, 1]) ticks.push(share * high);
    for (const value of ticks) {
      const y = this.y(value);
      image.append(svg("line", { x1: LEFT, x2: this.width - RIGHT, y1: y, y2: y, stroke: "var(--grid)" }));
      image.append(svg("text", { x: LEFT - 7, y: y + 4, "text-anchor": "end" }, (this.options.tick || this.options.format)(value)));
    }
    const parts = this.width < 360 ? 2 : this.width < 520 ? 3 : 4, last = this.data.length - 1;
    for (let part = 0; part <= parts; part++) {
      const i = Math.round(last * part / parts);
      const anchor = part === 0 ? "start" : part === parts ? "end" : "middle";
      image.append(svg("text", { x: this.x(i), y: HEIGHT - 4, "text-anchor": anchor }, part === parts ? "now" : clock(this.times[i])));
    }
  }

  drawLines(image) {
    const base = this.data.map(() => 0);
    for (const line of this.lines) {
      let path = "", run = [];
      const areas = [];
      const end = () => { if (run.length) areas.push(run); run = []; };
      line.values.forEach((value, i) => {
        if (value === null) { end(); return; }
        const height = this.options.stack ? base[i] + value : value;
        run.push([this.x(i), this.y(height), this.y(this.options.stack ? base[i] : 0)]);
        if (this.options.stack) base[i] = height;
      });
      end();
      for (const points of areas) {
        if (line.area) {
          const there = points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");
          const back = [...points].reverse().map(([x, , y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");
          image.append(svg("path", { d: `M${there}L${back}Z`, fill: line.colour, opacity: this.options.stack ? 0.32 : 0.13 }));
        }
        if (points.length === 1) image.append(svg("circle", { cx: points[0][0], cy: points[0][1], r: 2, fill: line.colour }));
        path += "M" + points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");
      }
      image.append(svg("path", { d: path || "M0 0", fill: "none", stroke: line.colour, "stroke-width": 1.6, "stroke-linejoin": "round", "stroke-linecap": "round" }));
    }
  }

  drawBars(image) {
    const wide = Math.max((this.width - LEFT - RIGHT) / this.data.length - 1, 1.5), base = this.data.map(() => 0);
    for (const line of this.lines) {
      line.values.forEach((value, i) => {
        if (!value) return;
        const y = this.y(base[i] + value), x = Math.min(Math.max(this.x(i) - wide / 2, LEFT), this.width - RIGHT - wide);
        image.append(svg("rect", { x, y, width: wide, height: Math.max(this.y(base[i]) - y, 1), fill: line.colour }));
        base[i] += value;
      });
    }
  }

  showLegend() {
    const at = this.cursor ?? this.data.length - 1, entries = [];
    for (const line of this.lines) {
      const value = this.options.bars && this.cursor === null ? line.values.reduce((a, b) => a + (b || 0), 0) : this.near(line, at);
      entries.push(el("span", {}, el("i", { style: { background: line.colour } }), line.name + " ", el("b", {}, this.options.format(value))));
    }
    this.legend.replaceChildren(...entries);
    const words = this.lines.map(line => line.name + " " + this.options.format(this.near(line, this.data.length - 1))).join(", ");
    this.figure.setAttribute("aria-label", this.options.title + " over time, now: " + words + ". Arrow keys move through time.");
  }

  /** The value at a time; of the present, which may have none yet, the one before. */
  near(line, at) {
    const value = line.values[at];
    return value === null && at === this.data.length - 1 ? line.values[at - 1] : value;
  }

  point(offset) {
    if (!this.data) return;
    const last = this.data.length - 1;
    this.move(Math.min(Math.max(Math.round((offset - LEFT) / (this.width - LEFT - RIGHT) * last), 0), last));
  }

  move(cursor) {
    this.cursor = cursor;
    if (!this.data || !this.mark) return;
    this.mark.setAttribute("visibility", cursor === null ? "hidden" : "visible");
    this.tip.hidden = cursor === null;
    this.showLegend();
    if (cursor === null) return;
    const x = this.x(cursor);
    this.mark.setAttribute("x1", x); this.mark.setAttribute("x2", x);
    this.tip.replaceChildren(el("div", {}, clock(this.times[cursor])), ...this.lines.map(line => el("div", {}, el("i", { class: "dot", style: { background: line.colour } }), line.name + " " + this.options.format(line.values[cursor]))));
    const right = x > this.width / 2;
    this.tip.style.left = right ? "" : x + 8 + "px";
    this.tip.style.right = right ? this.width - x + 8 + "px" : "";
  }
}
