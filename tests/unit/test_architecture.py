"""The rooms import one way, and docs/architecture.md tells of them as they are."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINTER = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]


def test_imports_run_one_way():
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_table_of_rooms_is_in_the_order_of_the_contract():
    layers = next(contract["layers"] for contract in LINTER["contracts"] if contract["type"] == "layers")
    text = (ROOT / "docs/architecture.md").read_text()
    table = re.findall(r"^\| `(\w+)` \|", text.split("| room, from the top down |")[1], re.MULTILINE)
    place = {room: floor for floor, layer in enumerate(layers) for room in layer.split(" | ")}
    assert sorted(table) == sorted(place)
    assert [place[room] for room in table] == sorted(place.values())


def test_every_room_begins_where_the_table_says():
    text = (ROOT / "docs/architecture.md").read_text()
    for room, files in re.findall(r"^\| `(\w+)` \| .* \| (`.*`) \|$", text, re.MULTILINE):
        for file in re.findall(r"`(\w+\.py)`", files):
            assert (ROOT / "protopnet" / room / file).exists(), f"{room}/{file}"
