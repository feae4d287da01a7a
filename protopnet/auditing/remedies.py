"""From findings to commands: what a person can type to put right what an audit has flagged."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from protopnet.auditing.findings import KINDS, Finding
from protopnet.words import counted

# What can be put right without training again, by dropping prototypes or by moving them to other patches.
_DROPPED, _MOVED = ("repeated", "other-classes", "unused"), ("background",)


@dataclass(frozen=True)
class Remedy:
    """For one kind of finding: the options of `jobs/prune.py` that act on its prototypes, and what they do, in words."""

    kind: str
    says: str
    options: str


def remedies(findings: Sequence[Finding], prototypes: pa.Table) -> list[Remedy]:
    """For each kind of finding that pruning can put right. prototypes: of the bundle (PROTOTYPE_SCHEMA).

    A class keeps one prototype at least: where all of them are flagged, the first stays.
    """
    class_P = prototypes["class"].to_numpy()
    found = []
    for kind in KINDS:
        flagged = sorted({p for finding in findings if finding.kind == kind for p in finding.flagged})
        if kind in _MOVED and flagged:
            found.append(
                Remedy(
                    kind,
                    f"moves {counted(len(flagged), 'prototype')} to the next nearest patch",
                    _forbid(prototypes, flagged),
                )
            )
        elif kind in _DROPPED and (going := _without_the_last(flagged, class_P)):
            found.append(
                Remedy(kind, f"drops {counted(len(going), 'prototype')}", f"--remove {','.join(map(str, going))}")
            )
    return found


def _without_the_last(flagged: Sequence[int], class_P: np.ndarray) -> list[int]:
    """Those that can go without leaving a class with none."""
    emptied = set(np.unique(class_P)) - set(class_P[np.setdiff1d(np.arange(len(class_P)), flagged)])
    staying = {next(p for p in flagged if class_P[p] == label) for label in emptied}
    return [p for p in flagged if p not in staying]


def _forbid(prototypes: pa.Table, flagged: Sequence[int]) -> str:
    """The box of each on the image it comes from."""
    rows = prototypes.select(["uri", "box"]).take(flagged).to_pylist()
    return " ".join(f"--forbid {shlex.quote(row['uri'] + ':' + ','.join(map(str, row['box'])))}" for row in rows)
