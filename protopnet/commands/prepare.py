"""Turn any source of images into Parquet shards.

python jobs/prepare.py --data.source cub --data.path CUB_200_2011 --output shards/cub
python jobs/prepare.py --data.source folder --data.path s3://bucket/flowers --output s3://bucket/shards/flowers
"""

import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from protopnet import storage
from protopnet.cli import checked, parse
from protopnet.config import PrepareSettings
from protopnet.datasets.duplicates import duplicates_across, duplicates_text
from protopnet.datasets.open import open_source
from protopnet.datasets.rows import Dataset
from protopnet.datasets.shards import check_output, write_source
from protopnet.errors import exit_with_a_sentence
from protopnet.lease import Lease
from protopnet.pages.data import data_page


class CountLine:
    """A line that is kept up to date on a terminal, and printed twice a minute into a log."""

    def __init__(self, doing: str) -> None:
        self.doing = doing
        self.start = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        last = done == total
        if now - self.shown < (0.2 if self.terminal else 30) and not last:
            return
        self.shown = now
        amount = f"{done:,}" if total is None else f"{done:,} of {total:,}"
        line = f"{self.doing} {amount} images, {done / max(now - self.start, 1e-3):,.0f} a second"
        end = "" if self.terminal and not last else "\n"
        print(f"\r\033[K{line}" if self.terminal else line, file=sys.stderr, end=end, flush=True)

    def end(self) -> None:
        """Leave the line on a terminal for what is printed next."""
        if self.terminal:
            print("\r\033[K", file=sys.stderr, end="", flush=True)


def summary(dataset: Dataset, output: str, seconds: float) -> str:
    """What was written, and every image that wasn't, up to ten."""
    counts = ", ".join(f"{count:,} {split}" for split, count in dataset.counts().items() if count)
    images, classes = dataset.table.num_rows, len(dataset.classes)
    lines = [f"{images:,} images of {classes} classes in {seconds:.0f} s: {counts}"]
    if passed := dataset.source.get("passed_over"):
        lines.append(passed)
    if repeated := duplicates_text(duplicates_across(dataset.table)):
        lines.append(repeated)
    errors = dataset.errors.to_pylist()
    lines += [f"not used: {error['uri']}: {error['reason']}" for error in errors[:10]]
    if len(errors) > 10:
        lines.append(f"not used: {len(errors) - 10:,} more, listed in the shards' errors table")
    lines.append(f"dataset: {output}")
    return "\n".join(lines)


def prepare(settings: PrepareSettings | Mapping[str, Any]) -> Dataset:
    """Write images of any source as shards; returns their manifest. `UserError` for what is wrong with them.

    On this machine, or where a cluster is named (`compute.address`, `RAY_ADDRESS`) on all its nodes. A killed call is gone
    on with by the same one.
    """
    settings = checked(PrepareSettings, settings)
    check_output(settings.output, settings.overwrite)
    reading, writing = CountLine("read"), CountLine("written")
    with Lease(settings.output, "--output") as lease:
        source = open_source(settings)
        dataset = write_source(
            source,
            settings.output,
            overwrite=settings.overwrite,
            checked=reading,
            written=writing,
            max_bad=settings.data.max_bad,
            **_on_cluster(settings),
        )
        lease.check()
    writing.end()
    if settings.report:
        page = data_page(dataset, settings.data.path or settings.data.source, settings.data)
        storage.write_bytes(settings.report, page.encode())
    return dataset


def _on_cluster(settings: PrepareSettings) -> dict[str, Any]:
    """Where it is done: one machine has no use for Ray, whose start takes longer than a few hundred images."""
    if not (settings.compute.address or os.environ.get("RAY_ADDRESS")):
        return {}
    from protopnet import cluster  # only here: Ray takes a second to load

    paths = {"--output": settings.output} | ({"data.path": settings.data.path} if settings.data.path else {})
    cluster.connect(settings.compute, paths)
    return {"spread": partial(cluster.spread, settings.compute), "cores": 1}


@exit_with_a_sentence
def main() -> None:
    settings, start = parse(PrepareSettings), time.monotonic()
    dataset = prepare(settings)
    print(summary(dataset, settings.output, time.monotonic() - start))
    if settings.report:
        print(f"report: {settings.report}")
