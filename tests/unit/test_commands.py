"""`protopnet COMMAND`: every job and the service by name."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import protopnet
from protopnet import __main__ as command
from protopnet.__main__ import COMMANDS
from protopnet.commands import completion

ROOT = Path(__file__).parents[2]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code."""
    monkeypatch.setattr(sys, "argv", ["protopnet", *arguments])
    try:
        command.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_it_lists_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch) == run(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[2 : 2 + len(COMMANDS)]] == list(COMMANDS)


def test_its_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"protopnet {protopnet.__version__}\n"


def test_a_misspelt_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "trian") == 2
    assert capsys.readouterr().err == "error: there is no command trian; did you mean protopnet train?\n"


def test_its_help_is_that_of_the_job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "prepare", "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: protopnet prepare ")
    assert "--data.path TEXT" in out


def test_each_is_a_module_of_its_own_and_a_job() -> None:
    modules = {path.stem for path in (ROOT / "protopnet/commands").glob("*.py")} - {"__init__"}
    assert modules == set(COMMANDS)
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == modules - {"serve", "doctor", "completion"}
    for name in modules:
        assert importlib.util.find_spec(f"protopnet.commands.{name}")
    for path in (ROOT / "jobs").glob("*.py"):
        assert f"from protopnet.commands.{path.stem} import main" in path.read_text()


def test_a_job_of_the_checkout() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs/prepare.py"), "--data.source", "folder"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: data.path is missing")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("protopnet pr", {"prepare", "prune"}),
        ("protopnet prepare --data.so", {"--data.source"}),
        ("protopnet prepare --ov", {"--overwrite"}),
        ("protopnet explain --cl", {"--class"}),
        ("protopnet prepare pictures/", set()),
    ],
)
def test_what_a_shell_completes(typed: str, offered: set[str]) -> None:
    made = completion.script({name: completion.options(name) for name in ("prepare", "prune", "explain")})
    words = typed.split()
    asked = f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _protopnet; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", f"{made}\n{asked}"], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered
