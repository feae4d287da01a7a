/* Requests to the server that sent this page, and to no other. */

const KEPT_TOKEN = "protopnet-token";
let askForToken = async () => null; // see onUnauthorized
let asking = null; // one question at a time, however many requests wait for its answer

/** What to do when the server wants a token: an async function that gives one, or null. */
export function onUnauthorized(ask) {
  askForToken = ask;
}

/** A request that wasn't answered as hoped; its message is a sentence for people. */
export class Refused extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** JSON of an answer. `Refused` where there is none. */
export async function getJson(path, options = {}) {
  return (await ask(path, options)).json();
}

/** Bytes of an answer: pictures as well, because an <img> can't send a token. */
export async function getBlob(path) {
  return (await ask(path)).blob();
}

async function ask(path, options = {}) {
  for (let refusedBefore = false; ; refusedBefore = true) {
    const token = sessionStorage.getItem(KEPT_TOKEN);
    const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
    const answer = await send(path, { ...options, headers });
    if (answer.ok) return answer;
    if (answer.status !== 401 || !(await newToken(token, refusedBefore))) throw await refusal(answer);
  }
}

async function send(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server doesn't answer. Is it still running, and is this device online?");
  }
}

/** Whether there is now a token other than the one that was refused. */
async function newToken(refused, again) {
  if (sessionStorage.getItem(KEPT_TOKEN) !== refused) return true; // another request was told meanwhile
  asking ??= askForToken(again || refused !== null).finally(() => (asking = null));
  const token = await asking;
  if (token) sessionStorage.setItem(KEPT_TOKEN, token);
  else sessionStorage.removeItem(KEPT_TOKEN);
  return Boolean(token);
}

async function refusal(answer) {
  const wait = Number(answer.headers.get("Retry-After")) || null;
  let message = `The server answered ${answer.status} ${answer.statusText}.`;
  try {
    message = sentence((await answer.json()).error.message);
  } catch {
    if (answer.status === 503) message = "The server is busy."; // a proxy in between, which answers in its own words
  }
  return new Refused(message, answer.status, wait);
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?…]$/.test(text) ? "" : ".");
