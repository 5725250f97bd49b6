// The script of runs.html: draws the curves, shows what is under the pointer, sorts the table. It has no library.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];  // ten colours, then the same ones dashed
const COLOURS = 10, SHOWN = 12;  // SHOWN: runs in a tooltip
const MARGIN = {left: 58, right: 14, top: 8, bottom: 34};
const shown = data.runs.map(() => true);
let chosen = null;  // the run whose legend is under the pointer

const colourOf = run => `var(--c${run % COLOURS})`;
const dashOf = run => DASHES[Math.floor(run / COLOURS) % DASHES.length];

// ------------------------------------------------------------------------------------------------ elements and numbers

function svg(name, attributes, parent) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (parent) parent.append(element);
  return element;
}

function html(name, properties, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

/** A number in at most four digits, as Python's %.4g. */
function short(value) {
  if (value !== 0 && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e6)) {
    return value.toExponential(3).replace(/\.?0+e/, "e");
  }
  return Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));
}

/** Round numbers from `low` to `high`, about `count` of them. */
function linearTicks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-9); i++) ticks.push(Number((i * step).toPrecision(10)));
  return ticks;
}

/** Round numbers for a logarithmic axis: 1, 2, 5 times powers of ten, or powers alone if these are many. */
function logTicks(low, high, count) {
  const ticks = [];
  const decades = Math.log10(high / low), factors = decades > 4 ? [1] : decades > 1.2 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const factor of factors) ticks.push(Number((factor * 10 ** power).toPrecision(10)));
  }
  const inside = ticks.filter(tick => tick >= low && tick <= high);
  const every = Math.max(1, Math.ceil(inside.length / (count + 3)));
  return inside.length > 1 ? inside.filter((_, i) => i % every === 0) : linearTicks(low, high, count);
}

/** The index in sorted `steps` of the number nearest to `step`. */
function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle; else high = middle;
  }
  return step - steps[low] <= steps[high] - step ? low : high;
}

// ------------------------------------------------------------------------------------------------------------ a chart

class Chart {
  constructor(plot, {log, curves}) {
    Object.assign(this, {plot, curves, wantsLog: log});
    this.tooltip = html("div", {className: "tooltip", hidden: true});
    plot.append(this.tooltip);
    plot.style.position = "relative";
    plot.addEventListener("pointermove", event => this.hover(event));
    plot.addEventListener("pointerleave", () => this.leave());
    new ResizeObserver(() => this.draw()).observe(plot);
  }

  /** The runs that are on and have this curve. */
  runs() {
    return data.runs.map((_, run) => run).filter(run => shown[run] && this.curves[run]);
  }

  /** What the axes have to hold: the least and the greatest step and value, and whether a logarithm can be taken. */
  measure() {
    const steps = [], values = [];
    for (const run of this.runs()) {
      const [own, all] = this.curves[run];
      steps.push(own[0], own[own.length - 1]);
      for (const value of all) if (value !== null) values.push(value);
    }
    if (!values.length) return false;
    const least = list => list.reduce((a, b) => Math.min(a, b)), most = list => list.reduce((a, b) => Math.max(a, b));
    let [low, high] = [least(values), most(values)];
    this.log = this.wantsLog && low > 0;
    if (this.log) [low, high] = [low / 1.05, high * 1.05];
    else [low, high] = [Math.min(0, low), high + (high - Math.min(0, low)) * 0.05 || 1];
    Object.assign(this, {low, high, first: least(steps), last: most(steps)});
    if (this.first === this.last) { this.first -= 1; this.last += 1; }
    return true;
  }

  x(step) {
    return MARGIN.left + (step - this.first) / (this.last - this.first) * (this.width - MARGIN.left - MARGIN.right);
  }

  y(value) {
    const share = this.log ? Math.log(value / this.low) / Math.log(this.high / this.low) : (value - this.low) / (this.high - this.low);
    return this.height - MARGIN.bottom - share * (this.height - MARGIN.top - MARGIN.bottom);
  }

  draw() {
    this.width = this.plot.clientWidth;
    this.height = this.plot.clientHeight;
    if (this.root) this.root.remove();
    this.tooltip.hidden = true;
    this.root = svg("svg", {width: this.width, height: this.height, role: "img", "aria-label": "curves of all runs"}, this.plot);
    if (!this.measure()) {
      svg("text", {x: this.width / 2, y: this.height / 2, "text-anchor": "middle"}, this.root).textContent = "no values";
      return;
    }
    this.drawAxes();
    for (const run of this.runs()) this.drawCurve(run);
    this.marks = svg("g", {}, this.root);
    this.emphasise();
  }

  drawAxes() {
    const right = this.width - MARGIN.right, bottom = this.height - MARGIN.bottom;
    for (const tick of (this.log ? logTicks : linearTicks)(this.low, this.high, 5)) {
      svg("path", {class: "grid", d: `M${MARGIN.left} ${this.y(tick)}H${right}`}, this.root);
      svg("text", {x: MARGIN.left - 7, y: this.y(tick) + 4, "text-anchor": "end"}, this.root).textContent = short(tick);
    }
    for (const tick of linearTicks(this.first, this.last, Math.max(2, this.width / 110)).filter(Number.isInteger)) {
      svg("path", {class: "axis", d: `M${this.x(tick)} ${bottom}v4`}, this.root);
      svg("text", {x: this.x(tick), y: bottom + 17, "text-anchor": "middle"}, this.root).textContent = short(tick);
    }
    svg("path", {class: "axis", d: `M${MARGIN.left} ${bottom}H${right}`}, this.root);
    svg("text", {x: right, y: this.height - 3, "text-anchor": "end"}, this.root).textContent = "step";
  }

