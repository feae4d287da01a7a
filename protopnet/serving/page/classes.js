/* Classes by name, looked for on the server: there may be ten thousand of them. */

import { getJson, Refused } from "./api.js";
import { byId, make } from "./dom.js";

const SUGGESTED = 20;
const PAUSE_MS = 150; // in typing, before the server is asked

/** Offer the classes that an input's text may mean, in the datalist beside it. */
export function suggest(input) {
  const list = byId(input.getAttribute("list"));
  let waiting = null;
  let newest = 0;
  const ask = async () => {
    const mine = ++newest;
    try {
      const { classes } = await search(input.value, SUGGESTED);
      if (mine === newest) list.replaceChildren(...classes.map((entry) => make("option", { value: entry.readable_name })));
    } catch (error) {
      if (!(error instanceof Refused)) throw error; // nothing is suggested, then
    }
  };
  for (const kind of ["input", "focus"]) {
    input.addEventListener(kind, () => {
      clearTimeout(waiting);
      waiting = setTimeout(ask, PAUSE_MS);
    });
  }
}

/** Label of the class that a text means, as the server understands it; `Refused` with the nearest names where there is none. */
export async function labelOf(text) {
  const { prototypes } = await getJson(`v1/prototypes?${new URLSearchParams({ class: text, limit: 1 })}`);
  if (!prototypes.length) throw new Refused("This class has no prototypes.");
  return prototypes[0].class;
}

const search = (text, limit) => getJson(`v1/classes?${new URLSearchParams({ search: text.trim(), limit })}`);
