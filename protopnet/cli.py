"""Settings of a job from its YAML files and its command line, by pydantic-settings.

    settings = parse(RunSettings)      # python jobs/train.py --config quickstart.yaml --model.cut layer2

The fields of the settings class are the keys of the YAML file and the options of the command line. The command line
wins over the files, a later `--config` over an earlier one, a file over the one it `extends:`, and all over the
defaults. A field annotated `Positional[...]` is given without its name; one marked `Repeated`, a list of texts that
may hold commas, is given once for each of them:

    class EvaluateSettings(Section):
        bundle: Positional[str] = Field(description="folder of the bundle")
        forbid: Annotated[list[str], Repeated("IMAGE:BOX")] = Field([], description="bar a patch")

pydantic-settings makes the options and reads their values. What is added here is how things are said: the help, and
one `UserError` line that names the setting, the value and what is expected.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_settings import CliSettingsSource

from protopnet.config import Section
from protopnet.errors import UserError
from protopnet.settings_text import Positional, Repeated, Setting, changed_settings, flat, nearest, settings_of, shown

__all__ = ["Positional", "Repeated", "changed_settings", "checked", "combined", "nearest", "parse", "read_yaml"]

S = TypeVar("S", bound=Section)
Known = Mapping[str, Setting]


def parse(settings_class: type[S], argv: Sequence[str] | None = None, *, description: str | None = None) -> S:
    """Settings from the command line (`sys.argv` when argv is None) and the YAML files it names.

    Raises `UserError` for anything the user got wrong; `--help` prints the settings and leaves with code 0.
    """
    known = settings_of(settings_class)
    parser, options = _parser(settings_class, known, description or inspect.cleandoc(settings_class.__doc__ or ""))
    given, unknown = parser.parse_known_intermixed_args(list(_spelt(sys.argv[1:] if argv is None else argv, known)))
    if unknown:
        raise _first(_unknown_arguments(unknown, known))
    values, origin = _of_files([Path(file) for file in getattr(given, "config", [])], known)
    texts = {name: _as_json(raw, known[name]) for name, raw in vars(given).items() if name in known and raw}
    values |= flat(options(parsed_args=texts)())
    return _validated(settings_class, known, values, origin | dict.fromkeys(texts, ""))


def checked(settings_class: type[S], given: S | Mapping[str, Any]) -> S:
    """Settings as a program gives them: such settings, or a mapping with their names, nested or dotted.

    Raises `UserError` as `parse` does.
    """
    if isinstance(given, settings_class):
        return given
    if not isinstance(given, Mapping):
        raise UserError(
            f"settings can't be a {type(given).__name__}: expected {settings_class.__name__} or a mapping such as "
            '{"compute.threads": 2}'
        )
    return _validated(settings_class, settings_of(settings_class), flat(given), {})


def combined(settings_class: type[S], files: Sequence[Path], given: Sequence[Mapping[str, Any]]) -> S:
    """Settings of YAML files and then of mappings, of which a later one wins. Raises `UserError` as `parse` does."""
    known = settings_of(settings_class)
    values, origin = _of_files(files, known)
    for mapping in given:
        values |= flat(mapping)
        origin |= dict.fromkeys(flat(mapping), "")
    return _validated(settings_class, known, values, origin)


def _validated(settings_class: type[S], known: Known, values: Mapping[str, Any], origin: Mapping[str, str]) -> S:
    try:
        return settings_class.model_validate(_nested(values))
    except ValidationError as error:
        raise _first(_sentences(error, known, values, origin)) from None


def _first(problems: Sequence[str]) -> UserError:
    return UserError(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))


# ---------------------------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print."""

    def error(self, message: str) -> Any:
        raise UserError(message.removeprefix("argument ").replace("expected one argument", "expected a value after it"))


def _parser(settings_class: type[Section], known: Known, description: str) -> tuple[_Parser, CliSettingsSource[Any]]:
    """The parser, with the settings as options in our words, and what makes values of its texts."""
    places = " ".join(setting.place for setting in known.values() if setting.positional)
    parser = _Parser(
        description=description.strip().replace("%", "%%"),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=6),
        usage=f"%(prog)s {places} [--config FILE.yaml] [--setting value …]".replace("  ", " "),
        epilog="Each setting can be given as an option or in the YAML file; the option wins.\n"
        "Lists: a,b,c or JSON. `null` leaves a setting out.",
    )
    parser.add_argument("--config", metavar="FILE.yaml", action="append", help="YAML file with settings")

    def add(place: Any, *names: str, dest: str = "", **_: Any) -> None:
        if setting := known.get(dest or names[0]):  # neither --help, which is there, nor a whole section as JSON
            place.add_argument(setting.option, **setting.argument)

    def add_group(place: Any, title: str, description: str) -> Any:
        return place.add_argument_group(title.removesuffix(" options"), description.strip().split("\n")[0])

    return parser, CliSettingsSource(
        settings_class,  # type: ignore[arg-type]  # a source reads any model; only to merge sources takes BaseSettings
        root_parser=parser,
        add_argument_method=add,
        add_argument_group_method=add_group,
        cli_parse_none_str="null",
        cli_use_class_docs_for_groups=True,
    )


