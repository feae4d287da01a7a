"""Networks without the compiler: it isn't loaded for nothing, and it is still there for who wants it."""

import subprocess
import sys


def said_by(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_actor_or_replica_loads_the_compiler() -> None:
    code = """
import protopnet.training.push, protopnet.scoring.actor, serve.members, sys, torch
from protopnet.config import ModelSettings
from protopnet.model.network import build_network
network = build_network(ModelSettings(image_size=64, prototype_depth=8, prototypes=4), 2).eval()
with torch.inference_mode():
    network(torch.rand(1, 3, 64, 64))
print([name for name in sys.modules if name.startswith("torch._dynamo")])
"""
    assert said_by(code) == "[]"


def test_the_compiler_works_as_ever() -> None:
    code = """
import protopnet.model.zoo, torch
import importlib, torch._dynamo.utils
roi_align = importlib.import_module("torchvision.ops.roi_align")
assert hasattr(torch._dynamo, "optimize") and hasattr(torch._dynamo.utils, "counters")
assert roi_align.is_compile_supported("cpu") == torch._dynamo.utils.is_compile_supported("cpu")
compiled = torch.compile(lambda x: 2 * x, backend="eager")
print(compiled(torch.ones(1)).item())
"""
    assert said_by(code) == "2.0"


def test_a_compiler_that_is_loaded_already_stays() -> None:
    code = "import torch._dynamo as given, protopnet.model.zoo, sys; print(sys.modules['torch._dynamo'] is given)"
    assert said_by(code) == "True"
