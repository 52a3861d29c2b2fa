// A curve over the steps.
class Curve extends Figure {
  constructor(element) {
    super(element, 180);
    const {log, others = []} = this.data, y = [this.data, ...others].flatMap(each => each.y);
    const low = Math.min(...y), high = Math.max(...y);
    this.constant = low === high;
    const room = log ? 1.12 : (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    // The axis of a learning rate or loss that is never negative does not extend below 0.
    Object.assign(this, log ? {low: low / room, high: high * room} : {low: low >= 0 ? Math.max(0, low - room) : low - room, high: high + room});
    if (!y.length) Object.assign(this, {low: 0, high: 1});
  }

  y(value) {
    const scale = this.data.log ? Math.log : each => each;
    return TOP + this.height * (1 - (scale(value) - scale(this.low)) / (scale(this.high) - scale(this.low)));
  }

  levels() {
    if (this.constant) return [this.data.y[0]];
    if (!this.data.log) return ticks(this.low, this.high, 5);
    const found = [], first = Math.floor(Math.log10(this.low)), last = Math.ceil(Math.log10(this.high));
    const decades = last - first, thin = Math.max(1, Math.ceil((decades - 1) / 5)), digits = decades <= 1 ? [1, 2, 3, 5, 7] : decades <= 2 ? [1, 2, 5] : decades <= 3 ? [1, 3] : [1];
    for (let power = first; power <= last; power += thin) for (const digit of digits) found.push(digit * 10 ** power);
    return found.filter(level => level >= this.low && level <= this.high);
  }

  // One notation per axis, with enough digits to distinguish its ticks. A label is condensed rather than cut off.
  labelsOf(levels) {
    const most = Math.max(...levels.map(Math.abs)), step = levels.length > 1 ? levels[1] - levels[0] : 0;
    if (this.constant || this.data.log || !step) return levels.map(level => short(level, 4));
    const places = Math.ceil(-Math.log10(step) - 1e-9), digits = clamp(places, 0, 9);
    if (most >= 1e-3 && most < 1e6) return levels.map(level => level ? level.toLocaleString('en', {minimumFractionDigits: digits, maximumFractionDigits: digits}) : '0');
    return levels.map(level => level ? level.toExponential(clamp(Math.floor(Math.log10(Math.abs(level)) + 1e-9) + places, 0, 6)).replace('e+', 'e') : '0');
  }

  paint(context) {
    context.textAlign = 'right';
    context.textBaseline = 'middle';
    context.lineWidth = 1;
    const levels = this.levels(), labels = this.labelsOf(levels);
    for (const [i, level] of levels.entries()) {
      const y = this.y(level);
      context.strokeStyle = paint('grid');
      context.beginPath(); context.moveTo(LEFT, y); context.lineTo(this.width - RIGHT, y); context.stroke();
      context.fillStyle = paint('soft');
      context.fillText(labels[i], LEFT - 6, y, LEFT - 8);
    }
    this.paintBand(context);
    this.paintAlarmLines(context);
    context.fillStyle = PATTERNS.nan;
    for (const step of this.data.bad) context.fillRect(this.x(step) - 1, TOP, 2.5, this.height);
    this.paintCurve(context);
  }

  // The ordinary range at each sample: pale inside, with a dashed line at its end.
  paintBand(context) {
    const band = this.data.band || [], edge = (value, otherwise) => value === null ? otherwise : clamp(this.y(value), TOP, TOP + this.height);
    const edges = [new Path2D(), new Path2D()];
    context.save();
    context.strokeStyle = paint('warn'); context.lineWidth = 1; context.setLineDash([4, 3]);
    band.forEach(([step, low, high], i) => {
      const from = Math.round(this.x(i ? band[i - 1][0] : step)), to = Math.round(this.x(step)), top = edge(high, TOP), bottom = edge(low, TOP + this.height);
      context.fillStyle = paint('band');
      context.fillRect(from, top, to - from, bottom - top);
      for (const [value, y, edge] of [[high, top, edges[0]], [low, bottom, edges[1]]]) {
        if (value !== null && y > TOP && y < TOP + this.height) { edge.lineTo(from, y); edge.lineTo(to, y); } else edge.moveTo(to, y);
      }
    });
    for (const edge of edges) context.stroke(edge);
    context.restore();
  }

  paintCurve(context) {
    this.paintSeries(context, this.data, this.data.colour || 'accent');
    for (const other of this.data.others || []) this.paintSeries(context, other, other.colour);
  }

  paintSeries(context, {x, y, bad, mean}, colour) {
    context.strokeStyle = context.fillStyle = paint(colour);
    context.lineJoin = 'round';
    // Where steps were thinned, the extremes form a pale band and the means a line.
    context.lineWidth = mean.length ? 1 : 1.4;
    context.globalAlpha = mean.length ? 0.35 : 1;
    this.trace(context, x, y, bad);
    context.globalAlpha = 1;
    context.lineWidth = 1.6;
    this.trace(context, mean.map(([step]) => step), mean.map(([, value]) => value), bad);
    if (x.length > this.inner / 12) return;
    x.forEach((step, i) => { context.beginPath(); context.arc(this.x(step), this.y(y[i]), 2.2, 0, 7); context.fill(); });
  }

  // The line is interrupted at non-finite steps.
  trace(context, x, y, bad) {
    let next = 0;
    context.beginPath();
    x.forEach((step, i) => {
      let broken = i === 0;
      while (next < bad.length && bad[next] < step) { broken = true; next++; }
      if (broken) context.moveTo(this.x(step), this.y(y[i])); else context.lineTo(this.x(step), this.y(y[i]));
    });
    context.stroke();
  }

  paintAlarmLines(context) {
    for (const [step, severity] of data.alarms) {
      context.strokeStyle = paint(severity);
      context.globalAlpha = 0.55;
      context.setLineDash(severity === 'fail' ? [] : [2, 4]);
      context.beginPath(); context.moveTo(this.x(step), TOP); context.lineTo(this.x(step), TOP + this.height); context.stroke();
    }
    context.globalAlpha = 1;
    context.setLineDash([]);
  }

  at(x) { return [nearest(this.data.x, this.step(x)), 0]; }

  describe([index]) {
    const {x, y} = this.data;
    if (!x.length) return {step: this.data.bad[0], value: 'never a finite number', layer: '', x: this.x(this.data.bad[0]), y: TOP};
    const step = x[index], both = (this.data.others || []).map(other => [other.name, other.y[nearest(other.x, step)]]);
    const layer = both.length ? `${this.data.name}; ${both.map(([name, value]) => `${name} ${short(value)}`).join('; ')}` : '';
    return {step, value: short(y[index]), layer, x: this.x(x[index]), y: this.y(y[index])};
  }

  move([index], right) { return [clamp(index + right, 0, Math.max(0, this.data.x.length - 1)), 0]; }
  start() { return [Math.max(0, this.data.x.length - 1), 0]; }
  mark() {}
}
