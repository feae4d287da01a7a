"""The record of a run tells one story, also after a kill."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from protopnet.training.runlog import RunLog


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    log = RunLog(str(tmp_path))
    for epoch in range(2):
        log.add("02-joint", {"total": 1.5 - epoch, "accuracy": 0.25, "phase": "joint", "missing": None}, epoch=epoch)
    log.add("03-push", {"test_accuracy": 0.5, "says": "moved"})
    return log


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def told(folder: Path) -> list[tuple[object, ...]]:
    return [(row["stage"], row["epoch"], row["name"], row["value"]) for row in lines(folder)]


STORY = [
    ("02-joint", 0, "total", 1.5),
    ("02-joint", 0, "accuracy", 0.25),
    ("02-joint", 1, "total", 0.5),
    ("02-joint", 1, "accuracy", 0.25),
    ("03-push", None, "test_accuracy", 0.5),
]


def test_each_number_is_a_line(log: RunLog, tmp_path: Path) -> None:
    log.flush()
    assert told(tmp_path) == STORY
    assert set(lines(tmp_path)[0]) == {"time", "stage", "epoch", "step", "name", "value"}
    assert [row["step"] for row in lines(tmp_path)] == [0, 0, 1, 1, 2]


def test_nothing_is_written_before_a_flush(log: RunLog, tmp_path: Path) -> None:
    assert not (tmp_path / "metrics.jsonl").exists()


def test_it_goes_on_where_it_was(log: RunLog, tmp_path: Path) -> None:
    log.flush()
    again = RunLog(str(tmp_path))
    again.add("04-last-layer", {"objective": 0.75})
    again.flush()
    assert told(tmp_path) == [*STORY, ("04-last-layer", None, "objective", 0.75)]
    assert lines(tmp_path)[-1]["step"] == 3


def test_an_epoch_that_is_run_again_replaces_its_lines(log: RunLog, tmp_path: Path) -> None:
    log.flush()
    again = RunLog(str(tmp_path))
    again.add("02-joint", {"total": 0.75, "accuracy": 0.5}, epoch=1)
    again.flush()
    rows = told(tmp_path)
    assert len(rows) == len(STORY)
    assert ("02-joint", 1, "total", 0.75) in rows
    assert ("02-joint", 1, "total", 0.5) not in rows


def test_an_epoch_that_is_run_again_keeps_its_step(log: RunLog) -> None:
    log.add("02-joint", {"total": 0.75, "accuracy": 0.5}, epoch=1)
    assert {row["step"] for row in log.rows if row["epoch"] == 1} == {1}


def test_tensorboard_shows_the_same_numbers(log: RunLog, tmp_path: Path) -> None:
    for _ in range(2):  # written anew each time
        log.write_tensorboard()
        assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("total")] == [(0, 1.5), (1, 0.5)]
    assert [e.value for e in events.Scalars("test_accuracy")] == [0.5]
