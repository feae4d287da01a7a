/* What the last decision changed: accuracy before and after, the images that flip, and whether that is the optimum yet. */

import { trainingImage } from "./card.js";
import { byId, make } from "./dom.js";
import { whole } from "./pictures.js";

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const WORDS = { solving: "own-class connections solved; the rest is being solved …", optimal: "certified optimum", "not optimal": "not yet optimal" };
let drawn = null; // number and state of the effect whose flips are shown

/** state: as the server gives it. */
export function showEffect({ effect, shown, at_first, decisions, saved }) {
  const images = shown === "validation" ? "validation images" : "training images (there are no validation images)";
  const way = effect.after > effect.before ? "up" : effect.after < effect.before ? "down" : "";
  const change = effect.number
    ? [`${percent(effect.before)} → `, make("b", { class: way, id: "after" }, percent(effect.after)), ` of the ${images} right after ${effect.says}`]
    : [make("b", { id: "after" }, percent(effect.after)), ` of the ${images} right`];
  const since = decisions ? `; ${percent(at_first)} at first` : "";
  const solved = `${since} · ${WORDS[effect.state]} (KKT residual ${effect.residual.toExponential(1)}, ${effect.seconds.toFixed(1)} s)`;
  byId("accuracy").replaceChildren(...change, make("span", { class: "soft" }, solved));
  byId("accuracy").dataset.state = effect.state;
  byId("accuracy").dataset.number = effect.number;
  showFlips(effect);
  byId("saved").textContent = said(saved);
}

function showFlips({ number, state, flips, flips_total, flips_by_class }) {
  const box = byId("flips");
  box.hidden = !flips_total;
  if (drawn === `${number} ${state}`) return;
  drawn = `${number} ${state}`;
  const classes = flips_by_class.map(({ class_name, images }) => `${class_name} (${images})`).join(", ");
  box.querySelector("summary").textContent = `${flips_total} image${flips_total === 1 ? " changes" : "s change"} class: ${classes}`;
  const draw = () => box.open && box.querySelector("ul").replaceChildren(...flips.map(flipped));
  box.ontoggle = draw;
  draw();
}

function flipped({ image_id, width, height, class_name, before, after }) {
  const item = make("li", {}, make("div", { class: "waiting" }), make("small", {}, `${class_name}: ${before} → ${after}`));
  trainingImage({ image_id, width, height }).then((picture) => picture && item.firstChild.replaceWith(whole(picture, { label: class_name })), () => {});
  return item;
}

function said(saved) {
  if (saved.state === "working") return "corrections.yaml is written; the new bundle is being made …";
  if (saved.state === "done") return `Saved: ${saved.corrections} and ${saved.bundle}`;
  if (saved.state === "failed") return `corrections.yaml is written, but no bundle: ${saved.message}`;
  return "";
}
