// A heat map: a row for each layer, a column for each sample.
const EDGES = data.steps.map((step, i) => {
  const before = i ? (data.steps[i - 1] + step) / 2 : -Infinity, after = i + 1 < data.steps.length ? (data.steps[i + 1] + step) / 2 : Infinity;
  // A sample extends to its neighbours, but not over a long stretch without samples.
  return [Math.max(before, step - 1.5 * gap), Math.min(after, step + 1.5 * gap)];
});

// Decodes values of two bytes each (bfloat16), all low bytes first. A very negative number means no value.
function decode(text) {
  const raw = atob(text), half = raw.length / 2, bits = new Uint32Array(half);
  for (let i = 0; i < half; i++) bits[i] = (raw.charCodeAt(half + i) << 24) | (raw.charCodeAt(i) << 16);
  return new Float32Array(bits.buffer);
}
const nothing = value => value < -2.9e38 && value !== -Infinity;
// Precedence where several cells share a pixel: NaN, then infinity, then a number, then no value.
const rank = value => Number.isNaN(value) ? 3 : Math.abs(value) === Infinity ? 2 : nothing(value) ? 0 : 1;

// Of the outlines of cells beyond a limit: the same in both themes, because the maps are.
const LINES = {warn: '#c47f00', fail: '#d1190b'};

class HeatMap extends Figure {
  constructor(element) {
    const {axis} = data.figures[element.dataset.name], rows = data.axes[axis].length;
    super(element, Math.round(clamp(rows * clamp(230 / rows, 2, 24), 48, 420)));
    this.names = data.axes[axis];
    this.labels = data.ticks[axis];
    this.rows = rows;
  }

  // Decoded on first use, because most maps are outside the window.
  get values() {
    const values = decode(this.data.data);
    Object.defineProperty(this, 'values', {value: values});
    return values;
  }

  value(column, row) { return this.values[column * this.rows + row]; }

  // A fixed scale where the values are shares of something; symmetric about 0 for differences. Otherwise
  // the colour range covers all but the outermost 1 % of the finite values, and is never so narrow that it shows only noise.
  findRange() {
    const {values} = this, {log} = this.data, kinds = new Set();
    let least = Infinity, most = -Infinity;
    for (const value of values) {
      const kind = rank(value);
      kinds.add(kind);
      if (kind === 1 && value < least) least = value;
      if (kind === 1 && value > most) most = value;
    }
    // The percentiles are estimated from a few thousand values.
    const stride = Math.ceil(values.length / 5000), few = values.filter((_, i) => (i * 7919) % stride === 0);
    const usable = few.filter(value => rank(value) === 1 && (!log || value > 0)).sort();
    const at = share => usable.length ? usable[Math.round(share * (usable.length - 1))] : 1;
    let low = at(0.01), high = at(0.99);
    if (log && high < 1.5 * low) { const middle = Math.sqrt(low * high); low = middle / 1.23; high = middle * 1.23; }
    if (!log && !this.data.difference && high - low < 0.02) { const middle = (low + high) / 2; low = Math.max(0, middle - 0.01); high = low + 0.02; }
    if (this.data.scale) [low, high] = this.data.scale;
    if (this.data.difference) { high = Math.max(-low, high, this.data.difference); low = -high; }
    Object.assign(this, {low, high, from: log ? Math.log(low) : low, to: log ? Math.log(high) : high});
    const room = (high - low) * 0.01;
    this.beyond = log ? [least < low * 0.99, most > high * 1.01] : [least < low - room, most > high + room];
    this.kinds = kinds;
  }

  shade(value) {
    const scaled = this.data.log ? Math.log(value) : value;
    return (this.data.difference ? PACKED_SIDES : PACKED)[Math.round(255 * clamp((scaled - this.from) / (this.to - this.from), 0, 1)) || 0];
  }

  paint(context) {
    if (!this.kinds) this.findRange();
    context.fillStyle = paint('nothing');
    context.fillRect(LEFT, TOP, this.inner, this.height);
    const wide = Math.max(1, Math.round(this.inner * this.ratio)), high = Math.min(this.rows, Math.round(this.height * this.ratio));
    const pixels = this.pool(wide, high), layer = make('canvas'), small = layer.getContext('2d');
    layer.width = wide; layer.height = high;
    const image = small.createImageData(wide, high), colours = new Uint32Array(image.data.buffer);
    for (let i = 0; i < pixels.length; i++) if (rank(pixels[i]) === 1) colours[i] = this.shade(pixels[i]);
    small.putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(layer, LEFT, TOP, this.inner, this.height);
    this.paintBad(context, pixels, wide, high);
    for (const limit of this.data.limits || []) this.paintLimit(context, pixels, wide, high, limit);
    this.drawRows(context);
    this.drawLegend();
  }

