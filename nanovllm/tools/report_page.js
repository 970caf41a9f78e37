document.querySelectorAll('.tabs').forEach(tabs => {
  const panes = [...tabs.parentElement.querySelectorAll(':scope > .pane')];
  const buttons = [...tabs.children];
  buttons.forEach((button, i) => button.onclick = () => {
    panes.forEach((pane, j) => pane.hidden = i !== j);
    buttons.forEach((other, j) => other.classList.toggle('on', i === j));
  });
});
document.querySelectorAll('table.sortable th').forEach((head, column) => head.onclick = () => {
  const body = head.closest('table').tBodies[0];
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const numbers = !isNaN(value(body.rows[0]));
  [...body.rows]
    .sort((a, b) => numbers ? value(b) - value(a) : value(a).localeCompare(value(b)))
    .forEach(row => body.append(row));
  head.parentElement.querySelectorAll('th')
    .forEach(other => other.classList.toggle('sorted', other === head));
});
