/* Prototypes and the training images they were cut from: each picture fetched once, a few examples, the gallery of all. */

import { getBlob, getJson } from "./api.js";
import { labelOf } from "./classes.js";
import { byId, complain, make } from "./dom.js";
import { part, readPicture, whole } from "./pictures.js";

const PAGE = 24;
const pictures = new Map(); // path → promise of a picture

/** Picture of a prototype's training image, its boxes measured as in `source`; null if the bundle has none. */
export async function trainingPicture({ member, prototype, source, thumbnail }, model) {
  if (!source || thumbnail === null) return null;
  const path = `v1/prototypes/${member}/${prototype}/thumbnail?v=${model.hash}`;
  if (!pictures.has(path)) {
    const fetched = getBlob(path).then(readPicture);
    fetched.catch(() => pictures.delete(path)); // to be tried again
    pictures.set(path, fetched);
  }
  const picture = await pictures.get(path);
  return picture && { ...picture, width: source.width, height: source.height };
}

/** Name of the file a prototype comes from, where it may be told. */
export const fileName = (source) => source.uri?.split("/").pop() ?? "";

/** Prototypes from evenly spaced places among all of them, begun at random. */
export async function someOf(model, count) {
  const start = Math.floor((Math.random() * model.prototypes) / count);
  const offsets = Array.from({ length: count }, (_, place) => start + Math.floor((place * model.prototypes) / count));
  const answers = await Promise.all(offsets.map((offset) => getJson(`v1/prototypes?limit=1&offset=${offset}`)));
  return answers.flatMap((answer) => answer.prototypes);
}

/** The gallery; what is returned fills it: show(label, offset), label null for all classes. */
export function gallery(model) {
  let [label, offset] = [null, 0];
  let newest = 0;

  async function show(nextLabel, nextOffset = 0) {
    [label, offset] = [nextLabel, nextOffset];
    byId("gallery-class").value = label === null ? "" : model.names[label];
    const mine = ++newest;
    try {
      const wanted = new URLSearchParams({ offset, limit: PAGE });
      if (label !== null) wanted.set("class", model.names[label]);
      const answer = await getJson(`v1/prototypes?${wanted}`);
      if (mine === newest) fill(answer); // else another page was asked for meanwhile
    } catch (error) {
      if (mine === newest) complain(byId("gallery-problem"), error.message);
    }
  }

  function fill({ prototypes, total, next }) {
    complain(byId("gallery-problem"), null);
    byId("gallery").replaceChildren(...prototypes.map((item) => card(item, model)));
    byId("gallery-count").textContent = total ? `${offset + 1} to ${offset + prototypes.length} of ${total}` : "No prototypes.";
    byId("earlier").disabled = offset === 0;
    byId("later").disabled = next === null;
  }

  async function turn(pages) {
    await show(label, Math.max(0, offset + pages * PAGE));
    byId("gallery-title").focus();
  }

  byId("gallery-class").addEventListener("change", async ({ target }) => {
    try {
      const wanted = target.value.trim();
      location.hash = wanted ? `#prototypes/${await labelOf(wanted)}` : "#prototypes";
    } catch (error) {
      complain(byId("gallery-problem"), error.message);
    }
  });
  byId("earlier").addEventListener("click", () => turn(-1));
  byId("later").addEventListener("click", () => turn(1));
  return show;
}

function card(item, model) {
  const pair = make("div", { class: "pair" }, make("div", { class: "waiting" }));
  fillPair(pair, item, model);
  const file = item.source?.uri && make("small", { title: item.source.uri }, fileName(item.source));
  return make("li", {}, pair, make("b", {}, model.names[item.class]), make("small", {}, model.number(item)), file);
}

async function fillPair(pair, item, model) {
  const title = model.title(item);
  try {
    const picture = await trainingPicture(item, model);
    if (!picture) throw new Error("No picture in the bundle.");
    const { box } = item.source;
    pair.replaceChildren(whole(picture, { box, label: `Training image of ${title}, in a box` }), part(picture, box, title));
  } catch (error) {
    pair.replaceChildren(make("span", { class: "soft" }, error.message));
  }
}
