"""What decisions come to for one bundle: which prototypes go, move, merge and are called what, and what no longer applies.

Decisions are read in order; the last about a prototype counts. None leaves a class without prototypes.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from protopnet.auditing.barred_patches import BarredRegion
from protopnet.auditing.decisions import (
    Decision,
    Drop,
    Group,
    Keep,
    MergeInto,
    MustBeUsed,
    NameIt,
    NotInRegion,
    NotThisPatch,
    PrototypeRef,
)
from protopnet.auditing.draft import Merge
from protopnet.config import ModelSettings
from protopnet.model.network import ProtoPNet


@dataclass(frozen=True)
class Lapsed:
    """A decision that doesn't apply to this bundle: its number, from 1, and why."""

    decision: int
    reason: str


class LapsedError(Exception):
    """Why a decision can't be applied."""


@dataclass
class Settled:
    """Prototypes by their numbers in the bundle. moved: whether to another image; merged: into which; floors: of their
    connections to their own class."""

    removed: set[int] = field(default_factory=set)
    merged: dict[int, int] = field(default_factory=dict)
    moved: dict[int, bool] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)
    floors: dict[int, float] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    groups: dict[int, str] = field(default_factory=dict)
    regions: list[BarredRegion] = field(default_factory=list)
    lapsed: list[Lapsed] = field(default_factory=list)

    @property
    def merges(self) -> list[Merge]:
        """Each prototype that takes others over, with all that end there."""
        repeats: dict[int, list[int]] = defaultdict(list)
        for p in sorted(self.merged):
            end = self.merged[p]
            while end in self.merged:
                end = self.merged[end]
            repeats[end].append(p)
        return [Merge(kept, others) for kept, others in sorted(repeats.items())]

    @property
    def dropped(self) -> list[int]:
        """Those that go, and with them what was merged into them."""
        ends = {p: merge.kept for merge in self.merges for p in merge.repeats}
        return sorted(self.removed | {p for p, end in ends.items() if end in self.removed})

    def gone(self, p: int) -> bool:
        return p in self.removed or p in self.merged


def patch_grid(network: ProtoPNet, model: ModelSettings) -> tuple[int, int]:
    """Rows and columns of patches on an image."""
    _, rows, columns = network.backbone.map_shape(model.image_size)
    return rows - model.prototype_shape[0] + 1, columns - model.prototype_shape[1] + 1


