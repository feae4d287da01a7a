"""The wheel, from which the jobs of these tests and the service are run: nothing is missing, nothing is the checkout's."""

import json
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import yaml
from running_jobs import ROOT, Jobs

from protopnet import __version__


def test_all_of_the_package_is_in_it(jobs: Jobs) -> None:
    (wheel,) = jobs.programs.parents[1].glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("protopnet/")}
    files = [path for path in (ROOT / "protopnet").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert inside == {str(path.relative_to(ROOT)) for path in files}


def test_it_could_be_published(jobs: Jobs) -> None:
    folder = jobs.programs.parents[1]
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(source)]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    with zipfile.ZipFile(wheel) as inside:
        (metadata,) = [name for name in inside.namelist() if name.endswith(".dist-info/METADATA")]
        about = Parser().parsestr(inside.read(metadata).decode())
        assert any(name.endswith("/licenses/LICENSE") for name in inside.namelist())
    assert (about["Version"], about["License-Expression"]) == (__version__, "MIT")
    assert "Typing :: Typed" in about.get_all("Classifier", [])
    assert {"aws", "dev"} <= set(about.get_all("Provides-Extra", []))


def test_one_version_is_told_everywhere(jobs: Jobs) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (__version__, "MIT")
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    said = subprocess.run([str(jobs.programs / "protopnet"), "--version"], capture_output=True, text=True, check=True)
    assert said.stdout == f"protopnet {__version__}\n"


def test_it_is_what_the_commands_import(jobs: Jobs) -> None:
    code = "import protopnet, torch; print(protopnet.__file__)"
    done = subprocess.run(
        [str(jobs.programs / "python"), "-c", code], cwd=jobs.folder, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).is_relative_to(jobs.programs.parent)
    assert not jobs.programs.is_relative_to(ROOT)


def test_the_bill_of_materials_names_what_the_lock_does(tmp_path: Path) -> None:
    made = tmp_path / "sbom.json"
    given = [f"SBOM={made}", f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(["make", "-o", ".venv/.installed", *given, "sbom"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(made.read_text())
    assert (said["bomFormat"], said["metadata"]["component"]["name"]) == ("CycloneDX", "protopnet")
    lines = [line.split(" ;")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()]
    assert sorted(f"{each['name']}=={each['version']}" for each in said["components"]) == sorted(lines)
    assert all(each["purl"] == f"pkg:pypi/{each['name']}@{each['version']}" for each in said["components"])
