/* The page: its three views, the ways to bring a photo, and the token. */

import { getBlob, onUnauthorized, Refused } from "./api.js";
import { byId, complain, make } from "./dom.js";
import { askWhyNot, look, refused } from "./look.js";
import { modelKnown } from "./model.js";
import { suggest } from "./classes.js";
import { whole } from "./pictures.js";
import { gallery, someOf, trainingPicture } from "./prototypes.js";
import { showWatch } from "./watch.js";

const EXAMPLES = 6;
let showGallery = null; // once the model is known

// ------------------------------------------------------------------------------------ ways to bring one

function bring(file, note) {
  if (byId("photo-view").hidden) location.hash = "#photo";
  look(file, note);
}

byId("file").addEventListener("change", ({ target }) => {
  const [file] = target.files;
  if (file) bring(file);
  target.value = ""; // so that the same file can be chosen again
});

document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file) bring(file);
});

for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  const [file] = event.dataTransfer.files;
  if (file) bring(file);
  else complain(byId("problem"), "That was an address, and nothing is fetched from elsewhere: save the picture and drop its file.");
});

byId("example").addEventListener("click", async () => {
  try {
    const model = await modelKnown();
    const [item] = await someOf(model, 1);
    await bringExample(item, model);
  } catch (error) {
    refused(byId("problem"), error);
  }
});

async function bringExample(item, model) {
  if (!item?.thumbnail) throw new Refused("This bundle keeps no pictures to take an example from.");
  const blob = await getBlob(item.thumbnail);
  bring(blob, `A training image of ${model.names[item.class]}, which ${model.number(item)} was cut from: it finds itself again.`);
}

/** Training images to begin with, for who has no photo at hand. */
async function offerExamples(model) {
  const items = (await someOf(model, EXAMPLES)).filter((item) => item.thumbnail);
  const buttons = items.map(async (item) => {
    const picture = await trainingPicture(item, model);
    const click = () => bringExample(item, model).catch((error) => refused(byId("problem"), error));
    return make("button", { type: "button", click }, whole(picture, {}), model.names[item.class]);
  });
  byId("examples").replaceChildren(...(await Promise.all(buttons)));
  byId("examples-side").hidden = !items.length;
}

suggest(byId("other-class"));
suggest(byId("gallery-class"));
byId("why-not").addEventListener("submit", (event) => {
  event.preventDefault();
  askWhyNot(byId("other-class").value);
});

// ------------------------------------------------------------------------------------------------ token

onUnauthorized((wrong) => {
  const form = byId("token");
  form.hidden = false;
  byId("token-wrong").textContent = wrong ? "The server doesn't take that token." : "";
  byId("token-text").value = "";
  byId("token-text").focus();
  return new Promise((resolve) => {
    const done = (token) => {
      form.hidden = true;
      resolve(token);
    };
    form.onsubmit = (event) => {
      event.preventDefault();
      done(byId("token-text").value.trim());
    };
    byId("token-cancel").onclick = () => done(null);
  });
});

// ------------------------------------------------------------------------------------------------ views

const VIEWS = { photo: async () => {}, prototypes: showPrototypes, watch: showWatch };

/** #photo, #prototypes, #prototypes/<label> or #watch */
async function route() {
  const [asked, ...rest] = location.hash.slice(1).split("/");
  if (asked === "main") return; // the link past the navigation
  const view = asked in VIEWS ? asked : "photo";
  for (const name of Object.keys(VIEWS)) byId(`${name}-view`).hidden = name !== view;
  for (const link of document.querySelectorAll("nav a[href^='#']")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (view === "photo") return;
  try {
    await VIEWS[view](await modelKnown(), ...rest);
  } catch (error) {
    refused(byId(view === "watch" ? "watch-problem" : "gallery-problem"), error, route);
  }
}

async function showPrototypes(model, label) {
  showGallery ??= gallery(model);
  await showGallery(label in model.names ? Number(label) : null);
  scrollTo(0, 0);
}

async function start() {
  complain(byId("problem"), null);
  try {
    const model = await modelKnown();
    byId("model").textContent = model.summary;
    await offerExamples(model);
  } catch (error) {
    refused(byId("problem"), error, start);
  }
}

window.addEventListener("hashchange", route);
route();
start();
