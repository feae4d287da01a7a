"""What a bundle's probabilities and similarities are worth, from images it wasn't trained on: the bundle keeps it.

Logits, points and similarities stay as they are; probabilities are those of logits / temperature. Fitted in
`protopnet.quality.calibration`.

Legend: B images, K classes, M members of an ensemble.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from protopnet.config import Threshold
from protopnet.errors import UserError
from protopnet.model.usual import Usual


class Calibration(BaseModel):
    """Of one bundle."""

    model_config = ConfigDict(frozen=True)

    temperature: float = Field(gt=0)
    split: Literal["validation", "train"] = Field(description="of the images it was fitted on")
    images: int
    error_before: float = Field(description="calibration error on them without the temperature, in 15 bins")
    error_after: float
    accuracy: float = Field(description="that was wanted of the images answered")
    abstain_below: float | None = Field(
        description="probability from which on at least so many answers are right; None where there is none"
    )
    coverage: float = Field(description="share of the images that reach it")
    unknown_below: float | None = Field(
        description="best similarity below which an image looks like nothing known; None for a baseline"
    )
    similarity: Usual | None = Field(None, description="best similarities of the images; None for a baseline")
    margin: Usual | None = Field(None, description="probability of the first class minus that of the second")


@dataclass(frozen=True)
class Trust:
    """Of an ensemble, whose logits are the sum of its members'.

    temperature: the sum of the members' (1 each where nothing was fitted, and then 1 in all): one for all classes, so that
    the order of the classes is that of the logits. unknown_below_M: None for a member that doesn't say. abstain_below: of a
    bundle alone; what is right of an ensemble's answers wasn't measured, nor are its margins. similarity_M: what is usual.
    """

    temperature: float = 1.0
    unknown_below_M: tuple[float | None, ...] = (None,)
    abstain_below: float | None = None
    similarity_M: tuple[Usual | None, ...] = (None,)
    margin: Usual | None = None

    @classmethod
    def of(cls, calibrations: Sequence[Calibration | None]) -> "Trust":
        known = [each for each in calibrations if each is not None]
        fitted = len(known) == len(calibrations)
        return cls(
            sum(each.temperature for each in known) if fitted else 1.0,
            tuple(None if each is None else each.unknown_below for each in calibrations),
            known[0].abstain_below if fitted and len(known) == 1 else None,
            tuple(None if each is None else each.similarity for each in calibrations),
            known[0].margin if fitted and len(known) == 1 else None,
        )

    def threshold(self, asked: Threshold | None, setting: str) -> float | None:
        """The probability below which to abstain; `UserError` where the bundle is asked for one that it doesn't have."""
        if asked != "bundle":
            return asked
        if self.abstain_below is None:
            raise UserError(
                f"{setting} bundle: expected one bundle that keeps a threshold for the accuracy wanted "
                "(calibration.accuracy of its training); give a probability from 0 to 1"
            )
        return self.abstain_below

    def probabilities(self, logits_BK: Tensor) -> Tensor:
        return (logits_BK / self.temperature).softmax(1)

    def unknown(self, best_MB: Tensor) -> Tensor | None:
        """Which images look like nothing that any member knows, from each member's best similarity to each; None where
        a member doesn't say."""
        below_M = [below for below in self.unknown_below_M if below is not None]
        if len(below_M) < len(best_MB):
            return None
        return (best_MB < best_MB.new_tensor(below_M)[:, None]).all(0)
