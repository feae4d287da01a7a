"""Jobs run as users run them: a command, its output, its exit code, and what it leaves behind."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import ray

ROOT = Path(__file__).parents[1]
# The whole way from images to a bundle, as small as it goes: 4 kinds of bird, 8 training images each.
TINY = {
    "config": str(ROOT / "configs/quickstart.yaml"),
    "birds.classes": 4,
    "birds.train_per_class": 10,
    "birds.test_per_class": 3,
    "birds.size": 64,
    "model.cut": "layer2",
    "model.image_size": 64,
    "model.prototypes": 8,
    "model.prototype_depth": 16,
    "train.batch_size": 12,
    "train.joint_epochs": 2,
    "train.precision": "float32",
    "augment.copies": 4,
    "last_layer.max_iterations": 60,
    "compute.threads": 1,
}


@dataclass(frozen=True)
class Finished:
    """A job that has ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a user gets to see of an error of theirs."""
        lines = self.err.strip().splitlines()
        assert self.code == 2, self
        assert len(lines) == 1, self
        assert lines[0].startswith("error: "), self
        return lines[0]


@dataclass(frozen=True)
class Jobs:
    """Starts jobs as users do who have installed the package, in a folder where there is nothing of the checkout."""

    programs: Path
    folder: Path

    def options(self, **changes: object) -> list[str]:
        """TINY with some settings changed; `model__cut` stands for `model.cut`, None leaves a setting out."""
        settings = TINY | {name.replace("__", "."): value for name, value in changes.items()}
        return [part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))]

    def start(self, job: str, *arguments: str) -> subprocess.Popen[str]:
        command = [str(self.programs / "protopnet"), job, *arguments]
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        environment.pop("RAY_ADDRESS", None)
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def finish(self, process: subprocess.Popen[str], timeout: float = 500) -> Finished:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return Finished(process.returncode, out, err)

    def run(self, job: str, *arguments: str) -> Finished:
        return self.finish(self.start(job, *arguments))

    def run_here(self, job: str, *arguments: str) -> Finished:
        """The same job of the checkout in this process, on its Ray where there is one: starting both takes long."""
        out, err, before, had_ray = io.StringIO(), io.StringIO(), sys.argv, ray.is_initialized()
        sys.argv = [f"{job}.py", *arguments]
        code: object = 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_path(str(ROOT / "jobs" / f"{job}.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        finally:
            sys.argv = before
            if not had_ray:
                ray.shutdown()
        assert isinstance(code, int), code
        return Finished(code, out.getvalue(), err.getvalue())

    def train(self, storage: Path | str, **changes: object) -> Finished:
        return self.run("train", "--storage", str(storage), *self.options(**changes))

    def start_training(self, storage: Path | str, **changes: object) -> subprocess.Popen[str]:
        return self.start("train", "--storage", str(storage), *self.options(**changes))


@dataclass(frozen=True)
class TrainedRun:
    """A complete run."""

    storage: Path
    folder: Path
    job: Finished

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def data(self) -> Path:
        return self.folder / "stages/00-data"

    @property
    def shards(self) -> Path:
        """Of the birds it was trained on."""
        return next(self.data.glob("birds-*"))


@dataclass(frozen=True)
class Left:
    """What a job has left in a folder."""

    folder: Path
    job: Finished


@dataclass(frozen=True)
class Scored:
    """Images, a bundle, and what scoring them says when nobody disturbs it."""

    images: Path
    bundle: str
    output: Path
    job: Finished

    KILLS: ClassVar[int] = int(os.environ.get("PROTOPNET_SCORE_KILLS", "3"))
    IMAGES: ClassVar[int] = 84 * max(3, KILLS)  # enough that there is something left to do at each
    SETTINGS: ClassVar[list[str]] = ["--explain=2", "--chunk-rows=8", "--batch-size=8"]

    def arguments(self, output: Path | str, source: Path | str | None = None) -> list[str]:
        given = ["--bundle", self.bundle, "--input", str(source or self.images), "--output", str(output)]
        return [*given, *self.SETTINGS]
