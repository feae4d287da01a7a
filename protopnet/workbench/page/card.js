/* One prototype: where it is from, what it is nearest to, which images it decides, and the decisions there are. */

import { getBlob } from "./api.js";
import { make } from "./dom.js";
import { part, readPicture, whole } from "./pictures.js";

const pictures = new Map(); // image → promise of a picture

/** Picture of an image, its boxes measured in pixels of the original; fetched once. */
export async function trainingImage({ image_id, width, height }) {
  if (!pictures.has(image_id)) {
    const fetched = getBlob(`v1/images/${image_id}`).then(readPicture);
    fetched.catch(() => pictures.delete(image_id)); // to be tried again
    pictures.set(image_id, fetched);
  }
  const picture = await pictures.get(image_id);
  return picture && { ...picture, width, height };
}

/** The button of an action, or the answer with this number, as if it had been clicked. */
export function press(card, action) {
  const buttons = /^\d$/.test(action) ? card.querySelectorAll(".asked .answer") : card.querySelectorAll(`[data-action="${action}"]`);
  (/^\d$/.test(action) ? buttons[Number(action) - 1] : buttons[0])?.click();
}

/** Draws a prototype. decide: takes a decision; switchTo: looks at another prototype of the item of the list. */
export function show(card, prototype, { item, mayDecide, decide, switchTo }) {
  const { prototype: p, class_name: own, source } = prototype;
  const asked = make("div", { class: "question" });
  const question = (...content) => {
    asked.replaceChildren(make("fieldset", { class: "asked" }, ...content));
    asked.querySelector("input, button")?.focus();
  };
  const title = prototype.name ? `${prototype.name}, prototype ${p} of ${own}` : `Prototype ${p} of ${own}`;
  card.className = prototype.gone ? "gone" : "";
  card.replaceChildren(
    ...(item.text ? [make("p", {}, item.text)] : []),
    ...(item.prototypes.length > 1 ? [chips(item.prototypes, p, switchTo)] : []),
    make("h2", {}, title),
    make("p", { class: "soft" }, status(prototype)),
    ...(mayDecide ? [actions(prototype, { decide, question }), asked] : [make("p", { class: "soft" }, "Say who you are, above, to decide.")]),
    sourceOf(prototype, title),
    make("p", { class: "soft" }, `${figures(prototype)} · ${source.uri}`),
    ...findings(prototype, item),
    ...nearest("Nearest in the training images", prototype.nearest.train),
    ...nearest("Nearest in the validation images", prototype.nearest.validation),
    ...decides(prototype),
    ...(prototype.decided.length ? [make("ul", { class: "decided" }, ...prototype.decided.map(said))] : []),
  );
}

function chips(prototypes, p, switchTo) {
  const chip = (each) => make("button", { type: "button", "aria-pressed": String(each === p), click: () => switchTo(each) }, `prototype ${each}`);
  return make("div", { class: "line chips" }, ...prototypes.slice(0, 30).map(chip));
}

function status({ gone, moved, merged, group }) {
  const group_ = group ? ` In the group ${group}.` : "";
  if (merged !== null) return `Merged into prototype ${merged}.${group_}`;
  if (gone) return `Dropped.${group_}`;
  return (moved ? "Moved to this patch; its nearest patches below are those of the one before." : "On the patch that it came from.") + group_;
}

function actions(prototype, { decide, question }) {
  const p = prototype.prototype;
  const act = (action, key, text, click) => make("button", { type: "button", "data-action": action, click }, text, make("kbd", {}, key));
  return make(
    "div",
    { class: "actions", role: "group", "aria-label": "Decisions" },
    act("keep", "k", "Keep", () => decide({ decide: "keep", prototype: p })),
    act("drop", "d", "Drop", () => decide({ decide: "drop", prototype: p })),
    act("patch", "n", "Not this patch", () => decide({ decide: "not-this-patch", prototype: p })),
    act("elsewhere", "e", "Not this image", () => decide({ decide: "not-this-patch", prototype: p, elsewhere: true })),
    act("region", "r", "Not in this region", () => question(...regions(prototype, decide))),
    act("merge", "m", "Merge", () => question(...text("Merge into which prototype of its class? Its number:", "number", (into) => decide({ decide: "merge", prototype: p, into: Number(into) })))),
    act("used", "f", "Must be used", () => question(...text("Its class connection is never below:", "number", (floor) => decide({ decide: "must-be-used", prototype: p, floor: Number(floor) })))),
    act("name", "i", "Name it", () => question(...text("What is it, in words?", "text", (name) => decide({ decide: "name", prototype: p, name }), prototype.name))),
    act("group", "g", "Group it", () => question(...text("With which prototypes does it share its meaning? Call them:", "text", (group) => decide({ decide: "group", prototypes: [p], group }), prototype.group ?? prototype.name))),
    make("input", { id: "why", placeholder: "why (for the record)", "aria-label": "Why, for the record", maxlength: 300 }),
  );
}

