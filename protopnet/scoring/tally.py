"""What is counted while images are scored: once a chunk, and added up for the whole job."""

import re
from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from protopnet.quality.watch import OfClass, added


class Agreement(BaseModel):
    """How far a lower precision is from float32, measured on the first images."""

    model_config = ConfigDict(frozen=True)

    images: int = 0
    same_prediction: int = 0
    largest_logit_difference: float = 0.0

    def plus(self, other: "Agreement") -> "Agreement":
        return Agreement(
            images=self.images + other.images,
            same_prediction=self.same_prediction + other.same_prediction,
            largest_logit_difference=max(self.largest_logit_difference, other.largest_logit_difference),
        )


class Tally(BaseModel):
    """Counts that can be added."""

    model_config = ConfigDict(frozen=True)

    images: int = 0
    abstained: int = 0
    labelled: int = Field(0, description="images with a label that got a prediction")
    correct: int = Field(0, description="of those, the ones whose prediction is the label")
    errors: dict[str, int] = Field({}, description="images that couldn't be scored, by reason")
    predictions: dict[str, int] = Field({}, description="images by the class predicted")
    agreement: Agreement = Agreement()
    watched: dict[str, OfClass] = Field({}, description="what is compared with the usual, by first class")

    @property
    def bad(self) -> int:
        return sum(self.errors.values())

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.labelled if self.labelled else None

    @classmethod
    def of(cls, table: pa.Table, agreement: Agreement, watched: dict[str, OfClass] | None = None) -> "Tally":
        """Counts of rows as they are written, and of what isn't in them."""
        errors = Counter(_kind(reason) for reason in table["error"].drop_null().to_pylist())
        right = pc.equal(table["prediction"], table["label"])  # null where either is
        return cls(
            images=len(table),
            abstained=table["prediction"].null_count - table["error"].length() + table["error"].null_count,
            labelled=len(right) - right.null_count,
            correct=pc.sum(right).as_py() or 0,
            errors=dict(errors),
            predictions=dict(Counter(table["class_name"].drop_null().to_pylist())),
            agreement=agreement,
            watched=watched or {},
        )

    def plus(self, other: "Tally") -> "Tally":
        return Tally(
            images=self.images + other.images,
            abstained=self.abstained + other.abstained,
            labelled=self.labelled + other.labelled,
            correct=self.correct + other.correct,
            errors=dict(Counter(self.errors) + Counter(other.errors)),
            predictions=dict(Counter(self.predictions) + Counter(other.predictions)),
            agreement=self.agreement.plus(other.agreement),
            watched=added(self.watched, other.watched),
        )


def _kind(reason: str) -> str:
    """A reason without what differs from image to image: `damaged or cut off: 12 bytes missing`, say."""
    if reason.startswith("damaged"):
        reason = reason.split(":")[0]
    return re.sub(r"\d[\d,]*", "…", re.sub(r" \(.*\)", "", reason))
