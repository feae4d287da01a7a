"""Kill anything: the same command ends with the same result, and nothing that was done is done again."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from ray_processes import descendants, kill_all
from running_jobs import Finished, Jobs, TrainedRun
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """The lines that the job prints up to the first with this text."""
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"the job ended without saying {text!r}: {''.join(lines)} {process.communicate()}")


def assert_same_result(run: Path, other: Path) -> None:
    network, expected = (load_file(f / "stages/04-last-layer/network.safetensors") for f in (run, other))
    assert {name for name in expected if not torch.equal(network[name], expected[name])} == set()
    pushed, chosen = (pq.read_table(f / "stages/03-push/push.parquet") for f in (run, other))
    assert pushed == chosen
    assert (run / "bundle/model.json").exists()
    assert (run / "summary.json").exists()
    assert (run / "report.html").exists()


def finished(job: Finished) -> str:
    assert job.code == 0, job
    return job.out


@pytest.fixture
def orphans() -> Iterator[list[int]]:
    """What a killed driver leaves. Ray's processes end by themselves, its agents after a minute; nobody waits."""
    pids: list[int] = []
    yield pids
    kill_all(pids)


def kill_driver(process: subprocess.Popen[str], orphans: list[int]) -> None:
    orphans += descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()


def test_a_lost_driver_goes_on_where_it_was(
    trained: TrainedRun, jobs: Jobs, tmp_path: Path, orphans: list[int]
) -> None:
    folder = tmp_path / "fragile"
    process = jobs.start_training(tmp_path, name="fragile")
    read_until(process, "epoch 1/2")
    kill_driver(process, orphans)
    done = sorted(folder.glob("stages/*/result.json"))
    assert [path.parent.name for path in done] == ["00-data", "01-start"]
    assert not (folder / "bundle/model.json").exists()
    before = {path: path.stat().st_mtime_ns for path in done}

    process = jobs.start_training(tmp_path, name="fragile")
    lines = read_until(process, "03-push")
    assert [line.split()[0] for line in lines if "done before" in line] == ["00-data", "01-start"]
    assert not [line for line in lines if "epoch 1/2" in line]  # the checkpoint of the first epoch was used
    kill_driver(process, orphans)
    assert not (folder / "summary.json").exists()

    out = finished(jobs.train(tmp_path, name="fragile"))
    again = [line.split()[0] for line in out.splitlines() if "done before" in line]
    assert again == ["00-data", "01-start", "02-joint", "03-push"]
    assert {path: path.stat().st_mtime_ns for path in done} == before
    assert_same_result(folder, trained.folder)
