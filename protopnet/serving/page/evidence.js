/* What a class got and from where: the paper's table, under the name of the class. */

import { byId, make } from "./dom.js";
import { part, whole } from "./pictures.js";
import { fileName, trainingPicture } from "./prototypes.js";
import * as stage from "./stage.js";

const COLUMNS = [
  "This part of your photo",
  "looks like that prototype",
  "of this training image",
  "Where it is similar",
  "Similarity × connection = points",
];
// The same where a row is a card of its own, on a phone.
const SHORT = ["part of your photo", "that prototype", "its training image", "where it is similar"];

/** A class that folds away: `lead` is a sentence above its table. Its pictures are drawn when it is first unfolded. */
export function classCard(entry, { model, photo, heats, lead, open }) {
  const name = model.names[entry.class];
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
      make("span", { class: "share" }, entry.shown.probability),
      make("span", { class: "total" }, `${entry.shown.total} points`),
    ),
  );
  const unfold = () => {
    if (card.children.length === 1) {
      card.append(make("p", {}, lead), ...because(entry), classTable(entry, model, photo, heats));
    }
    unpress();
    stage.setMarks(entry.evidence, `Numbered: the parts of your photo that gave ${name} the most points.`);
  };
  if (open) unfold();
  card.addEventListener("toggle", () => card.open && unfold());
  return card;
}

/** What tells a class from another, folded away: as many prototypes that speak for the one as for the other. */
export function contrastCard(contrast, { model, photo, heats, open }) {
  const [name, rival] = [model.names[contrast.class], model.names[contrast.rival]];
  const card = make(
    "details",
    { class: "class contrast", open },
    make("summary", {}, make("b", { class: "name" }, `Why ${name} and not ${rival}?`), make("span", { class: "total" }, `${contrast.shown.total} points`)),
  );
  const unfold = () => {
    if (card.children.length === 1) card.append(contrastTable(contrast, name, rival, model, photo, heats));
    unpress();
    stage.setMarks(contrast.rows, `Numbered: the parts of your photo that tell ${name} from ${rival}.`);
  };
  if (open) unfold();
  card.addEventListener("toggle", () => card.open && unfold());
  return card;
}

/** What people call the prototypes that spoke for the class, with their points; nothing where none has a name. */
function because({ evidence, shown }) {
  const named = evidence.map((item, place) => item.name && item.points > 0 && `${item.name}, ${shown.rows[place].points} points`);
  const listed = named.filter(Boolean);
  return listed.length ? [make("div", { class: "because" }, `Because of: ${listed.join("; ")}.`)] : [];
}

function classTable(entry, model, photo, heats) {
  const name = model.names[entry.class];
  const numbered = entry.evidence.map((item, place) => ({ item, points: item.points, sum: sumOf(item, entry.shown.rows[place]) }));
  return table(`Evidence for ${name}`, COLUMNS[4], numbered, { of: entry.class, model, photo, heats }, foot(entry, entry.evidence, `Total for ${name}`));
}

function contrastTable(contrast, name, rival, model, photo, heats) {
  const head = `Points for ${name} − for ${rival} = difference`;
  const numbered = contrast.rows.map((item, place) => ({ item, points: item.difference, sum: differenceOf(contrast.shown.rows[place]) }));
  return table(`${name} and not ${rival}`, head, numbered, { of: null, model, photo, heats }, foot(contrast, contrast.rows, `${name} more than ${rival}`));
}

/** Rows {item, points, sum}: a piece of evidence, how long its bar is, and its numbers. of: the class whose prototypes need no
    class named. Roles are named, because on a phone the style makes blocks of rows, and browsers then forget what they were. */
function table(label, last, numbered, { of, model, photo, heats }, feet) {
  const heads = [...COLUMNS.slice(0, 4), last].map((text) => make("th", { scope: "col", role: "columnheader" }, text));
  const most = Math.max(...numbered.map(({ points }) => Math.abs(points)), 0.01);
  const rows = numbered.map(({ item, points, sum }, place) => {
    const prototype = item.class === of ? model.number(item) : model.title(item);
    const heat = `data:image/png;base64,${heats[`${item.member}/${item.prototype}`]}`;
    const line = row(item, place + 1, prototype, photo, heat);
    line.append(make("td", { role: "cell", class: "sum", "data-label": last }, ...sum.numbers, barOf(points, most), sum.note && make("small", {}, sum.note)));
    fillSource(line, item, prototype, model);
    return line;
  });
  return make(
    "table",
    { class: "evidence", role: "table", "aria-label": label },
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...heads)),
    make("tbody", { role: "rowgroup" }, ...rows),
    make("tfoot", { role: "rowgroup" }, ...feet),
  );
}

/** The pictures of one piece of evidence; those of its prototype come later. */
function row(item, number, prototype, photo, heat) {
  const caption = `Part ${number} looks like ${prototype}.`;
  const shown = { box: item.box, field: item.receptive_field, heat, caption };
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
    cell(SHORT[3], whole(photo, { box: item.box, field: item.receptive_field, heat, label: `Where your photo is like ${prototype}` })),
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

function barOf(points, most) {
  const bar = make("div", { class: points < 0 ? "amount against" : "amount" });
  bar.style.width = `${(100 * Math.abs(points)) / most}%`;
  return bar;
}

function sumOf(item, shown) {
  const [similarity, connection] = [make("span", { class: "similarity" }, shown.similarity), make("span", { class: "connection" }, shown.connection)];
  const note = item.source && `similarity ${shown.similarity} of ${item.source.self_similarity.toFixed(3)}`;
  return { numbers: [similarity, " × ", connection, " = ", make("b", { class: "points" }, shown.points)], note };
}

function differenceOf(shown) {
  const [own, rival] = [make("span", { class: "own" }, shown.points), make("span", { class: "rival" }, bracketed(shown.rival_points))];
  return { numbers: [own, " − ", rival, " = ", make("b", { class: "points" }, shown.difference)], note: `similarity ${shown.similarity}` };
}

const bracketed = (text) => (text.startsWith("−") ? `(${text})` : text);

/** The prototype and its training image, when they have come. */
async function fillSource(line, item, prototype, model) {
  const [cropCell, imageCell] = [line.children[1], line.children[2]];
  try {
    const picture = await trainingPicture(item, model);
    if (!picture) throw new Error("the bundle keeps no picture");
    const link = make(
      "a",
      { href: `#prototypes/${item.class}`, title: [fileName(item.source), "see all prototypes of this class"].filter(Boolean).join(": ") },
      whole(picture, { box: item.source.box, label: `The training image of ${prototype}, with the prototype in a box` }),
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
function foot({ remainder, shown }, listed, label) {
  const total = footLine(label, shown.total, "total");
  if (!remainder.prototypes) return [total];
  const what = `${remainder.prototypes} ${listed.length ? "other " : ""}prototype${remainder.prototypes === 1 ? "" : "s"} together`;
  return [footLine(what, shown.remainder), total];
}

function footLine(label, value, kind = "rest") {
  return make(
    "tr",
    { role: "row", class: kind },
    make("th", { scope: "row", role: "rowheader", colspan: COLUMNS.length - 1 }, label),
    make("td", { role: "cell", class: "sum" }, make("b", { class: "points" }, value)),
  );
}
