"""What a number usually is, in tenths of the images it was measured on, and how far others are from that."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

TENTHS = 10
_CHI_SQUARED = 16.918977604620448  # that 19 of 20 draws with 9 degrees of freedom stay below


class Drift(BaseModel):
    """How far counts are from the usual ones."""

    model_config = ConfigDict(frozen=True)

    index: float = Field(
        description="population stability index, sum of (share - usual) log(share / usual); above 0.25 by custom a shift"
    )
    by_chance: float = Field(
        description="which index so few images stay below in 19 of 20 cases where nothing has changed"
    )


class Usual(BaseModel):
    """A number's distribution over some images: nine edges between tenths, and how many were in each.

    Equal numbers share a tenth, so that tenths may be uneven, and some empty.
    """

    model_config = ConfigDict(frozen=True)

    edges: list[float] = Field(min_length=TENTHS - 1, max_length=TENTHS - 1)
    counts: list[int] = Field(min_length=TENTHS, max_length=TENTHS)

    @classmethod
    def of(cls, values_n: NDArray[Any]) -> "Usual":
        edges = np.quantile(values_n, np.arange(1, TENTHS) / TENTHS).astype(np.float64).tolist()
        return cls(edges=edges, counts=_counted(edges, values_n))

    def counted(self, values_n: NDArray[Any]) -> list[int]:
        """How many numbers are in each tenth."""
        return _counted(self.edges, values_n)

    def drift(self, counts: Sequence[int]) -> Drift:
        """Of counts like these; half an image in each tenth keeps the index finite.

        Where both are drawn from one distribution, index / (1/n + 1/m) is about chi-squared with 9 degrees of freedom.
        """
        usual, seen = (np.array(each, np.float64) + 0.5 for each in (self.counts, counts))
        p, q = usual / usual.sum(), seen / seen.sum()
        index = float(((q - p) * np.log(q / p)).sum())
        chance = _CHI_SQUARED * (1 / max(1, sum(self.counts)) + 1 / max(1, sum(counts)))
        return Drift(index=round(index, 4), by_chance=round(chance, 4))


def _counted(edges: Sequence[float], values_n: NDArray[Any]) -> list[int]:
    counts: list[int] = np.bincount(np.searchsorted(edges, values_n, side="right"), minlength=TENTHS).tolist()
    return counts
