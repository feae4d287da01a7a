"""Columns of `--explain all`: a row has arrays of one length, whatever the image, as lists of a fixed size."""

from typing import Any, Literal

import numpy as np
import pyarrow as pa

from protopnet.errors import UserError
from protopnet.evidence.every import Asked, Everything

NAMES = ("similarities", "points", "places", "boxes", "maps")
Explain = int | Literal["all"]
Format = Literal["parquet", "delta"]
_A_PROTOTYPE = 28  # bytes in the four columns before the maps
_CELL: dict[Format, pa.DataType] = {"parquet": pa.float16(), "delta": pa.float32()}  # Delta Lake knows no halves
_MOST_A_ROW, _MOST_A_PART = 4_000_000, 256_000_000  # bytes; a part is held whole by the actor that makes it


def array_fields(asked: Asked, form: Format = "parquet") -> list[pa.Field]:
    S, C = asked.prototypes, asked.cells
    kinds = (
        pa.list_(pa.float32(), S),
        pa.list_(pa.float32(), S),
        pa.list_(pa.list_(pa.int16(), 2), S),
        pa.list_(pa.list_(pa.int32(), 4), S),
        pa.list_(_CELL[form], C),
    )
    return [pa.field(name, kind) for name, kind in zip(NAMES, kinds, strict=True)]


def rows_at_most(asked: Asked, form: Format = "parquet") -> int:
    """Of a part, so that it can be held. `UserError` where a row would be too large to be of use."""
    size = _A_PROTOTYPE * asked.prototypes + _CELL[form].bit_width // 8 * asked.cells
    if size > _MOST_A_ROW:
        raise UserError(
            f"--explain all: a row would have {size:,} bytes ({asked.prototypes:,} prototypes, {asked.cells:,} cells of "
            f"maps), more than {_MOST_A_ROW:,}: name some with --explain_classes or --explain_prototypes, or list the "
            "first with --explain 10"
        )
    return max(1, _MOST_A_PART // max(1, size))


def array_columns(
    found: Everything, fields: list[pa.Field], B: int, at: np.ndarray, finite_G: np.ndarray
) -> dict[str, Any]:
    """The arrays of those of G images that are finite, at their rows of B; null elsewhere."""
    missing_B = np.ones(B, bool)
    missing_B[at] = False
    values_G = (found.similarity_BS, found.points_BS, found.place_BS2, found.box_BS4, found.map_BC)
    columns = {}
    for field, of_column in zip(fields, values_G, strict=True):
        values_B = np.zeros((B, *of_column.shape[1:]), of_column.dtype)
        values_B[at] = of_column[finite_G]
        values, each = pa.array(values_B.reshape(-1)), field.type.value_type
        if pa.types.is_fixed_size_list(each):
            values = pa.FixedSizeListArray.from_arrays(values, each.list_size)
        columns[field.name] = pa.FixedSizeListArray.from_arrays(
            values.cast(each), field.type.list_size, mask=pa.array(missing_B)
        )
    return columns
