"""Settings put into words: their names, types, bounds, values and differences, for help and errors."""

import difflib
import json
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo

from protopnet.config import Section

NOT_SET = "(not set)"

_NOUNS = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_METAVARS = {int: "N", float: "X", str: "TEXT", bool: "true|false"}


def is_section(annotation: object) -> bool:
    """Whether a field is a group of settings rather than a setting."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def leaves(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted name and field of every setting, in the order of the class. A field's alias goes before its name."""
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            yield from leaves(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{field.alias or name}", field


def section_of(settings_class: type[Section], dotted: str) -> type[Section]:
    """Class of the section with this dotted name; the settings class itself for the empty name."""
    for key in filter(None, dotted.split(".")):
        settings_class = settings_class.model_fields[key].annotation  # type: ignore[assignment]
    return settings_class


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name most like this one; what follows the last dot counts by itself (`backbon`)."""

    def likeness(candidate: str) -> float:
        def ratio(a: str, b: str) -> float:
            return difflib.SequenceMatcher(None, a.lower().replace("-", "_"), b.lower()).ratio()

        leaf = ratio(name.rpartition(".")[2], candidate.rpartition(".")[2])
        return max(ratio(name, candidate), 0.95 * leaf + 0.05 * ratio(name, candidate))

    return max(valid, key=likeness, default="")


# ------------------------------------------------------------------------------------ types and bounds


def _options(annotation: Any) -> list[Any]:
    """The members of a union, without None; [annotation] for a plain type."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return [member for member in members if member is not type(None)]


def takes_list(field: FieldInfo) -> bool:
    """Whether several values, separated by commas, make sense."""
    return any(get_origin(option) in (list, tuple, set) for option in _options(field.annotation))


def is_switch(field: FieldInfo) -> bool:
    """Whether the setting is true or false."""
    return _options(field.annotation) == [bool]


def metavar(field: FieldInfo) -> str:
    """Placeholder of the value in the help."""
    return "|".join(_metavar(option) for option in _options(field.annotation))


def _metavar(option: Any) -> str:
    if get_origin(option) is Literal:
        return "|".join(str(choice) for choice in get_args(option))
    if get_origin(option) is tuple:
        return ",".join(_metavar(member) for member in get_args(option))
    if get_origin(option) in (list, set):
        return "A,B,…"
    return _METAVARS.get(option, "VALUE")


def expected(field: FieldInfo) -> str:
    """What a setting takes, e.g. `a number, at least 0, below 1`."""
    options = " or ".join(_noun(option) for option in _options(field.annotation))
    nothing = " or null" if type(None) in get_args(field.annotation) else ""
    return ", ".join(filter(None, [options, bounds(field)])).replace("text, that", "text that") + nothing


def _noun(option: Any) -> str:
    if get_origin(option) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(option))
    if get_origin(option) is tuple:
        members = get_args(option)
        return f"{len(members)} {_NOUNS.get(members[0], 'value')}s such as {','.join('1' for _ in members)}"
    if get_origin(option) in (list, set):
        return "a list (a,b,c)"
    noun = _NOUNS.get(option, "a value")
    return f"a {noun}" if option in (int, float) else noun


def bounds(field: FieldInfo) -> str:
    """Limits of a number, length or pattern of a text; empty when there are none."""
    words = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}
    parts = []
    for mark in field.metadata:
        if type(mark) in words:
            attribute, phrase = words[type(mark)]
            parts.append(f"{phrase} {shown(getattr(mark, attribute))}")
        elif isinstance(mark, MinLen):
            parts.append(f"at least {mark.min_length} of them")
        elif isinstance(mark, MaxLen):
            parts.append(f"at most {mark.max_length} of them")
        elif pattern := getattr(mark, "pattern", None):
            parts.append(f"that matches {pattern}")
    return ", ".join(parts)


def shown(value: object) -> str:
    """A value as one would type it on the command line."""
    if isinstance(value, str):
        return value if value and value == value.strip() and value != "null" else repr(value)
    if isinstance(value, list | tuple) and value and not any(isinstance(part, list | dict) for part in value):
        return ",".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.12g}"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= 80 else text[:79] + "…"


# ----------------------------------------------------------------------------------------- differences


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted name, old and new value of each setting that differs between two nested records.

    A setting that only one of the two has (another version wrote it) differs from `NOT_SET`.
    """
    before, after = dict(_leaf_values(old)), dict(_leaf_values(new))
    names = [*before, *(name for name in after if name not in before)]
    pairs = ((name, before.get(name, NOT_SET), after.get(name, NOT_SET)) for name in names)
    return [(name, was, now) for name, was, now in pairs if was != now]


def _leaf_values(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _leaf_values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
