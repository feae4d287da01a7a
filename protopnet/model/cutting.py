"""Cutting a network behind one of its modules, and what to say where that can't be done."""

import difflib
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from protopnet.errors import UserError


def cut_after(network: nn.Module, name: str, cut: str, *, trace: bool = False) -> nn.Module:
    """The network up to and including the module `cut`: its leading children if it runs them in order, else traced.

    trace: it doesn't, although its children look as if. The result gives the map, or `{"map": map}` where traced.
    """
    modules = [path for path, _ in network.named_modules() if path]
    if cut not in modules:
        raise UserError(f"{name}: " + unknown("model.cut", cut, modules, [n for n, _ in network.named_children()]))
    leading = None if trace else _leading(network, cut.split("."))
    if leading is not None:
        return leading
    from torchvision.models.feature_extraction import create_feature_extractor

    try:
        return create_feature_extractor(network, {cut: "map"})
    except Exception as error:  # whatever torch's tracer stumbles over
        raise UserError(f"model.cut {cut!r} of {name} can't be cut out: {first_line(error)}") from error


def _leading(module: nn.Module, path: list[str]) -> nn.Sequential | None:
    """The children of `module` up to and including `path`, or None where they branch on the way."""
    head, *rest = path
    kept: OrderedDict[str, nn.Module] = OrderedDict()
    for name, child in module.named_children():
        kept[name] = child
        if name != head:
            continue
        if rest:
            inner = _leading(child, rest) if type(child).forward is nn.Sequential.forward else None
            if inner is None:
                return None
            kept[name] = inner
        break
    return nn.Sequential(kept)


def unknown(setting: str, value: str, known: Sequence[str], examples: Sequence[str], where: str = "torchvision") -> str:
    """That a setting names nothing that exists, with the nearest names."""
    near = difflib.get_close_matches(value, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"expected for example {', '.join(examples[:4])}"
    return f"{setting} {value!r} does not exist in {where}; {hint}"


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
