"""`bench/gpu.py` runs with torch, torchvision, pyarrow and pydantic alone."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import torch
from authors_way import on_device
from PIL import Image

from protopnet.config import AugmentSettings
from protopnet.datasets import augment

ROOT = Path(__file__).parents[2]
ALLOWED = {"torch", "torchvision", "numpy", "pillow", "pyarrow", "pydantic"}  # torchvision brings numpy and Pillow
WITHOUT = """
import runpy, sys
from importlib.abc import MetaPathFinder

class Refusing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused}:
            raise ImportError("not on a bare machine: " + name)

sys.meta_path.insert(0, Refusing())
sys.path[:0] = ["bench", "."]
sys.argv = ["gpu.py", *{options}]
runpy.run_path("bench/gpu.py", run_name="__main__")
"""
SMALL = {"backbone": "squeezenet1_0", "size": 64, "batch": 4, "prototypes": 8, "classes": 4, "rows": 64, "maps": 1}


def test_it_needs_no_ray_nor_what_reads_files() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {line.split("[")[0].split(">")[0].strip() for line in wanted} - ALLOWED
    refused = {name.replace("-", "_") for name in names} | {"yaml", "botocore", "aiohttp", "fastapi"}
    assert {"ray", "fsspec", "safetensors", "matplotlib"} <= refused
    options = [f"--{name}={value}" for name, value in (SMALL | {"rounds": 1, "threads": 1, "compile": 0}).items()]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(refused=sorted(refused), options=options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    for row in ("joint step", "augmentation", "push map", "last layer", "P = 100,000", "predict", "explain"):
        assert row in done.stdout


def test_what_was_recorded_is_the_table_beside_it() -> None:
    text = (ROOT / "bench/results/gpu_cpu.txt").read_text()
    figures = json.loads((ROOT / "bench/results/gpu_cpu.json").read_text())["figures"]
    rows = text.splitlines()[1:]
    assert len(rows) == len(figures)
    for row, (name, found) in zip(rows, figures.items(), strict=True):
        assert row.startswith(name)
        assert f"{found['milliseconds']['ours']:.1f}" in row


def test_views_on_a_device_are_those_of_training() -> None:
    random = np.random.default_rng(0)
    photo = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (80, 60), Image.Resampling.BICUBIC
    )
    pixels = torch.from_numpy(np.asarray(photo))
    for _ in range(12):
        warp = augment.draw(AugmentSettings(), 80, 60, random)
        ours = augment.apply(photo, warp, 64).astype(float)
        there = on_device(pixels[None], torch.from_numpy(warp.matrix).float()[None], 64)[0].numpy()
        assert np.abs(there[2:-2, 2:-2] - ours[2:-2, 2:-2]).mean() < 3