  // One value per pixel column and row: of the cells that share it, the one farthest from the middle of the range.
  pool(wide, high) {
    const {rows, values} = this, pixels = new Float32Array(wide * high).fill(-3e38);
    const middle = this.data.log ? Math.exp((this.from + this.to) / 2) : (this.low + this.high) / 2;
    const away = this.data.log ? value => value > middle ? value / middle : middle / Math.max(value, 1e-38) : value => Math.abs(value - middle);
    const place = step => (step - range.low) / (range.high - range.low) * wide;
    EDGES.forEach(([before, after], column) => {
      const left = clamp(Math.round(place(before)), 0, wide - 1), right = clamp(Math.round(place(after)), left + 1, wide);
      for (let row = 0; row < rows; row++) {
        const value = values[column * rows + row], line = Math.floor(row * high / rows) * wide, kind = rank(value);
        for (let x = left; x < right; x++) {
          const old = pixels[line + x], better = kind - rank(old);
          if (better > 0 || (better === 0 && kind === 1 && away(value) > away(old))) pixels[line + x] = value;
        }
      }
    });
    return pixels;
  }

  paintBad(context, pixels, wide, high) {
    if (!this.kinds.has(2) && !this.kinds.has(3)) return;
    const unit = this.inner / wide, tall = this.height / high;
    for (let y = 0; y < high; y++) for (let x = 0; x < wide; x++) {
      const kind = rank(pixels[y * wide + x]);
      if (kind < 2) continue;
      let end = x + 1;
      while (end < wide && rank(pixels[y * wide + end]) === kind) end++;
      context.fillStyle = PATTERNS[kind === 3 ? 'nan' : 'inf'];
      context.fillRect(LEFT + x * unit, TOP + y * tall, Math.max(2, (end - x) * unit), tall);
      x = end - 1;
    }
  }

  // Outlines the cells beyond a limit, in the colour of its severity; dashed if a further condition must hold.
  paintLimit(context, pixels, wide, high, [warn, fail, below, conditional]) {
    for (const [name, value] of [['warn', warn], ['fail', fail]]) {
      if (value === null) continue;
      const outline = this.outline(pixels, wide, high, each => rank(each) === 1 && (below ? each < value : each > value));
      context.setLineDash(conditional ? [4, 3] : []);
      context.strokeStyle = '#fff'; context.lineWidth = 3.5; context.stroke(outline);
      context.strokeStyle = LINES[name]; context.lineWidth = 1.8; context.stroke(outline);
      context.setLineDash([]);
    }
  }

  // The borders between pixels for which a condition holds and those for which it does not.
  outline(pixels, wide, high, holds) {
    const path = new Path2D(), unit = this.inner / wide, tall = this.height / high, inside = pixels.map(value => holds(value) ? 1 : 0);
    const at = (x, y) => x >= 0 && x < wide && y >= 0 && y < high ? inside[y * wide + x] : 0;
    for (let y = 0; y <= high; y++) for (let x = 0; x < wide; x++) {
      if (at(x, y) === at(x, y - 1)) continue;
      const from = x;
      while (x + 1 < wide && at(x + 1, y) !== at(x + 1, y - 1)) x++;
      const level = clamp(TOP + y * tall, TOP + 1, TOP + this.height - 1);
      path.moveTo(LEFT + from * unit, level); path.lineTo(LEFT + (x + 1) * unit, level);
    }
    for (let x = 0; x <= wide; x++) for (let y = 0; y < high; y++) {
      if (at(x, y) === at(x - 1, y)) continue;
      const from = y;
      while (y + 1 < high && at(x, y + 1) !== at(x - 1, y + 1)) y++;
      const place = clamp(LEFT + x * unit, LEFT + 1, LEFT + this.inner - 1);
      path.moveTo(place, TOP + from * tall); path.lineTo(place, TOP + (y + 1) * tall);
    }
    return path;
  }

