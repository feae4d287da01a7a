"""What an explanation says, typed and ready for JSON.

    logit of a class = points of the prototypes listed + points of the remaining ones
    points           = similarity of the prototype to the image x its connection to the class

Boxes are (top, left, bottom, right), half-open, in pixels of the image as uploaded, after any EXIF turn.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from protopnet.evidence.sources import Box, Source
from protopnet.evidence.sums import ShownContrast, Sums

MapKind = Literal["similarity", "gradient"]
EvidenceOf = TypeVar("EvidenceOf", bound="Evidence")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True, serialize_by_alias=True)


class Falls(_Record):
    """How far a similarity falls (below 0: rises) when what its patch sees is changed in one respect."""

    hue: float = Field(description="every colour turned a third of the circle, either way")
    contrast: float = Field(description="contrast taken down to 0.4")
    sharpness: float = Field(description="blurred")
    shape: float = Field(description="bent in waves, colours and texture kept")


class Evidence(_Record):
    """One prototype: how similar the image is to it, where, and how many points that gives a class."""

    member: int = Field(description="of the ensemble, from 0")
    prototype: int = Field(description="its number in that member's bundle")
    class_: int = Field(alias="class", description="class the prototype belongs to", examples=[3])
    class_name: str = Field(examples=["Blue Jay"])
    name: str | None = Field(None, description="that people gave the prototype", examples=["red bill"])
    group: str | None = Field(None, description="of prototypes that people say mean the same")
    similarity: float = Field(examples=[0.95])
    connection: float = Field(
        description="class connection: last-layer weight from the prototype to the class", examples=[2.0]
    )
    points: float = Field(description="similarity x connection", examples=[1.9])
    box: Box = Field(description="top, left, bottom, right in pixels of the image as uploaded")
    row: int = Field(description="of the most similar patch on the latent map")
    column: int
    activation_map: list[list[float]] | None = Field(
        None, description="similarity of every patch, row by row over the whole image, where asked for"
    )
    saliency_map: list[list[float]] | None = Field(
        None,
        description="`map: gradient`, where maps are asked for: how much of the similarity rests on each cell of a fine "
        "grid over the whole image, row by row; 1 in all",
    )
    receptive_field: Box | None = Field(
        None, description="what the patch can see at all, where that is less than the whole image"
    )
    falls: Falls | None = Field(None, description="what the similarity rests on, where `perturb` asks for it")
    source: Source | None = Field(description="where the prototype comes from; null where the bundle doesn't record it")

    @property
    def shown_map(self) -> list[list[float]]:
        """The map for pictures: the more faithful one, where there is one."""
        found = self.saliency_map or self.activation_map
        assert found is not None, "maps weren't asked for"
        return found


class Remainder(_Record):
    """All prototypes that aren't listed, together."""

    prototypes: int
    points: float


class ClassEvidence(_Record):
    """What a class got and from which prototypes. Listed points and remainder add up to the logit."""

    class_: int = Field(alias="class", examples=[3])
    class_name: str = Field(examples=["Blue Jay"])
    probability: float = Field(examples=[0.91])
    logit: float = Field(examples=[7.25])
    own_points: float = Field(description="points from the class's own prototypes, listed or not")
    evidence: list[Evidence] = Field(description="most points first")
    remainder: Remainder
    shown: Sums = Field(description="the same for people: rounded so that it adds up")


class Difference(Evidence):
    """One prototype of a contrast: `connection` and `points` are those to the answer."""

    rival_connection: float = Field(description="class connection to the rival")
    rival_points: float = Field(description="points for the rival")
    difference: float = Field(description="points more for the answer than for the rival")


class Contrast(_Record):
    """Why this class and not that: the prototypes that tell the answer from a rival.

    The differences of the rows and of the remainder add up to the difference of the logits.
    """

    class_: int = Field(alias="class", description="the answer", examples=[3])
    class_name: str = Field(examples=["Blue Jay"])
    rival: int = Field(description="the class asked about, or the second most probable", examples=[5])
    rival_name: str = Field(examples=["Cardinal"])
    difference: float = Field(description="of the logits", examples=[4.5])
    rows: list[Difference] = Field(
        description="what speaks most for the answer, then what speaks most for the rival; highest difference first"
    )
    remainder: Remainder = Field(description="`points` are points more for the answer")
    shown: ShownContrast = Field(description="the same for people: rounded so that it adds up")


class Explanation(_Record):
    """One image: the classes with the highest logits, then those that were asked for."""

    width: int = Field(description="of the image as uploaded, in pixels")
    height: int
    members: int = Field(description="size of the ensemble; its logits are added up")
    unknown: bool | None = Field(
        None,
        description="looks like nothing the model knows: it is less similar to any prototype than most images of its "
        "classes; null where the bundles don't say",
    )
    classes: list[ClassEvidence]
    most_similar: list[Evidence] = Field(
        [], description="prototypes most similar to the image, of whatever class, with their points for the first class"
    )

    contrasts: list[Contrast] = Field(
        [], description="where asked for: the answer and each class asked about, or the second most probable"
    )

    def rows(self) -> Iterator[Evidence]:
        """What the tables of classes and contrasts list; a prototype may be there several times."""
        for entry in self.classes:
            yield from entry.evidence
        for contrast in self.contrasts:
            yield from contrast.rows

    def with_rows(self, changes: Callable[[Evidence], Mapping[str, object]]) -> "Explanation":
        """A copy with changes of what the tables list."""

        def changed(rows: list[EvidenceOf]) -> list[EvidenceOf]:
            return [row.model_copy(update=changes(row)) for row in rows]

        return self.model_copy(
            update={
                "classes": [e.model_copy(update={"evidence": changed(e.evidence)}) for e in self.classes],
                "contrasts": [c.model_copy(update={"rows": changed(c.rows)}) for c in self.contrasts],
            }
        )

    @property
    def top(self) -> ClassEvidence:
        """The predicted class."""
        return self.classes[0]
