/* Making elements, and finding those of index.html. */

export const byId = (id) => document.getElementById(id);

const DRAWN = new Set(["svg", "image", "rect", "text", "g"]); // what is drawn isn't HTML

/** An element: make("p", {class: "soft"}, "text", child). Properties that are functions become listeners. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElementNS(`http://www.w3.org/${DRAWN.has(tag) ? "2000/svg" : "1999/xhtml"}`, tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child || child === 0));
  return element;
}

/** A sentence about what went wrong, read out at once; nothing to take it away. */
export function complain(place, message, ...more) {
  place.replaceChildren(...(message ? [make("p", {}, message), ...more.filter(Boolean)] : []));
}
