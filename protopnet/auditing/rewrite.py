"""From corrected prototypes to a new bundle: the last layer solved again, accuracies, and the history."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from protopnet import __version__, storage
from protopnet.auditing.decisions import decisions_table
from protopnet.auditing.draft import Draft, with_prototypes
from protopnet.auditing.prune import Correction, Corrector
from protopnet.errors import UserError
from protopnet.model.bundle import Bundle, save_bundle
from protopnet.model.network import ProtoPNet
from protopnet.passes.describe import describe_prototypes
from protopnet.passes.image_pass import PassOptions
from protopnet.quality.calibration import calibrate
from protopnet.quality.card import write_card
from protopnet.tables import write_table
from protopnet.training.last_layer import cache_similarities, cached_accuracies, solve_last_layer

Accuracies = dict[str, float]  # by split


@dataclass(frozen=True)
class Rewritten:
    """The corrected network and its accuracies on the validation and test images.

    before: of the bundle as it was; corrected: with the class connections as the steps left them; after: as they are
    now. `last_layer` says how the solution ended, None where the connections were kept.
    """

    network: ProtoPNet
    before: Accuracies
    corrected: Accuracies
    after: Accuracies
    last_layer: dict[str, Any] | None


def source_network(bundle: Bundle, uri: str) -> tuple[ProtoPNet, pa.Table]:
    """Network and prototypes of a bundle that has them; `UserError` for a baseline or one that was never pushed."""
    if not isinstance(bundle.network, ProtoPNet):
        raise UserError(f"bundle {uri} is a baseline: it has no prototypes to correct")
    if bundle.prototypes is None:
        raise UserError(f"bundle {uri} has no prototypes.parquet: its prototypes aren't patches of training images")
    return bundle.network, bundle.prototypes.sort_by("prototype")


def resolve(corrector: Corrector, correction: Correction, options: PassOptions, *, keep_connections: bool) -> Rewritten:
    """Solve the last layer of the corrected prototypes (or keep it), and measure.

    One pass over the images serves the old prototypes and the new: where they differ, both are looked for.
    """
    old, draft, table = corrector.start, correction.draft, corrector.dataset.table
    seen_PDhw, columns_P = union(old, draft)
    everything = with_prototypes(
        corrector.network,
        corrector.model,
        seen_PDhw,
        np.zeros(len(seen_PDhw), np.int64),
        torch.zeros(len(old.connections_KP), len(seen_PDhw)),
    )
    rows = table.filter(pc.not_equal(table["split"], "train")) if keep_connections else table
    copies, plan = 0 if keep_connections else corrector.trained.last_layer.copies, options.plan
    blocks = []
    if len(rows):
        blocks = cache_similarities(everything, rows, copies=copies, options=options)
    network = draft.network(corrector.network, corrector.model)
    if not blocks:
        return Rewritten(network, {}, {}, {}, None)
    before = cached_accuracies(old.connections_KP.numpy(), blocks, plan=plan, columns=np.arange(len(old)))
    if keep_connections:
        corrected = cached_accuracies(draft.connections_KP.numpy(), blocks, plan=plan, columns=columns_P)
        return Rewritten(network, before, corrected, corrected, None)
    scale, settings = corrector.model.own_connection, corrector.trained.last_layer
    floor_KP = floors(draft, corrector.settled.floors)
    result = solve_last_layer(
        network, scale, blocks, settings=settings, plan=plan, columns=columns_P, floor_KP=floor_KP
    )
    solution = result.solution
    with torch.no_grad():
        network.last_layer.weight.copy_(torch.from_numpy(solution.weights).float())
    ended = {"converged": solution.converged, "iterations": solution.iterations, "kkt_residual": solution.residual}
    return Rewritten(network, before, result.before, result.after, ended)


def floors(draft: Draft, given: Mapping[int, float]) -> np.ndarray:
    """What connections may not fall below (K x P): those of some prototypes, by their numbers, to their own class."""
    floor_KP = np.full(draft.connections_KP.shape, -np.inf)
    for number, least in given.items():
        for p in draft.at([number]):
            floor_KP[draft.prototype_class_P[p], p] = least
    return floor_KP


def union(old: Draft, new: Draft) -> tuple[torch.Tensor, np.ndarray]:
    """All prototypes of the old draft and those of the new that have moved, and where the new ones are among them."""
    columns = new.numbers_P.copy()
    moved = [p for p, n in enumerate(new.numbers_P) if not torch.equal(new.prototypes_PDhw[p], old.prototypes_PDhw[n])]
    columns[moved] = len(old) + np.arange(len(moved))
    return torch.cat([old.prototypes_PDhw, new.prototypes_PDhw[moved]]), columns


def write_corrected(
    uri: str, bundle: Bundle, corrector: Corrector, correction: Correction, rewritten: Rewritten, options: PassOptions
) -> str:
    """Write the new bundle and return its hash. Its prototypes are numbered anew. Beside it the decisions that people
    took, where there are any."""
    places = places_table(correction.draft)
    prototypes = describe_prototypes(rewritten.network, corrector.dataset, places, options=options)
    for column, values in names_and_groups(bundle, corrector, correction.draft).items():
        at = prototypes.schema.get_field_index(column)
        prototypes = prototypes.set_column(at, column, pa.array(values, pa.string()))
    entry = history_entry(bundle.hash, corrector, correction, rewritten)
    history = [*corrector.history, entry]
    if len(decisions := decisions_table(history)):
        write_table(storage.join(uri, "decisions.parquet"), decisions)
    provenance = {**bundle.info.provenance, "history": history}
    calibration = calibrate(rewritten.network, corrector.dataset, corrector.trained.calibration, options)
    written = save_bundle(uri, rewritten.network, corrector.model, bundle.classes, provenance, prototypes, calibration)
    write_card(uri, None)
    return written


def names_and_groups(bundle: Bundle, corrector: Corrector, draft: Draft) -> dict[str, list[str | None]]:
    """What the prototypes of the draft are called. One that has moved to another patch loses the name it had."""
    numbers, start = draft.numbers_P.tolist(), corrector.start
    moved = [place != start.places[number] for place, number in zip(draft.places, numbers, strict=True)]
    columns = {}
    for column, given in {"name": corrector.settled.names, "group": corrector.settled.groups}.items():
        table = bundle.prototypes
        before = [None] * len(start) if table is None else table.sort_by("prototype")[column].to_pylist()
        inherited = [None if gone else before[number] for number, gone in zip(numbers, moved, strict=True)]
        columns[column] = [given.get(number, old) for number, old in zip(numbers, inherited, strict=True)]
    return columns


def places_table(draft: Draft) -> pa.Table:
    """The patch that each prototype is: prototype, image_id, row and column."""
    columns: Sequence[Sequence[int]] = list(zip(*draft.places, strict=True))
    names = ("image_id", "row", "column")
    return pa.table({"prototype": range(len(draft)), **dict(zip(names, map(list, columns), strict=True))})


def history_entry(
    bundle_hash: str, corrector: Corrector, correction: Correction, rewritten: Rewritten
) -> dict[str, Any]:
    """What was done, for the provenance of the new bundle. Prototypes are named as in the bundle it was done to."""
    stages = {"before": rewritten.before, "corrected": rewritten.corrected, "after": rewritten.after}
    return {
        "job": "prune",
        "bundle": bundle_hash,
        "protopnet": __version__,
        "settings": corrector.corrections.record(),
        "data": corrector.dataset.source,
        "images": corrector.dataset.counts(),
        "steps": [step.record for step in correction.steps],
        "lapsed": [asdict(each) for each in corrector.settled.lapsed],
        "last_layer": rewritten.last_layer,
        "prototypes": {"before": len(corrector.start), "after": len(correction.draft)},
        "numbers": correction.draft.numbers_P.tolist(),
        "accuracy": {split: {name: of[split] for name, of in stages.items()} for split in rewritten.before},
    }
