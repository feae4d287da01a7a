"""What a table of runs is made of: rows, seeds and ensembles, from a YAML file to the settings of each run.

    seeds: [0, 1, 2]
    settings: {data.path: CUB_200_2011}         # of every row
    rows:
      vgg16-baseline: {config: vgg16-baseline.yaml, published: 74.6, published_deviation: 0.2}
      vgg16: {config: vgg16.yaml, published: 76.1, published_deviation: 0.2, baseline: vgg16-baseline}
    ensembles:
      both: {members: [vgg16, vgg19]}

A row's settings are those of its file (beside this one), of the table, and its own; a later one wins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from protopnet.cli import combined, nearest, read_yaml
from protopnet.config import RunSettings, Section
from protopnet.errors import UserError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Published(Section):
    """What a row or an ensemble is called, and what others have published for it."""

    label: str | None = Field(None, description="what people call it; its name when left out")
    published: float | None = Field(None, ge=0, le=100, description="published accuracy in per cent")
    published_deviation: float | None = Field(None, ge=0, description="its deviation in points")


class Row(Published):
    """A network, trained once for each seed."""

    config: str | None = Field(None, description="settings: a file as jobs/train.py takes, beside the table's")
    settings: dict[str, Any] = Field({}, description="settings that win over the file's and the table's")
    baseline: str | None = Field(None, description="the row that this one is compared with")


class Ensemble(Published):
    """Rows whose logits are added up."""

    members: list[str] = Field(min_length=1, description="names of rows")
    across_seeds: bool = Field(False, description="one ensemble of the members of all seeds, rather than one a seed")


class Table(Section):
    """The file."""

    name: str = Field("table", description="heading of what comes out")
    seeds: Seeds = Field([0], description="each row is trained once with each of them")
    settings: dict[str, Any] = Field({}, description="settings of all rows, which win over those of their files")
    rows: dict[Name, Row] = Field(min_length=1)
    ensembles: dict[Name, Ensemble] = Field({})


@dataclass(frozen=True)
class Member:
    """One run of a table: a row with a seed."""

    row: str
    seed: int
    settings: RunSettings


def read_table_file(path: str) -> Table:
    """The table in a YAML file. `UserError` for what is wrong with it."""
    try:
        table = Table.model_validate(read_yaml(Path(path), "TABLE"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if part != "[key]")
        raise UserError(f"TABLE {path}: {where}: {first['msg'].lower()}") from None
    named = [(f"rows.{name}.baseline", row.baseline) for name, row in table.rows.items() if row.baseline]
    named += [(f"ensembles.{name}.members", row) for name, each in table.ensembles.items() for row in each.members]
    for where, row in named:
        if row not in table.rows:
            raise UserError(f"TABLE {path}: {where}: there is no row {row}; did you mean {nearest(row, table.rows)}?")
    return table


def members(table: Table, folder: Path, storage: str, given: Mapping[str, Any]) -> list[Member]:
    """The runs of all rows, seed by seed, so that all rows have something early.

    folder: of the table's file. storage: where the run folders go. given: settings that win over all others.
    `UserError` for settings that can't be, naming the row.
    """
    return [
        Member(name, seed, _run_settings(name, row, seed, table.settings, folder, storage, given))
        for seed in table.seeds
        for name, row in table.rows.items()
    ]


def _run_settings(
    name: str, row: Row, seed: int, of_all: Mapping[str, Any], folder: Path, storage: str, given: Mapping[str, Any]
) -> RunSettings:
    own = {"name": f"{name}-seed{seed}", "storage": storage, "seed": seed}
    try:
        files = [folder / row.config] if row.config else []
        return combined(RunSettings, files, [of_all, row.settings, given, own])
    except UserError as error:
        raise UserError(f"row {name}: {error}") from None


def given_settings(texts: Sequence[str]) -> dict[str, Any]:
    """`["data.classes=8"]` as `{"data.classes": 8}`; values as in YAML. `UserError` where one isn't NAME=VALUE."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            if not equals:
                raise ValueError
            found[name.strip()] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError):
            raise UserError(f"set: {text!r} is not valid; expected NAME=VALUE such as data.classes=8") from None
    return found
