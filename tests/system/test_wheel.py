"""The wheel, from which the jobs of these tests and the service are run: nothing is missing, nothing is the checkout's."""

import subprocess
import zipfile
from pathlib import Path

from running_jobs import ROOT, Jobs


def test_all_of_the_package_is_in_it(jobs: Jobs) -> None:
    (wheel,) = jobs.programs.parents[1].glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("protopnet/")}
    files = [path for path in (ROOT / "protopnet").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert inside == {str(path.relative_to(ROOT)) for path in files}


def test_it_is_what_the_commands_import(jobs: Jobs) -> None:
    code = "import protopnet, torch; print(protopnet.__file__)"
    done = subprocess.run(
        [str(jobs.programs / "python"), "-c", code], cwd=jobs.folder, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).is_relative_to(jobs.programs.parent)
    assert not jobs.programs.is_relative_to(ROOT)
