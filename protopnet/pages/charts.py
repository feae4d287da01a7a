"""Charts of a report as inline SVG that follow the page: its font, its width, its light or dark colours.

Curves are drawn by matplotlib with stand-in colours that are then replaced by CSS variables; the confusion matrix
is written directly, since most of its cells are empty.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Stand-ins, unlikely to occur otherwise, and the CSS that takes their place.
_INK, _FAINT = "#010101", "#020202"
_SERIES = ("#030301", "#030302", "#030303", "#030304")
_CSS = {
    _INK: "var(--ink)",
    _FAINT: "var(--line)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, 1)},
}
_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "protopnet", "font.size": 9}
_MARKS = ("o", "s", "D", "^")

LABELLED_CLASSES = 32  # a confusion matrix of more classes has no names along its sides
COUNTED_CLASSES = 20  # … and one of more than this no numbers in its cells


@dataclass(frozen=True)
class Curve:
    """Points of one series. `joined`: with a line; otherwise marks alone."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    joined: bool = True


def curves_chart(
    curves: Sequence[Curve], pushes: Sequence[float], *, percent: bool = False, description: str
) -> Markup:
    """Small chart of curves over epochs, with a dashed line at each push.

    percent: values are shares of 1 and shown as per cent. description: what a screen reader says.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.6, 2.3), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        _style_axes(axes)
        for push in pushes:
            axes.axvline(push, color=_INK, linewidth=1, linestyle=(0, (2, 2)), alpha=0.6)
        for number, curve in enumerate(curves):
            values = [100 * y for y in curve.y] if percent else list(curve.y)
            line = "-" if curve.joined else "none"
            mark = _MARKS[number % len(_MARKS)] if not curve.joined or len(curve.x) < 25 else ""
            colour, mark_size = _SERIES[number % len(_SERIES)], 3.5 if curve.joined else 5.5
            style: dict[str, Any] = {"linestyle": line, "linewidth": 1.6, "marker": mark, "markersize": mark_size}
            axes.plot(curve.x, values, label=curve.name, color=colour, **style)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        if percent:
            axes.set_ylim(min(0.0, axes.get_ylim()[0]), max(100.0, axes.get_ylim()[1]))
        axes.set_xlabel("epoch", color=_INK)
        if len(curves) > 1:
            axes.legend(frameon=False, labelcolor=_INK, fontsize=8, loc="best", handlelength=1.4)
        return _inline_svg(figure, description)


def confusion_chart(confusion_KK: np.ndarray, names: Sequence[str]) -> Markup:
    """Confusion matrix: a row for each true class, a column for each predicted one.

    The darker a cell, the larger the share of its row; right answers in one colour, mistakes in another. Each cell
    says on hovering what it counts.
    """
    classes = len(names)
    labelled = classes <= LABELLED_CLASSES
    cell = 26 if classes <= COUNTED_CLASSES else 20 if labelled else max(3.0, 760 / classes)
    left = 12 + 6.2 * max(len(name) for name in names) if labelled else 22
    top = 12 + 4.6 * max(len(name) for name in names) if labelled else 22
    side = cell * classes
    width, height = left + side + (top * 0.75 if labelled else 4), top + side + 4
    parts = [
        f'<svg class="confusion" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'style="max-width:{width:.0f}px{";min-width:" + format(width * 0.8, ".0f") + "px" if labelled else ""}">'
        f"<title>Confusion matrix of {classes} classes</title>"
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{side:.1f}" height="{side:.1f}" class="frame"/>'
    ]
    parts += _side_labels(names, left, top, cell) if labelled else _side_titles(left, top, side)
    parts += _cells(confusion_KK, names, left, top, cell)
    return Markup("".join(parts) + "</svg>")


def most_confused(confusion_KK: np.ndarray, names: Sequence[str], limit: int = 10) -> list[dict[str, object]]:
    """The commonest mistakes: true and predicted class, how many images, and of how many."""
    mistakes = np.array(confusion_KK) * (1 - np.eye(len(names), dtype=int))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:limit]
    pairs = [divmod(int(place), len(names)) for place in order]
    totals = np.asarray(confusion_KK).sum(axis=1)
    return [
        {"true": names[i], "predicted": names[j], "count": int(mistakes[i, j]), "of": int(totals[i])}
        for i, j in pairs
        if mistakes[i, j]
    ]


def _side_labels(names: Sequence[str], left: float, top: float, cell: float) -> list[str]:
    parts = []
    for number, name in enumerate(names):
        middle = (number + 0.5) * cell
        parts.append(f'<text x="{left - 6:.1f}" y="{top + middle + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        x, y = left + middle + 3, top - 5
        parts.append(f'<text transform="translate({x:.1f} {y:.1f}) rotate(-50)">{escape(name)}</text>')
    return parts


def _side_titles(left: float, top: float, side: float) -> list[str]:
    middle = top + side / 2
    turned = f"translate({left - 7:.1f} {middle:.1f}) rotate(-90)"
    return [
        f'<text x="{left + side / 2:.1f}" y="{top - 7:.1f}" text-anchor="middle">predicted class →</text>',
        f'<text transform="{turned}" text-anchor="middle">← true class</text>',
    ]


def _cells(confusion_KK: np.ndarray, names: Sequence[str], left: float, top: float, cell: float) -> list[str]:
    parts = []
    totals = np.maximum(1, np.asarray(confusion_KK).sum(axis=1))
    gap = 1 if cell > 8 else 0
    faintest = 0.2 if gap else 0.45  # small cells need more colour to be seen
    for i, j in np.argwhere(np.asarray(confusion_KK) > 0):
        count, share = int(confusion_KK[i][j]), float(confusion_KK[i][j] / totals[i])
        x, y = left + j * cell, top + i * cell
        says = f"{names[i]}: {count} of {totals[i]} taken for {names[j]}"
        opacity = faintest + (1 - faintest) * share
        parts.append(
            f'<rect class="{"right" if i == j else "wrong"}" x="{x:.1f}" y="{y:.1f}" width="{cell - gap:.1f}" '
            f'height="{cell - gap:.1f}" fill-opacity="{opacity:.2f}"><title>{escape(says)}</title></rect>'
        )
        if len(names) <= COUNTED_CLASSES:
            strong = " strong" if share > 0.45 else ""
            parts.append(
                f'<text class="count{strong}" x="{x + cell / 2:.1f}" y="{y + cell / 2 + 4:.1f}">{count}</text>'
            )
    return parts


def _style_axes(axes: matplotlib.axes.Axes) -> None:
    axes.patch.set_alpha(0)
    axes.grid(True, color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_INK)
    axes.tick_params(colors=_INK, length=0)


def _inline_svg(figure: Figure, description: str) -> Markup:
    """The figure without XML header and fixed size, its stand-in colours replaced."""
    sink = io.StringIO()
    figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = sink.getvalue()
    body = text[text.index("<svg") :]
    head, rest = body.split(">", 1)
    view = head[head.index('viewBox="') :].split('"')[1]
    for colour, css in _CSS.items():
        rest = rest.replace(colour, css)
    return Markup(f'<svg class="chart" viewBox="{view}" role="img"><title>{escape(description)}</title>{rest}')


def series_by_name(rows: Sequence[Mapping[str, object]], names: Mapping[str, str]) -> list[Curve]:
    """Curves over epochs (counted from 1) of the metrics in `names`, which maps them to what people call them."""
    curves = []
    for name, label in names.items():
        points = sorted((int(r["epoch"]) + 1, float(r["value"])) for r in rows if r["name"] == name)  # type: ignore[call-overload, arg-type]
        if points:
            curves.append(Curve(label, [x for x, _ in points], [y for _, y in points]))
    return curves
