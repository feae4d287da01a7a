"""What a search tries: settings with their choices or ranges, and the trials drawn from them. Pure.

tune:
  space:
    model.similarity: [cosine, log]               # one of these
    train.lr_add_on: {log: [1.0e-4, 1.0e-2]}      # between them, even over the logarithm
    train.joint_epochs: {between: [4, 12]}        # between them; whole numbers where the setting takes those
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from protopnet.cli import combined, nearest
from protopnet.config import RunSettings, Section
from protopnet.errors import UserError
from protopnet.quality.table import METRICS
from protopnet.settings_text import Setting, flat, settings_of

_SEARCHED = ("model.", "augment.", "train.", "push.", "last_layer.")  # all else would change what is compared
_RANGES = ("between", "log")
_ATTEMPTS = 100  # draws in a row that are refused or known before the space counts as used up


class TuneSettings(Section):
    """A search over settings of training."""

    output: str = Field("runs/tune", description="folder for the trials, table.json, .md, .html and best.yaml")
    space: dict[str, Any] = Field(
        {},
        description="settings with what to try: a list of values, {between: [low, high]} or {log: [low, high]}",
    )
    trials: int = Field(16, ge=1, description="how many settings are tried; the first are those given")
    seed: int = Field(0, ge=0, description="seed of what is drawn from the space; more trials go on with it")
    parallel: int = Field(1, ge=1, description="trials side by side; give each its share by compute.…")
    grace: int = Field(4, ge=1, description="epochs that each trial has before it may be stopped (ASHA)")
    reduction: int = Field(3, ge=2, description="of the trials that have come so far one in so many goes on (ASHA)")
    measure: str | None = Field(
        None, description="a measure of explanations, e.g. purity, that counts beside accuracy; on validation images"
    )
    weight: float = Field(0.5, gt=0, description="of the measure, in the score accuracy + weight × measure")

    @field_validator("measure")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in METRICS:
            raise ValueError(f"tune.measure: {value} is not valid; expected one of {', '.join(METRICS)}")
        return value

    @model_validator(mode="after")
    def _something_to_try(self) -> "TuneSettings":
        if self.space:
            dimensions(self.space)
        return self


@dataclass(frozen=True)
class Dimension:
    """A setting that is searched: one of `choices`, or between `low` and `high`."""

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def draw(self, random: np.random.Generator) -> Any:
        if self.choices:
            return self.choices[int(random.integers(len(self.choices)))]
        if self.log:
            value = float(np.exp(random.uniform(np.log(self.low), np.log(self.high))))
        else:
            value = float(random.uniform(self.low, self.high + self.whole))
        return min(int(value), int(self.high)) if self.whole else float(f"{value:.3g}")


def dimensions(space: Mapping[str, Any]) -> list[Dimension]:
    """What a `space` means; its names nested or dotted. ValueError in a sentence for what can't be."""
    known = {name: setting for name, setting in settings_of(RunSettings).items() if name.startswith(_SEARCHED)}
    found: dict[str, Any] = {}
    for name, value in flat(space).items():
        setting, _, kind = name.rpartition(".")
        found[setting if kind in _RANGES else name] = {kind: value} if kind in _RANGES else value
    for name in found:
        if name not in known:
            raise ValueError(
                f"tune.space: {name} can't be searched; did you mean {nearest(name, known)}? (settings of "
                f"{', '.join(prefix.rstrip('.') for prefix in _SEARCHED)})"
            )
    return [_dimension(known[name], value) for name, value in found.items()]


def _dimension(setting: Setting, value: Any) -> Dimension:
    kinds: Any = Annotated[setting.field.annotation, setting.name, *setting.field.metadata]
    takes: TypeAdapter[Any] = TypeAdapter(kinds)
    kind = next(iter(value)) if isinstance(value, dict) else ""
    ends = value[kind] if kind else value
    if not isinstance(ends, list) or not ends or (kind and len(ends) != 2):
        raise ValueError(
            f"tune.space: {setting.name} is {value}; expected a list of values, {{between: [low, high]}} "
            "or {log: [low, high]}"
        )
    for end in ends:
        try:
            takes.validate_python(end)
        except ValidationError:
            raise ValueError(f"tune.space: {setting.refusal(end)}") from None
    if not kind:
        return Dimension(setting.name, choices=tuple(ends))
    low, high = ends
    if not all(isinstance(end, int | float) for end in ends) or not low < high or (kind == "log" and low <= 0):
        raise ValueError(f"tune.space: {setting.name} is {value}; expected the lower number first, above 0 for log")
    return Dimension(setting.name, (), low, high, kind == "log", setting.takes("integer") and isinstance(low, int))


@dataclass(frozen=True)
class Drawn:
    """A trial to be: its name, what it changes, and all of its settings."""

    name: str
    changes: Mapping[str, Any]
    settings: RunSettings


def drawn(settings: RunSettings, search: TuneSettings) -> list[Drawn]:
    """The trials of a search: first the settings as given, then draws, each once; fewer where there are no more.

    The first n of more trials are the n trials. Settings that don't go together are drawn again. `UserError` for a
    space without anything in it.
    """
    if not search.space:
        raise UserError("tune.space is missing: which settings are to be tried? e.g. model.similarity: [cosine, log]")
    space = dimensions(search.space)
    random, base = np.random.default_rng(search.seed), settings.model_dump(mode="json")
    given = flat(base)
    found = [Drawn("trial-000", {each.name: given[each.name] for each in space}, settings)]
    known = {json.dumps(found[0].changes)}
    refused = 0
    while len(found) < search.trials and refused < _ATTEMPTS:
        changes = {each.name: each.draw(random) for each in space}
        try:
            if json.dumps(changes) in known:
                raise UserError("drawn before")
            known.add(json.dumps(changes))
            found.append(Drawn(f"trial-{len(found):03}", changes, combined(RunSettings, [], [base, changes])))
            refused = 0
        except UserError:
            refused += 1
    return found


def score(accuracy: float, measured: float | None, search: TuneSettings) -> float:
    """What trials are compared by: higher is better."""
    if search.measure is None:
        return accuracy
    sign = 1 if METRICS[search.measure].better == "higher" else -1
    return accuracy + sign * search.weight * (measured or 0.0)
