/* Class names for people, and what somebody may have meant by a name that isn't one. */

/** `001.Black_footed_Albatross` is Black footed Albatross, unless two became the same. */
export function readableNames(names) {
  const readable = names.map((name) => name.replace(/^\d+[._ -]+(?=\D)/, "").replaceAll("_", " ").trim() || name);
  return new Set(readable).size === names.length ? readable : names;
}

/** Place of a name in the list, however it was typed; -1 if it isn't there. */
export function find(text, readable, raw) {
  const wanted = plain(text);
  const exact = raw.findIndex((name) => name === text.trim());
  return exact >= 0 ? exact : readable.findIndex((name) => plain(name) === wanted);
}

/** Places of the names nearest to a text that is none of them, best first. */
export function nearest(text, names, count = 3) {
  const wanted = plain(text);
  if (!wanted) return [];
  return names
    .map((name, place) => ({ place, far: distance(wanted, plain(name)) }))
    .sort((a, b) => a.far - b.far)
    .slice(0, count)
    .filter(({ far }) => far < 0.75)
    .map(({ place }) => place);
}

const plain = (text) => text.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, " ").trim();

/** From 0, the same, to 1, nothing in common. A part of a name is near it: "auklet", or one of its words with a slip. */
function distance(wanted, name) {
  if (name.includes(wanted)) return 0.1 * (1 - wanted.length / name.length);
  const parts = [name, ...name.split(" ")];
  return Math.min(...parts.map((part) => edits(wanted, part) / Math.max(wanted.length, part.length)));
}

/** Letters to insert, take away or replace to make one text the other. */
function edits(a, b) {
  let above = Array.from({ length: b.length + 1 }, (_, column) => column);
  for (let row = 1; row <= a.length; row++) {
    const line = [row];
    for (let column = 1; column <= b.length; column++) {
      const replaced = above[column - 1] + (a[row - 1] === b[column - 1] ? 0 : 1);
      line.push(Math.min(replaced, above[column] + 1, line[column - 1] + 1));
    }
    above = line;
  }
  return above[b.length];
}
