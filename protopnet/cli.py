"""Settings of a job from its YAML file and its command line.

    settings = parse(RunSettings)      # python jobs/train.py --config quickstart.yaml --model.cut layer2

The fields of the settings class are the keys of the YAML file and the options of the command line. The
command line wins over the file, the file over the defaults; of several `--config` files a later one wins.
A field annotated `Positional[...]` is given without its name; one marked `Repeated`, a list of texts that may
hold commas, is given once for each of them:

    class EvaluateSettings(Section):
        bundle: Positional[str] = Field(description="folder of the bundle")
        forbid: Annotated[list[str], Repeated("IMAGE:BOX")] = Field([], description="bar a patch")

What is wrong is raised as one `UserError` line that names the setting, the value and what is expected.
argparse is generated from the fields here rather than by pydantic-settings, whose help and errors speak of
types (`{null,int}`), not to people.
"""

import argparse
import contextlib
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from protopnet.config import Section
from protopnet.errors import UserError
from protopnet.settings_text import (
    bounds,
    changed_settings,
    expected,
    is_section,
    is_switch,
    leaves,
    metavar,
    nearest,
    section_of,
    shown,
    takes_list,
)

__all__ = ["Positional", "Repeated", "changed_settings", "nearest", "parse"]

T = TypeVar("T")
S = TypeVar("S", bound=Section)


class _PositionalMark:
    """Marks a field that the command line takes by its place."""


Positional = Annotated[T, _PositionalMark()]


@dataclass(frozen=True)
class Repeated:
    """Marks a list of texts whose option is given once for each of them; `metavar` is how the help shows one."""

    metavar: str


def parse(settings_class: type[S], argv: Sequence[str] | None = None, *, description: str | None = None) -> S:
    """Settings from the command line (`sys.argv` when argv is None) and the YAML files it names.

    Raises `UserError` for anything the user got wrong; `--help` prints the settings and leaves with code 0.
    """
    fields = dict(leaves(settings_class))
    parser = _parser(settings_class, fields, description)
    given, unknown = parser.parse_known_intermixed_args(_underscored(_join_negative_numbers(argv), fields))
    problems = _unknown_arguments(unknown, fields)
    tree: dict[str, Any] = {}
    origin: dict[str, str] = {}
    options = vars(given)
    for path in options.pop("config", []):
        for name, value in _flat(_read_yaml(path), settings_class):
            _put(tree, name, value)
            origin[name] = f" in {path}"
    for name, raw in options.items():
        if raw not in (None, []):
            _put(tree, name, _from_text(raw, fields[name]))
            origin.pop(name, None)
    try:
        settings = settings_class.model_validate(tree)
    except ValidationError as error:
        problems += _describe(error, fields, tree, origin)
    if problems:
        raise UserError(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
    return settings


# ---------------------------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print."""

    def error(self, message: str) -> Any:
        message = message.removeprefix("argument ")
        raise UserError(message.replace("expected one argument", "expected a value after it"))


def _parser(settings_class: type[Section], fields: dict[str, FieldInfo], description: str | None) -> _Parser:
    text = description.strip() if description else inspect.cleandoc(settings_class.__doc__ or "")
    places = " ".join(map(_place, _positionals(fields)))
    parser = _Parser(
        description=text.replace("%", "%%"),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=6),
        usage=f"%(prog)s {places} [--config FILE.yaml] [--setting value …]".replace("  ", " "),
        epilog="Each setting can be given as an option or in the YAML file; the option wins.\n"
        "Lists: a,b,c or JSON. `null` leaves a setting out.",
    )
    parser.add_argument("--config", metavar="FILE.yaml", action="append", help="YAML file with settings")
    groups: dict[str, Any] = {}
    for name, field in fields.items():
        if _is_positional(field):
            nargs = "*" if takes_list(field) else "?"
            parser.add_argument(name, metavar=name.upper(), nargs=nargs, help=_help(field))
            continue
        section = name.rpartition(".")[0]
        if section not in groups:
            doc = (section_of(settings_class, section).__doc__ or "").strip().split("\n")[0]
            groups[section] = parser.add_argument_group(section, doc) if section else parser
        option: dict[str, Any] = {"nargs": "?", "const": "true"} if is_switch(field) else {}
        option |= {"metavar": metavar(field), "help": _help(field)}
        if repeated := next((mark for mark in field.metadata if isinstance(mark, Repeated)), None):
            option |= {"metavar": repeated.metavar, "action": "append"}
        groups[section].add_argument(f"--{name}", dest=name, **option)
    return parser


def _is_positional(field: FieldInfo) -> bool:
    return any(isinstance(mark, _PositionalMark) for mark in field.metadata)


def _positionals(fields: dict[str, FieldInfo]) -> list[tuple[str, FieldInfo]]:
    return [(name, field) for name, field in fields.items() if _is_positional(field)]


def _place(positional: tuple[str, FieldInfo]) -> str:
    name, field = positional
    text = name.upper() + (" …" if takes_list(field) else "")
    return text if field.is_required() else f"[{text}]"