  drawRows(context) {
    const tall = this.height / this.rows;
    context.fillStyle = paint('soft');
    context.textAlign = 'right';
    context.textBaseline = 'middle';
    // Every n-th block, and parts outside the blocks where there is room; names of groups come last.
    const numbers = this.labels.filter(label => /^\d+$/.test(label)).length, each = this.height / Math.max(1, numbers);
    const every = [1, 2, 4, 5, 8, 10, 20, 50, 100, 500].find(step => step * each >= 20) || 1000;
    let last = -Infinity;
    const wanted = this.labels.map((label, row) => [label, row]).filter(([label]) => label && (!/^\d+$/.test(label) || Number(label) % every === 0));
    for (const [label, row] of wanted) {
      const y = TOP + (row + 0.5) * tall;
      if (y - last < 12 || y > TOP + this.height) continue;
      last = y;
      context.fillText(fitting(context, label, LEFT - 8), LEFT - 6, clamp(y, TOP + 5, TOP + this.height - 4));
    }
  }

  drawLegend() {
    const legend = this.element.querySelector('.legend'), bar = make('canvas');
    const limits = this.data.limits || [], band = limits.length ? 6 : 0;
    bar.width = 256; bar.height = 12 + band;
    bar.style.height = `${bar.height / 1.5}px`;
    const context = bar.getContext('2d');
    (this.data.difference ? DIVERGING : SCALE).forEach((colour, i) => { context.fillStyle = `rgb(${colour})`; context.fillRect(i, 0, 1, 12); });
    // Below the colours: which of them are healthy, and which are beyond a limit.
    for (let i = 0; band && i < 256; i++) {
      const part = this.from + (i + 0.5) / 256 * (this.to - this.from), value = this.data.log ? Math.exp(part) : part;
      context.fillStyle = paint(this.severity(value) || 'good');
      context.fillRect(i, 13, 1, 5);
    }
    bar.setAttribute('aria-hidden', 'true');
    const parts = [make('span', '', (this.beyond[0] ? '≤ ' : '') + short(this.low, 3)), bar, make('span', '', (this.beyond[1] ? '≥ ' : '') + short(this.high, 3))];
    if (this.data.log) parts.push(make('span', '', 'log'));
    if (limits.length) parts.push(make('span', 'healthy-key', 'within limits'));
    for (const [kind, name, pattern] of [[3, 'NaN', PATTERNS.nan], [2, 'infinite', PATTERNS.inf], [0, 'no value', null]]) {
      if (!this.kinds.has(kind)) continue;
      const key = make('canvas', 'key'), ink = key.getContext('2d');
      key.width = 16; key.height = 10;
      ink.fillStyle = pattern || paint('nothing');
      ink.fillRect(0, 0, 16, 10);
      ink.strokeStyle = paint('line');
      ink.strokeRect(0.5, 0.5, 15, 9);
      parts.push(key, make('span', '', name));
    }
    legend.replaceChildren(...parts);
  }

  // The gravest severity of a value by the limits, or null.
  severity(value) {
    const beyond = at => (this.data.limits || []).some(limit => limit[at] !== null && (limit[2] ? value < limit[at] : value > limit[at]));
    return beyond(1) ? 'fail' : beyond(0) ? 'warn' : null;
  }

  at(x, y) {
    const column = nearest(data.steps, this.step(x)), row = clamp(Math.floor((y - TOP) / this.height * this.rows), 0, this.rows - 1);
    return [column, row];
  }

  describe([column, row]) {
    const value = this.value(column, row), tall = this.height / this.rows;
    const severity = rank(value) === 1 && this.severity(value), beyond = severity ? ` (beyond the ${severity === 'fail' ? 'failure' : 'warning'} limit)` : '';
    return {
      step: data.steps[column], value: nothing(value) ? 'no value' : short(value, 3) + beyond, layer: this.names[row],
      x: this.x(data.steps[column]), y: TOP + (row + 0.5) * tall,
    };
  }

  move([column, row], right, down) { return [clamp(column + right, 0, data.steps.length - 1), clamp(row + down, 0, this.rows - 1)]; }
  start() { return [data.steps.length - 1, 0]; }

  // The row of the layer, or of the block that contains it.
  rowOf(layer) {
    let found = -1;
    this.names.forEach((name, row) => {
      if (layer === name || layer.startsWith(`${name}.`)) if (found < 0 || name.length > this.names[found].length) found = row;
    });
    return found;
  }

  mark(alarm) {
    if (this.box) this.box.remove();
    const row = alarm && alarm[3] ? this.rowOf(alarm[3]) : -1;
    if (row < 0) return;
    const tall = this.height / this.rows, size = Math.max(9, tall + 4), x = clamp(this.x(alarm[0]), LEFT, this.width - RIGHT);
    this.box = this.plot.appendChild(make('div', 'box'));
    Object.assign(this.box.style, {left: `${x - 7}px`, width: '14px', top: `${TOP + (row + 0.5) * tall - size / 2}px`, height: `${size}px`});
  }
}
