"""jobs/prune.py refuses what can't be done in one line, before it starts Ray or touches a file."""

import hashlib
import io
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from PIL import Image

from protopnet.config import RunSettings
from protopnet.model.bundle import PROTOTYPE_SCHEMA, load_bundle, save_bundle
from protopnet.model.network import build_network

JOB = Path(__file__).parents[2] / "jobs/prune.py"
CLASSES = ["jay", "wren"]
MODEL = {"backbone": "squeezenet1_0", "image_size": 64, "prototype_depth": 4, "prototypes": 4}


def png(seed: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three training images a class."""
    for label, name in enumerate(CLASSES):
        (tmp_path / "birds" / name).mkdir(parents=True)
        for n in range(3):
            (tmp_path / "birds" / name / f"{name}{n}.png").write_bytes(png(10 * label + n))
    return tmp_path / "birds"


def settings(data: Path, **model: Any) -> RunSettings:
    source = {"source": "folder", "path": str(data), "validation": 0, "test": 0}
    return RunSettings.model_validate({"data": source, "model": MODEL | model})


def save(uri: Path, trained: RunSettings, data: Path, **provenance: Any) -> Path:
    """A bundle whose prototypes are patches of the first two images of each class."""
    uris = [data / name / f"{name}{n}.png" for name in CLASSES for n in range(2)]
    rows = [
        {
            **dict.fromkeys(PROTOTYPE_SCHEMA.names),
            "prototype": p,
            "class": p // 2,
            "image_id": 3 * (p // 2) + p % 2,
            "uri": str(uri),
            "sha256": hashlib.sha256(uri.read_bytes()).hexdigest(),
            "row": 1,
            "column": p % 2,
        }
        for p, uri in enumerate(uris)
    ]
    network = build_network(trained.model, 2)
    provenance = {"settings": trained.model_dump(mode="json")} | provenance
    prototypes = pa.Table.from_pylist(rows, PROTOTYPE_SCHEMA) if trained.model.kind == "protopnet" else None
    save_bundle(str(uri), network, trained.model, CLASSES, provenance, prototypes)
    return uri


@pytest.fixture
def bundle(data: Path, tmp_path: Path) -> Path:
    return save(tmp_path / "bundle", settings(data), data)


Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    def run(bundle: Path, data: Path, *options: str, output: Path = tmp_path / "new") -> str:
        monkeypatch.setattr(sys, "argv", [str(JOB), str(bundle), str(data), "--output", str(output), *options])
        started = ray.is_initialized()
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(JOB), run_name="__main__")
        assert left.value.code == 2
        assert ray.is_initialized() == started
        assert not (tmp_path / "new" / "model.json").exists()
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    return run


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "nothing to do"),
        (["--keep_connections"], "nothing to do"),
        (["--remove", "12"], "--remove names 12, but the bundle's prototypes are 0 to 3"),
        (["--remove", "2,3"], "class 'wren' without prototypes: keep at least one of 2, 3"),
        (["--remove", "one"], "remove: one is not valid"),
        (["--rule", "--k", "2"], "threshold 3 is more than the k = 2"),
        (["--forbid", "jay1.png"], "expected IMAGE:top,left,bottom,right"),
        (["--forbid", "jay9.png:all"], "the nearest names are"),
        (["--forbid", "jay1.png:0,0,31,40"], "30 rows and 40 columns"),
        (["--forbid", "0:all", "--forbid", "jay1.png:all", "--forbid", "2:all"], "bars every patch of class 'jay'"),
        (["--prune"], "unknown setting --prune"),
    ],
)
def test_what_can_t_be_done(refused: Refused, bundle: Path, data: Path, options: list[str], said: str) -> None:
    assert said in refused(bundle, data, *options)


def test_a_bundle_is_not_overwritten_unasked(refused: Refused, bundle: Path, data: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", settings(data), data, run="other")
    before = load_bundle(str(other)).hash
    assert "already holds a bundle; pass --overwrite" in refused(bundle, data, "--rule", output=other)
    assert load_bundle(str(other)).hash == before


def test_never_the_bundle_that_is_read(refused: Refused, bundle: Path, data: Path) -> None:
    again = bundle.parent / "birds" / ".." / "bundle"
    assert "is the bundle that is read" in refused(bundle, data, "--rule", "--overwrite", output=again)


def test_no_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(JOB), "bundle", "data", "--rule"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(JOB), run_name="__main__")
    assert "--output is missing" in capsys.readouterr().err


def test_other_data(refused: Refused, bundle: Path, data: Path) -> None:
    (data / "wren" / "wren1.png").write_bytes(png(99))
    said = refused(bundle, data, "--rule")
    assert "isn't the data that the bundle was trained on" in said
    assert "wren1.png" in said
    assert "nowhere" in refused(bundle, data / "nowhere", "--rule")


def test_a_baseline_and_a_bundle_that_doesn_t_say_how_it_was_trained(
    refused: Refused, data: Path, tmp_path: Path
) -> None:
    baseline = save(tmp_path / "baseline", settings(data, kind="baseline", prototypes=None), data)
    assert "is a baseline" in refused(baseline, data, "--rule")
    bare = save(tmp_path / "bare", settings(data), data, settings=None)
    assert "doesn't record the settings" in refused(bare, data, "--rule")
