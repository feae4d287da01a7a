"""What a model says of an image, for notebooks: typed, as a picture, as a dictionary, as a table, and as itself.

A result of one image is a `Prediction` or a `Why`; of several, `Results` of them. Each shows itself in a notebook.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from protopnet.api import display
from protopnet.errors import UserError
from protopnet.evidence.figures import Album, class_figure, page
from protopnet.evidence.records import ClassEvidence, Contrast, Explanation
from protopnet.words import called, find_class, percent, probability_text, readable_names

if TYPE_CHECKING:
    import pandas

SHOWN = 5  # classes that a figure or a table lists


class Result(ABC):
    """What a model says of one image, called `name`."""

    name: str

    @abstractmethod
    def figure(self) -> Image.Image:
        """The result as a picture, to be shown or saved."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The result as JSON has it."""

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """The rows of `to_pandas`."""

    @abstractmethod
    def _repr_html_(self) -> str: ...

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self}>"

    def to_pandas(self) -> "pandas.DataFrame":
        """The result as a table. `UserError` where pandas isn't installed."""
        return _table(self.rows())


R = TypeVar("R", bound=Result)


class Results(tuple[R, ...]):
    """Those of several images, in their order: a tuple with the methods of a single one."""

    def figure(self) -> Image.Image:
        """The pictures of all, one below the other."""
        return display.stacked([result.figure() for result in self])

    def to_dict(self) -> list[dict[str, Any]]:
        return [result.to_dict() for result in self]

    def to_pandas(self) -> "pandas.DataFrame":
        """One table for all. `UserError` where pandas isn't installed."""
        return _table([row for result in self for row in result.rows()])

    def _repr_html_(self) -> str:
        return display.several([result._repr_html_() for result in self[: display.MOST]], len(self))


@dataclass(frozen=True)
class ClassScore:
    """A class, its label, and how likely the model takes the image to be of it."""

    label: int
    class_name: str
    probability: float
    logit: float


@dataclass(frozen=True, eq=False, repr=False)
class Prediction(Result):
    """How likely an image is of each class. photo: the image as a small JPEG; logits_K: of the classes by label.

    unknown: whether it looks like nothing that the model knows; None where the bundles don't say.
    """

    name: str
    width: int
    height: int
    classes: Sequence[str]
    logits_K: np.ndarray
    photo: bytes
    temperature: float = 1.0
    unknown: bool | None = None

    @cached_property
    def probabilities_K(self) -> np.ndarray:
        exp_K = np.exp((self.logits_K.astype(np.float64) - self.logits_K.max()) / self.temperature)
        return exp_K / exp_K.sum()

    @property
    def label(self) -> int:
        """Of the predicted class; of equal logits the first."""
        return int(self.logits_K.argmax())

    @property
    def class_name(self) -> str:
        return self.classes[self.label]

    @property
    def probability(self) -> float:
        """Of the predicted class."""
        return float(self.probabilities_K[self.label])

    def top(self, count: int = SHOWN) -> list[ClassScore]:
        """The likeliest classes, likeliest first."""
        order = np.argsort(-self.logits_K, kind="stable")[:count].tolist()
        return [ClassScore(k, self.classes[k], float(self.probabilities_K[k]), float(self.logits_K[k])) for k in order]

    def figure(self) -> Image.Image:
        """The image beside the likeliest classes."""
        return display.bars(self.photo, self.name, self._lines())

    def to_dict(self) -> dict[str, Any]:
        """`classes` has every class, likeliest first."""
        return {
            "image": self.name,
            "width": self.width,
            "height": self.height,
            "class": self.label,
            "class_name": self.class_name,
            "probability": self.probability,
            "unknown": self.unknown,
            "classes": [_plain(score) for score in self.top(len(self.classes))],
        }

    def rows(self) -> list[dict[str, Any]]:
        """A row for each of the likeliest classes."""
        return [{"image": self.name, "rank": rank} | _plain(score) for rank, score in enumerate(self.top(), 1)]

    def _repr_html_(self) -> str:
        return display.prediction_html(self.photo, self.name, self._lines())

    def __str__(self) -> str:
        name, _, said = self._lines()[0]
        return f"{self.name}: {name} ({said})"

    def _lines(self) -> list[tuple[str, float, str]]:
        names = readable_names(self.classes)
        return [(names[score.label], score.probability, probability_text(score.probability)) for score in self.top()]


