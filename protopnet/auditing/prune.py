"""Correcting a trained bundle without training it again: `jobs/prune.py`.

The steps, in this order, each on what the one before left (names of prototypes are always those of the given bundle):

    remove    prototypes named by the user go
    merge     prototypes that repeat one of their class go, their connections are added to its own
    forbid    prototypes on barred patches are projected again, each onto its nearest patch that is allowed
    rule      the authors' pruning
    last layer  the class connections are solved again, on similarities computed once

Each does what the settings ask for and what the decisions of a corrections.yaml come to (`auditing/settling.py`). The rules
themselves are in `auditing/draft.py` and `auditing/barred_patches.py`; here is what needs passes over the images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from protopnet.auditing.barred_patches import Barred, Bars, barred_before, parse_barred
from protopnet.auditing.decisions import Decision, parse_decisions, record_of
from protopnet.auditing.draft import (
    Draft,
    Merge,
    Place,
    check_removal,
    find_repeats,
    merged_connections,
    prune_by_neighbours,
)
from protopnet.auditing.settling import Prototypes, Settled, settle
from protopnet.cli import Repeated
from protopnet.config import ModelSettings, Section
from protopnet.datasets.rows import Dataset
from protopnet.datasets.trained import TrainedWith
from protopnet.errors import UserError
from protopnet.model.network import ProtoPNet
from protopnet.passes.describe import REENCODE_TOLERANCE
from protopnet.passes.image_pass import PassOptions
from protopnet.passes.nearest_patches import nearest_patches
from protopnet.passes.push import PushResult, push
from protopnet.progress import Reporter, Stopwatch
from protopnet.words import counted, first_few

_SHOWN = 20  # prototypes that a line names; all of them are in the record


class Corrections(Section):
    """What to do to a bundle."""

    remove: list[int] = Field([], description="prototypes to drop, by their numbers")
    merge: bool = Field(
        False, description="merge prototypes of a class that are the same patch or (nearly) the same vector"
    )
    merge_tolerance: float = Field(
        REENCODE_TOLERANCE, ge=0, description="squared distance up to which two vectors are the same"
    )
    forbid: Annotated[list[str], Repeated("IMAGE:BOX")] = Field(
        [],
        description="bar what lies on a box of a training image, and move the prototypes there to their next nearest "
        "patches; IMAGE: uri, the end of it, or image_id; BOX: top,left,bottom,right in pixels of the image, or all; "
        "may be given several times",
    )
    rule: bool = Field(False, description="the authors' pruning: drop prototypes with few neighbours of their class")
    k: int = Field(6, ge=1, description="nearest training images that the rule looks at, one patch an image")
    threshold: int = Field(3, ge=0, description="how many of them must be of the prototype's class")

    decisions: list[Decision] = Field(
        [],
        description="what people decided about single prototypes, in a file: --config corrections.yaml; "
        "docs/data-formats.md has its form",
    )
    made_for: str | None = Field(
        None,
        description="sha256 of the model.json in whose bundle the decisions' numbers count; in that of the given bundle "
        "when left out",
    )

    @field_validator("decisions", mode="before")
    @classmethod
    def _in_a_sentence(cls, given: Any) -> Any:
        return parse_decisions(given)

    def record(self) -> dict[str, Any]:
        """As JSON values; of the decisions, what they say."""
        settings = self.model_dump(mode="json", exclude={"decisions"})
        return settings | {"decisions": [record_of(each) for each in self.decisions]}

    def nothing(self) -> bool:
        return not (self.remove or self.merge or self.forbid or self.rule or self.decisions)


@dataclass(frozen=True)
class Step:
    """What one step did: as a record for the bundle's history, and in words."""

    name: str
    record: dict[str, Any]
    says: str


@dataclass(frozen=True)
class Correction:
    """The corrected prototypes and how they came about."""

    draft: Draft
    steps: list[Step]


