"""What an audit says of a bundle's prototypes: tables in, tables and findings out. The rules are in `findings`.

Legend: P prototypes, K classes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from protopnet.auditing.findings import (
    KINDS,
    SEVERITIES,
    AuditSettings,
    Finding,
    UseSplit,
    background,
    borrowed,
    confused,
    errors_of,
    other_classes,
    repeated,
    same_place,
    unused,
)
from protopnet.auditing.usage import Use
from protopnet.words import readable_names

FINDING_SCHEMA = pa.schema(
    [
        ("severity", pa.int8()),
        ("kind", pa.string()),
        ("class", pa.int32()),
        ("class_name", pa.string()),
        ("prototypes", pa.list_(pa.int32())),
        ("errors", pa.int64()),  # wrong images it explains
        ("text", pa.string()),
        ("region", pa.list_(pa.float64(), 4)),  # the part of the image it is about: top, left, bottom, right, 0 to 1
    ]
)


@dataclass(frozen=True)
class Audit:
    """All that an audit says. Tables as in docs/data-formats.md; findings the most severe first."""

    prototypes: pa.Table
    nearest: pa.Table
    pairs: pa.Table
    classes: pa.Table
    findings: list[Finding]
    class_names: list[str]

    def findings_table(self) -> pa.Table:
        rows = [
            {**asdict(each), "class": each.label, "class_name": self.class_names[each.label]} for each in self.findings
        ]
        return pa.Table.from_pylist(rows, FINDING_SCHEMA)

    def counts(self) -> dict[str, Any]:
        """How many there are of what."""
        kinds, severities = Counter(f.kind for f in self.findings), Counter(f.severity for f in self.findings)
        return {
            "prototypes": len(self.prototypes),
            "prototypes_with_findings": int(np.count_nonzero(pc.list_value_length(self.prototypes["flags"]))),
            "classes": len(self.classes),
            "findings": len(self.findings),
            "by_kind": {kind: kinds[kind] for kind in KINDS},
            "by_severity": {word: severities[severity] for severity, word in SEVERITIES.items()},
        }


def audit(
    prototypes: pa.Table,
    nearest: pa.Table,
    pairs: pa.Table,
    use: Use,
    classes: Sequence[str],
    settings: AuditSettings,
    split: UseSplit,
) -> Audit:
    """Judge a bundle's prototypes.

    prototypes: of the bundle (PROTOTYPE_SCHEMA). nearest: `explain.patch_table.NEAREST_SCHEMA`. pairs: of `close_pairs`.
    use: on the images of `split`.
    """
    names = readable_names(classes)
    class_P = prototypes["class"].to_numpy()
    pairs = _with_errors(pairs, class_P, use, classes)
    numbers = _prototype_numbers(prototypes, nearest, use)
    per_class = _class_numbers(use, class_P, classes)
    findings = sorted(
        [
            *confused(pairs, class_P, use, names, split),
            *other_classes(nearest, class_P, names, settings),
            *background(numbers, settings),
            *same_place(nearest, prototypes, settings),
            *borrowed(per_class, settings, split),
            *repeated(pairs, prototypes),
            *unused(numbers, use, settings, split),
        ],
        key=lambda found: (
            -found.severity,
            -found.errors,
            -int(use.first_P[list(found.prototypes)].sum()),
            list(KINDS).index(found.kind),
            found.label,
            found.prototypes,
        ),
    )
    flags: list[list[str]] = [[] for _ in class_P]
    for found in findings:
        for p in found.flagged:
            if found.kind not in flags[p]:
                flags[p].append(found.kind)
    numbers = numbers.append_column("flags", pa.array(flags, pa.list_(pa.string())))
    return Audit(numbers, nearest, pairs, per_class, findings, list(classes))


def _prototype_numbers(prototypes: pa.Table, nearest: pa.Table, use: Use) -> pa.Table:
    """A row a prototype: where it comes from, how it is used, and whose its nearest training patches are."""
    class_P = prototypes["class"].to_numpy()
    P = len(class_P)
    training = nearest.filter(pc.equal(nearest["split"], "train"))
    prototype = training["prototype"].to_numpy()
    own = training["own_class"].to_numpy(zero_copy_only=False)
    known = np.flatnonzero(pc.is_valid(training["on_object"]).to_numpy(zero_copy_only=False))
    shares = training["on_object"].to_numpy(zero_copy_only=False)[known]
    on_object_P = _ratio(
        np.bincount(prototype[known], weights=shares, minlength=P), np.bincount(prototype[known], minlength=P)
    )
    columns = ["prototype", "class", "class_name", "uri", "sha256", "box", "self_similarity"]
    numbers = {
        "first": use.first_P.astype(np.int64),
        "top": use.top_P.astype(np.int64),
        "top_share": use.top_P / max(1, use.images),
        "mean_points": _nullable(_ratio(use.points_P, use.predicted_K[class_P])),
        "reach": use.reach(class_P),
        "nearest_own": np.bincount(prototype[own], minlength=P),
        "nearest": np.bincount(prototype, minlength=P),
        "on_object": _nullable(on_object_P),
    }
    table = prototypes.select(columns)
    for name, column in numbers.items():
        table = table.append_column(name, pa.array(column))
    return table


def _class_numbers(use: Use, class_P: np.ndarray, classes: Sequence[str]) -> pa.Table:
    """A row a class: how it fares on its own images, and the mean points for and against it."""
    K = len(classes)
    return pa.table(
        {
            "class": np.arange(K, dtype=np.int32),
            "class_name": list(classes),
            "prototypes": np.bincount(class_P, minlength=K),
            "images": use.images_K.astype(np.int64),
            "right": use.right_K.astype(np.int64),
            "own_points": _nullable(_ratio(use.own_points_K, use.images_K)),
            "other_points": _nullable(_ratio(use.other_points_K, use.images_K)),
            "points_against": _nullable(_ratio(use.against_K, use.images_K)),
            "own_share": _nullable(_ratio(use.own_points_K, use.own_points_K + use.other_points_K)),
        }
    )


def _with_errors(pairs: pa.Table, class_P: np.ndarray, use: Use, classes: Sequence[str]) -> pa.Table:
    """Pairs with their classes and the errors each causes: images of the class of one that were taken for the class of
    the other, the other being the prototype that gave the most points."""
    first, second = pairs["prototype"].to_numpy(), pairs["other"].to_numpy()
    errors = [errors_of([pair], class_P, use) for pair in zip(first.tolist(), second.tolist(), strict=True)]
    names = pa.array(list(classes), pa.string())
    added = {
        "class": pa.array(class_P[first], pa.int32()),
        "class_name": names.take(pa.array(class_P[first])),
        "other_class": pa.array(class_P[second], pa.int32()),
        "other_class_name": names.take(pa.array(class_P[second])),
        "errors": pa.array(errors, pa.int64()),
    }
    for name, column in added.items():
        pairs = pairs.append_column(name, column)
    return pairs


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=np.asarray(counts) > 0)


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, pa.float64(), mask=~np.isfinite(values))
