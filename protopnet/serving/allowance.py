"""How much evidence one request may ask for: what is over it is refused before anything is done."""

from protopnet.evidence.saliency import MAP_SIDE
from protopnet.serving.refusals import Refusal
from protopnet.serving.schemas import ExplainOptions
from protopnet.serving.settings import AppSettings

# A prototype with its map, or looked at more closely, takes as long as so many without.
MAP_COUNTS, CLOSER_COUNTS = 4, 16
# Bytes of JSON at most: of a prototype listed, of its map as PNG, and of one value of its maps.
_LISTED, _PNG, _VALUE = 1_600, 40_000, 22


def check_allowance(
    options: ExplainOptions, images: int, *, classes: int, prototypes: int, map_cells: int, settings: AppSettings
) -> None:
    """`Refusal` where the answer would be too much. classes, prototypes: that there are; map_cells: of the largest map."""
    with_maps = options.maps != "none"
    tables = min(classes, options.top_classes + len(options.asked))
    if options.contrast:
        tables += 2 * max(1, len(options.asked))
    listed = images * tables * min(prototypes, options.top_prototypes)
    closer = options.gradient + options.perturb
    count = listed * ((MAP_COUNTS if with_maps else 1) + CLOSER_COUNTS * closer)
    if count > settings.max_evidence:
        raise Refusal(
            "over_budget",
            f"images x classes x prototypes, those with a map counted {MAP_COUNTS} times, and {CLOSER_COUNTS} more for map "
            f"gradient and for perturb, are {count:,}, more than max_evidence ({settings.max_evidence:,}); ask for less at "
            "a time",
        )
    each = {"none": 0, "png": _PNG, "values": _VALUE * (map_cells + options.gradient * MAP_SIDE**2)}[options.maps]
    size = listed * (_LISTED + each)
    if size > settings.max_answer_bytes:
        raise Refusal(
            "over_budget",
            f"the answer might have {size:,} bytes, more than max_answer_bytes ({settings.max_answer_bytes:,}); ask "
            "for less at a time, or without maps",
        )
