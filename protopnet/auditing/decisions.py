"""What people decide about the prototypes of a bundle: the `decisions` of a corrections.yaml, and the auditors' table.

A prototype is known by the patch that it is (image and place), so that decisions carry over to a bundle trained anew;
its number counts in the bundle alone for which the decision was made. What decisions come to for one bundle is for
`auditing/settling.py`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import pyarrow as pa
import yaml
from pydantic import AwareDatetime, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from protopnet.config import Section

Share = Annotated[float, Field(ge=0, le=1)]
Region = tuple[Share, Share, Share, Share] | Literal["background"]
Name = Annotated[str, Field(min_length=1, max_length=80)]


class PrototypeRef(Section):
    """Which prototype is meant: `12`, or the image and the place of its patch."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    number: int | None = Field(None, ge=0, description="in the bundle that the decision was made for")
    class_name: str | None = Field(None, alias="class", description="that the prototype belongs to")
    uri: str | None = Field(None, description="of the training image it is a patch of")
    sha256: str | None = Field(None, description="of that image")
    row: int | None = Field(None, ge=0, description="of the patch on the latent map")
    column: int | None = Field(None, ge=0)
    of: tuple[int, int] | None = Field(None, description="rows and columns of patches that there were")

    @model_validator(mode="before")
    @classmethod
    def _number_alone(cls, given: Any) -> Any:
        return {"number": given} if isinstance(given, int) else given

    @model_validator(mode="after")
    def _says_which(self) -> "PrototypeRef":
        place = (self.row, self.column)
        if (self.sha256 or self.uri) and None in place:
            raise ValueError("expected row and column of the patch beside its image")
        if not (self.sha256 or self.uri) and self.number is None:
            raise ValueError("expected a number, or uri or sha256 of an image with row and column")
        return self

    def __str__(self) -> str:
        number = f"prototype {self.number}" if self.number is not None else "the prototype"
        own = f" of {self.class_name}" if self.class_name else ""
        image = self.uri or (f"image {self.sha256[:12]}…" if self.sha256 else "")
        return f"{number}{own}" + (f" ({image}, row {self.row}, column {self.column})" if image else "")


class _Decision(Section):
    """Who decided it, when, and why."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    who: str = Field(min_length=1)
    when: AwareDatetime
    why: str = ""


class Keep(_Decision):
    """The prototype is as it should be: the authors' rule doesn't drop it either."""

    decide: Literal["keep"] = "keep"
    prototype: PrototypeRef


class Drop(_Decision):
    """The prototype goes."""

    decide: Literal["drop"] = "drop"
    prototype: PrototypeRef


class NotThisPatch(_Decision):
    """The prototype moves to its next nearest patch."""

    decide: Literal["not-this-patch"] = "not-this-patch"
    prototype: PrototypeRef
    elsewhere: bool = Field(False, description="on another image")


class NotInRegion(_Decision):
    """No prototype may lie there, on any training image, or only on those of a class, or on one."""

    decide: Literal["not-in-region"] = "not-in-region"
    region: Region = Field(
        description="top, left, bottom, right in shares of the image's height and width; background: all that lies "
        "beside the object's mask, or outside the outline of its key points"
    )
    class_name: str | None = Field(None, alias="class", description="on images of this class only")
    sha256: str | None = Field(None, description="on this image only")
    uri: str | None = None
    prototype: PrototypeRef | None = Field(None, description="that gave rise to it")

    @field_validator("region")
    @classmethod
    def _has_an_area(cls, region: Region) -> Region:
        if region != "background" and not (region[0] < region[2] and region[1] < region[3]):
            raise ValueError("expected top, left, bottom, right with top < bottom and left < right")
        return region


class MergeInto(_Decision):
    """The prototype says the same as another of its class: that one takes over its connections, and it goes."""

    decide: Literal["merge"] = "merge"
    prototype: PrototypeRef
    into: PrototypeRef


class MustBeUsed(_Decision):
    """The connection of the prototype to its own class doesn't fall below a floor, whatever the images say."""

    decide: Literal["must-be-used"] = "must-be-used"
    prototype: PrototypeRef
    floor: float = Field(gt=0, le=1e6, description="the least its class connection may be")


