"""A folder is worked in by one job at a time, and a dead one doesn't keep it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from protopnet import lease, storage
from protopnet.errors import UserError
from protopnet.lease import Lease

HOLD = """
import sys, time
from protopnet.lease import Lease
with Lease(sys.argv[1], "--name"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lease, "EXPIRE_SECONDS", 1.0)


def test_a_second_job_is_refused_and_a_killed_one_followed_at_once(folder: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with (
        pytest.raises(UserError, match=rf"process {process.pid} on .*; wait for it, stop it, or .* --name"),
        Lease(folder, "--name"),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Lease(folder, "--name") as mine:
        mine.check()


def test_a_job_that_ended_leaves_nothing(folder: str) -> None:
    with pytest.raises(RuntimeError), Lease(folder, "--name"):
        raise RuntimeError
    assert not list(Path(folder).iterdir())


def test_an_owner_elsewhere_is_waited_for_and_followed_when_it_has_stood_still(folder: str) -> None:
    elsewhere = {"host": "elsewhere", "pid": 1, "born": "", "token": "x", "count": 3}
    storage.write_json(f"{folder}/lease.json", elsewhere)
    said: list[str] = []
    with Lease(folder, "--name", said.append) as mine:
        mine.check()
    assert said == [f"waits to see whether process 1 on elsewhere still works in {folder}"]


def test_an_owner_elsewhere_that_lives_keeps_it(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(folder, "--name"):
        monkeypatch.setattr(lease.socket, "gethostname", lambda: "elsewhere")
        with pytest.raises(UserError, match="another job works in"), Lease(folder, "--name"):
            pass


def test_who_was_thought_dead_learns_that_another_has_taken_over(folder: str) -> None:
    with Lease(folder, "--name") as first:
        storage.write_json(f"{folder}/lease.json", first.own | {"token": "another", "count": 1})
        deadline = time.monotonic() + 10
        while not first._lost and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(UserError, match="taken over by another job"):
            first.check()
    assert storage.read_json(f"{folder}/lease.json")["token"] == "another"
