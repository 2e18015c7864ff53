// Elements in one call. Text goes in as text, never as markup: nothing that a user or a model wrote is ever parsed as HTML.

export const $ = (id) => document.getElementById(id);

/** An element; `attributes` are set as attributes (null and false leave them out), functions as listeners, `children` are nodes or text. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Set text only where it changed, so that a screen reader is not told the same again. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A table of `columns` [{label, class, cell(row)}] over `rows`, in a box of its own that scrolls where the screen is narrow. */
export function table(caption, columns, rows) {
  const head = h("tr", {}, columns.map((column) => h("th", { scope: "col", class: column.class }, column.label)));
  const body = rows.map((row) => h("tr", {}, columns.map((column) => h("td", { class: column.class }, column.cell(row)))));
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h("table", {}, h("caption", { class: "hidden" }, caption), h("thead", {}, head), h("tbody", {}, body)),
  );
}
