"""Settings put into words: their names, types, bounds, values and differences, for help and errors."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args

from pydantic.fields import FieldInfo
from pydantic_settings import CliPositionalArg

from protopnet.config import Section

T = TypeVar("T")
Positional = Annotated[CliPositionalArg[T], "positional"]

NOT_SET = "(not set)"

# Of each type of a JSON schema: its placeholder in the help, and what is expected.
_TYPES = {
    "integer": ("N", "a whole number"),
    "number": ("X", "a number"),
    "string": ("TEXT", "text"),
    "boolean": ("true|false", "true or false"),
    "array": ("A,B,…", "a list (a,b,c)"),
    "object": ("JSON", "names with values"),
}
_LIMITS = {
    "minimum": ", at least {}",
    "exclusiveMinimum": ", above {}",
    "maximum": ", at most {}",
    "exclusiveMaximum": ", below {}",
    "minItems": ", at least {} of them",
    "maxItems": ", at most {} of them",
    "pattern": " that matches {}",
}


@dataclass(frozen=True)
class Repeated:
    """Marks a list of texts whose option is given once for each of them; `metavar` is how the help shows one."""

    metavar: str


@dataclass(frozen=True)
class Setting:
    """One field of the settings; `kinds` are the JSON schemas of what it may be, without null."""

    name: str
    field: FieldInfo
    kinds: list[Mapping[str, Any]]
    nullable: bool

    @property
    def positional(self) -> bool:
        return "positional" in self.field.metadata

    def takes(self, kind: str) -> bool:
        return any(one["type"] == kind for one in self.kinds)

    @property
    def option(self) -> str:
        return self.name if self.positional else f"--{self.name}"

    @property
    def argument(self) -> dict[str, Any]:
        """How argparse is to take it, and to say so in the help."""
        metavar = "|".join(_in_words(kind)[0] for kind in self.kinds)
        keywords = {"metavar": metavar, "help": self._help().replace("%", "%%")}
        if self.positional:
            keywords |= {"metavar": self.name.upper(), "nargs": "*" if self.takes("array") else "?"}
        elif [kind["type"] for kind in self.kinds] == ["boolean"]:
            keywords |= {"nargs": "?", "const": "true"}
        for mark in self.field.metadata:
            if isinstance(mark, Repeated):
                keywords |= {"metavar": mark.metavar, "action": "append"}
        return keywords

    @property
    def place(self) -> str:
        """How the usage shows one that is given without its name."""
        text = self.name.upper() + (" …" if self.takes("array") else "")
        return text if self.field.is_required() else f"[{text}]"

    @property
    def expected(self) -> str:
        """What it takes, e.g. `a number, at least 0, below 1`."""
        words = " or ".join(_in_words(kind)[1] for kind in self.kinds)
        return words + self._bounds() + (" or null" if self.nullable else "")

    def refusal(self, value: object, where: str = "") -> str:
        return f"{self.name}: {shown(value)}{where} is not valid; expected {self.expected}"

    def _help(self) -> str:
        notes = [self._bounds().strip(", ")]
        if not self.field.is_required():
            notes.append(f"default: {shown(self.field.get_default(call_default_factory=True))}")
        elif not self.positional:
            notes.append("required")
        note = "; ".join(filter(None, notes))
        return (self.field.description or "") + (f" ({note})" if note else "")

    def _bounds(self) -> str:
        free = [kind for kind in self.kinds if "prefixItems" not in kind]  # whose length isn't said already
        limits = ((phrase, kind.get(limit)) for kind in free for limit, phrase in _LIMITS.items())
        return "".join(phrase.format(shown(limit)) for phrase, limit in limits if limit is not None)


def _in_words(kind: Mapping[str, Any]) -> tuple[str, str]:
    """Placeholder of a value of this schema in the help, and what is expected."""
    if choices := kind.get("enum") or ([kind["const"]] if "const" in kind else None):
        return "|".join(choices), f"one of {', '.join(choices)}"
    if members := kind.get("prefixItems"):
        noun = _TYPES[members[0]["type"]][1].removeprefix("a ")
        ones = ",".join("1" for _ in members)
        return ",".join(_in_words(member)[0] for member in members), f"{len(members)} {noun}s such as {ones}"
    return _TYPES[kind["type"]]


def settings_of(settings_class: type[Section]) -> dict[str, Setting]:
    """Every setting by its dotted name, in the order of the class. A field's alias goes before its name."""
    schema = settings_class.model_json_schema()

    def leaves(section: type[Section], properties: Mapping[str, Any], prefix: str) -> Iterator[Setting]:
        for name, field in section.model_fields.items():
            key, inner = field.alias or name, _section_or_not(field.annotation)
            if isinstance(inner, type) and issubclass(inner, Section):
                yield from leaves(inner, schema["$defs"][inner.__name__]["properties"], f"{prefix}{key}.")
            else:
                anything = properties[key].get("anyOf", [properties[key]])
                kinds = [kind for kind in anything if kind["type"] != "null"]
                yield Setting(f"{prefix}{key}", field, kinds, nullable=len(kinds) < len(anything))

    return {setting.name: setting for setting in leaves(settings_class, schema["properties"], "")}


def _section_or_not(annotation: Any) -> Any:
    """The section of one that may be left out altogether (`BatchSettings | None`); anything else as it is."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    is_section = len(parts) == 1 and isinstance(parts[0], type) and issubclass(parts[0], Section)
    return parts[0] if is_section else annotation


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name most like this one; what follows the last dot counts by itself (`backbon`)."""

    def likeness(candidate: str) -> float:
        pairs = ((name, candidate), (name.rpartition(".")[2], candidate.rpartition(".")[2]))
        whole, leaf = (difflib.SequenceMatcher(None, a.lower().replace("-", "_"), b).ratio() for a, b in pairs)
        return max(whole, 0.95 * leaf + 0.05 * whole)

    return max(valid, key=likeness, default="")


def shown(value: object) -> str:
    """A value as one would type it on the command line."""
    if isinstance(value, str):
        return value if value and value == value.strip() and value != "null" else repr(value)
    if isinstance(value, list | tuple) and value and not any(isinstance(part, list | dict) for part in value):
        return ",".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.12g}"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:79] + "…"


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model": {"cut": "layer2"}}` as `{"model.cut": "layer2"}`; tuples as lists."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted name, old and new value of each setting that differs between two nested records.

    A setting that only one of the two has (another version wrote it) differs from `NOT_SET`.
    """
    before, after = flat(old), flat(new)
    pairs = ((name, before.get(name, NOT_SET), after.get(name, NOT_SET)) for name in before | after)
    return [(name, was, now) for name, was, now in pairs if was != now]
