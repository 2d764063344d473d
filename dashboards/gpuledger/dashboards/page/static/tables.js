// Tables: sortable, with amounts right-aligned and their exact value on hover; `exact` shows every digit instead.

import { colourOf, label, stateColour } from "/static/colours.js";
import { element } from "/static/dom.js";
import { dateTime, formatValue, relative } from "/static/format.js";

const NUMERIC = new Set(["money", "money_per_second", "money_per_hour", "gpus", "count", "share"]);

function compare(a, b, unit) {
  if (a === null || b === null) return a === b ? 0 : a === null ? 1 : -1;
  return NUMERIC.has(unit) ? Number(a) - Number(b) : String(a).localeCompare(String(b), "en", { numeric: true });
}

export function drawTable(card, box, exact) {
  const { columns } = card.panel;
  const blank = (value) => value === null || value === "";
  const shown = columns
    .map((column, n) => ({ ...column, n }))
    .filter((column) => column.role !== "currency" && column.name !== "action" && (exact || column.role !== "under") && !card.rows.every((row) => blank(row[column.n])));
  const rows = [...card.rows];
  if (card.sort) {
    const { n, unit } = columns.map((column, at) => ({ ...column, n: at })).find((column) => column.name === card.sort.name);
    rows.sort((a, b) => compare(a[n], b[n], unit) * (card.sort.down ? -1 : 1));
  }
  const focused = box.contains(document.activeElement) ? document.activeElement.dataset.column : undefined;
  const { scrollTop, scrollLeft } = box;
  box.replaceChildren(
    element("table", {}, element("caption", { class: "sr", text: card.panel.title }),
      element("thead", {}, element("tr", {}, ...shown.map((column) => heading(card, column)))),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, ...shown.map((column, k) => cell(card, row, column, k === 0, exact)))))),
  );
  box.scrollTop = scrollTop;
  box.scrollLeft = scrollLeft;
  if (focused !== undefined) [...box.querySelectorAll("thead button")].find((button) => button.dataset.column === focused)?.focus();
}

function heading(card, column) {
  const sorted = card.sort?.name === column.name;
  const button = element("button", { type: "button", "data-column": column.name, text: column.title });
  button.addEventListener("click", () => {
    card.sort = sorted && card.sort.down !== NUMERIC.has(column.unit) ? null : { name: column.name, down: sorted ? !card.sort.down : NUMERIC.has(column.unit) };
    card.redraw();
  });
  const order = sorted ? (card.sort.down ? "descending" : "ascending") : null;
  return element("th", { scope: "col", class: NUMERIC.has(column.unit) ? "num" : null, "aria-sort": order }, button);
}

function cell(card, row, column, first, exact) {
  const value = row[column.n];
  const currency = card.column("currency");
  const { text, per, exact: whole } = formatValue(value, column.unit, currency < 0 ? "" : row[currency]);
  if (value === null) return element("td", { class: `dim ${NUMERIC.has(column.unit) ? "num" : ""}`, text: "–", title: "not known" });
  if (column.unit === "status") return element("td", {}, element("span", { class: "pill", "data-status": value, text: label(value) }));
  if (column.unit === "time") {
    return element("td", { title: dateTime(value), text: exact ? dateTime(value) : relative(value, card.context.now()) });
  }
  if (column.unit === "share" && !exact) {
    const fill = element("i", { "--c": stateColour("active") });
    fill.style.width = `${100 * Math.min(1, Number(value))}%`;
    return element("td", { class: "num", title: whole }, element("span", { class: "meter" }, element("i", { "aria-hidden": "true" }, fill), text));
  }
  if (NUMERIC.has(column.unit)) return element("td", { class: "num", title: whole, text: exact ? whole : text + per });
  if (column.role === "series" || (exact && column.role === "category")) {
    return element("td", {}, element("span", { class: "who-cell" }, column.role === "series" ? element("span", { class: "swatch", "--c": colourOf(value) }) : null, label(value)));
  }
  const under = first && !exact ? row[card.column("under")] : null;
  const small = under && under !== value ? element("small", { text: under }) : null;
  return element("td", { class: first ? "main" : String(value).length > 24 ? "wrap" : null }, String(value), small);
}
