"""jobs/score.py as users run it: killed at any moment, with a bucket that fails now and then, and read by analysts."""

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pytest
from deltalake import DeltaTable
from ray_processes import descendants, kill_all, named, wait_for
from running_jobs import Jobs, Scored

KILLS, IMAGES = Scored.KILLS, Scored.IMAGES
BAD = IMAGES // 12


def rows(folder: Path) -> pa.Table:
    return pads.dataset(str(folder / "parts")).to_table().sort_by("image_id")


def test_too_many_bad_images_are_said_at_the_end(scored: Scored, jobs: Jobs) -> None:
    """One in twelve is bad: everything is finished, and the exit code says so."""
    assert scored.job.code == 1
    assert scored.job.err.strip().splitlines() == [
        f"error: {BAD} of {IMAGES:,} images couldn't be scored, more than --max_bad 0.05 allows: "
        f"not an image of a known kind ({BAD}); "
        "they are the rows with an error, all others are complete"
    ]
    assert len(rows(scored.output)) == IMAGES
    table = scored.job.out
    for text in (
        rf"images +{IMAGES:,}",
        rf"scored +{IMAGES - BAD:,}",
        rf"with an error +{BAD}: ",
        r"accuracy +\d",
        r"speed +[\d.,]+ img/s",
    ):
        assert re.search(text, table), table
    assert table.strip().endswith(f"scores: {scored.output}/parts")
    again = jobs.run_here("score", *scored.arguments(scored.output), "--max-bad", "0.1")
    assert (again.code, again.err) == (0, "")


def test_a_plan_says_what_it_would_use_and_starts_nothing(scored: Scored, jobs: Jobs, tmp_path: Path) -> None:
    output = tmp_path / "out"
    planned = jobs.run_here(
        "score",
        *("--bundle", str(scored.bundle), "--input", str(scored.images), "--output", str(output)),
        *("--plan", "--plan.images_per_second", "50"),
    )
    assert planned.code == 0, planned
    assert re.search(r"images +\d", planned.out)
    assert "parts" in planned.out
    assert "at 50 img/s an actor" in planned.out
    assert not output.exists()


def test_one_line_says_what_is_wrong(scored: Scored, jobs: Jobs, tmp_path: Path) -> None:
    def error(*arguments: str) -> str:
        return jobs.run_here("score", *arguments).error

    assert "--bundle is missing" in error("--input", "x", "--output", "y")
    assert "no complete bundle" in error("--bundle", str(tmp_path), "--input", str(tmp_path), "--output", str(tmp_path))
    assert "there is nothing at" in error(*scored.arguments(tmp_path / "o", tmp_path / "nowhere.txt"))
    other = error(*scored.arguments(scored.output), "--precision=bf16")
    assert "--precision float32, not bf16; give what it was begun with to go on, or another --output" in other


# Kills


@pytest.fixture
def left_over() -> Iterator[list[int]]:
    """Ray's processes whose driver was killed. They end by themselves, after a minute; nobody waits."""
    pids: list[int] = []
    yield pids
    kill_all(pids)


def victims(what: str, driver: int) -> list[int]:
    if what == "driver":
        return [driver]
    if what == "actor":
        return named("ray::MapWorker", below=driver)
    programs = ("raylet/raylet", "gcs/gcs_server")
    return [pid for pid, text in descendants(driver).items() if text.split(" ")[0].endswith(programs)]


def wait_for_a_moment(chance: random.Random, process: subprocess.Popen[str], done: Path) -> None:
    """Some moment of the start, or one when another chunk or two have just been written."""
    before, began, patience = len(list(done.glob("*.json"))), time.monotonic(), chance.uniform(0, 12)
    further = chance.choice([0, 1, 1, 2])

    def reached() -> bool:
        if not further:
            return time.monotonic() - began > patience
        return len(list(done.glob("*.json"))) >= before + further

    wait_for(lambda: reached() or process.poll() is not None, 120)
    time.sleep(chance.uniform(0, 0.2))


@pytest.mark.slow
@pytest.mark.timeout(200 + 100 * KILLS)
def test_killed_again_and_again_it_ends_with_the_same_rows(
    scored: Scored, jobs: Jobs, tmp_path: Path, left_over: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Actors, the driver and Ray itself, at random moments; every image has its row, and only one, in the end."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")  # a minute otherwise, until the driver gives up
    chance, in_the_middle = random.Random(KILLS), 0
    for turn in range(KILLS):
        process = jobs.start("score", *scored.arguments(tmp_path), "--format=delta")
        wait_for_a_moment(chance, process, tmp_path / "job/done")
        what, below = ("ray", "driver", "actor")[turn % 3], list(descendants(process.pid))
        left_over += below
        for pid in victims(what, process.pid):
            with contextlib.suppress(ProcessLookupError):  # it ended with the one before
                os.kill(pid, signal.SIGKILL)
        if what == "actor":  # it is replaced; the job is ended all the same, for the next to go on
            time.sleep(chance.uniform(0, 0.5))
            process.kill()
        ended = jobs.finish(process, 100)
        kill_all(below)
        assert ended.code != 0
        in_the_middle += not (tmp_path / "scores.json").exists()
        if DeltaTable.is_deltatable(table := str(tmp_path / "parts")):  # then it is whole
            assert DeltaTable(table).count() == len(rows(scored.output))
    assert in_the_middle > KILLS // 2
    last = jobs.run("score", *scored.arguments(tmp_path), "--format=delta")
    assert last.code == 1
    assert "couldn't be scored" in last.err
    assert rows(tmp_path).equals(rows(scored.output))
    table_ids = DeltaTable(tmp_path / "parts").to_pyarrow_table()["image_id"].to_pylist()
    assert sorted(table_ids) == rows(scored.output)["image_id"].to_pylist()
    assert not list(tmp_path.rglob("*.unfinished"))
