"""How much evidence one request may ask for: what is over it is refused before anything is done."""

from protopnet.serving.refusals import Refusal
from protopnet.serving.schemas import ExplainOptions
from protopnet.serving.settings import AppSettings

MAP_COUNTS = 4  # a prototype with its map takes as long as so many without
# Bytes of JSON at most: of a prototype listed, of its map as PNG, and of one value of its map.
_LISTED, _PNG, _VALUE = 1_500, 40_000, 22


def check_allowance(
    options: ExplainOptions, images: int, *, classes: int, prototypes: int, map_cells: int, settings: AppSettings
) -> None:
    """`Refusal` where the answer would be too much. classes, prototypes: that there are; map_cells: of the largest map."""
    with_maps = options.maps != "none"
    tables = min(classes, options.top_classes + len(options.asked))
    if options.contrast:
        tables += 2 * max(1, len(options.asked))
    listed = images * tables * min(prototypes, options.top_prototypes)
    count = listed * (MAP_COUNTS if with_maps else 1)
    if count > settings.max_evidence:
        raise Refusal(
            "over_budget",
            f"images x classes x prototypes, those with a map counted {MAP_COUNTS} times, are {count:,}, more than "
            f"max_evidence ({settings.max_evidence:,}); ask for less at a time",
        )
    each = {"none": 0, "png": _PNG, "values": _VALUE * map_cells}[options.maps]
    size = listed * (_LISTED + each)
    if size > settings.max_answer_bytes:
        raise Refusal(
            "over_budget",
            f"the answer might have {size:,} bytes, more than max_answer_bytes ({settings.max_answer_bytes:,}); ask "
            "for less at a time, or without maps",
        )
