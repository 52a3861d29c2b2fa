// Responds to the pointer, the keys, the window's width and the theme.
const tip = document.getElementById('tip'), live = document.getElementById('live');

function point(figure, cursor, spoken) {
  const described = figure.describe(cursor), box = figure.plot.getBoundingClientRect();
  figure.cursor = cursor;
  for (const other of figures) other.showHair(described.step);
  figure.spot.hidden = false;
  figure.spot.style.left = `${described.x}px`;
  figure.spot.style.top = `${described.y}px`;
  tip.replaceChildren(make('b', '', described.value), ...(described.layer ? [make('span', '', described.layer)] : []), make('span', '', `step ${count(described.step)}`));
  tip.hidden = false;
  const x = box.left + described.x, y = box.top + described.y, {offsetWidth: wide, offsetHeight: high} = tip;
  tip.style.left = `${clamp(x + 16 + wide > root.clientWidth ? x - wide - 16 : x + 16, 4, Math.max(4, root.clientWidth - wide - 4))}px`;
  tip.style.top = `${y - high - 12 < 4 ? y + 16 : y - high - 12}px`;
  if (spoken) live.textContent = [described.value, described.layer, `step ${count(described.step)}`].filter(Boolean).join(', ');
}

function leave(figure) {
  tip.hidden = true;
  figure.spot.hidden = true;
  const alarm = chosen === null ? null : data.alarms[chosen];
  for (const other of figures) other.showHair(alarm ? alarm[0] : null);
}

const KEYS = {
  ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-1e9, 0], End: [1e9, 0], PageUp: [-20, 0], PageDown: [20, 0],
};

function listen(figure) {
  const {plot} = figure;
  const follow = event => {
    const box = plot.getBoundingClientRect();
    point(figure, figure.at(event.clientX - box.left, event.clientY - box.top), false);
  };
  plot.addEventListener('pointermove', follow);
  plot.addEventListener('pointerdown', follow);
  plot.addEventListener('pointerleave', event => { if (event.pointerType === 'mouse') leave(figure); });
  plot.addEventListener('blur', () => leave(figure));
  plot.addEventListener('focus', () => { if (plot.matches(':focus-visible')) point(figure, figure.cursor || figure.start(), true); });
  plot.addEventListener('keydown', event => {
    if (event.key === 'Escape') leave(figure);
    if (!(event.key in KEYS) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    point(figure, figure.move(figure.cursor || figure.start(), ...KEYS[event.key]), true);
  });
}

// Draws figures in or near the viewport immediately and the rest when idle.
const sight = new IntersectionObserver(entries => {
  for (const {isIntersecting, target} of entries) if (isIntersecting) drawOnce(figures.find(figure => figure.plot === target));
}, {rootMargin: '400px'});

function drawOnce(figure) {
  sight.unobserve(figure.plot);
  if (!figure.drawn) figure.draw();
}

function drawRest() {
  const next = figures.find(figure => !figure.drawn);
  if (next) { drawOnce(next); setTimeout(drawRest); } else root.dataset.drawn = String(figures.length);
}

function drawAll() {
  const alarm = chosen === null ? null : data.alarms[chosen];
  for (const figure of figures) { figure.measure(); figure.drawn = false; sight.observe(figure.plot); }
  for (const figure of figures) { figure.mark(alarm); figure.showHair(alarm ? alarm[0] : null); }
  setTimeout(drawRest, 50);
}

function setUpTheme() {
  const button = document.getElementById('theme'), system = matchMedia('(prefers-color-scheme: dark)');
  const dark = () => root.dataset.theme ? root.dataset.theme === 'dark' : system.matches;
  const name = () => { button.textContent = dark() ? 'Light' : 'Dark'; button.setAttribute('aria-label', `Switch to ${dark() ? 'light' : 'dark'} colours`); };
  button.addEventListener('click', () => { root.dataset.theme = dark() ? 'light' : 'dark'; name(); drawAll(); });
  system.addEventListener('change', () => { name(); drawAll(); });
  button.hidden = false;
  name();
}

for (const element of document.querySelectorAll('[data-figure]')) {
  const figure = new (element.dataset.figure === 'map' ? HeatMap : Curve)(element);
  figures.push(figure);
  listen(figure);
}
setUpTheme();
drawTimeline();
document.querySelectorAll('#table-alarms, #table-layers, #table-norms').forEach(makeSortable);
document.querySelectorAll('.show').forEach(button => button.addEventListener('click', () => choose(Number(button.dataset.alarm))));
drawAll();
if (!restore() && data.lead !== null) choose(data.lead);
refreshLater();
let width = window.innerWidth;
window.addEventListener('resize', () => {
  if (window.innerWidth === width) return;
  width = window.innerWidth;
  drawAll();
});
window.addEventListener('beforeprint', () => figures.forEach(drawOnce));
root.dataset.ready = String(figures.length);
