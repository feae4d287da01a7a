"""Figures as people read them: rounded, and still adding up for whoever checks them with a calculator.

Similarity and connection have three decimals, and points are the product of what is shown, to two. The total is the
logit to two decimals. What rounding left over goes into the remaining prototypes, which no reader can add up again.
"""

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, Field

from protopnet.words import probability_text


class ShownRow(BaseModel):
    """One prototype listed."""

    model_config = ConfigDict(frozen=True)

    similarity: str
    connection: str
    points: str


class Sums(BaseModel):
    """A table of evidence in rounded figures that add up, with a true minus sign."""

    model_config = ConfigDict(frozen=True)

    probability: str
    rows: list[ShownRow] = Field(description="of the prototypes listed, in their order")
    remainder: str = Field(description="points of all others")
    total: str


class ShownDifference(BaseModel):
    """One prototype of a contrast."""

    model_config = ConfigDict(frozen=True)

    similarity: str
    points: str
    rival_points: str
    difference: str


class ShownContrast(BaseModel):
    """A table of differences in rounded figures that add up, with a true minus sign."""

    model_config = ConfigDict(frozen=True)

    rows: list[ShownDifference] = Field(description="of the prototypes listed, in their order")
    remainder: str = Field(description="what all others together give the answer more")
    total: str = Field(description="points more for the answer: its total minus the rival's, as they are shown")


def sums_of(listed: Iterable[tuple[float, float]], logit: float, probability: float, *, remaining: int) -> Sums:
    """listed: similarity and connection of each prototype. remaining: how many prototypes aren't listed."""
    thousandths = [(round(1000 * similarity), round(1000 * connection)) for similarity, connection in listed]
    points = [_points(*pair) for pair in thousandths]
    total = round(100 * logit) if remaining else sum(points)
    rows = [
        ShownRow(similarity=_text(s, 3), connection=_text(c, 3), points=_text(p, 2))
        for (s, c), p in zip(thousandths, points, strict=True)
    ]
    return Sums(
        probability=probability_text(probability),
        rows=rows,
        remainder=_text(total - sum(points), 2),
        total=_text(total, 2),
    )


def contrast_sums_of(
    listed: Iterable[tuple[float, float, float]], logit: float, rival_logit: float, *, remaining: int
) -> ShownContrast:
    """listed: similarity of each prototype, and its connections to the answer and to the rival."""
    thousandths = [tuple(round(1000 * value) for value in row) for row in listed]
    points = [(_points(s, c), _points(s, r)) for s, c, r in thousandths]
    listed_total = sum(own - rival for own, rival in points)
    total = round(100 * logit) - round(100 * rival_logit) if remaining else listed_total
    rows = [
        ShownDifference(
            similarity=_text(s, 3),
            points=_text(own, 2),
            rival_points=_text(rival, 2),
            difference=_text(own - rival, 2),
        )
        for (s, _, _), (own, rival) in zip(thousandths, points, strict=True)
    ]
    return ShownContrast(rows=rows, remainder=_text(total - listed_total, 2), total=_text(total, 2))


def _points(similarity: int, connection: int) -> int:
    """Hundredths of a point, from thousandths; half a one is rounded away from 0, as on paper."""
    millionths = similarity * connection
    size = (abs(millionths) + 5_000) // 10_000
    return size if millionths >= 0 else -size


def _text(value: int, decimals: int) -> str:
    return f"{'−' if value < 0 else ''}{abs(value) / 10**decimals:.{decimals}f}"


def signed(value: float, decimals: int = 2) -> str:
    """A change with its sign; none where nothing is left of it."""
    text = _text(round(value * 10**decimals), decimals)
    return f"+{text}" if value > 0 and text.strip("0.") else text
