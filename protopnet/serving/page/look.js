/* One photo: it goes to the server, its answer comes back, and "why not …?" is asked of it. */

import { getJson, Refused } from "./api.js";
import { byId, complain, make } from "./dom.js";
import { classCard, contrastCard } from "./evidence.js";
import { modelKnown } from "./model.js";
import { readPicture } from "./pictures.js";
import * as stage from "./stage.js";

const TOP_CLASSES = 3;
const TOP_PROTOTYPES = 5;

let current = null; // {blob, photo, model, top}: what is shown; top is the entry of its first class
let request = new AbortController(); // of the photo that was brought last

/** Show a photo and ask the server about it. The note says what is special about it. */
export async function look(blob, note = "") {
  request.abort();
  request = new AbortController();
  const { signal } = request;
  const started = performance.now();
  begin();
  const showing = readPicture(blob).then((photo) => {
    if (!signal.aborted && photo) stage.setPicture(photo);
    return photo;
  });
  try {
    const model = await modelKnown();
    const image = await explain(model, blob, { top_classes: TOP_CLASSES }, signal);
    const url = (await showing)?.url; // none of a photo that only the server can read
    if (signal.aborted) return;
    const photo = { url, width: image.width, height: image.height }; // boxes are in pixels as the server counts them
    current = { blob, photo, model, top: image.classes[0] };
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    showAnswer(image, `${note} Answered in ${seconds} s.`.trim());
  } catch (error) {
    if (signal.aborted) return;
    clear();
    refused(byId("problem"), error, () => look(blob, note));
  } finally {
    if (!signal.aborted) busy(false);
  }
}

async function explain(model, blob, options, signal) {
  if (blob.size > model.limits.max_bytes) {
    // Said here, because a server that stops reading can't make itself heard in every browser.
    const [size, most] = [blob.size, model.limits.max_bytes].map((bytes) => (bytes / 1e6).toFixed(1));
    throw new Refused(`The file has ${size} MB, and this server takes ${most} MB at most. A smaller copy of the photo will do.`, 413);
  }
  const wanted = new URLSearchParams({ ...options, top_prototypes: TOP_PROTOTYPES, contrast: true, maps: "png", map: "gradient" });
  return (await getJson(`v1/explain?${wanted}`, { method: "POST", body: blob, signal })).images[0];
}

// ------------------------------------------------------------------------------------------- the answer

function showAnswer(image, note) {
  const { model, photo, top } = current;
  const second = image.classes[1];
  const unsure = image.abstained
    ? `A guess: where it is less than ${100 * model.abstainBelow} % sure, this model would rather not answer. `
    : "";
  const strange = image.unknown ? "It looks like nothing this model knows: no prototype is as similar to it as to most photos of these classes. " : "";
  stage.setPicture(photo);
  byId("welcome").hidden = true;
  byId("answer").hidden = false;
  byId("photo-view").classList.add("answered");
  const share = make("span", { class: "share" }, top.shown.probability);
  byId("verdict").replaceChildren(model.names[top.class], " ", share);
  byId("verdict-note").textContent = strange + unsure + note;
  byId("classes").replaceChildren(
    ...image.classes.map((entry) => card(image, entry, entry === top ? second : top, entry === top)),
    ...contrasts(image, false),
  );
  byId("asked").replaceChildren();
  byId("other-class").value = "";
  complain(byId("why-not-problem"), null);
  say(`${strange}${model.names[top.class]}, ${top.shown.probability}. Its evidence is in the table below.`);
}

function card(image, entry, other, open) {
  return classCard(entry, { ...current, heats: image.heat_maps, lead: other ? compare(entry, other) : "", open });
}

const contrasts = (image, open) => image.contrasts.map((each) => contrastCard(each, { ...current, heats: image.heat_maps, open }));

/** How far a class is from another. */
function compare(entry, other) {
  const [name, otherName] = [entry, other].map((one) => current.model.names[one.class]);
  const [own, others] = [entry, other].map((one) => inPoints(one.own_points));
  const because = `${name} got ${own} points from its own prototypes, ${otherName} ${others} from its own.`;
  const [total, otherTotal] = [entry, other].map((one) => Number(one.shown.total.replace("−", "-")));
  const apart = `${Math.abs(total - otherTotal).toFixed(2)} points ${total < otherTotal ? "fewer" : "more"}`;
  return `${apart} than ${otherName}. ${because}`;
}

/** To two decimals, and never -0.00. */
const inPoints = (value) => (Math.round(100 * value) / 100 || 0).toFixed(2);

// ---------------------------------------------------------------------------------------------- why not

/** Answer to the name of a class as somebody typed it; the server says which it may be where there is none. */
export async function askWhyNot(text) {
  const { signal } = request;
  const { model, blob, top } = current;
  complain(byId("why-not-problem"), null);
  if (!text.trim()) return complain(byId("why-not-problem"), "Type the name of a class.");
  busy(true);
  try {
    const image = await explain(model, blob, { top_classes: 1, class: text.trim() }, signal);
    if (signal.aborted) return;
    const entry = image.classes.at(-1);
    const name = model.names[entry.class];
    byId("other-class").value = name;
    if (entry.class === top.class) {
      return complain(byId("why-not-problem"), `${name} is what the network takes it for: its evidence is at the top.`);
    }
    const heading = make("h3", { tabindex: "-1" }, `Why not ${name}?`);
    byId("asked").replaceChildren(heading, ...contrasts(image, true), card(image, entry, top, true));
    heading.focus({ preventScroll: true });
    heading.scrollIntoView({ block: "start" });
    say(`${name}, ${entry.shown.probability}. ${compare(entry, top)}`);
  } catch (error) {
    if (!signal.aborted) refused(byId("why-not-problem"), error, () => askWhyNot(text));
  } finally {
    if (!signal.aborted) busy(false);
  }
}

// ------------------------------------------------------------------------------------- what is going on

function begin() {
  busy(true);
  complain(byId("problem"), null);
  say("Looking at the photo …");
}

function clear() {
  current = null;
  stage.setPicture(null);
  byId("photo-view").classList.remove("answered");
  byId("answer").hidden = true;
  byId("welcome").hidden = false;
  say("");
}

function busy(is) {
  document.body.classList.toggle("busy", is);
  byId("main").setAttribute("aria-busy", String(is));
}

/** To those who listen. */
function say(text) {
  byId("status").textContent = text;
}

/** Say what went wrong, and offer to try again where that may help. */
export function refused(place, error, again) {
  if (!(error instanceof Refused)) throw error; // a mistake of this page: into the console
  const mayHelp = error.status === 0 || error.status >= 500 || error.status === 401;
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  complain(place, error.message + wait, mayHelp && again && make("button", { type: "button", click: again }, "Try again"));
}