/** Where a prototype must not be: about where its findings say, or its box; numbers are keys. */
function regions({ prototype, class_name: own, class_key, source, findings }, decide) {
  const { width, height } = source;
  const found = findings.find(({ region }) => region)?.region;
  const [top, left, bottom, right] = source.box;
  const region = found ?? [top / height, left / width, bottom / height, right / width];
  const bar = (more) => decide({ decide: "not-in-region", prototype, region, ...more });
  const answers = [
    ["On this image", () => bar({ sha256: source.sha256, uri: source.uri })],
    [`On every image of ${own}`, () => bar({ class: class_key })],
    ["On all images", () => bar({})],
    [`Nowhere on the background, for ${own}`, () => bar({ region: "background", class: class_key })],
  ];
  const buttons = answers.map(([words, click], n) => make("button", { type: "button", class: "answer", click }, words, make("kbd", {}, ` ${n + 1}`)));
  const box = [region[0] * height, region[1] * width, region[2] * height, region[3] * width];
  const shown = make("div", { class: "asked-region" });
  trainingImage(source).then((picture) => picture && shown.replaceChildren(whole(picture, { box, label: "Where nothing may lie, in a box" })), () => {});
  return [make("legend", {}, "Nothing may lie in this box:"), shown, make("div", { class: "actions" }, ...buttons)];
}

function text(question, type, then, value = "") {
  const field = make("input", { type, value: value ?? "", required: true, "aria-label": question, ...(type === "number" ? { min: 0, step: "any" } : { maxlength: 80 }) });
  const submit = (event) => {
    event.preventDefault();
    then(field.value.trim());
  };
  return [make("legend", {}, question), make("form", { class: "line", submit }, field, make("button", { class: "strong" }, "Decide"))];
}

function sourceOf({ source }, title) {
  const pair = make("div", { class: "source" }, make("div", { class: "waiting" }));
  trainingImage(source).then((picture) => {
    if (picture) pair.replaceChildren(whole(picture, { box: source.box, label: `Training image of ${title}, in a box` }), part(picture, source.box, title));
  }, () => pair.replaceChildren(make("span", { class: "soft" }, "no picture")));
  return pair;
}

function figures({ first, top, on_object, nearest: { train } }) {
  const share = on_object === null ? "" : `, ${(100 * on_object).toFixed(0)} % of what it sees on the object`;
  const own = train.filter((patch) => patch.own_class).length;
  return `strongest for ${first} images, among the top evidence for ${top}; ${own} of ${train.length} nearest training patches of its class${share}`;
}

function findings({ findings }, item) {
  const others = findings.filter(({ finding }) => finding !== item.finding);
  return others.length ? [make("ul", {}, ...others.map(({ kind, text }) => make("li", {}, make("b", {}, kind), `: ${text}`)))] : [];
}

function nearest(title, patches) {
  if (!patches.length) return [];
  const shown = patches.map((patch) => {
    const words = `${patch.own_class ? "" : "≠ "}${patch.class_name}, ${patch.similarity.toFixed(2)}`;
    const entry = make("li", {}, make("div", { class: "waiting" }), make("small", { class: patch.own_class ? "" : "other" }, words));
    trainingImage(patch).then((picture) => picture && entry.firstChild.replaceWith(whole(picture, { box: patch.box, heat: patch.heat, label: words })), () => {});
    return entry;
  });
  return [make("h3", {}, title), make("ul", { class: "near" }, ...shown)];
}

function decides({ deciding }) {
  const shown = deciding.images.map((image) => {
    const entry = make("li", {}, make("div", { class: "waiting" }), make("small", {}, image.class_name));
    trainingImage(image).then((picture) => picture && entry.firstChild.replaceWith(whole(picture, { label: image.class_name })), () => {});
    return entry;
  });
  return [make("h3", {}, `Gives the most points for ${deciding.total} image${deciding.total === 1 ? "" : "s"}`), make("ul", { class: "near" }, ...shown)];
}

function said({ decide, who, when, why }) {
  return make("li", {}, `${decide}, ${who}, ${new Date(when).toLocaleString()}${why ? `: ${why}` : ""}`);
}
