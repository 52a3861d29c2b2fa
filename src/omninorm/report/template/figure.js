// The base class of maps and curves: the common axis of steps and the marks of alarms.
const LEFT = 72, RIGHT = 10, TOP = 14, BOTTOM = 20;
const gaps = data.steps.slice(1).map((step, i) => step - data.steps[i]).sort((a, b) => a - b);
const gap = gaps.length ? gaps[gaps.length >> 1] : 1;
const range = {
  low: Math.min(data.first, data.steps.length ? data.steps[0] : Infinity),
  high: Math.max(data.last, data.steps.length ? data.steps[data.steps.length - 1] + gap / 2 : -Infinity),
};
if (!(range.high > range.low)) { range.low -= 0.5; range.high = range.low + 1; }
const figures = [];

// Round steps for an axis, plus the first step if there is room: a run begins at step 1, not at 0.
function stepTicks(number) {
  const found = ticks(range.low, range.high, number).filter(Number.isInteger), room = (range.high - range.low) / (2.5 * number);
  if (Number.isInteger(range.low) && !(found[0] - range.low < room)) found.unshift(range.low);
  return found;
}

// Shortens a text in its middle to a width in pixels: names differ at either end.
function fitting(context, text, wide) {
  for (let end = text.length; end > 0; end--) {
    const cut = end < text.length ? `${text.slice(0, Math.ceil(end / 2))}…${text.slice(text.length - Math.floor(end / 2))}` : text;
    if (context.measureText(cut).width <= wide) return cut;
  }
  return '';
}

class Figure {
  constructor(element, height) {
    this.element = element;
    this.plot = element.querySelector('.plot');
    this.canvas = element.querySelector('.plot canvas');
    this.title = element.querySelector('h3').textContent;
    this.data = data.figures[element.dataset.name];
    this.height = height;
    this.drawn = false;
    this.canvas.style.height = `${height + TOP + BOTTOM}px`;
    this.hair = this.plot.appendChild(make('div', 'hair'));
    this.spot = this.plot.appendChild(make('div', 'spot'));
    this.hair.hidden = this.spot.hidden = true;
    this.cursor = null;
  }

  measure() { this.width = this.plot.clientWidth; }
  get inner() { return this.width - LEFT - RIGHT; }
  x(step) { return LEFT + (step - range.low) / (range.high - range.low) * this.inner; }
  step(x) { return range.low + (x - LEFT) / this.inner * (range.high - range.low); }

  // Fits the canvas to its container and draws the axis of steps. Subclasses draw the rest.
  draw() {
    this.drawn = true;
    this.measure();
    this.ratio = Math.min(3, window.devicePixelRatio || 1);
    const context = this.canvas.getContext('2d');
    this.canvas.width = Math.round(this.width * this.ratio);
    this.canvas.height = Math.round((this.height + TOP + BOTTOM) * this.ratio);
    this.hair.style.top = `${TOP}px`;
    this.hair.style.height = `${this.height}px`;
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.font = '11px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';
    this.paint(context);
    this.drawSteps(context);
    this.drawAlarms(context);
  }

  drawSteps(context) {
    const base = TOP + this.height;
    context.fillStyle = paint('soft');
    context.strokeStyle = paint('line');
    context.lineWidth = 1;
    context.textBaseline = 'top';
    for (const tick of stepTicks(Math.max(2, this.inner / 75))) {
      const x = this.x(tick), label = stepLabel(tick), half = context.measureText(label).width / 2;
      context.beginPath(); context.moveTo(x, base); context.lineTo(x, base + 4); context.stroke();
      context.textAlign = 'center';
      context.fillText(label, Math.min(x, this.width - half - 1), base + 6);
    }
  }

  // A triangle for a failure, a ring for a warning, above the plot. Of overlapping marks the most severe is drawn.
  drawAlarms(context) {
    const taken = [];
    const graver = [...data.alarms].sort((a, b) => (a[1] === 'warn') - (b[1] === 'warn'));
    for (const [step, severity] of graver) {
      const x = clamp(this.x(step), LEFT, this.width - RIGHT), fail = severity === 'fail';
      if (taken.some(other => Math.abs(other - x) < 7)) continue;
      taken.push(x);
      context.strokeStyle = context.fillStyle = paint(severity);
      context.lineWidth = 1.5;
      context.beginPath();
      if (fail) { context.moveTo(x, 2); context.lineTo(x + 4.5, 10); context.lineTo(x - 4.5, 10); context.fill(); }
      else { context.arc(x, 6, 3.2, 0, 7); context.stroke(); }
    }
    return taken;
  }

  showHair(step) {
    const x = step === null ? -1 : this.x(step);
    this.hair.hidden = !(x >= LEFT - 1 && x <= this.width - RIGHT + 1);
    if (!this.hair.hidden) this.hair.style.left = `${x}px`;
  }
}
