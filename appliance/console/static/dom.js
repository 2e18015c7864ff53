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
