"""The five lines of README.md, the notebook and the programs in examples/, run as they are from the installed package."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image
from running_jobs import ROOT, Jobs, TrainedRun

ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}


def five_lines() -> str:
    """The program of the section "In Python"."""
    section = (ROOT / "README.md").read_text().split("## In Python\n", 1)[1].split("\n## ", 1)[0]
    return "\n".join(line.strip() for line in re.findall(r"^    .+$", section, re.MULTILINE))


def test_the_five_lines(jobs: Jobs, own_run: TrainedRun, tmp_path: Path) -> None:
    lines = five_lines()
    assert lines.startswith("import protopnet\n")
    assert len(lines.splitlines()) == 5
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/my-run").symlink_to(own_run.folder)
    (tmp_path / "bird.jpg").symlink_to(next((own_run.storage / "images/Wren").glob("0*.png")))
    done = subprocess.run(
        [str(jobs.programs / "python"), "-c", lines], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"bird\.jpg: (Cardinal|Jay|Wren) \([<>]?[ \d.]+ %\)\n", done.stdout)
    assert Image.open(tmp_path / "why.png").width > 1200


def test_the_notebook(jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a real kernel, of the environment that has the wheel; cells show what a person would see."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    kernel = AsyncKernelManager()
    kernel.kernel_spec.argv[0] = str(jobs.programs / "python")
    notebook: Any = nbformat.read(ROOT / "examples/quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, km=kernel, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = {kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})}
    assert {"text/html", "image/png", "text/plain"} <= shown
    html = "".join(
        output["data"].get("text/html", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "data" in output
    )
    assert "<iframe srcdoc=" in html
    assert (tmp_path / "audit/index.html").exists()
    assert (tmp_path / "pruned/model.json").exists()


@pytest.mark.parametrize(
    ("name", "says", "figure"),
    [
        (
            "inspection",
            r"(\d+) of 30 faults named rightly; the strongest evidence is on the fault in (\d+)",
            "inspection/report.png",
        ),
        ("medicine", r"nodule: sensitivity (\d\.\d+), specificity (\d\.\d+)", "medicine/why.png"),
        ("biodiversity", r"species counted: .*; (\d+) of 60 left to people", "survey/doubtful.png"),
    ],
    ids=["inspection", "medicine", "biodiversity"],
)
def test_a_program(jobs: Jobs, tmp_path: Path, name: str, says: str, figure: str) -> None:
    done = subprocess.run(
        [str(jobs.programs / "python"), str(ROOT / f"examples/{name}.py")],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(says, done.stdout)
    assert found, done.stdout
    if name == "inspection":
        named, looked = map(int, found.groups())
        assert named > 20  # of four classes: by chance 7 or 8
        assert looked > 15
    if name == "medicine":
        sensitivity, specificity = map(float, found.groups())
        assert sensitivity + specificity > 1.3  # 1 by chance
    assert Image.open(tmp_path / figure).width > 1200
