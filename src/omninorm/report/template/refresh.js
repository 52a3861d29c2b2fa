// A page of a run that is still going on loads itself again, and keeps its scroll position and the chosen alarm.
const KEPT = `omninorm ${document.title.split(':')[0]}`;

const opened = () => [...document.querySelectorAll('details')].map(each => each.open);

function keep() {
  try { sessionStorage.setItem(KEPT, JSON.stringify([window.scrollY, chosen, root.dataset.theme || '', opened()])); } catch { /* refused */ }
}

function restore() {
  let kept = null;
  try { kept = JSON.parse(sessionStorage.getItem(KEPT)); sessionStorage.removeItem(KEPT); } catch { /* refused */ }
  if (!kept) return false;
  if (kept[2]) root.dataset.theme = kept[2];
  if (kept[1] !== null && kept[1] < data.alarms.length) choose(kept[1]);
  if (kept[3].length === opened().length) document.querySelectorAll('details').forEach((each, i) => { each.open = kept[3][i]; });
  window.scrollTo({top: kept[0], behavior: 'instant'});
  return true;
}

function refreshLater() {
  if (data.refresh) setTimeout(() => { keep(); location.reload(); }, 1000 * data.refresh);
}