def _spelt(argv: Sequence[str], known: Known) -> Iterator[str]:
    """`--max-bad` as `--max_bad`, for either may be typed; `--x -1e-3` as `--x=-1e-3`: argparse takes it for an option."""
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        name, equals, value = token.partition("=")
        setting = name.removeprefix("--").replace("-", "_")
        if name.startswith("--") and setting in known:
            token = f"--{setting}{equals}{value}"
            if not equals and tokens and re.match(r"-\.?\d", tokens[0]):
                token += f"={tokens.pop(0)}"
        yield token


def _unknown_arguments(unknown: Sequence[str], known: Known) -> list[str]:
    options = [token.partition("=")[0] for token in unknown if token.startswith("-")]
    if options:  # the words between them may be values of the unknown options: no complaint about those
        valid = [*(name for name, setting in known.items() if not setting.positional), "config", "help"]
        return [f"unknown setting {name}; did you mean --{nearest(name.lstrip('-'), valid)}?" for name in options]
    places = ", ".join(name.upper() for name, setting in known.items() if setting.positional)
    return [f"unexpected argument {token!r}; expected {places or 'settings as --name value'}" for token in unknown]


def _as_json(raw: str | list[str], setting: Setting) -> str:
    """A list as one types it (a,b,c) in the JSON that pydantic-settings reads; all else as it is."""
    if isinstance(raw, list):
        return json.dumps(raw)
    if not setting.takes("array") or raw == "null" or (setting.takes("integer") and re.fullmatch(r"-?\d+", raw)):
        return raw
    if not raw.startswith("["):
        return json.dumps([part.strip() for part in raw.split(",")])
    try:
        return json.dumps(json.loads(raw))
    except ValueError:
        raise UserError(setting.refusal(raw)) from None


# ------------------------------------------------------------------------------------------------ YAML


def _of_files(files: Sequence[Path], known: Known) -> tuple[dict[str, Any], dict[str, str]]:
    """Values by dotted name, and in which file each is, as errors say it."""
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for path, content in (layer for file in files for layer in _read(file, known)):
        values |= content
        origin |= dict.fromkeys(content, f" in {path}")
    return values, origin


def read_yaml(path: Path, setting: str = "--config") -> dict[str, Any]:
    """The content of a YAML file of `key: value` lines; `UserError` naming the setting where it isn't one."""
    try:  # not by YamlConfigSettingsSource, which takes a missing file for an empty one and a list of pairs for keys
        content = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
    except FileNotFoundError:
        raise UserError(f"{setting} {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{setting} {path}: can't be read as text ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{setting} {path}: not valid YAML{where}: {getattr(error, 'problem', error)}") from None
    if not isinstance(content, dict):
        kind = "list" if isinstance(content, list) else "single value"
        raise UserError(f"{setting} {path}: expected `key: value` lines, found a {kind}")
    return content


def _read(path: Path, known: Known, above: tuple[Path, ...] = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Files with their settings by dotted name: the one that this one `extends`, beside it, then this one."""
    content = read_yaml(path)
    if base := content.pop("extends", None):
        if path in above:
            raise UserError(f"--config {path}: it extends itself; change extends")
        yield from _read(path.parent / str(base), known, (*above, path))
    sections = {name.rpartition(".")[0] for name in known}
    yield path, {name: value for name, value in flat(content).items() if value is not None or name not in sections}


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"model.cut": "layer2"}` as `{"model": {"cut": "layer2"}}`; an option replaces `model: vgg19` of a file."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, key = name.split(".")
        place = tree
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}
            place = place[section]
        place[key] = value
    return tree


# ---------------------------------------------------------------------------------------------- errors


def _sentences(error: ValidationError, known: Known, values: Mapping[str, Any], origin: Mapping[str, str]) -> list[str]:
    """One a setting; pydantic reports each member of a union by itself."""
    found: dict[str, str] = {}
    for item in error.errors(include_url=False):
        path = [str(part) for part in item["loc"]]
        heads = [".".join(path[:length]) for length in range(len(path), 0, -1)]
        name = next((head for head in heads if head in known), heads[0] if heads else "")
        where = next((origin[full] for full in origin if f"{full}.".startswith(f"{name}.")), "")
        found.setdefault(name, _sentence(name, item, known, values.get(name), where))
    return list(found.values())


def _sentence(name: str, item: Any, known: Known, value: Any, where: str) -> str:
    kind, setting = item["type"], known.get(name)
    if kind == "extra_forbidden":
        return f"unknown setting {name}{where}; did you mean {nearest(name, known)}?"
    if kind in ("value_error", "assertion_error"):  # our own validators speak in sentences
        message = re.sub(r"^(Value error|Assertion failed), ", "", item["msg"])
        return message if message.startswith(name) else f"{name}: {message}"
    if setting is None:
        return (
            f"{name}: {shown(value)}{where} is no group of settings; expected `{name}:` with `key: value` lines below"
        )
    if kind == "missing":
        label = name.upper() if setting.positional else f"--{name}"
        return f"{label} is missing: {setting.field.description or setting.expected}"
    return setting.refusal(value, where)
