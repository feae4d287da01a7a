"""The parts of a finished job as a table of Delta Lake: `parts/_delta_log/`, beside the files, which stay where they are.

One commit says which parts are the table, when all of them are there: readers see all rows, or those of before.
"""

import json
import os
import time
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from protopnet import storage
from protopnet.datasets.pool import ordered, threads_for
from protopnet.errors import UserError
from protopnet.scoring.output import FORMAT, PARTS


def check_installed() -> None:
    """`UserError` where the library is missing."""
    try:
        import deltalake  # noqa: F401
    except ImportError:
        raise UserError("--format delta needs deltalake: pip install 'protopnet[delta]'") from None


def commit(output_uri: str) -> None:
    """Make the table what the parts are. Does nothing where it is that already.

    A part that was made again is added anew, in the place of what the table had by its name; parts are never taken away.
    """
    from deltalake import DeltaTable, Schema
    from deltalake.exceptions import DeltaError
    from deltalake.transaction import AddAction, create_table_with_add_actions

    uri = storage.located(storage.join(output_uri, PARTS))
    names = [file[len(uri) + 1 :] for file in storage.each_file(uri)]
    parts = sorted(name for name in names if name.rsplit("/", 1)[-1].startswith("part-"))
    measured = list(ordered(_measured, [storage.join(uri, name) for name in parts], threads_for(uri)))
    options, now, added = _options(uri), int(1000 * time.time()), list[Any]()
    try:
        table = DeltaTable(uri, storage_options=options) if DeltaTable.is_deltatable(uri, options) else None
        known = _known(table) if table is not None else {}
        for name, (size, rows, _) in zip(parts, measured, strict=True):
            if known.get(name) != size:
                added.append(AddAction(name, size, {}, now, True, json.dumps({"numRecords": rows})))
        given: Any = Schema.from_arrow(measured[0][2])
        if table is None:
            create_table_with_add_actions(uri, given, added, name=FORMAT, storage_options=options)
        elif added:
            table.create_write_transaction(added, "append", given)
    except (DeltaError, OSError) as error:
        said = str(error).strip().split("\n")[0]
        raise UserError(f"{uri}: the Delta table can't be written ({said}); the same command tries it again") from error


def _known(table: Any) -> dict[str, int]:
    """Files of the table and their sizes."""
    actions = pa.table(table.get_add_actions(flatten=True))
    return dict(zip(map(unquote, actions["path"].to_pylist()), actions["size_bytes"].to_pylist(), strict=True))


def _measured(uri: str) -> tuple[int, int, pa.Schema]:
    """Bytes, rows and columns of a part."""
    with storage.open_reader(uri) as handle:
        file = pq.ParquetFile(handle, pre_buffer=False)
        return handle.seek(0, 2), file.metadata.num_rows, file.schema_arrow.remove_metadata()


def _options(uri: str) -> dict[str, str]:
    """What it doesn't take from the environment by itself: it refuses an endpoint without TLS."""
    plain = uri.startswith("s3://") and os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    return {"allow_http": "true"} if plain else {}