  drawCurve(run) {
    const [steps, values] = this.curves[run];
    let path = "", pen = "M";
    steps.forEach((step, i) => {
      if (values[i] === null) { pen = "M"; return; }  // a gap where there is no number
      path += `${pen}${this.x(step).toFixed(1)} ${this.y(values[i]).toFixed(1)}`;
      pen = "L";
    });
    const style = {class: "curve", d: path, stroke: colourOf(run), "stroke-dasharray": dashOf(run), "data-run": run};
    svg("path", style, this.root);
    if (steps.length <= 40) {
      steps.forEach((step, i) => values[i] !== null &&
        svg("circle", {class: "curve", r: 2, cx: this.x(step), cy: this.y(values[i]), stroke: colourOf(run), "data-run": run}, this.root));
    }
  }

  /** Bring the chosen run to the fore. */
  emphasise() {
    this.root.classList.toggle("strong", chosen !== null && shown[chosen]);
    for (const element of this.root.querySelectorAll(".curve")) {
      element.classList.toggle("chosen", Number(element.dataset.run) === chosen);
    }
  }

  hover(event) {
    const runs = this.runs();
    if (!runs.length || !this.marks) return;
    const box = this.plot.getBoundingClientRect(), [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const wanted = this.first + (x - MARGIN.left) / (this.width - MARGIN.left - MARGIN.right) * (this.last - this.first);
    const points = runs.map(run => {
      const [steps, values] = this.curves[run], i = nearest(steps, wanted);
      return {run, step: steps[i], value: values[i]};
    }).filter(point => point.value !== null);
    points.sort((a, b) => Math.abs(this.y(a.value) - y) - Math.abs(this.y(b.value) - y));
    const near = points.slice(0, SHOWN).sort((a, b) => b.value - a.value);
    this.mark(near, x);
    this.tell(near, points.length - near.length, x, y);
  }

  mark(points, x) {
    this.marks.replaceChildren();
    const right = this.width - MARGIN.right, at = Math.min(right, Math.max(MARGIN.left, x));
    svg("path", {class: "cursor", d: `M${at} ${MARGIN.top}V${this.height - MARGIN.bottom}`}, this.marks);
    for (const {run, step, value} of points) {
      svg("circle", {class: "dot", r: 4.5, cx: this.x(step), cy: this.y(value), fill: colourOf(run)}, this.marks);
    }
  }

  tell(points, others, x, y) {
    this.tooltip.replaceChildren(...points.map(({run, step, value}) => {
      const spot = html("i", {});
      spot.style.background = colourOf(run);
      const words = [data.runs[run], `step ${step.toLocaleString("en")}`].map(text => html("span", {textContent: text}));
      return html("div", {}, spot, ...words, html("b", {textContent: short(value)}));
    }));
    if (others > 0) this.tooltip.append(html("div", {className: "dim", textContent: `and ${others} more`}));
    this.tooltip.hidden = !points.length;
    const {offsetWidth: width, offsetHeight: height} = this.tooltip;
    const left = x + 16 + width <= this.width ? x + 16 : x - 16 - width;
    this.tooltip.style.left = `${Math.min(Math.max(0, left), Math.max(0, this.width - width))}px`;
    this.tooltip.style.top = `${Math.max(0, Math.min(y - height / 2, this.height - height))}px`;
  }

  leave() {
    this.tooltip.hidden = true;
    if (this.marks) this.marks.replaceChildren();
  }
}

// ----------------------------------------------------------------------------------------------- legend, table, links

function makeLegend(charts) {
  const legend = document.getElementById("legend");
  const buttons = data.runs.map((name, run) => {
    const line = svg("svg", {width: 22, height: 8});
    svg("path", {d: "M1 4H21", "stroke-width": 2.5, stroke: colourOf(run), "stroke-dasharray": dashOf(run)}, line);
    const button = html("button", {type: "button", onclick: () => turn([run], !shown[run])}, line, name);
    button.onpointerenter = () => choose(run);
    button.onpointerleave = () => choose(null);
    return button;
  });
  const turn = (runs, on) => {
    for (const run of runs) shown[run] = on;
    buttons.forEach((button, run) => button.setAttribute("aria-pressed", shown[run]));
    for (const chart of charts) chart.draw();
  };
  const choose = run => {
    chosen = run;
    for (const chart of charts) chart.emphasise();
  };
  const every = data.runs.map((_, run) => run);
  const all = html("button", {type: "button", className: "all", textContent: "all", onclick: () => turn(every, true)});
  const none = html("button", {type: "button", className: "all", textContent: "none", onclick: () => turn(every, false)});
  legend.append(...(buttons.length > 2 ? [all, none] : []), ...buttons);
  turn([], true);
}

/** Numbers before texts; what has no value comes last in both directions. */
function compare(a, b, direction) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const numbers = [Number(a), Number(b)], isNumber = numbers.map(n => !Number.isNaN(n));
  if (isNumber[0] && isNumber[1]) return direction * (numbers[0] - numbers[1]);
  if (isNumber[0] !== isNumber[1]) return direction * (isNumber[0] ? -1 : 1);
  return direction * a.localeCompare(b, "en", {numeric: true});
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.key;
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b), direction)));
  }));
}

/** Open the part of the page that a link in the table leads to. */
function openTarget() {
  const target = document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
}

const plots = document.querySelectorAll(".plot");
const charts = data.charts.map((chart, i) => new Chart(plots[i], chart));
makeLegend(charts);
makeSortable(document.getElementById("runs"));
addEventListener("hashchange", openTarget);
openTarget();
