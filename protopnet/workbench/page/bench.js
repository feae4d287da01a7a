/* The workbench: a list of what to look at, the prototype looked at, and what the last decision changed. */

import { getJson, onUnauthorized } from "./api.js";
import { show as showCard, press } from "./card.js";
import { byId, complain, make } from "./dom.js";
import { showEffect } from "./effect.js";

const PAGE = 20;
const KEPT_SEAT = "protopnet-seat";
const KEYS = { k: "keep", d: "drop", n: "patch", e: "elsewhere", r: "region", m: "merge", f: "used", i: "name", g: "group" };

let view = "findings";
let offset = 0;
let items = []; // of the list: {prototypes, …}
let current = -1;
let state = null;

const seat = () => sessionStorage.getItem(KEPT_SEAT) ?? "";

/** POST with the seat; complains and gives null where it is refused. */
async function post(path, content = {}) {
  try {
    const body = JSON.stringify({ seat: seat(), ...content });
    const answer = await getJson(path, { method: "POST", body, headers: { "Content-Type": "application/json" } });
    complain(byId("problem"), null);
    return answer;
  } catch (error) {
    complain(byId("problem"), error.message);
    return null;
  }
}

// ------------------------------------------------------------------------------------------------ state

async function ask() {
  try {
    take(await getJson(`v1/state?seat=${encodeURIComponent(seat())}`));
  } catch (error) {
    complain(byId("problem"), error.message);
  }
}

/** What the server says of how things are. */
function take(next) {
  if (!next) return;
  const changed = state && next.effect.number !== state.effect.number;
  state = next;
  byId("torn").hidden = !state.torn;
  showLapsed(state.lapsed);
  byId("holder").textContent = state.yours ? `You are deciding as ${state.holder}.` : state.holder ? `${state.holder} is deciding; you can look.` : "Nobody is deciding.";
  byId("who").hidden = byId("sit").hidden = state.yours;
  byId("sit").disabled = Boolean(state.holder);
  byId("leave").hidden = !state.yours;
  byId("undo").disabled = !state.yours || !state.undo;
  byId("redo").disabled = !state.yours || !state.redo;
  byId("save").disabled = !state.yours || !state.decisions || state.saved.state === "working";
  byId("undo").textContent = state.undo ? `Undo ${state.undo}` : "Undo";
  byId("redo").textContent = state.redo ? `Redo ${state.redo}` : "Redo";
  document.body.classList.toggle("deciding", state.yours);
  showEffect(state);
  if (changed) look();
}

/** Decisions from before that this bundle has no use for. */
function showLapsed(lapsed) {
  const box = byId("lapsed");
  box.hidden = !lapsed.length;
  box.querySelector("summary").textContent = `${lapsed.length} of the decisions from before ${lapsed.length === 1 ? "doesn't" : "don't"} apply to this bundle`;
  box.querySelector("ul").replaceChildren(...lapsed.map(({ decide, who, why }) => make("li", {}, `${decide} (${who}): ${why}`)));
}

async function decide(decision) {
  const why = byId("why")?.value.trim() ?? "";
  take(await post("v1/decisions", { decision: { ...decision, why } }));
}

byId("desk").addEventListener("submit", async (event) => {
  event.preventDefault();
  const answer = await post("v1/desk", { who: byId("who").value });
  if (answer) sessionStorage.setItem(KEPT_SEAT, answer.seat);
  await ask();
  look();
});
byId("leave").addEventListener("click", async () => {
  await post("v1/desk/leave");
  await ask();
  look();
});
byId("undo").addEventListener("click", async () => take(await post("v1/undo")));
byId("redo").addEventListener("click", async () => take(await post("v1/redo")));
byId("save").addEventListener("click", async () => take(await post("v1/save")));

// ------------------------------------------------------------------------------------------------- list

async function list(nextView = view, nextOffset = 0) {
  [view, offset] = [nextView, nextOffset];
  for (const each of ["findings", "all", "worth"]) byId(`view-${each}`).setAttribute("aria-pressed", String(each === view));
  byId("class-line").hidden = view !== "all";
  try {
    const page = await fetchPage();
    items = page.items;
    byId("count").textContent = page.says;
    byId("list").replaceChildren(...items.map((item, place) => make("li", {}, button(item, place))));
    byId("earlier").disabled = offset === 0;
    byId("later").disabled = page.next === null;
    current = -1;
  } catch (error) {
    complain(byId("problem"), error.message);
  }
}

