/* The model in use: the images it has answered beside those it was calibrated on. */

import { getJson } from "./api.js";
import { byId, complain, make } from "./dom.js";

const SHIFT = 0.25; // by custom, of the population stability index
const CLASSES = 30; // listed, those with the most images
const [WIDTH, HEIGHT, BAR] = [300, 110, 30];

const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "–");

/** Fill the view with what the server has counted so far. */
export async function showWatch(model) {
  complain(byId("watch-problem"), null);
  const seen = await getJson("v1/watch");
  byId("watch-count").textContent =
    `${seen.images.toLocaleString("en")} images since this model was deployed; abstained from ${share(seen.abstained, seen.images)}, ` +
    `like nothing known ${share(seen.unknown, seen.images)}.`;
  byId("watch-shadow").textContent = seen.shadow ? shadowText(seen.shadow) : "";
  const missing = make("p", { class: "soft" }, "These bundles don't keep what is usual, so there is nothing to compare with.");
  byId("watch-measures").replaceChildren(...(seen.measures.length ? seen.measures.map((each) => card(each, model)) : [missing]));
  const classes = Object.entries(seen.classes).sort(([, a], [, b]) => b.images - a.images); // a name like "7" would come first
  byId("watch-classes").replaceChildren(...classes.slice(0, CLASSES).map(([name, counts]) => line(name, counts)));
}

function shadowText({ model, same, other, missed, classes }) {
  const [most] = Object.entries(classes).sort(([, a], [, b]) => b.other - a.other);
  const where = other ? ` Most often it differs on ${most[0]} (${most[1].other}).` : "";
  return (
    `The shadow ${model} would have said the same of ${share(same, same + other)} of ${(same + other).toLocaleString("en")} images` +
    `${missed ? `; ${missed.toLocaleString("en")} it wasn't asked about` : ""}.${where}`
  );
}

function card({ measure, usual, seen, drift }, model) {
  const title = measure === "margin" ? "How sure it is" : "How similar to what it knows" + ofMember(measure, model);
  const ends = measure === "margin" ? ["undecided", "sure"] : ["unlike", "like"];
  const all = total(seen);
  return make(
    "figure",
    { class: "card" },
    make("h3", {}, title),
    make("p", { class: drift.index > drift.by_chance && drift.index > SHIFT ? "strongly" : "soft" }, verdict(drift, all)),
    chart(usual, seen, `${title}: share of images in each tenth of the usual ones; seen ${seen.join(", ")}`),
    make("figcaption", { class: "ends" }, make("span", {}, ends[0]), make("span", {}, ends[1])),
  );
}

const total = (counts) => counts.reduce((sum, count) => sum + count, 0);

const ofMember = (measure, model) => (model.members.length > 1 ? `, model ${measure.split(" ")[1]}` : "");

function verdict({ index, by_chance }, images) {
  if (!images) return "No images yet.";
  const figures = ` Stability index ${index.toFixed(2)}; by chance alone up to ${by_chance.toFixed(2)}.`;
  if (index <= by_chance) return `As usual, as far as ${images.toLocaleString("en")} images can tell.${figures}`;
  return `${index > SHIFT ? "Other images than it was made for." : "A little different from the usual."}${figures}`;
}

/** Bars of what was seen in each tenth, a line at what is usual. */
function chart(usual, seen, description) {
  const [shares, lines] = [seen, usual].map((counts) => counts.map((count) => count / Math.max(1, total(counts))));
  const scale = HEIGHT / Math.max(0.2, ...shares, ...lines);
  const bars = shares.map((value, tenth) =>
    make("rect", { class: "seen", x: tenth * BAR + 3, y: HEIGHT - value * scale, width: BAR - 6, height: value * scale }),
  );
  const marks = lines.map((value, tenth) =>
    make("rect", { class: "usual", x: tenth * BAR, y: HEIGHT - value * scale - 1, width: BAR, height: 2 }),
  );
  return make("svg", { viewBox: `0 -2 ${WIDTH} ${HEIGHT + 3}`, class: "tenths", role: "img", "aria-label": description }, ...bars, ...marks);
}

function line(name, { images, abstained, unknown }) {
  const cells = [images.toLocaleString("en"), share(abstained, images), share(unknown, images)];
  return make("tr", {}, make("th", { scope: "row" }, name), ...cells.map((text) => make("td", {}, text)));
}
