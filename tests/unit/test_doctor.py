"""`protopnet doctor`: what the machine has, what is wrong with it, and what Ray would stumble over."""

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest
import ray

from protopnet.cluster import connect, temporary_folder
from protopnet.commands import doctor
from protopnet.config import ComputeSettings
from protopnet.errors import UserError

LONG = "/scratch/" + 86 * "x"  # 95 characters, as batch systems make them


def told(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code."""
    monkeypatch.setattr(sys, "argv", ["protopnet doctor", *arguments])
    try:
        doctor.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with which nothing is wrong, as far as the environment goes."""
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)


class TestTemporaryFolder:
    @pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
    def test_one_too_long_is_said_in_a_line_before_ray_starts(
        self, variable: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("RAY_TMPDIR")
        monkeypatch.setenv(variable, LONG)
        if temporary_folder()[0] != variable:
            pytest.skip("Ray doesn't look at TMPDIR on this system")
        with pytest.raises(UserError, match=f"^{variable} has 95 characters .* set RAY_TMPDIR to a folder of at most"):
            connect(ComputeSettings())
        assert not ray.is_initialized()

    def test_rays_own_comes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TMPDIR", LONG)
        assert temporary_folder() == ("RAY_TMPDIR", "/tmp")

    def test_the_longest_that_is_taken_is_the_longest_that_fits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By the rule of Ray itself, for a session of now and the longest number of a process."""
        from ray._private.utils import validate_socket_filepath

        below = "ray/session_2026-11-25_22-38-19_123456_4194304/sockets/plasma_store"
        longest = max(length for length in range(2, 100) if doctor_takes(monkeypatch, "/" + (length - 1) * "x"))
        validate_socket_filepath(os.path.join("/" + (longest - 1) * "x", below))
        with pytest.raises(OSError, match="AF_UNIX path length"):
            validate_socket_filepath(os.path.join("/" + longest * "x", below))


def doctor_takes(monkeypatch: pytest.MonkeyPatch, folder: str) -> bool:
    monkeypatch.setenv("RAY_TMPDIR", folder)
    return not doctor.sockets().wrong


class TestDoctor:
    def test_it_says_what_there_is(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        told(monkeypatch)
        lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
        assert set(lines) >= {
            "protopnet",
            "torch",
            "ray",
            "timm",
            "CPUs",
            "memory",
            "GPU",
            "storage",
            "temporary folder",
        }
        assert lines["torch"].strip() == importlib.metadata.version("torch")
        assert os.listdir() == []  # nothing is left

    def test_what_is_wrong_is_a_line_each_and_the_exit_code(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setattr(doctor, "usable_memory", lambda: 1e9)
        assert told(monkeypatch, "--storage", str(tmp_path / "file/runs")) == 1
        wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrong: ")]
        assert any("1.0 GB of memory" in line for line in wrong)
        assert any("file/runs can't be written" in line and "set storage" in line for line in wrong)

    def test_packages_that_do_not_fit(self) -> None:
        there = {"torch": "2.1.0", "numpy": "2.3"}

        def installed(name: str) -> str:
            if name not in there:
                raise importlib.metadata.PackageNotFoundError(name)
            return there[name]

        wanted = ["torch>=2.13", "numpy>=2.0", "pyarrow>=19", 'boto3>=1.35; extra == "aws"']
        lines = list(doctor.versions(wanted, installed))
        assert [line.name for line in lines] == ["torch", "pyarrow"]
        assert lines[0].wrong == "torch 2.1.0 doesn't fit >=2.13: pip install 'torch>=2.13'"
        assert lines[1].wrong == "pyarrow is missing: pip install 'pyarrow>=19'"

    def test_a_checkout_that_is_not_installed_names_versions_too(self) -> None:
        names = doctor.requirements("a-package-that-nobody-installed")
        assert [line.name for line in doctor.versions(names, importlib.metadata.version)] == names

    def test_a_container_with_dockers_shared_memory(self) -> None:
        assert "--shm-size=4g" in doctor.shared_memory(67_108_864).wrong
        assert not doctor.shared_memory(8e9).wrong

    @pytest.mark.parametrize(("cuda", "built"), [(None, "for CPUs only"), ("13.0", "for CUDA 13.0")])
    def test_a_gpu_that_pytorch_cannot_use(self, monkeypatch: pytest.MonkeyPatch, cuda: str | None, built: str) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        monkeypatch.setattr("torch.version.cuda", cuda)
        monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
        assert f"PyTorch {doctor.torch.__version__} (built {built}) can't use it" in doctor.gpu().wrong
