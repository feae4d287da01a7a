"""ProtoPNet on Ray: image classifiers that show which training patches they looked at.

    import protopnet

    model = protopnet.load("runs/quickstart/bundle")
    why = model.explain("bird.jpg", why_not="Cardinal")
    why.figure().save("why.png")

`load` and what it gives, and the jobs as functions: each takes its settings (an object, or a mapping with the names of the
YAML file, nested or dotted), shows its progress, and raises `UserError` where the command would print `error: …`.

    protopnet.train({"name": "mine", "data.source": "folder", "data.path": "my-images"})

The names in `__all__` are stable. What they need is imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from protopnet.api.model import Model, load
    from protopnet.api.results import Prediction, Results, Why
    from protopnet.commands.audit import audit
    from protopnet.commands.evaluate import evaluate
    from protopnet.commands.explain import explain
    from protopnet.commands.export import export
    from protopnet.commands.prepare import prepare
    from protopnet.commands.prune import prune
    from protopnet.commands.score import score
    from protopnet.commands.train import train
    from protopnet.errors import UserError
    from protopnet.predictor import Predictor

__all__ = [
    "Model",
    "Prediction",
    "Predictor",
    "Results",
    "UserError",
    "Why",
    "__version__",
    "audit",
    "evaluate",
    "explain",
    "export",
    "load",
    "prepare",
    "prune",
    "score",
    "train",
]

_MODULES = {
    "Model": "api.model",
    "load": "api.model",
    "Prediction": "api.results",
    "Results": "api.results",
    "Why": "api.results",
    "UserError": "errors",
    "Predictor": "predictor",
    **{
        job: f"commands.{job}"
        for job in ("audit", "evaluate", "explain", "export", "prepare", "prune", "score", "train")
    },
}


if not TYPE_CHECKING:  # to a type checker a name that isn't above is a mistake

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return __all__
