"""Networks without the compiler: it isn't loaded for nothing, and it is still there for who wants it."""

import subprocess
import sys
import types

import pytest

from protopnet.model import zoo

CODE = """
import importlib, sys, torch
import protopnet.passes.push, protopnet.scoring.actor, protopnet.serving.members
from protopnet.config import ModelSettings
from protopnet.model.network import build_network

network = build_network(ModelSettings(image_size=64, prototype_depth=8, prototypes=4), 2).eval()
with torch.inference_mode():
    network(torch.rand(1, 3, 64, 64))
print([name for name in sys.modules if name.startswith("torch._dynamo")])

import torch._dynamo.utils
roi_align = importlib.import_module("torchvision.ops.roi_align")
print(roi_align.is_compile_supported("cpu") == torch._dynamo.utils.is_compile_supported("cpu"))
print(torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(1)).item())
"""


def test_no_actor_or_replica_loads_the_compiler_and_it_works_as_ever() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "True", "2.0"]


def test_a_compiler_that_is_loaded_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = types.ModuleType("torch._dynamo")
    monkeypatch.setitem(sys.modules, "torch._dynamo", loaded)
    with zoo._compiler_left_alone():
        assert sys.modules["torch._dynamo"] is loaded
    assert sys.modules["torch._dynamo"] is loaded
