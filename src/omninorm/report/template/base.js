// All scripts together form the body of one function. Text from the record only goes into textContent and canvases.
const data = JSON.parse(document.getElementById('data').textContent);
const root = document.documentElement;

const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const paint = name => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

// Formats numbers as text.short does in Python.
function short(value, digits = 4) {
  if (value === null || value === undefined) return 'no value';
  if (Number.isNaN(value)) return 'NaN';
  if (!Number.isFinite(value)) return value > 0 ? '∞' : '−∞';
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) {
    const [mantissa, exponent] = value.toExponential(digits - 1).split('e');
    return `${Number(mantissa)}e${Number(exponent)}`;
  }
  return size >= 1000 ? Math.round(value).toLocaleString('en') : String(Number(value.toPrecision(digits)));
}

const count = value => value.toLocaleString('en');
const stepLabel = value => value >= 1e6 ? `${value / 1e6}M` : value >= 1e4 ? `${value / 1e3}k` : count(value);

// Round numbers between two limits, about as many as requested.
function ticks(low, high, number) {
  const rough = (high - low) / Math.max(1, number), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find(each => each * power >= rough * 0.999) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

// Index of the element of an ascending list that is nearest to a value.
function nearest(list, value) {
  let low = 0, high = list.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle] < value) low = middle; else high = middle;
  }
  return Math.abs(list[high] - value) < Math.abs(list[low] - value) ? high : low;
}

// Viridis: perceptually uniform, monotone in lightness, and safe for colour-blind readers.
const ANCHORS = [[68, 1, 84], [72, 36, 117], [65, 68, 135], [53, 95, 141], [42, 120, 142], [33, 145, 140], [34, 168, 132],
  [68, 191, 112], [122, 209, 81], [189, 223, 38], [253, 231, 37]];
const SCALE = Array.from({length: 256}, (_, i) => {
  const place = i / 255 * 10, left = Math.min(9, Math.floor(place)), part = place - left;
  return ANCHORS[left].map((from, channel) => Math.round(from + part * (ANCHORS[left + 1][channel] - from)));
});

// Blue to red through pale grey, for differences: equal lightness on both sides, and safe for colour-blind readers.
const SIDES = [[5, 48, 97], [67, 147, 195], [240, 240, 238], [214, 96, 77], [103, 0, 31]];
const DIVERGING = Array.from({length: 256}, (_, i) => {
  const place = i / 255 * 4, left = Math.min(3, Math.floor(place)), part = place - left;
  return SIDES[left].map((from, channel) => Math.round(from + part * (SIDES[left + 1][channel] - from)));
});

// The same colours as numbers, in the byte order of a canvas.
const packed = scale => new Uint32Array(new Uint8Array(scale.flatMap(colour => [...colour, 255])).buffer);
const PACKED = packed(SCALE), PACKED_SIDES = packed(DIVERGING);

// Stripes for non-finite values: rising for NaN, falling for infinity, so that they differ without colour.
function stripes(kind) {
  const tile = make('canvas'), context = tile.getContext('2d');
  tile.width = tile.height = 6;
  const image = context.createImageData(6, 6), [dark, light] = kind === 'nan' ? [[200, 0, 90], [255, 255, 255]] : [[20, 20, 20], [255, 150, 30]];
  for (let y = 0; y < 6; y++) for (let x = 0; x < 6; x++) {
    const along = kind === 'nan' ? (x + y) % 6 : (x - y + 6) % 6;
    image.data.set([...(along < 3 ? dark : light), 255], 4 * (6 * y + x));
  }
  context.putImageData(image, 0, 0);
  return context.createPattern(tile, 'repeat');
}
const PATTERNS = {nan: stripes('nan'), inf: stripes('inf')};
