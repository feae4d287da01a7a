"""`protopnet serve` and `python -m serve` as people run them: on this machine alone, until told to stop."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ray_processes import descendants, kill_all, wait_for
from running_jobs import Jobs
from serving import Answer, Client, photo

ROOT = Path(__file__).parents[2]


def start(*arguments: str, installed: Jobs | None = None) -> subprocess.Popen[str]:
    """The wheel's command outside the checkout, or the checkout's."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    command = [str(installed.programs / "protopnet"), "serve"] if installed else [sys.executable, "-m", "serve"]
    folder = installed.folder if installed else ROOT
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *arguments], cwd=folder, env=environment, text=True, **pipes)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def own_address() -> str:
    """Of this machine as others see it; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        address: str = probe.getsockname()[0]
        return address


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--bundles", "no/such/bundle"], "there is no complete bundle at no/such/bundle"),
        (["--max_bytes", "3"], "max_bytes"),
        (["--member.replicas", "3"], "did you mean --member."),
    ],
)
def test_what_is_wrong_is_said_in_a_line(arguments, expected):
    out, err = (process := start(*arguments)).communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert re.fullmatch(r"error: .*\n", err)
    assert expected in err


def test_a_port_in_use_is_named(bundles):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = start("--bundles", bundles[0], "--port", str(taken.getsockname()[1]))
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "change port" in err


def test_it_serves_this_machine_alone_and_answers_what_it_has_taken_on_before_it_ends(bundles, jobs):
    port = free_port()
    process = start("--bundles", bundles[0], "--port", str(port), "--member.batch_wait_s", "1", installed=jobs)
    below: list[int] = []
    try:
        assert process.stdout is not None
        started = [process.stdout.readline() for _ in range(4)]
        assert f"http://127.0.0.1:{port}/docs" in "".join(started), process.stderr and process.stderr.read()
        below = list(descendants(process.pid))
        client = Client(f"http://127.0.0.1:{port}")
        wait_for(lambda: client.get("/readyz").status == 200, 30)
        assert client.get("/").status == client.get("/page/app.js").status == 200
        if not (address := own_address()).startswith("127."):
            with pytest.raises(OSError), socket.create_connection((address, port), timeout=5):
                pass
        answers: list[Answer] = []
        running = threading.Thread(target=lambda: answers.append(client.post("/v1/predict", photo(0))))
        running.start()
        time.sleep(0.4)  # of the second for which the batch waits
        process.send_signal(signal.SIGTERM)
        running.join(30)
        assert [answer.status for answer in answers] == [200]
        process.communicate(timeout=60)
        assert process.returncode == 0
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), 30)
    finally:
        process.kill()
        kill_all(below)
