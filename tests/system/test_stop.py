"""A job that is told to stop says so, leaves nothing running, and keeps what is finished."""

import signal
from pathlib import Path

from ray_processes import descendants, wait_for
from running_jobs import Jobs


def test_a_stopped_training_says_that_the_same_command_goes_on(jobs: Jobs, tmp_path: Path) -> None:
    process = jobs.start_training(tmp_path, name="stopped", train__joint_epochs=50)
    assert process.stdout
    for line in process.stdout:
        if "epoch 1/50" in line:
            break
    below = descendants(process.pid)
    process.send_signal(signal.SIGTERM)  # what `ray job stop` sends
    finished = jobs.finish(process, timeout=60)
    assert finished.code == 143, finished
    assert finished.err.splitlines() == ["stopped; what is finished is kept, the same command goes on from here"]
    done = [path.parent.name for path in sorted((tmp_path / "stopped").glob("stages/*/result.json"))]
    assert done == ["00-data", "01-start"]
    assert list((tmp_path / "stopped/stages/02-joint").rglob("state.pt"))
    wait_for(lambda: not [pid for pid, title in below.items() if descendants(1).get(pid) == title], 30)
