"""torchvision's networks, without torch's compiler.

`torchvision.ops` takes one function from `torch._dynamo`, which brings the whole compiler along: a second of CPU at the
start of every job, worker, actor and replica, none of which compiles anything. While torchvision is imported that
function is one that fetches the real one when it is called.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

_PACKAGE, _MODULE = "torch._dynamo", "torch._dynamo.utils"


def _is_compile_supported(device_type: str | torch.device | int) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return bool(is_compile_supported(device_type))


@contextmanager
def _compiler_left_alone() -> Iterator[None]:
    if _PACKAGE in sys.modules:
        yield
        return
    package, module = ModuleType(_PACKAGE), ModuleType(_MODULE)
    module.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    package.utils = module  # type: ignore[attr-defined]
    stand_ins = {_PACKAGE: package, _MODULE: module}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]


try:
    with _compiler_left_alone():
        import torchvision
except (ImportError, AttributeError):  # another torchvision, which needs more of it
    import torchvision

from torchvision.models import get_model, get_model_weights, list_models  # noqa: E402
from torchvision.models.feature_extraction import create_feature_extractor  # noqa: E402

__all__ = ["create_feature_extractor", "get_model", "get_model_weights", "list_models", "torchvision"]
