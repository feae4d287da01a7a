"""Export a bundle as one graph for other programs: logits, similarities and places, with a JSON that explains them.

python jobs/export.py runs/quickstart/bundle --output bird.onnx
python jobs/export.py s3://bucket/runs/cub/bundle --format torch --output cub.pt2

Beside the file, FILE.json has the classes, the prototypes, the connections, and how an image becomes the input. ONNX needs
`pip install 'protopnet[export]'`.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from protopnet import storage
from protopnet.cli import Positional, checked, parse
from protopnet.config import Section
from protopnet.errors import exit_with_a_sentence
from protopnet.exporting import Format
from protopnet.exporting import export as write
from protopnet.model.bundle import load_bundle


class ExportSettings(Section):
    """Settings of `jobs/export.py`."""

    bundle: Positional[str] = Field(description="folder of the bundle: a local path or s3://…")
    output: str = Field(description="file of the graph: a local path or s3://…")
    form: Format = Field("onnx", alias="format", description="onnx, or torch: what torch.export.load reads")
    int8: bool = Field(
        False, description="the backbone's convolutions in 8 bits (onnx): smaller, and faster on many CPUs"
    )


def export(settings: ExportSettings | Mapping[str, Any]) -> str:
    """Write the graph of a bundle; returns where the JSON beside it is. `UserError` for what can't be exported."""
    settings = checked(ExportSettings, settings)
    return write(load_bundle(settings.bundle), settings.output, settings.form, int8=settings.int8)


@exit_with_a_sentence
def main() -> None:
    settings = parse(ExportSettings, description=__doc__)
    beside = export(settings)
    print(f"graph    {storage.located(settings.output)}\nmeaning  {storage.located(beside)}")
