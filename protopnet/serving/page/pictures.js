/* Photos, parts of them, boxes and heat maps on canvases. Nothing here asks the server anything.

   A picture is {canvas, width, height}: pixels to draw from, and the size that boxes are measured in. A box is
   [top, left, bottom, right] as the server gives it. */

import { make } from "./dom.js";

const LONGEST = 1600; // pixels kept of a photo: enough for a large screen, little enough for a phone
const CELL = 288; // longest side of the small pictures, twice what is shown
const MARK = "#ffd400"; // --mark of style.css

// Viridis: rises evenly in brightness, whatever colours the reader can tell apart.
const VIRIDIS = [
  [68, 1, 84],
  [71, 45, 123],
  [59, 82, 139],
  [44, 114, 142],
  [33, 145, 140],
  [40, 174, 128],
  [94, 201, 98],
  [173, 220, 48],
  [253, 231, 37],
];

/** A picture of an image file, turned as its EXIF says, on white; null if this browser can't read such files. */
export async function readPicture(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    return null;
  }
  const { width, height } = bitmap;
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  const canvas = blank(Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale)), "#fff");
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return { canvas, width, height };
}

/** In place of a photo that only the server can read. */
export function unseen(width, height) {
  const scale = CELL / Math.max(width, height);
  return { canvas: blank(Math.ceil(width * scale), Math.ceil(height * scale), "#8a929b"), width, height };
}

/** The part of a picture inside a box, enlarged. */
export function part(picture, box, label) {
  const { x, y, w, h } = scaled(picture, box);
  const scale = CELL / Math.max(w, h);
  const canvas = small(w * scale, h * scale, label);
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(picture.canvas, x, y, w, h, 0, 0, canvas.width, canvas.height);
  return canvas;
}

/** A whole picture, small, with a box: what is outside the box is darker, or under a heat map if there is one. */
export function whole(picture, box, heat, label) {
  const scale = CELL / Math.max(picture.canvas.width, picture.canvas.height);
  const canvas = small(picture.canvas.width * scale, picture.canvas.height * scale, label);
  paint(canvas, picture, { focus: box, heat, line: 4 });
  return canvas;
}

/** Draw a picture on a canvas, with numbered boxes (marks), or with one box (focus) over a heat map. */
export function paint(canvas, picture, { marks = [], focus = null, heat = null, line = 2 } = {}) {
  const pen = canvas.getContext("2d");
  const { width, height } = canvas;
  pen.imageSmoothingQuality = "high";
  pen.drawImage(picture.canvas, 0, 0, width, height);
  if (heat) pen.drawImage(heatMap(heat), 0, 0, width, height);
  else if (focus) darken(pen, scaled(picture, focus, canvas), width, height);
  if (focus) outline(pen, scaled(picture, focus, canvas), line);
  for (const mark of marks) outline(pen, scaled(picture, mark.box, canvas), line);
  placeNumbers(pen, marks.map((mark) => ({ ...scaled(picture, mark.box, canvas), text: mark.number })), line);
}

function blank(width, height, colour) {
  const canvas = make("canvas", { width, height });
  const pen = canvas.getContext("2d");
  pen.fillStyle = colour;
  pen.fillRect(0, 0, width, height);
  return canvas;
}

function small(width, height, label) {
  const sides = { width: Math.max(1, Math.round(width)), height: Math.max(1, Math.round(height)) };
  return make("canvas", label ? { ...sides, role: "img", "aria-label": label } : { ...sides, "aria-hidden": "true" });
}

/** A box in pixels of the canvas that is drawn from or on. */
function scaled(picture, [top, left, bottom, right], canvas = picture.canvas) {
  const across = canvas.width / picture.width;
  const down = canvas.height / picture.height;
  return { x: left * across, y: top * down, w: (right - left) * across, h: (bottom - top) * down };
}

function darken(pen, { x, y, w, h }, width, height) {
  pen.fillStyle = "rgb(0 0 0 / .45)";
  pen.beginPath();
  pen.rect(0, 0, width, height);
  pen.rect(x, y, w, h);
  pen.fill("evenodd");
}

/** Yellow between two dark lines, to be seen on any ground; wholly inside the box. */
function outline(pen, { x, y, w, h }, line) {
  for (const [colour, thick] of [["rgb(0 0 0 / .75)", 2 * line], [MARK, line]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = thick;
    pen.strokeRect(x + line, y + line, Math.max(1, w - 2 * line), Math.max(1, h - 2 * line));
  }
}

/** A number at a corner of each box, moved down along the edge where another number already is. */
function placeNumbers(pen, boxes, line) {
  const side = 11 * line;
  const taken = [];
  for (const { x, y, h, text } of boxes) {
    let top = y;
    while (taken.some((other) => Math.abs(other.x - x) < side && Math.abs(other.y - top) < side) && top < y + h) top += side;
    top = Math.min(top, pen.canvas.height - side);
    taken.push({ x, y: top });
    pen.fillStyle = MARK;
    pen.fillRect(x, top, side, side);
    pen.fillStyle = "#16191d";
    pen.font = `600 ${8 * line}px system-ui, sans-serif`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.fillText(text, x + side / 2, top + side / 2 + line / 2);
  }
}

/** Similarities of all patches as a picture: from their least, dark, to their greatest, yellow. */
function heatMap(rows) {
  const side = 128;
  const smooth = enlarge(rows, side);
  const low = Math.min(...rows.flat());
  const range = Math.max(...rows.flat()) - low || 1;
  const canvas = make("canvas", { width: side, height: side });
  const pen = canvas.getContext("2d");
  const image = pen.createImageData(side, side);
  smooth.forEach((value, place) => {
    const share = Math.min(1, Math.max(0, (value - low) / range));
    image.data.set([...viridis(share), 130], 4 * place);
  });
  pen.putImageData(image, 0, 0);
  return canvas;
}

function viridis(share) {
  const step = Math.min(VIRIDIS.length - 2, Math.floor(share * (VIRIDIS.length - 1)));
  const between = share * (VIRIDIS.length - 1) - step;
  return VIRIDIS[step].map((from, channel) => from + between * (VIRIDIS[step + 1][channel] - from));
}

/** Bicubic, as the server enlarges a map to find the box. One row of numbers after the other. */
function enlarge(rows, side) {
  const down = weights(rows.length, side);
  const across = weights(rows[0].length, side);
  const wide = rows.map((row) => across.map((taps) => taps.reduce((sum, [place, weight]) => sum + weight * row[place], 0)));
  return down.flatMap((taps) =>
    across.map((_, column) => taps.reduce((sum, [place, weight]) => sum + weight * wide[place][column], 0)),
  );
}

/** For each of `to` new places, the four old ones it is made of and their weights (cubic convolution, a = -3/4). */
function weights(from, to) {
  return Array.from({ length: to }, (_, place) => {
    const centre = ((place + 0.5) * from) / to - 0.5;
    const first = Math.floor(centre) - 1;
    return [0, 1, 2, 3].map((tap) => {
      const old = first + tap;
      return [Math.min(from - 1, Math.max(0, old)), cubic(Math.abs(centre - old))];
    });
  });
}

function cubic(t) {
  if (t <= 1) return 1.25 * t ** 3 - 2.25 * t ** 2 + 1;
  return t < 2 ? -0.75 * (t ** 3 - 5 * t ** 2 + 8 * t - 4) : 0;
}
