"use strict";
// A press sorts by that column: numbers largest first, words from A; the next press turns it round.
for (const button of document.querySelectorAll("table.sortable button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement;
    const column = head.cellIndex;
    const body = head.closest("table").tBodies[0];
    const rows = [...body.rows];
    const numbers = rows.some((row) => row.cells[column].dataset.value !== undefined);
    const now = head.getAttribute("aria-sort");
    const first = numbers ? "descending" : "ascending";
    const other = numbers ? "ascending" : "descending";
    const order = now === first ? other : first;
    const value = (row) => numbers ? Number(row.cells[column].dataset.value) : row.cells[column].textContent;
    const words = new Intl.Collator("en", { numeric: true });
    const compare = numbers ? (a, b) => a - b : words.compare;
    rows.sort((a, b) => compare(value(a), value(b)) * (order === "ascending" ? 1 : -1));
    for (const cell of head.parentElement.cells) cell.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    body.append(...rows);
  });
}
