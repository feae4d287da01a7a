"""Export a bundle: as one graph for other programs (logits, similarities and places, with a JSON that explains them), or as
a bundle to hand on, which says of training images only what may be told.

python jobs/export.py runs/quickstart/bundle --output bird.onnx
python jobs/export.py s3://bucket/runs/cub/bundle --format torch --output cub.pt2
python jobs/export.py runs/my-run/bundle --format bundle --sources none --output for-others

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
from protopnet.evidence.sources import Named, Shown
from protopnet.exporting import Format
from protopnet.exporting import export as write
from protopnet.model.bundle import load_bundle
from protopnet.quality.card import write_card


class ExportSettings(Section):
    """Settings of `jobs/export.py`."""

    bundle: Positional[str] = Field(description="folder of the bundle: a local path or s3://…")
    output: str = Field(description="file of the graph, or folder of the bundle: a local path or s3://…")
    form: Format = Field("onnx", alias="format", description="onnx; torch: what torch.export.load reads; bundle")
    sources: Named = Field(
        "names",
        description="what goes along of training images: full: their locations; names: relative to the data's root; none: "
        "nothing, and of their pictures the prototypes alone",
    )
    crops_only: bool = Field(False, description="of the pictures of training images the prototypes alone")
    int8: bool = Field(
        False, description="the backbone's convolutions in 8 bits (onnx): smaller, and faster on many CPUs"
    )


def export(settings: ExportSettings | Mapping[str, Any]) -> str:
    """Write the graph of a bundle, and return where the JSON beside it is; or a bundle, and return its folder.

    `UserError` for what can't be exported.
    """
    settings = checked(ExportSettings, settings)
    shown = Shown(settings.sources, settings.crops_only)
    written = write(load_bundle(settings.bundle), settings.output, settings.form, shown, int8=settings.int8)
    if settings.form == "bundle":
        write_card(written, None)
    return written


@exit_with_a_sentence
def main() -> None:
    settings = parse(ExportSettings, description=__doc__)
    written = export(settings)
    if settings.form == "bundle":
        print(f"bundle   {written}")
    else:
        print(f"graph    {storage.located(settings.output)}\nmeaning  {storage.located(written)}")
