"""A table of runs for people."""

from collections.abc import Mapping
from typing import Any

from protopnet.experiments.figures import failures
from protopnet.experiments.sheets import Sheet, markdown, page
from protopnet.quality.table import METRICS
from protopnet.words import duration, percent

KINDS = {"protopnet": "ProtoPNet", "baseline": "black box", None: ""}


def as_markdown(figures: Mapping[str, Any]) -> str:
    """figures: of table.json."""
    return markdown(figures["name"], _sheets(figures))


def as_page(figures: Mapping[str, Any]) -> str:
    return page(figures["name"], _sheets(figures))


def _sheets(figures: Mapping[str, Any]) -> list[Sheet]:
    return [_networks(figures), _ensembles(figures), _quality(figures), _failed(figures)]


def _networks(figures: Mapping[str, Any]) -> Sheet:
    header = ["network", "kind", "published", "ours", "runs", "to its baseline", "published", "image passes", "time"]
    rows = [
        [
            row["label"],
            KINDS[row["kind"]],
            _accuracy(row["published"], row["published_deviation"]),
            _accuracy(row["accuracy"]["mean"], row["accuracy"]["deviation"]),
            f"{row['accuracy']['count']} of {len(figures['seeds'])}",
            _points(row["gap"]),
            _points(row["published_gap"]),
            "" if row["image_passes"] is None else f"{row['image_passes']:,.0f}",
            "" if row["seconds"] is None else duration(row["seconds"]),
        ]
        for row in figures["rows"]
    ]
    note = (
        "Accuracy on test images: mean ± standard deviation over seeds. To its baseline: points above the black box of "
        "the same backbone. Image passes and time are of one run."
    )
    return Sheet("Networks", note, header, rows)


def _ensembles(figures: Mapping[str, Any]) -> Sheet:
    header = ["ensemble", "members", "published", "ours", "ensembles", "best member", "gain"]
    labels = {row["row"]: row["label"] for row in figures["rows"]}
    rows = [
        [
            each["label"],
            " + ".join(labels[member] for member in each["members"]) + (", all seeds" if each["across_seeds"] else ""),
            _accuracy(each["published"], each["published_deviation"]),
            _accuracy(each["accuracy"]["mean"], each["accuracy"]["deviation"]),
            str(each["accuracy"]["count"]),
            percent(each["best_member"]),
            _points(each["gain"]),
        ]
        for each in figures["ensembles"]
    ]
    return Sheet("Ensembles", "The members' logits added up.", header, rows)


def _quality(figures: Mapping[str, Any]) -> Sheet:
    explaining = [row for row in figures["rows"] if row["quality"]]
    shown = [name for name in METRICS if any(name in row["quality"] for row in explaining)]

    def cell(row: Mapping[str, Any], name: str) -> str:
        value = row["quality"].get(name)
        return "" if value is None else percent(value) if METRICS[name].percent else f"{value:.2f}"

    rows = [[row["label"], *[cell(row, name) for name in shown]] for row in explaining]
    note = "Means over seeds, on test images."
    return Sheet("Quality of the explanations", note, ["network", *[METRICS[name].label for name in shown]], rows)


def _failed(figures: Mapping[str, Any]) -> Sheet:
    return Sheet("Failed", "The same command tries them again.", ["run", "why"], failures(figures))


def _accuracy(value: float | None, deviation: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} ± {100 * deviation:.1f} %" if deviation is not None else percent(value)


def _points(share: float | None) -> str:
    return "" if share is None else f"{100 * share:+.1f}"
