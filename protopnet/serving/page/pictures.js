/* Photos and training images, whole or a part of them, with boxes and heat maps over them, as SVG.

   A picture is {url, width, height}: the size is that of the original, which boxes are measured in, whatever the file has. A
   box is [top, left, bottom, right] as the server gives it, a heat map the URL of a picture to stretch over all. */

import { make } from "./dom.js";

/** A picture of an image file, turned as its EXIF says; null if this browser can't read such files. */
export async function readPicture(blob) {
  const image = new Image();
  image.src = URL.createObjectURL(blob);
  try {
    await image.decode();
  } catch {
    return null;
  }
  return { url: image.src, width: image.naturalWidth, height: image.naturalHeight };
}

/** The part of a picture inside a box. */
export function part(picture, [top, left, bottom, right], label) {
  return drawing(`${left} ${top} ${right - left} ${bottom - top}`, label, layer(picture, picture.url));
}

/** All of a picture, with a heat map, with a box, with what a patch can see, and with numbered boxes (marks: {box, number}). */
export function whole(picture, { box = null, field = null, heat = null, marks = [], label }) {
  return drawing(
    `0 0 ${picture.width} ${picture.height}`,
    label,
    layer(picture, picture.url),
    heat && layer(picture, heat, "heat"),
    ...(box ? outline(box) : []),
    ...(field ? outline(field, ["edge thin", "field"]) : []),
    ...marks.flatMap((mark) => outline(mark.box)),
    ...numbers(picture, marks),
  );
}

function drawing(viewBox, label, ...content) {
  const heard = label ? { role: "img", "aria-label": label } : { "aria-hidden": "true" };
  return make("svg", { class: "picture", viewBox, ...heard }, ...content);
}

const layer = ({ width, height }, href, kind = "photo") =>
  href && make("image", { class: kind, href, width, height, preserveAspectRatio: "none" });

/** Yellow within dark, to be seen on any ground. */
const outline = ([top, left, bottom, right], kinds = ["edge", "box"]) =>
  kinds.map((kind) => make("rect", { class: kind, x: left, y: top, width: right - left, height: bottom - top }));

/** A number at a corner of each box, moved down along the edge where another number already is. */
function numbers(picture, marks) {
  const side = Math.max(picture.width, picture.height) / 22;
  const taken = [];
  return marks.map(({ box: [top, left, bottom], number }) => {
    let y = top;
    while (taken.some((other) => Math.abs(other.left - left) < side && Math.abs(other.y - y) < side) && y < bottom) y += side;
    y = Math.min(y, picture.height - side);
    taken.push({ left, y });
    const place = { x: left + side / 2, y: y + 0.76 * side, "font-size": 0.75 * side };
    return make("g", { class: "mark" }, make("rect", { x: left, y, width: side, height: side }), make("text", place, number));
  });
}
