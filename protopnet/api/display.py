"""How results look in a notebook and as pictures."""

import html
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from protopnet.pages import pictures

MOST = 12  # results of a list that a notebook shows
_ROW_PIXELS, _CLASS_PIXELS, _HEAD_PIXELS = 148, 160, 270  # of a frame: as much as the page needs at 1,000 pixels' width
_INK, _SOFT, _STRONG = "#22262b", "#646b73", "#0068a8"
Line = tuple[str, float, str]  # a class, its probability, and that in words


def bars(photo: bytes, title: str, lines: Sequence[Line]) -> Image.Image:
    """A photo beside a bar for each class."""
    figure = Figure(figsize=(7.2, 2.6), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    left.imshow(np.asarray(pictures.opened(photo)))
    left.set_title(title.rsplit("/", 1)[-1], fontsize=8, color=_SOFT, parse_math=False)
    left.set_axis_off()
    places = range(len(lines))
    right.barh(places, [share for _, share, _ in lines], color=_STRONG, height=0.32)
    for place, (name, _, said) in zip(places, lines, strict=True):
        right.text(0, place - 0.3, name, fontsize=9, color=_INK, va="bottom", parse_math=False)
        right.text(1, place - 0.3, said, fontsize=9, color=_SOFT, va="bottom", ha="right")
    right.set(xlim=(0, 1), ylim=(len(lines) - 0.5, -0.9))
    right.set_axis_off()
    figure.tight_layout()
    figure.canvas.draw()  # type: ignore[no-untyped-call]
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")  # type: ignore[attr-defined]


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """One below the other, on white."""
    if len(images) == 1:
        return images[0]
    whole = Image.new("RGB", (max((i.width for i in images), default=1), sum(i.height for i in images) or 1), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    return whole


def prediction_html(photo: bytes, title: str, lines: Sequence[Line]) -> str:
    cells = "".join(
        f'<tr><td style="text-align:left">{html.escape(name)}</td>'
        f'<td><progress max="1" value="{share:.4f}"></progress></td><td>{html.escape(said)}</td></tr>'
        for name, share, said in lines
    )
    picture = f'<img src="{pictures.data_uri(photo)}" alt="" style="max-height:150px">'
    return (
        f'<figure style="display:flex;gap:1.5em;align-items:center;margin:0 0 1em">{picture}'
        f"<figcaption><div>{html.escape(title)}</div><table>{cells}</table></figcaption></figure>"
    )


def framed(document: str, rows: int, classes: int) -> str:
    """A whole HTML document within a notebook's page, whose styles it neither takes nor changes."""
    height = _HEAD_PIXELS + _CLASS_PIXELS * classes + _ROW_PIXELS * rows
    return (
        f'<iframe srcdoc="{html.escape(document)}" style="width:100%;height:{height}px;border:0" title="Why?"></iframe>'
    )


def several(shown: Sequence[str], count: int) -> str:
    more = f"<p>and {count - len(shown):,} more</p>" if count > len(shown) else ""
    return "".join(shown) + more


def in_words(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"
