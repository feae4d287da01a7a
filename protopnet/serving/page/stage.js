/* The photo at the side: numbered boxes of a class's evidence, or one piece of it with its heat map. */

import { byId } from "./dom.js";
import { whole } from "./pictures.js";

let picture = null;
let marks = [];
let about = ""; // the caption of the marks
let pointedAt = null; // piece of evidence under the pointer or the focus …
let kept = null; // … and the one that was clicked

/** Put a photo on the stage. */
export function setPicture(next) {
  picture = next;
  [marks, about, pointedAt, kept] = [[], "", null, null];
  byId("stage").hidden = !picture;
  draw();
}

/** Number the boxes of a class's evidence; forgets what was clicked. */
export function setMarks(evidence, caption) {
  marks = evidence.map((item, place) => ({ box: item.box, number: String(place + 1) }));
  [about, kept] = [caption, null];
  draw();
}

/** Show one piece of evidence ({box, field, heat, caption}) for as long as it is pointed at; null: no longer. */
export function point(item) {
  pointedAt = item;
  draw();
}

/** Keep showing a piece of evidence, or let go of it. Says whether it is kept now. */
export function keep(item) {
  kept = kept === item ? null : item;
  pointedAt = null;
  draw();
  return kept === item;
}

function draw() {
  if (!picture) return;
  const item = pointedAt ?? kept;
  const shown = item ? { box: item.box, field: item.field, heat: item.heat, label: item.caption } : { marks, label: `Your photo. ${about}` };
  byId("picture").replaceChildren(whole(picture, shown));
  byId("caption").textContent = item ? item.caption : about;
  byId("legend").classList.toggle("off", !item?.heat);
}
