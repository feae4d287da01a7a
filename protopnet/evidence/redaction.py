"""A bundle's record with only what may be told of training images, so that the bundle itself can be handed on."""

import posixpath
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from protopnet.evidence.sources import Shown, Sources, name_below
from protopnet.model.bundle import PROTOTYPE_SCHEMA, Bundle
from protopnet.model.prototype_table import PrototypeTable

_OF_AN_IMAGE = ("image_id", "uri", "sha256")
_HIDDEN = "…"


def redacted(bundle: Bundle, shown: Shown) -> tuple[dict[str, Any], pa.Table | None]:
    """Provenance and prototypes of the bundle. With `sources: full` and whole pictures they are as they were.

    Locations in the provenance become their last part (`names`) or nothing (`none`); so do hashes and numbers of images.
    """
    provenance = dict(bundle.info.provenance)
    if shown.sources != "full":
        provenance = {name: _without_locations(value, shown) for name, value in provenance.items()}
    return provenance, None if bundle.prototypes is None else _table(bundle, shown)


def _table(bundle: Bundle, shown: Shown) -> pa.Table:
    table = bundle.prototypes
    assert table is not None
    sources = Sources(PrototypeTable.of(table), bundle.info.provenance, shown)
    told = {"uri": sources.uris(), "thumbnail": [sources.thumbnail(number) for number in range(len(table))]}
    if shown.sources == "none":
        told |= {name: pa.nulls(len(table)) for name in ("image_id", "sha256")}
    columns = [told.get(field.name, table[field.name]) for field in PROTOTYPE_SCHEMA]
    return pa.table(
        [_as(column, field.type) for column, field in zip(columns, PROTOTYPE_SCHEMA, strict=True)], PROTOTYPE_SCHEMA
    )


def _as(column: Any, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    return pa.array(column, kind) if isinstance(column, list) else column.cast(kind)


def _without_locations(value: Any, shown: Shown) -> Any:
    if isinstance(value, Mapping):
        return {
            name: None if shown.sources == "none" and name in _OF_AN_IMAGE else _without_locations(each, shown)
            for name, each in value.items()
        }
    if isinstance(value, list):
        return [_without_locations(each, shown) for each in value]
    if isinstance(value, str) and ("://" in value or value.startswith(("/", "~"))):
        return _HIDDEN if shown.sources == "none" else posixpath.basename(name_below(value, None).rstrip("/"))
    return value
