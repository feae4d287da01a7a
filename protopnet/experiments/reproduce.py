"""A table of runs as one job that can be killed at any moment: each (row, seed) is an ordinary run folder, and finished
ones are kept.

    <output>/data/<source>-<digest>/    shards that rows with the same images share
    <output>/<row>-seed<k>/             a run, as jobs/train.py leaves it
    <output>/table.json, table.md, table.html     written anew after each run
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from protopnet import storage
from protopnet.cli import changed_settings
from protopnet.config import RunSettings
from protopnet.experiments.figures import Outcome, read_outcome, table_figures
from protopnet.experiments.shared_data import on_shared_data
from protopnet.experiments.table import Member, Table, members
from protopnet.experiments.text import as_markdown, as_page
from protopnet.experiments.workers import train_all
from protopnet.lease import Lease
from protopnet.training.run import FREE_ON_RESUME
from protopnet.words import percent


def reproduce(table: Table, folder: Path, output: str, given: Mapping[str, Any], parallel: int) -> dict[str, Any]:
    """Bring all runs of a table to their ends; returns the content of table.json, with what failed as values.

    folder: of the table's file. given: settings that win over all others. `UserError` for settings and data that can't
    be, before anything is trained, and where another job works in `output`.
    """
    output = storage.located(output)
    runs = members(table, folder, output, given)
    storage.check_writable(output, "output")
    with Lease(output, "--output"):
        data = storage.join(output, "data")
        runs = [replace(run, settings=on_shared_data(run.settings, data)) for run in runs]
        return _train(table, runs, output, parallel)


def _train(table: Table, runs: Sequence[Member], output: str, parallel: int) -> dict[str, Any]:
    ended: dict[str, list[Outcome]] = {name: [] for name in table.rows}
    todo = []
    for run in runs:
        if is_finished(run.settings):
            ended[run.row].append(_outcome(run, None))
        else:
            todo.append(run)
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs were done before", flush=True)
    figures = _write(table, ended, output)
    with closing(train_all([run.settings for run in todo], parallel)) as endings:
        for place, failure in endings:
            outcome = _outcome(todo[place], failure)
            ended[todo[place].row].append(outcome)
            figures = _write(table, ended, output)
            done = sum(map(len, ended.values()))
            said = failure or f"{percent(outcome.summary['test_accuracy'])} of the test images right"
            print(f"{todo[place].settings.name}: {said} ({done} of {len(runs)} runs)\n", flush=True)
    return figures


def is_finished(settings: RunSettings) -> bool:
    """True if the folder of a run holds it complete, with these settings."""
    folder = storage.join(settings.storage, settings.name)
    if not storage.exists(storage.join(folder, "summary.json")):
        return False
    before = yaml.safe_load(storage.read_bytes(storage.join(folder, "config.yaml")))
    changed = changed_settings(before, settings.model_dump(mode="json"))
    return all(name.startswith(FREE_ON_RESUME) for name, _, _ in changed)


def _outcome(run: Member, failure: str | None) -> Outcome:
    folder, kind = storage.join(run.settings.storage, run.settings.name), run.settings.model.kind
    return Outcome(run.seed, folder, failure, kind) if failure else read_outcome(run.seed, folder, kind)


def _write(table: Table, ended: Mapping[str, Sequence[Outcome]], output: str) -> dict[str, Any]:
    in_order = {name: sorted(outcomes, key=lambda outcome: outcome.seed) for name, outcomes in ended.items()}
    figures = table_figures(table, in_order)
    storage.write_json(storage.join(output, "table.json"), figures)
    storage.write_bytes(storage.join(output, "table.md"), as_markdown(figures).encode())
    storage.write_bytes(storage.join(output, "table.html"), as_page(figures).encode())
    return figures