def _help(field: FieldInfo) -> str:
    """Description, bounds and default of one field."""
    notes = [bounds(field)]
    if not field.is_required():
        notes.append(f"default: {shown(field.get_default(call_default_factory=True))}")
    elif not _is_positional(field):
        notes.append("required")
    note = "; ".join(filter(None, notes))
    return ((field.description or "") + (f" ({note})" if note else "")).replace("%", "%%")


def _join_negative_numbers(argv: Sequence[str] | None) -> list[str]:
    """`--x -1e-3` as `--x=-1e-3`: argparse takes the exponent form for an option."""
    joined: list[str] = []
    for token in sys.argv[1:] if argv is None else argv:
        if joined and re.match(r"-\.?\d", token) and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={token}"
        else:
            joined.append(token)
    return joined


def _underscored(tokens: list[str], fields: Mapping[str, FieldInfo]) -> list[str]:
    """`--max-bad` as `--max_bad`: either may be typed."""
    spelled = []
    for token in tokens:
        name, equals, value = token.partition("=")
        setting = name.removeprefix("--").replace("-", "_")
        spelled.append(f"--{setting}{equals}{value}" if name.startswith("--") and setting in fields else token)
    return spelled


def _unknown_arguments(unknown: Sequence[str], fields: dict[str, FieldInfo]) -> list[str]:
    options = [token.partition("=")[0] for token in unknown if token.startswith("-")]
    if options:  # the words between them may be values of the unknown options: no complaint about those
        valid = [*(name for name, field in fields.items() if not _is_positional(field)), "config", "help"]
        meant = (nearest(option.lstrip("-"), valid) for option in options)
        return [f"unknown setting {a}; did you mean --{b}?" for a, b in zip(options, meant, strict=True)]
    places = ", ".join(name.upper() for name, _ in _positionals(fields)) or "settings as --name value"
    return [f"unexpected argument {token!r}; expected {places}" for token in unknown]


def _from_text(raw: str | list[str], field: FieldInfo) -> Any:
    """Value of an option: the first reading that the field accepts, or else the text itself."""
    if isinstance(raw, list):
        return raw
    readings: list[Any] = [None] if raw == "null" else []
    if raw.startswith(("[", "{")):
        with contextlib.suppress(ValueError):
            readings.append(json.loads(raw))
    elif "," in raw:
        readings.append([part.strip() for part in raw.split(",")])
    readings.append(raw)
    if not raw.startswith("["):
        readings.append([raw])
    checker: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
    return next((value for value in readings if _accepts(checker, value)), raw)


def _accepts(checker: TypeAdapter[Any], value: Any) -> bool:
    try:
        checker.validate_python(value)
    except ValidationError:
        return False
    return True


# ------------------------------------------------------------------------------------------------ YAML


def _read_yaml(path: str) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: can't be read as text ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise UserError(f"--config {path}: not valid YAML{where}: {problem}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected `key: value` lines, found a {_kind(content)}")
    return content


def _kind(value: object) -> str:
    return "list" if isinstance(value, list) else "single value"


def _flat(values: Mapping[Any, Any], section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; an empty section (`data:` with all its lines commented out) has none."""
    for key, value in values.items():
        field = section.model_fields.get(str(key))
        inner = field.annotation if field else None
        if is_section(inner) and isinstance(value, Mapping | None):
            yield from _flat(value or {}, inner, f"{prefix}{key}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{key}", value


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    *sections, key = name.split(".")
    for section in sections:
        inner = tree.get(section)
        if not isinstance(inner, dict):  # e.g. `model: vgg19` in the file: the option replaces it
            inner = tree[section] = {}
        tree = inner
    tree[key] = value


# ---------------------------------------------------------------------------------------------- errors


def _describe(
    error: ValidationError,
    fields: Mapping[str, FieldInfo],
    tree: Mapping[str, Any],
    origin: Mapping[str, str],
) -> list[str]:
    """One sentence a setting; pydantic reports each member of a union by itself."""
    sentences: dict[str, str] = {}
    for item in error.errors(include_url=False):
        path = [str(part) for part in item["loc"]]
        heads = (".".join(path[:length]) for length in range(len(path), 0, -1))
        name = next((head for head in heads if head in fields), ".".join(path))
        if name not in sentences:
            where = origin.get(name, "")
            sentences[name] = _sentence(name, item, fields, f"{shown(_get(tree, name))}{where}", where)
    return list(sentences.values())


def _sentence(name: str, item: Any, fields: Mapping[str, FieldInfo], value: str, where: str) -> str:
    kind, field = item["type"], fields.get(name)
    if kind == "extra_forbidden":
        return f"unknown setting {name}{where}; did you mean {nearest(name, list(fields))}?"
    if kind == "missing":
        label = name.upper() if field and _is_positional(field) else f"--{name}"
        return f"{label} is missing: {field.description or expected(field) if field else 'a value is needed'}"
    if kind in ("value_error", "assertion_error"):  # our own validators speak in sentences
        message = re.sub(r"^(Value error|Assertion failed), ", "", item["msg"])
        return message if message.startswith(name) else f"{name}: {message}"
    if field is None:
        return f"{name}: {value} is no group of settings; expected `{name}:` with `key: value` lines below"
    return f"{name}: {value} is not valid; expected {expected(field)}"


def _get(tree: Mapping[str, Any], name: str) -> Any:
    value: Any = tree
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
