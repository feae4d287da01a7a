"""The templates of all rooms → HTML documents that need nothing else."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from protopnet.words import duration, percent


def render(template: str, **values: Any) -> str:
    """A template, `<room>/<name>`, filled in. A value that it asks for and isn't given is an error; text is escaped."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "duration": duration, "thousands": lambda number: f"{number:,}"}
    return environment