def _plain(score: ClassScore) -> dict[str, Any]:
    return {
        "class": score.label,
        "class_name": score.class_name,
        "probability": score.probability,
        "logit": score.logit,
    }


@dataclass(frozen=True, eq=False, repr=False)
class Why(Result):
    """Why an image gets its points: `explanation` has them as data. photo: the image, made smaller."""

    name: str
    explanation: Explanation
    photo: Image.Image
    album: Album

    @property
    def classes(self) -> list[ClassEvidence]:
        """What each class explained got, and from which prototypes; the predicted class first."""
        return self.explanation.classes

    @property
    def contrasts(self) -> list[Contrast]:
        """What tells the predicted class from another, prototype by prototype."""
        return self.explanation.contrasts

    @property
    def class_name(self) -> str:
        """The predicted class."""
        return self.explanation.top.class_name

    @property
    def probability(self) -> float:
        """Of the predicted class."""
        return self.explanation.top.probability

    def figure(self, of: str | None = None) -> Image.Image:
        """The table of evidence of one of the classes explained, or of all, one below the other.

        `UserError` for another class, and for a bundle without pictures of its prototypes.
        """
        chosen = self.classes
        if of is not None:
            label = find_class(of, self.album.explainer.classes)
            chosen = [entry for entry in self.classes if entry.class_ == label]
            if not chosen:
                raise UserError(f"{of} isn't among the classes explained: ask for it with why_not={of!r}")
        return display.stacked([self.figure_of(entry) for entry in chosen])

    def figure_of(self, entry: ClassEvidence | Contrast) -> Image.Image:
        """The table of one of `classes` or `contrasts`."""
        size = (self.explanation.width, self.explanation.height)
        return class_figure(self.photo, entry, self.album, readable_names(self.album.explainer.classes), size)

    def page(self) -> str:
        """The same as an HTML document that needs nothing else."""
        return page([(self.name, self.photo, self.explanation)], self.album, "Why?")

    def to_dict(self) -> dict[str, Any]:
        return {"image": self.name, **self.explanation.model_dump(mode="json")}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each prototype listed. Those that aren't listed have points as well: see `remainder`."""
        return [row for entry in self.classes for row in _evidence_rows(self.name, entry)]

    @property
    def verdict(self) -> str:
        """The predicted class and what speaks most for it, in a line."""
        top, names = self.explanation.top, readable_names(self.album.explainer.classes)
        verdict = f"{names[top.class_]} ({percent(top.probability)}), {top.logit:z.2f} points"
        if top.evidence:
            first = top.evidence[0]
            verdict += (
                f"; most, {first.points:z.2f}, from {called(first.prototype, first.name)} of {names[first.class_]}"
            )
        return verdict

    def __str__(self) -> str:
        return f"{self.name}: {self.verdict}"

    def _repr_html_(self) -> str:
        rows = [max(1, len(entry.evidence)) for entry in self.classes] + [len(each.rows) for each in self.contrasts]
        try:
            return display.framed(self.page(), sum(rows), len(rows))
        except UserError as error:  # a bundle without pictures
            return display.in_words(f"{self} ({error})")


def _evidence_rows(image: str, entry: ClassEvidence) -> list[dict[str, Any]]:
    of_class = {"image": image, "class_name": entry.class_name, "probability": entry.probability, "logit": entry.logit}
    return [
        of_class
        | {
            "member": each.member,
            "prototype": each.prototype,
            "prototype_class": each.class_name,
            "similarity": each.similarity,
            "connection": each.connection,
            "points": each.points,
            "box": each.box,
            "source": each.source.uri if each.source else None,
        }
        for each in entry.evidence
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> "pandas.DataFrame":
    try:
        import pandas
    except ImportError:
        raise UserError("a table needs pandas, which isn't installed: pip install pandas") from None
    return pandas.DataFrame(rows)