async function fetchPage() {
  const window = `offset=${offset}&limit=${PAGE}`;
  if (view === "worth") {
    const { free, free_total, needed, needed_total } = await getJson(`v1/worth?${window}`);
    const items = [
      ...needed.map((item) => ({ ...item, prototypes: [item.prototype], note: `would cost ${item.lost} images` })),
      ...free.map((item) => ({ ...item, prototypes: [item.prototype], note: item.gained ? `free to drop; ${item.gained} more right` : "free to drop" })),
    ];
    const says = `${needed_total} that the model can't do without, ${free_total} free to drop by themselves.`;
    return { items, says, next: Math.max(needed_total, free_total) > offset + PAGE ? offset + PAGE : null };
  }
  const label = byId("class").value;
  const path = view === "findings" ? "v1/findings" : `v1/prototypes${label ? `?class=${label}&` : "?"}`;
  const page = await getJson(`${path}${path.includes("?") ? "" : "?"}${window}`);
  const items = page.items.map((item) => ({ prototypes: [item.prototype], ...item }));
  const last = page.offset + items.length;
  return { items, next: page.next, says: page.total ? `${page.offset + 1} to ${last} of ${page.total}, ${view === "findings" ? "the most serious first" : "in order"}.` : "Nothing." };
}

function button(item, place) {
  const title = item.kind ? [make("b", {}, item.kind), ` · ${item.class_name}`] : [make("b", {}, `Prototype ${item.prototype}`), ` · ${item.class_name}`];
  const severity = item.severity && make("small", { class: `severity-${item.severity.split(" ")[0]}` }, item.severity);
  const note = (item.text || item.note) && make("small", {}, item.text ?? item.note);
  return make("button", { type: "button", click: () => open(place) }, ...title, severity, note);
}

/** Looks at an item of the list, at the first of its prototypes. */
async function open(place) {
  if (place < 0 || place >= items.length) return;
  current = place;
  [...byId("list").querySelectorAll("button")].forEach((each, n) => each.setAttribute("aria-current", String(n === place)));
  items[place].at = items[place].prototypes[0];
  await look();
}

async function look() {
  const item = items[current];
  if (!item) return;
  try {
    const prototype = await getJson(`v1/prototypes/${item.at}`);
    if (items[current] !== item) return; // another was asked for meanwhile
    const switchTo = (p) => {
      item.at = p;
      look();
    };
    showCard(byId("card"), prototype, { item, mayDecide: state.yours, decide, switchTo });
  } catch (error) {
    complain(byId("problem"), error.message);
  }
}

byId("view-findings").addEventListener("click", () => list("findings"));
byId("view-all").addEventListener("click", () => list("all"));
byId("view-worth").addEventListener("click", () => list("worth"));
byId("class").addEventListener("change", () => list("all"));
byId("earlier").addEventListener("click", () => list(view, Math.max(0, offset - PAGE)));
byId("later").addEventListener("click", () => list(view, offset + PAGE));

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
  if (event.key === "j") open(current + 1);
  else if (event.key === "l") open(current - 1);
  else if (event.key === "u") byId("undo").click();
  else if (event.key === "y") byId("redo").click();
  else if (event.key in KEYS || /^[1-4]$/.test(event.key)) press(byId("card"), KEYS[event.key] ?? event.key);
  else return;
  event.preventDefault();
});

// ------------------------------------------------------------------------------------------------ token

onUnauthorized((wrong) => {
  const form = byId("token");
  form.hidden = false;
  byId("token-wrong").textContent = wrong ? "The server doesn't take that token." : "";
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

async function start() {
  await ask();
  if (!state) return;
  const { classes } = await getJson("v1/classes");
  byId("class").append(...classes.map((name, label) => make("option", { value: label }, name)));
  await list();
  await open(0);
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, state.effect.state === "solving" || state.saved.state === "working" ? 500 : 5000));
    await ask();
  }
}

start();