class NameIt(_Decision):
    """What the prototype is, in words: "red bill"."""

    decide: Literal["name"] = "name"
    prototype: PrototypeRef
    name: Name


class Group(_Decision):
    """Prototypes, of any classes, that mean the same."""

    decide: Literal["group"] = "group"
    prototypes: list[PrototypeRef] = Field(min_length=1)
    group: Name


KINDS = (Keep, Drop, NotThisPatch, NotInRegion, MergeInto, MustBeUsed, NameIt, Group)
Decision = Annotated[
    Keep | Drop | NotThisPatch | NotInRegion | MergeInto | MustBeUsed | NameIt | Group, Field(discriminator="decide")
]
_ADAPTER: TypeAdapter[Decision] = TypeAdapter(Decision)


def parse_decision(given: Any) -> Decision:
    """One decision from what a file or a request says; `ValueError` in a sentence."""
    try:
        return _ADAPTER.validate_python(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        kind = given.get("decide") if isinstance(given, Mapping) else None
        place = [str(part) for part in first["loc"] if part != kind]
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(": ".join(filter(None, [".".join(place), message]))) from None


def parse_decisions(given: Any) -> Any:
    """The decisions of a file; `ValueError` names the first that is none."""
    if not isinstance(given, list):
        return given
    found = []
    for number, each in enumerate(given, 1):
        try:
            found.append(each if isinstance(each, _Decision) else parse_decision(each))
        except ValueError as error:
            raise ValueError(f"number {number} is not valid: {error}") from None
    return found


def referred(decision: Decision) -> list[PrototypeRef]:
    """The prototypes that a decision is about, the one that is decided about first."""
    if isinstance(decision, Group):
        return decision.prototypes
    if isinstance(decision, MergeInto):
        return [decision.prototype, decision.into]
    return [decision.prototype] if decision.prototype else []


def corrections_yaml(decisions: Sequence[Decision], made_for: str) -> str:
    """A file for `jobs/prune.py --config`. made_for: hash of the bundle whose numbers the decisions give."""
    records = [record_of(each) for each in decisions]
    content = {"made_for": made_for, "decisions": records}
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return str(yaml.dump(content, Dumper=dumper, sort_keys=False, allow_unicode=True, width=120))


def record_of(decision: Decision) -> dict[str, Any]:
    """A decision in JSON values, without what it leaves out."""
    record = decision.model_dump(mode="json", exclude_none=True)
    return {"decide": record.pop("decide"), **record}


DECISION_SCHEMA = pa.schema(
    [
        ("bundle", pa.string()),  # that it was applied to: sha256 of its model.json
        ("number", pa.int32()),  # of the decision among those of that correction, from 1
        ("decide", pa.string()),
        ("who", pa.string()),
        ("when", pa.timestamp("us", "UTC")),
        ("why", pa.string()),
        ("prototype", pa.int32()),  # as the decision numbers it; null where it gives none
        ("class_name", pa.string()),
        ("uri", pa.string()),  # of the training image
        ("sha256", pa.string()),
        ("row", pa.int32()),
        ("column", pa.int32()),
        ("decision", pa.string()),  # all of it, as JSON
        ("applied", pa.bool_()),
        ("reason", pa.string()),  # why it wasn't applied
    ]
)


def decisions_table(history: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Every decision that a bundle's history records, the oldest correction first: DECISION_SCHEMA."""
    return pa.Table.from_pylist([row for entry in history for row in _rows(entry)], DECISION_SCHEMA)


def _rows(entry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    reasons = {each["decision"]: each["reason"] for each in entry.get("lapsed", [])}
    for number, record in enumerate(entry["settings"].get("decisions", []), 1):
        decision = parse_decision(record)
        first = next(iter(referred(decision)), None)
        place = first.model_dump(by_alias=False) if first else {}
        yield {
            "bundle": entry["bundle"],
            "number": number,
            "prototype": place.get("number"),
            **{name: place.get(name) for name in ("class_name", "uri", "sha256", "row", "column")},
            **decision.model_dump(include={"decide", "who", "when", "why"}),
            "decision": json.dumps(record, ensure_ascii=False),
            "applied": number not in reasons,
            "reason": reasons.get(number),
        }