@dataclass
class Corrector:
    """A bundle's network, its training data, and the passes that its correction needs.

    history: of the bundle, as in its provenance. start: the prototypes as they are in the bundle; known: where they come
    from. push: finds the nearest patch that is free (`passes.push.push`, or something that comes to the same).
    """

    network: ProtoPNet
    start: Draft
    dataset: Dataset
    trained: TrainedWith
    model: ModelSettings
    corrections: Corrections
    known: Prototypes
    history: Sequence[dict[str, Any]] = field(default_factory=list)
    push: Callable[..., PushResult] = push

    def check(self) -> None:
        """`UserError` for corrections that can't be made; before anything that takes time."""
        if self.corrections.threshold > self.corrections.k:
            raise UserError(
                f"threshold {self.corrections.threshold} is more than the k = {self.corrections.k} neighbours that the "
                "rule looks at: it would drop every prototype; lower --threshold"
            )
        check_removal(self.corrections.remove, self.start.prototype_class_P, self.dataset.classes)
        self._check_patches_are_left(self._left(self.start))

    def run(self, options: PassOptions, reporter: Reporter) -> Correction:
        """All steps but the last layer. Errors: `UserError`, as `check`."""
        asked, settled = self.corrections, self.settled
        steps = {
            "remove": (asked.remove or settled.dropped, self._remove),
            "merge": (asked.merge or settled.merges, self._merge),
            "forbid": (asked.forbid or settled.regions or settled.moved, self._forbid),
            "rule": (asked.rule, self._rule),
        }
        draft, done = self.start, []
        for name, (wanted, step) in steps.items():
            if wanted:
                watch = Stopwatch()
                reporter.begin(name, 0)
                draft, record, says = step(draft, options)
                done.append(Step(name, {"step": name, **record}, says))
                reporter.end(name, watch.seconds, says)
        return Correction(draft, done)

    @cached_property
    def settled(self) -> Settled:
        """What the decisions come to."""
        return settle(
            self.corrections.decisions,
            self.known,
            made_for=self.corrections.made_for,
            classes=self.dataset.classes,
            images=self.dataset.split("train")["sha256"].to_pylist(),
            removed=self.corrections.remove,
        )

    # The steps: a draft in, the next draft out, with a record and words.

    def _remove(self, draft: Draft, options: PassOptions) -> tuple[Draft, dict[str, Any], str]:
        removed = self.settled.dropped
        return (
            self._left(draft),
            {"removed": removed},
            f"{counted(len(removed), 'prototype')} removed: {first_few(removed, _SHOWN)}",
        )

    def _left(self, draft: Draft) -> Draft:
        return draft.without(draft.at(self.settled.dropped))

    def _merge(self, draft: Draft, options: PassOptions) -> tuple[Draft, dict[str, Any], str]:
        """Those that people decided on, then, if asked for, those that are the same."""
        places = [(draft.at([merge.kept]), draft.at(merge.repeats)) for merge in self.settled.merges]
        decided = [Merge(kept, repeats) for (kept,), repeats in (pair for pair in places if all(pair))]
        draft, pairs = _merged(draft, decided)
        tolerance = self.corrections.merge_tolerance
        if self.corrections.merge:
            same = find_repeats(draft.prototypes_PDhw, draft.prototype_class_P, draft.places, tolerance)
            draft, more_pairs = _merged(draft, same)
            pairs += more_pairs
        record = {"tolerance": tolerance, "merged": [{"kept": kept, "repeats": others} for kept, others in pairs]}
        into = "; ".join(f"{first_few(others, _SHOWN)} into {kept}" for kept, others in pairs[:_SHOWN])
        more = " …" if len(pairs) > _SHOWN else ""
        count = sum(len(others) for _, others in pairs)
        says = f"{counted(count, 'prototype')} merged: {into}{more}" if pairs else "no prototype repeats another"
        return draft, record, says

    def _forbid(self, draft: Draft, options: PassOptions) -> tuple[Draft, dict[str, Any], str]:
        moving = sorted({*self._bars.holding(draft.places), *draft.at(self.settled.moved)})
        bars = self._bars.with_places(self._rejected(draft))
        record: dict[str, Any] = {
            "barred": [each.record() for each in self._asked],
            "regions": [each.record() for each in self.settled.regions],
            "moved": [],
        }
        if not moving:
            return draft, record, "no prototype is on a barred patch"
        rows = self.dataset.split("train")
        result = self.push(
            draft.only(moving).network(self.network, self.model),
            rows.filter(pc.is_in(rows["label"], value_set=pa.array(draft.labels(moving), pa.int32()))),
            distinct=self.trained.push.distinct,
            options=options,
            barred=bars.with_places(self._taken(draft, moving, bars)).masks,
        )
        moved = draft.moved(moving, result.vectors_Pd, result.chosen)
        uris = dict(zip(rows["image_id"].to_pylist(), rows["uri"].to_pylist(), strict=True))
        for p, distance in zip(moving, result.chosen["distance"].to_pylist(), strict=True):
            places = {key: _place(each.places[p], uris) for key, each in (("from", draft), ("to", moved))}
            record["moved"].append({"prototype": draft.named([p])[0], **places, "distance": distance})
        return (
            moved,
            record,
            f"{counted(len(moving), 'prototype')} moved to other patches: {first_few(draft.named(moving), _SHOWN)}",
        )

    def _rule(self, draft: Draft, options: PassOptions) -> tuple[Draft, dict[str, Any], str]:
        k, threshold = self.corrections.k, self.corrections.threshold
        network = draft.network(self.network, self.model)
        rows = self.dataset.split("train")
        nearest = nearest_patches(network, rows, k=k, options=options)
        verdict = prune_by_neighbours(nearest, draft.prototype_class_P, threshold)
        kept = set(draft.at(self.settled.kept))
        going = [p for p in verdict.removed if p not in kept]
        removed, spared = draft.named(going), draft.named(verdict.spared)
        counts = {str(number): int(own) for number, own in zip(draft.numbers_P, verdict.own_P, strict=True)}
        record = {"k": k, "threshold": threshold, "own_neighbours": counts, "removed": removed, "spared": spared}
        says = f"{counted(len(removed), 'prototype')} removed{': ' if removed else ''}{first_few(removed, _SHOWN)}"
        if spared:
            names = [repr(self.dataset.classes[label]) for label in draft.prototype_class_P[verdict.spared]]
            says += f"; {first_few(spared, _SHOWN)} kept though under the rule, as the best of {', '.join(names)}"
        return draft.without(going), record, says

    # What is barred.

    @cached_property
    def _asked(self) -> list[Barred]:
        return [parse_barred(text, self.dataset.table) for text in self.corrections.forbid]

    @cached_property
    def _bars(self) -> Bars:
        _, rows, columns = self.network.backbone.map_shape(self.model.image_size)
        barred = [*barred_before(self.history), *self._asked, *self.settled.regions]
        return Bars.of(barred, self.dataset.split("train"), (rows, columns), self.model.prototype_shape)

    def _free(self, label: int, bars: Bars) -> int:
        """How many patches of the class's training images aren't barred."""
        rows = self.dataset.split("train")
        return bars.free(rows.filter(pc.equal(rows["label"], label))["image_id"].to_pylist())

    def _check_patches_are_left(self, draft: Draft) -> None:
        bars = self._bars.with_places(self._rejected(draft))
        for label in draft.labels([*self._bars.holding(draft.places), *draft.at(self.settled.moved)]):
            if not self._free(label, bars):
                raise UserError(
                    f"--forbid bars every patch of class {self.dataset.classes[label]!r}, or a decision does: its "
                    "prototypes would have nowhere to go; leave part of a training image free"
                )

    def _rejected(self, draft: Draft) -> list[Place]:
        """Patches that nothing moves to in this correction: those that were decided against, or all of their image."""
        rows, columns = self._bars.shape
        rejected: list[Place] = []
        for number, elsewhere in self.settled.moved.items():
            for p in draft.at([number]):
                image, row, column = draft.places[p]
                cells = np.ndindex(rows, columns) if elsewhere else [(row, column)]
                rejected += [(image, *cell) for cell in cells]
        return rejected

    def _taken(self, draft: Draft, moving: Sequence[int], bars: Bars) -> list[Place]:
        """Patches of prototypes that stay: closed to the others of a class unless it has too few to go round."""
        if not self.trained.push.distinct:
            return []
        taken = []
        for label in draft.labels(moving):
            members = np.flatnonzero(draft.prototype_class_P == label).tolist()
            if self._free(label, bars) >= len(members):
                taken += [draft.places[p] for p in members if p not in moving]
        return taken


def _merged(draft: Draft, merges: Sequence[Merge]) -> tuple[Draft, list[tuple[int, list[int]]]]:
    """The draft without the repeats, and the numbers of what was merged."""
    joined = replace(draft, connections_KP=merged_connections(draft.connections_KP, merges))
    pairs = [(draft.named([merge.kept])[0], draft.named(merge.repeats)) for merge in merges]
    return joined.without([p for merge in merges for p in merge.repeats]), pairs


def _place(place: Place, uris: dict[int, str]) -> dict[str, Any]:
    image_id, row, column = place
    return {"image_id": image_id, "uri": uris[image_id], "row": row, "column": column}
