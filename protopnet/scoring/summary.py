"""What a person reads at the end of a scoring job."""

from typing import Any

from rich.console import Console
from rich.table import Table

from protopnet import storage
from protopnet.scoring.output import PARTS
from protopnet.words import first_few, percent

_SHOWN = 5  # classes and reasons named


def closing_table(summary: dict[str, Any], output_uri: str) -> None:
    """Print the counts of `scores.json`, and where the rows are."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in _lines(summary):
        table.add_row(name, text)
    Console(highlight=False, markup=False).print(table)
    print(f"scores: {storage.located(storage.join(output_uri, PARTS))}", flush=True)


def too_many_bad(summary: dict[str, Any], max_bad: float) -> str:
    """The one line that explains exit code 1."""
    return (
        f"{summary['bad']:,} of {summary['images']:,} images couldn't be scored, more than --max_bad {max_bad:g} allows: "
        f"{_most(summary['errors'])}; they are the rows with an error, all others are complete"
    )


def _lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [("images", f"{summary['images']:,}"), ("scored", f"{summary['scored']:,}")]
    if summary["bad"]:
        lines.append(("with an error", f"{summary['bad']:,}: {_most(summary['errors'])}"))
    if summary["settings"]["abstain"] is not None:
        lines.append(("abstained", f"{summary['abstained']:,}"))
    if summary["accuracy"] is not None:
        lines.append(("accuracy", f"{percent(summary['accuracy'])} of {summary['labelled']:,} with a label"))
    lines.append(("predicted", _most(summary["predictions"])))
    if summary["watch"]["measures"]:
        lines.append(("beside the usual", "; ".join(map(_drift, summary["watch"]["measures"]))))
    compared = summary["precision"].get("against_float32")
    if compared:
        agreeing = f"{compared['same_prediction']} of {compared['images']} predictions as in float32"
        lines.append(("bf16", f"{agreeing}, logits differ by at most {compared['largest_logit_difference']:.3g}"))
    if summary["images_per_second"] is not None:
        seconds = summary["run"]["seconds"]
        lines.append(("speed", f"{summary['images_per_second']:,.1f} img/s, after {seconds['start']:.0f} s of start"))
    return lines


def _drift(measured: dict[str, Any]) -> str:
    drift = measured["drift"]
    return f"{measured['measure']} {drift['index']:.2f} (by chance below {drift['by_chance']:.2f})"


def _most(counts: dict[str, int]) -> str:
    """The largest counts by name."""
    return first_few([f"{name} ({count:,})" for name, count in counts.items()], _SHOWN)
