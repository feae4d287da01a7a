/* What a class got and from where: the paper's table, under the name of the class. */

import { byId, make } from "./dom.js";
import { part, whole } from "./pictures.js";
import { fileName, trainingPicture } from "./prototypes.js";
import * as stage from "./stage.js";
import { account, percent, points, precise } from "./sums.js";

const COLUMNS = [
  "This part of your photo",
  "looks like that prototype",
  "of this training image",
  "Where it is similar",
  "Similarity × connection = points",
];
// The same where a row is a card of its own, on a phone.
const SHORT = ["part of your photo", "that prototype", "its training image", "where it is similar", COLUMNS[4]];

/** A class that folds away: `lead` is a sentence above its table. Its pictures are drawn when it is first unfolded. */
export function classCard(entry, { model, photo, lead, open }) {
  const name = model.names[entry.class];
  const sums = account(entry, model.ownPrototypes[entry.class]);
  const bar = make("i");
  bar.style.width = `${100 * entry.probability}%`;
  const card = make(
    "details",
    { class: "class", open },
    make(
      "summary",
      {},
      make("b", { class: "name" }, name),
      make("span", { class: "meter", "aria-hidden": "true" }, bar),
      make("span", { class: "share" }, percent(entry.probability)),
      make("span", { class: "total" }, `${points(sums.total)} points`),
    ),
  );
  const unfold = () => {
    if (card.children.length === 1) card.append(make("p", {}, lead), table(entry, sums, model, photo));
    unpress();
    stage.setMarks(entry.evidence, `Numbered: the parts of your photo that gave ${name} the most points.`);
  };
  if (open) unfold();
  card.addEventListener("toggle", () => card.open && unfold());
  return card;
}

/** Roles are named, because on a phone the style makes blocks of rows, and browsers then forget what they were. */
function table(entry, sums, model, photo) {
  const name = model.names[entry.class];
  const heads = COLUMNS.map((text) => make("th", { scope: "col", role: "columnheader" }, text));
  const most = Math.max(...sums.rows.map((line) => Math.abs(line.points)), 1);
  const rows = entry.evidence.map((item, place) => {
    const prototype = item.class === entry.class ? model.number(item) : model.title(item);
    const line = row(item, place + 1, prototype, photo);
    line.append(sumCell(item, sums.rows[place], most));
    fillSource(line, item, prototype, model);
    return line;
  });
  return make(
    "table",
    { class: "evidence", role: "table", "aria-label": `Evidence for ${name}` },
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...heads)),
    make("tbody", { role: "rowgroup" }, ...rows),
    make("tfoot", { role: "rowgroup" }, ...foot(entry, sums, name)),
  );
}

/** The pictures of one piece of evidence; those of its prototype come later. */
function row(item, number, prototype, photo) {
  const caption = `Part ${number} looks like ${prototype}.`;
  const shown = { box: item.box, heat: item.activation_map, caption };
  const button = make(
    "button",
    { type: "button", class: "part", "aria-pressed": "false", "aria-label": `Part ${number}: show it on the photo` },
    part(photo, item.box, `Part ${number} of your photo`),
    make("span", { class: "number", "aria-hidden": "true" }, String(number)),
  );
  const line = make(
    "tr",
    {
      role: "row",
      mouseenter: () => stage.point(shown),
      mouseleave: () => stage.point(null),
      focusin: () => stage.point(shown),
      focusout: () => stage.point(null),
    },
    cell(SHORT[0], button),
    cell(SHORT[1], make("div", { class: "waiting" })),
    cell(SHORT[2], make("div", { class: "waiting" })),
    cell(SHORT[3], whole(photo, item.box, item.activation_map, `Where your photo is like ${prototype}`)),
  );
  button.addEventListener("click", () => {
    const kept = stage.keep(shown);
    unpress();
    button.setAttribute("aria-pressed", String(kept));
    if (kept) byId("stage").scrollIntoView({ block: "nearest" });
  });
  return line;
}

function unpress() {
  for (const button of document.querySelectorAll("button.part")) button.setAttribute("aria-pressed", "false");
}

const cell = (label, ...content) => make("td", { role: "cell", "data-label": label }, ...content);

function sumCell(item, sums, most) {
  const bar = make("div", { class: sums.points < 0 ? "amount against" : "amount" });
  bar.style.width = `${(100 * Math.abs(sums.points)) / most}%`;
  return make(
    "td",
    { role: "cell", class: "sum", "data-label": SHORT[4] },
    make("span", { class: "similarity" }, precise(sums.similarity)),
    " × ",
    make("span", { class: "connection" }, precise(sums.connection)),
    " = ",
    make("b", { class: "points" }, points(sums.points)),
    bar,
    item.source && make("small", {}, `similarity ${precise(sums.similarity)} of ${item.source.self_similarity.toFixed(3)}`),
  );
}

/** The prototype and its training image, when they have come. */
async function fillSource(line, item, prototype, model) {
  const [cropCell, imageCell] = [line.children[1], line.children[2]];
  try {
    const picture = await trainingPicture(item, model);
    if (!picture) throw new Error("the bundle keeps no picture");
    const link = make(
      "a",
      { href: `#prototypes/${item.class}`, title: `${fileName(item.source)}: see all prototypes of this class` },
      whole(picture, item.source.box, null, `The training image of ${prototype}, with the prototype in a box`),
    );
    cropCell.replaceChildren(part(picture, item.source.box, prototype));
    imageCell.replaceChildren(link);
  } catch (error) {
    cropCell.replaceChildren(make("span", { class: "soft" }, "no picture"));
    imageCell.replaceChildren(make("span", { class: "soft" }, `no picture: ${error.message}`));
  }
  imageCell.append(make("small", {}, prototype));
}

/** The prototypes that have no row, and the total. */
function foot(entry, sums, name) {
  const { own, other, total } = sums;
  const lines = [];
  const more = entry.evidence.length ? "other " : "";
  if (own.count) lines.push(footLine(`${own.count} ${more}${plural(own.count)} of ${name}`, own.points));
  if (other.count) lines.push(footLine(`${other.count} ${plural(other.count)} of other classes`, other.points));
  return [...lines, footLine(`Total for ${name}`, total, "total")];
}

const plural = (count) => (count === 1 ? "prototype" : "prototypes");

function footLine(label, value, kind = "rest") {
  return make(
    "tr",
    { role: "row", class: kind },
    make("th", { scope: "row", role: "rowheader", colspan: COLUMNS.length - 1 }, label),
    make("td", { role: "cell", class: "sum" }, make("b", { class: "points" }, points(value))),
  );
}
