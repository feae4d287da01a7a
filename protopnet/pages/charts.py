"""Curves as inline SVG that follow the page: its font, its width, its light or dark colours.

Matplotlib draws them with stand-in colours, which are then replaced by CSS variables.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
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
