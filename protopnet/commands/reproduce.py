"""A table of runs by one command: networks and their black boxes, over seeds, beside published figures; ensembles of them.

python jobs/reproduce.py configs/cub200/table.yaml --set data.path=CUB_200_2011
python jobs/reproduce.py configs/cub200/table.yaml --rows resnet34,resnet34-baseline --seeds 0,1,2 --parallel 4

Each row and seed is a run as jobs/train.py makes it, below the output folder. Killed, the same command goes on; a run that
fails costs its own cells, and is tried again the next time.
"""

import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field

from protopnet import storage
from protopnet.cli import Positional, Repeated, nearest, parse
from protopnet.config import Section
from protopnet.errors import UserError, exit_with_a_sentence
from protopnet.experiments.figures import failures
from protopnet.experiments.reproduce import reproduce
from protopnet.experiments.table import Table, given_settings, read_table_file
from protopnet.experiments.text import as_markdown


class ReproduceSettings(Section):
    """Settings of `jobs/reproduce.py`."""

    table: Positional[str] = Field(description="YAML file with rows, seeds and ensembles")
    output: str = Field("runs/table", description="folder for the runs and table.json, .md, .html: a path or s3://…")
    rows: list[str] | None = Field(None, description="only these rows, and the ensembles of them")
    seeds: list[int] | None = Field(None, description="in place of the file's")
    set: Annotated[list[str], Repeated("NAME=VALUE")] = Field(
        [],
        description="a setting of jobs/train.py for all rows, which wins over those in files, e.g. compute.threads=1",
    )
    parallel: int = Field(1, ge=1, description="runs side by side; give each its share by --set compute.…")


@exit_with_a_sentence
def main() -> None:
    settings = parse(ReproduceSettings, description=__doc__)
    table = chosen(read_table_file(settings.table), settings)
    folder = Path(settings.table).parent
    figures = reproduce(table, folder, settings.output, given_settings(settings.set), settings.parallel)
    print(as_markdown(figures))
    print(f"table  {storage.join(storage.located(settings.output), 'table.html')}", flush=True)
    if failed := failures(figures):
        name, why = failed[0]
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        print(f"error: {name} failed: {why}{more}", file=sys.stderr)
        sys.exit(1)


def chosen(table: Table, settings: ReproduceSettings) -> Table:
    """The rows and seeds that the command line asks for."""
    wanted = list(table.rows) if settings.rows is None else settings.rows
    for name in wanted:
        if name not in table.rows:
            raise UserError(f"rows: there is no row {name}; did you mean {nearest(name, table.rows)}?")
    rows = {
        name: row if row.baseline in wanted else row.model_copy(update={"baseline": None})
        for name, row in table.rows.items()
        if name in wanted
    }
    ensembles = {name: each for name, each in table.ensembles.items() if set(each.members) <= set(wanted)}
    changes = {"rows": rows, "ensembles": ensembles, "seeds": settings.seeds or table.seeds}
    return Table.model_validate(table.model_copy(update=changes).model_dump())