class Prototypes:
    """The prototypes of a bundle, to be found by patch or by number.

    table: PROTOTYPE_SCHEMA rows in order. grid: rows and columns of patches. bundle: its hash.
    """

    def __init__(self, table: pa.Table, grid: tuple[int, int], bundle: str) -> None:
        self.grid, self.bundle = grid, bundle
        columns = ("sha256", "uri", "row", "column", "class", "class_name")
        values = (table[name].to_pylist() for name in columns)
        self.sha256s, self.uris, self.rows, self.columns, self.labels, self.class_names = values
        self._at: dict[tuple[str, int, int], list[int]] = defaultdict(list)
        for p, (sha256, uri, row, column) in enumerate(
            zip(self.sha256s, self.uris, self.rows, self.columns, strict=True)
        ):
            self._at[sha256, row, column].append(p)
            if uri != sha256:
                self._at[uri, row, column].append(p)

    def __len__(self) -> int:
        return len(self.labels)

    def ref(self, p: int) -> PrototypeRef:
        """How a decision names a prototype."""
        return PrototypeRef(
            number=p,
            class_name=self.class_names[p],
            uri=self.uris[p],
            sha256=self.sha256s[p],
            row=self.rows[p],
            column=self.columns[p],
            of=self.grid,
        )

    def find(self, ref: PrototypeRef, made_for: str | None) -> int:
        """The number of a prototype. made_for: hash of the bundle that numbers count in; this one when None."""
        own_numbers = made_for in (None, self.bundle)
        if ref.sha256 is None and ref.uri is None:
            assert ref.number is not None
            if not own_numbers:
                raise LapsedError(f"{ref} is known by its number alone, which counts in another bundle")
            if ref.number >= len(self):
                raise LapsedError(f"{ref}: the bundle's prototypes are 0 to {len(self) - 1}")
            return ref.number
        found = self._patch(ref)
        if ref.class_name is not None:
            found = [p for p in found if self.class_names[p] == ref.class_name]
        if not found:
            raise LapsedError(f"no prototype of the bundle is the patch of {ref}")
        return ref.number if own_numbers and ref.number in found else found[0]

    def _patch(self, ref: PrototypeRef) -> list[int]:
        """Prototypes on the patch in which the middle of the one referred to lies."""
        assert ref.row is not None
        assert ref.column is not None
        there = ref.of or self.grid
        middle = zip((ref.row, ref.column), self.grid, there, strict=True)
        row, column = (min((2 * place + 1) * own // (2 * other), own - 1) for place, own, other in middle)
        found = self._at.get((ref.sha256 or "", row, column), [])
        return found if ref.sha256 else self._at.get((ref.uri or "", row, column), [])


def settle(
    decisions: Sequence[Decision],
    prototypes: Prototypes,
    *,
    made_for: str | None,
    classes: Sequence[str],
    images: Iterable[str],
    removed: Iterable[int] = (),
) -> Settled:
    """What the decisions come to. images: sha256 of every training image. removed: what goes beside them."""
    settling = _Settling(prototypes, made_for, classes, set(images), Settled(removed=set(removed)))
    for number, decision in enumerate(decisions, 1):
        try:
            settling.apply(decision)
        except LapsedError as reason:
            settling.settled.lapsed.append(Lapsed(number, str(reason)))
    return settling.settled


@dataclass
class _Settling:
    """Decisions applied one after another. Each that doesn't apply raises `LapsedError` and changes nothing."""

    prototypes: Prototypes
    made_for: str | None
    classes: Sequence[str]
    images: set[str]
    settled: Settled

    def __post_init__(self) -> None:
        labels = enumerate(self.prototypes.labels)
        self.left = Counter(label for p, label in labels if not self.settled.gone(p))  # prototypes, by class

    def apply(self, decision: Decision) -> None:
        if isinstance(decision, NotInRegion):
            self._region(decision)
        elif isinstance(decision, Group):
            self._group(decision)
        elif isinstance(decision, NameIt):
            self.settled.names[self._find(decision.prototype)] = decision.name
        elif isinstance(decision, MustBeUsed):
            self.settled.floors[self._find(decision.prototype)] = decision.floor
        else:
            self._fate(decision)

    def _find(self, ref: PrototypeRef) -> int:
        return self.prototypes.find(ref, self.made_for)

    def _region(self, decision: NotInRegion) -> None:
        if decision.class_name is not None and decision.class_name not in self.classes:
            raise LapsedError(f"the bundle has no class {decision.class_name!r}")
        if decision.sha256 is not None and decision.sha256 not in self.images:
            raise LapsedError(f"{decision.uri or decision.sha256} is no training image here")
        self.settled.regions.append(BarredRegion(decision.region, decision.class_name, decision.sha256))

    def _group(self, decision: Group) -> None:
        """Those that are here are grouped, whatever the others are."""
        missing = []
        for ref in decision.prototypes:
            try:
                self.settled.groups[self._find(ref)] = decision.group
            except LapsedError as reason:
                missing.append(str(reason))
        if missing:
            raise LapsedError("; ".join(missing))

    def _fate(self, decision: Keep | Drop | NotThisPatch | MergeInto) -> None:
        """The last word about a prototype: those before it no longer count."""
        settled, p = self.settled, self._find(decision.prototype)
        label, was_gone, goes = self.prototypes.labels[p], settled.gone(p), isinstance(decision, Drop | MergeInto)
        if goes and self.left[label] - (not was_gone) < 1:
            name = self.prototypes.class_names[p]
            raise LapsedError(f"{decision.prototype} is the last one of {name}: a class keeps one at least")
        into = self._find_other(decision, p) if isinstance(decision, MergeInto) else None
        self.left[label] += int(was_gone) - int(goes)
        settled.removed.discard(p)
        settled.kept.discard(p)
        settled.merged.pop(p, None)
        settled.moved.pop(p, None)
        if into is not None:
            settled.merged[p] = into
        elif isinstance(decision, Drop):
            settled.removed.add(p)
        elif isinstance(decision, NotThisPatch):
            settled.moved[p] = decision.elsewhere
        else:
            settled.kept.add(p)

    def _find_other(self, decision: MergeInto, p: int) -> int:
        into = self._find(decision.into)
        if self.prototypes.labels[into] != self.prototypes.labels[p]:
            raise LapsedError(f"{decision.prototype} and {decision.into} are of two classes: group them instead")
        if into == p or self.settled.gone(into):
            raise LapsedError(f"{decision.prototype} can't be merged into {decision.into}, which is gone itself")
        return into
