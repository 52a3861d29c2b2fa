// Column heads become buttons that sort the table, by a cell's data-value or else its text.
const keyOf = (row, column) => {
  const cell = row.cells[column], value = cell.dataset.value ?? cell.textContent.trim();
  if (value === '–' || value === '') return null;
  const number = Number(value);
  return Number.isNaN(number) ? value : number;
};

// Cells without a value stay at the end in both directions.
function compare(a, b, direction) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a === 'number' && typeof b === 'number') return direction * (a === b ? 0 : a - b);
  return direction * String(a).localeCompare(String(b), 'en', {numeric: true});
}

function sortBy(table, column) {
  const head = table.tHead.rows[0].cells[column], body = table.tBodies[0], numeric = typeof keyOf(body.rows[0], column) === 'number';
  const before = head.getAttribute('aria-sort'), first = numeric && column ? 'descending' : 'ascending';
  const order = before === null ? first : before === 'ascending' ? 'descending' : 'ascending';
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', order);
  const keyed = [...body.rows].map(row => [keyOf(row, column), row]);
  keyed.sort((a, b) => compare(a[0], b[0], order === 'ascending' ? 1 : -1));
  body.append(...keyed.map(([, row]) => row));
}

function makeSortable(table) {
  if (!table.tBodies[0].rows.length) return;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = make('button', '', head.textContent);
    button.type = 'button';
    button.addEventListener('click', () => sortBy(table, column));
    head.replaceChildren(button);
  });
}
