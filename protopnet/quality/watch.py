"""A model in use: what is counted of the images it answers, and how far they are from those it was made on.

Legend: B images, M members of an ensemble.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from protopnet.model.calibration import Trust
from protopnet.model.usual import TENTHS, Drift, Usual
from protopnet.predictor import Scores

MARGIN = "margin"
_TOP = 2


class OfClass(BaseModel):
    """Counts of the images whose first class is this one."""

    model_config = ConfigDict(frozen=True)

    images: int = 0
    abstained: int = 0
    unknown: int = 0
    tenths: dict[str, list[int]] = Field({}, description="how many are in each usual tenth, by measure")

    def plus(self, other: "OfClass") -> "OfClass":
        return OfClass(
            images=self.images + other.images,
            abstained=self.abstained + other.abstained,
            unknown=self.unknown + other.unknown,
            tenths={
                name: [a + b for a, b in zip(self._of(name), other._of(name), strict=True)]
                for name in self.tenths | other.tenths
            },
        )

    def _of(self, measure: str) -> list[int]:
        return self.tenths.get(measure, [0] * TENTHS)


class Measured(BaseModel):
    """One measure of the images in use, beside what is usual."""

    model_config = ConfigDict(frozen=True)

    measure: str = Field(
        description="margin (probability of the first class minus that of the second), or similarity of the member's "
        "number: of an image to the prototype it is most like"
    )
    edges: list[float] = Field(description="between the tenths of the images it was measured on")
    usual: list[int] = Field(description="how many of those images are in each tenth")
    seen: list[int] = Field(description="how many images in use are")
    drift: Drift


class WatchReport(BaseModel):
    """Images in use."""

    model_config = ConfigDict(frozen=True)

    images: int
    abstained: int
    unknown: int
    measures: list[Measured] = Field(description="none where the bundles don't keep what is usual")
    classes: dict[str, OfClass] = Field(description="by first class, most images first")


def watched(
    scores: Scores, classes: Sequence[str], abstained_B: NDArray[np.bool_] | Sequence[bool]
) -> dict[str, OfClass]:
    """Counts of a batch, by the first class of each image; logits must be finite."""
    if not len(scores.logits_BK):
        return {}
    top_B2, first_B = scores.probabilities_BK.topk(min(_TOP, len(classes)))
    top, first = top_B2.cpu().double().numpy(), first_B[:, 0].cpu().numpy()
    values = measures(scores.trust)
    numbers = {
        name: top[:, 0] - top[:, 1:].sum(1) if name == MARGIN else scores.best_MB[int(name.split()[1])].cpu().numpy()
        for name in values
    }
    unknown_B = np.zeros(len(first), bool) if scores.unknown_B is None else scores.unknown_B.cpu().numpy()
    found = {}
    for label in np.unique(first):
        own_B = first == label
        found[classes[label]] = OfClass(
            images=int(own_B.sum()),
            abstained=int(np.asarray(abstained_B)[own_B].sum()),
            unknown=int(unknown_B[own_B].sum()),
            tenths={name: usual.counted(numbers[name][own_B]) for name, usual in values.items()},
        )
    return found


def measures(trust: Trust) -> dict[str, Usual]:
    """What can be compared with what is usual, by name: `margin` of a single bundle, `similarity 0` of member 0 …"""
    found = {f"similarity {m}": usual for m, usual in enumerate(trust.similarity_M) if usual is not None}
    return found | ({MARGIN: trust.margin} if trust.margin else {})


def added(one: Mapping[str, OfClass], other: Mapping[str, OfClass]) -> dict[str, OfClass]:
    """Counts of both, by class."""
    return {name: one.get(name, OfClass()).plus(other.get(name, OfClass())) for name in {**one, **other}}


def report(seen: Mapping[str, OfClass], trust: Trust) -> WatchReport:
    """Counts, each measure beside what is usual, and how far they are apart."""
    total = OfClass()
    for each in seen.values():
        total = total.plus(each)
    return WatchReport(
        images=total.images,
        abstained=total.abstained,
        unknown=total.unknown,
        measures=[
            Measured(measure=name, edges=usual.edges, usual=usual.counts, seen=counts, drift=usual.drift(counts))
            for name, usual in measures(trust).items()
            for counts in [total.tenths.get(name, [0] * TENTHS)]
        ],
        classes=dict(sorted(seen.items(), key=lambda item: -item[1].images)),
    )
