"""How numbers and names are said to people, in reports and figures."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from protopnet.errors import UserError


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def probability_text(share: float) -> str:
    """Per cent, never rounded to certainty or impossibility."""
    if share >= 0.9995:
        return "> 99.9 %"
    return "< 0.1 %" if share < 0.0005 else percent(share)


def duration(seconds: float) -> str:
    """As people say it: 8.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def counted(number: int, noun: str) -> str:
    """1 image, 2,000 images."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_few(items: Sequence[object], shown: int) -> str:
    """The first ones, and how many more there are: `3, 5, 8 and 12 more`."""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(map(str, items[:shown])) + more


def called(prototype: int, name: str | None) -> str:
    """A prototype, by the name that people gave it if they did: `red bill (prototype 12)`."""
    return f"{name} (prototype {prototype})" if name else f"prototype {prototype}"


def readable_names(classes: Sequence[str]) -> list[str]:
    """Class names for people: `001.Black_footed_Albatross` is Black footed Albatross, unless two became the same."""
    names = [re.sub(r"^\d+[._ -]+(?=\D)", "", name).replace("_", " ").strip() or name for name in classes]
    return names if len(set(names)) == len(names) else list(classes)


def find_class(text: str, classes: Sequence[str]) -> int:
    """Label of the class a person means: its name, its readable name in any case, or its number.

    `UserError` with the nearest names where there is none.
    """
    if text in classes:
        return list(classes).index(text)
    readable = [name.lower() for name in readable_names(classes)]
    wanted = readable_names([text])[0].lower()
    if wanted in readable:
        return readable.index(wanted)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    near = difflib.get_close_matches(wanted, readable, n=3, cutoff=0.3) or readable[:3]
    meant = ", ".join(classes[readable.index(name)] for name in near)
    raise UserError(f"there is no class {text!r} among the {len(classes)} of the bundle; did you mean {meant}?")


def flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as they are written on the command line: (model.backbone, resnet18)."""
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        pairs += flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return pairs
