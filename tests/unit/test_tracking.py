"""What trackers of experiments hear of a run (real ones: tests/system/test_tracking.py)."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from protopnet.cli import checked
from protopnet.config import RunSettings
from protopnet.errors import UserError
from protopnet.training import tracking
from protopnet.training.runlog import RunLog


class Recorder:
    """A tracker that keeps what it hears, whichever run it is of."""

    heard: list[tuple[str, str, float]]

    def __init__(self, settings: RunSettings, run_id: str | None) -> None:
        self.id = run_id or "new"

    def note(self, rows: Sequence[Any]) -> None:
        if any(row["value"] < 0 for row in rows):
            raise ConnectionError("gone")
        type(self).heard += [(self.id, row["name"], row["value"]) for row in rows]

    def finish(self, summary: Any, report: Path, bundle: Path) -> None:
        type(self).heard += [(report.read_text(), file.name, 0) for file in sorted(bundle.iterdir())]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, float]]:
    Recorder.heard = []
    monkeypatch.setitem(tracking._KINDS, "wandb", Recorder)
    return Recorder.heard


def begin(folder: Path, said: list[str], to: Sequence[str] = ("wandb",)) -> tuple[RunLog, tracking.Tracking]:
    log = RunLog(str(folder))
    return log, tracking.Tracking(checked(RunSettings, {"tracking.to": list(to)}), log, str(folder), said.append)


def add(log: RunLog, tracked: tracking.Tracking, epoch: int, loss: float) -> None:
    log.add("02-joint", {"total": loss}, epoch=epoch)
    log.flush()
    tracked.flush()


def test_each_number_is_told_once_of_one_run_also_when_it_goes_on(tmp_path: Path, heard: list) -> None:
    for epoch, loss in ((0, 3.0), (1, 2.0)):
        log, tracked = begin(tmp_path, [])
        add(log, tracked, epoch, loss)
        tracked.flush()
    assert heard == [("new", "total", 3.0), ("new", "total", 2.0)]


def test_its_report_and_bundle(tmp_path: Path, heard: list) -> None:
    _, tracked = begin(tmp_path, [])
    (tmp_path / "report.html").write_text("report")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/model.json").write_text("{}")
    for _ in range(2):
        tracked.finish({}, str(tmp_path / "report.html"), str(tmp_path / "bundle"))
        _, tracked = begin(tmp_path, [])  # the same command once more: it is there already
    assert heard == [("report", "model.json", 0)]
    assert not (tmp_path / "tensorboard").exists()


def test_one_that_fails_costs_a_note(tmp_path: Path, heard: list) -> None:
    said: list[str] = []
    log, tracked = begin(tmp_path, said)
    add(log, tracked, 0, -1.0)
    add(log, tracked, 1, 2.0)
    assert said == ["tracking: wandb failed and hears no more of this run (ConnectionError: gone)"]
    assert heard == []


def test_what_it_missed_it_hears_when_the_run_goes_on(
    tmp_path: Path, heard: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, tracked = begin(tmp_path, [])
    add(log, tracked, 0, 3.0)
    with monkeypatch.context() as gone:
        gone.delattr(Recorder, "note")
        add(log, tracked, 1, 2.0)
    log, tracked = begin(tmp_path, [])
    add(log, tracked, 2, 1.0)
    assert heard == [("new", "total", 3.0), ("new", "total", 2.0), ("new", "total", 1.0)]


def test_tensorboard_alone_leaves_no_trace_of_others(tmp_path: Path) -> None:
    log, tracked = begin(tmp_path, [], ["tensorboard"])
    add(log, tracked, 0, 1.0)
    tracked.finish({}, "", "")
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_one_that_isnt_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match="mlflow, which isn't installed: pip install 'protopnet\\[mlflow\\]'"):
        begin(tmp_path, [], ["mlflow"])
