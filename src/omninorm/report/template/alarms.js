// The timeline of alarms: one lane per rule. Selecting an alarm marks it in every figure.
let chosen = null;

function choose(number) {
  chosen = number === chosen ? null : number;
  const alarm = chosen === null ? null : data.alarms[chosen];
  for (const tick of document.querySelectorAll('.tick')) tick.setAttribute('aria-pressed', String(Number(tick.dataset.alarm) === chosen));
  for (const row of document.querySelectorAll('#table-alarms tbody tr')) row.classList.toggle('chosen', row.id === `alarm-${chosen}`);
  for (const figure of figures) { figure.mark(alarm); figure.showHair(alarm ? alarm[0] : null); }
}

function drawTimeline() {
  const place = document.getElementById('timeline');
  if (!place || !data.alarms.length) return;
  const lanes = make('div', 'lanes'), rules = new Map();
  lanes.setAttribute('role', 'group');
  lanes.setAttribute('aria-label', 'Alarms by rule and step');
  data.alarms.forEach((alarm, number) => rules.set(alarm[2], [...(rules.get(alarm[2]) || []), number]));
  for (const [rule, numbers] of rules) {
    const track = make('div', 'track');
    for (const number of numbers) track.append(tickOf(number));
    lanes.append(make('code', 'rule', rule), track);
  }
  lanes.append(make('span', 'corner'), axis());
  place.replaceChildren(make('p', 'intro', 'Click an alarm here or in the table to mark it in every figure. ▲ failure, ○ warning.'), lanes);
}

const share = step => `${clamp((step - range.low) / (range.high - range.low), 0, 1) * 100}%`;

function tickOf(number) {
  const [step, severity, rule, layer] = data.alarms[number], tick = make('button', `tick ${severity}`, severity === 'fail' ? '▲' : '○');
  tick.type = 'button';
  tick.dataset.alarm = String(number);
  tick.style.left = share(step);
  const words = `${severity === 'fail' ? 'Failure' : 'Warning'} at step ${count(step)}: ${rule}${layer ? `, ${layer}` : ''}`;
  tick.setAttribute('aria-label', words);
  tick.title = words;
  tick.setAttribute('aria-pressed', 'false');
  tick.addEventListener('click', () => choose(number));
  return tick;
}

function axis() {
  const line = make('div', 'axis'), found = stepTicks(window.innerWidth < 560 ? 4 : 8);
  line.setAttribute('aria-hidden', 'true');
  for (const step of found) {
    const label = line.appendChild(make('span', '', stepLabel(step))), part = (step - range.low) / (range.high - range.low);
    label.style.left = share(step);
    if (part > 0.97) label.className = 'last';
    if (part < 0.03) label.className = 'first';
  }
  return line;
}
