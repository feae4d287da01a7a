"""`ray start --head` and `ray job submit`, as on a cluster: train (stopped and submitted again), evaluate, score."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient
from ray_processes import descendants, wait_for
from running_jobs import ROOT, Jobs, TrainedRun

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class JobServer:
    """A head node that takes jobs: Ray's own process in the foreground, on ports of its own, ended by its id."""

    def __init__(self, folder: Path) -> None:
        self.environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        self.environment["RAY_USAGE_STATS_ENABLED"] = "0"
        # Commands of the job are found beside this Python, as in an activated environment.
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment.pop("RAY_ADDRESS", None)
        self.folder = folder
        self.start()

    def start(self) -> None:
        names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")
        ports = {name: free_port() for name in (*names, "metrics-export-port")}
        command = [*RAY, "start", "--head", "--block", "--num-cpus=4", f"--temp-dir=/tmp/protopnet-{os.getpid()}"]
        command += [f"--{name}={port}" for name, port in ports.items()]
        self.address = f"http://127.0.0.1:{ports['dashboard-port']}"
        self.log = self.folder / f"{ports['port']}.log"
        with self.log.open("w") as log:
            self.head = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=log, stderr=log)
        wait_for(self._ready, timeout=120)

    def _ready(self) -> bool:
        assert self.head.poll() is None, self.log.read_text()
        with contextlib.suppress(Exception):
            self.client.list_jobs()
            return True
        return False

    def kill(self) -> None:
        """As when the machine goes: the head, its jobs and all workers at once."""
        below = list(descendants(self.head.pid))
        for pid in (self.head.pid, *below):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.head.wait()

    @property
    def client(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.address)

    def submit(self, *command: str, wait: bool = True) -> tuple[int, str]:
        """Exit code and output of `ray job submit`, by the documented command line."""
        options = ["--address", self.address, "--working-dir", ".", *([] if wait else ["--no-wait"])]
        done = subprocess.run(
            [*RAY, "job", "submit", *options, "--", "python", *command],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=400,
        )
        return done.returncode, done.stdout + done.stderr

    def begin(self, *command: str) -> str:
        """Submit without waiting; the job's id."""
        code, said = self.submit(*command, wait=False)
        job = re.search(r"raysubmit_\w+", said)
        assert code == 0, said
        assert job, said
        return job[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobServer]:
    made = JobServer(tmp_path_factory.mktemp("head"))
    yield made
    made.kill()


def test_training_is_stopped_loses_its_head_and_ends_as_if_nothing_had_happened(
    server: JobServer, jobs: Jobs, trained: TrainedRun, tmp_path: Path
) -> None:
    command = ("jobs/train.py", "--storage", str(tmp_path), *jobs.options(name="tiny", compute__workers=1))
    job, client = server.begin(*command), server.client
    wait_for(lambda: "epoch 1/2" in client.get_job_logs(job), timeout=200)
    client.stop_job(job)
    wait_for(lambda: client.get_job_status(job).is_terminal(), timeout=60)
    assert client.get_job_status(job) == JobStatus.STOPPED
    assert "the same command goes on" in client.get_job_logs(job)
    assert not (tmp_path / "tiny/bundle").exists()

    job = server.begin(*command)
    wait_for((tmp_path / "tiny/stages/02-joint/result.json").exists, timeout=200)
    server.kill()
    assert not (tmp_path / "tiny/bundle").exists()
    server.start()

    code, said = server.submit(*command)
    assert code == 0, said
    assert re.search(r"02-joint .*done before", said)
    assert (tmp_path / "tiny/bundle/model.json").exists()
    accuracy, expected = (
        json.loads((run / "summary.json").read_text())["test_accuracy"] for run in (tmp_path / "tiny", trained.folder)
    )
    assert accuracy == pytest.approx(expected)


def test_evaluation_and_scoring_on_the_cluster_agree(
    server: JobServer, jobs: Jobs, trained: TrainedRun, tmp_path: Path
) -> None:
    bundle = str(trained.folder / "bundle")
    shards = str(next((trained.folder / "stages/00-data").glob("birds-*")))
    code, said = server.submit("jobs/evaluate.py", bundle, shards, "--output", str(tmp_path / "evaluation"))
    assert code == 0, said
    assert "top-1" in said
    code, said = server.submit(
        "jobs/score.py", "--bundle", bundle, "--input", shards, "--output", str(tmp_path / "scores")
    )
    assert code == 0, said
    scored = {row["uri"]: row for row in pq.read_table(str(tmp_path / "scores/parts/part-00000.parquet")).to_pylist()}
    evaluated = pq.read_table(tmp_path / "evaluation/predictions.parquet").to_pylist()
    assert len(evaluated) == 12
    for row in evaluated:
        assert scored[row["uri"]]["prediction"] == row["prediction"]
        assert scored[row["uri"]]["probability"] == pytest.approx(row["probability"], abs=1e-6)


def test_what_is_wrong_is_the_last_line_and_the_exit_code(server: JobServer, tmp_path: Path) -> None:
    began = time.monotonic()
    code, said = server.submit("jobs/evaluate.py", str(tmp_path), str(tmp_path), "--output", str(tmp_path / "out"))
    assert code != 0
    assert f"error: there is no complete bundle at {tmp_path}" in said
    assert time.monotonic() - began < 120
