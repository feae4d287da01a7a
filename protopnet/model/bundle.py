"""The bundle: a trained network as a folder that explains itself and is never unpickled.

    model.safetensors    all tensors of the network, float32
    model.json           everything else (`BundleInfo`), with the sha256 of the other two
    prototypes.parquet   a row a prototype: where it comes from (`PROTOTYPE_SCHEMA`)
    README.md            the model card, for people (`quality/card.py`)

`model.json` is written last and taken away first: without it a folder is no bundle.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from protopnet import storage
from protopnet.config import ModelSettings
from protopnet.errors import UserError
from protopnet.imaging import Preprocessing
from protopnet.model.backbones import build_backbone
from protopnet.model.calibration import Calibration
from protopnet.model.network import Baseline, ProtoPNet, set_phase
from protopnet.tables import parse_table

FORMAT_VERSION = 1
TENSORS, INFO, PROTOTYPES, CARD = "model.safetensors", "model.json", "prototypes.parquet", "README.md"
_GROUP = 256  # rows of prototypes.parquet that are read together where one picture is asked for

# Boxes are (top, left, bottom, right), half-open, in pixels of the source image.
_BOX = pa.list_(pa.int32(), 4)
PROTOTYPE_SCHEMA = pa.schema(
    [
        ("prototype", pa.int32()),
        ("class", pa.int32()),
        ("class_name", pa.string()),
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("sha256", pa.string()),  # of the encoded source image
        ("width", pa.int32()),  # of the source image in pixels
        ("height", pa.int32()),
        ("row", pa.int32()),  # of the patch on the latent map
        ("column", pa.int32()),
        ("box", _BOX),
        ("receptive_field", _BOX),
        ("self_similarity", pa.float32()),
        ("activation_map", pa.list_(pa.list_(pa.float32()))),  # similarities on its source image, row by row
        ("thumbnail", pa.binary()),  # JPEG of the source image
        ("name", pa.string()),  # that people gave it, or null
        ("group", pa.string()),  # prototypes of the same meaning, or null
    ]
)


class BundleInfo(BaseModel):
    """The content of model.json."""

    model_config = ConfigDict(frozen=True)

    format_version: int
    architecture: ModelSettings
    similarity: str
    classes: list[str]
    prototype_class: list[int] | None = Field(description="class of each prototype; None for a baseline")
    preprocessing: Preprocessing
    provenance: dict[str, Any]
    sha256: str = Field(description="of model.safetensors")
    prototypes_sha256: str | None = Field(description="of prototypes.parquet, where there is one")
    calibration: Calibration | None = Field(None, description="None where nothing was fitted, as in older bundles")


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle. `network` is in eval mode on the CPU; `hash` is the sha256 of model.json, and
    so of everything."""

    network: ProtoPNet | Baseline
    info: BundleInfo
    prototypes: pa.Table | None
    hash: str

    @property
    def classes(self) -> list[str]:
        return self.info.classes


def save_bundle(
    folder_uri: str,
    network: ProtoPNet | Baseline,
    model_settings: ModelSettings,
    classes: Sequence[str],
    provenance: Mapping[str, Any],
    prototypes: pa.Table | None = None,
    calibration: Calibration | None = None,
) -> str:
    """Write the bundle and return its hash. `prototypes` has the columns of PROTOTYPE_SCHEMA."""
    from safetensors.torch import save

    tensors = save(_float32_tensors(network))
    table = parquet(prototypes) if prototypes is not None else None
    prototype_class = network.prototype_class.tolist() if isinstance(network, ProtoPNet) else None
    if prototype_class is not None:
        model_settings = model_settings.model_copy(update={"prototypes": len(prototype_class)})
    info = BundleInfo(
        format_version=FORMAT_VERSION,
        architecture=model_settings,
        similarity=model_settings.similarity,
        classes=list(classes),
        prototype_class=prototype_class,
        preprocessing=network.preprocessing,
        provenance=dict(provenance),
        sha256=_sha256(tensors),
        prototypes_sha256=_sha256(table) if table is not None else None,
        calibration=calibration,
    )
    written = (info.model_dump_json(indent=1) + "\n").encode()
    storage.delete_file(storage.join(folder_uri, INFO))
    storage.delete_file(storage.join(folder_uri, CARD))  # of a bundle that this one replaces
    storage.write_bytes(storage.join(folder_uri, TENSORS), tensors)
    if table is not None:
        storage.write_bytes(storage.join(folder_uri, PROTOTYPES), table)
    else:
        storage.delete_file(storage.join(folder_uri, PROTOTYPES))
    storage.write_bytes(storage.join(folder_uri, INFO), written)
    return _sha256(written)


def load_bundle(uri: str) -> Bundle:
    """Read a bundle, check it, and build its network; nothing is downloaded.

    Raises UserError where it is missing, incomplete, damaged or of a newer version.
    """
    from safetensors.torch import load

    info, written = read_info(uri)
    tensors = checked(uri, TENSORS, info.sha256)
    prototypes = None
    if info.prototypes_sha256 is not None:
        prototypes = with_all_columns(parse_table(checked(uri, PROTOTYPES, info.prototypes_sha256)))
    network = _network(info, uri)
    _fill(network, load(tensors), uri)
    set_phase(network, "eval")
    return Bundle(network, info, prototypes, _sha256(written))


def read_info(uri: str) -> tuple[BundleInfo, bytes]:
    """The content of model.json, parsed and as written."""
    try:
        written = storage.read_bytes(storage.join(uri, INFO))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"there is no complete bundle at {uri}: expected a folder with {INFO}") from error
    try:
        content = json.loads(written)
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(f"bundle {uri} has format version {version}; this program reads version {FORMAT_VERSION}")
        return BundleInfo.model_validate(content), written
    except (ValueError, AttributeError) as error:
        raise UserError(f"{INFO} of bundle {uri} is damaged: {_first_problem(error)}") from error


def _network(info: BundleInfo, uri: str) -> ProtoPNet | Baseline:
    """The network with tensors still to be filled in."""
    model = info.architecture
    backbone = build_backbone(model.backbone, model.cut, model.image_size)
    backbone.preprocessing = info.preprocessing  # of then: another version of timm might know better
    if model.kind == "baseline":
        return Baseline(backbone, len(info.classes))
    of_prototypes = info.prototype_class or []
    if not of_prototypes or not all(0 <= label < len(info.classes) for label in of_prototypes):
        raise UserError(f"the prototypes of bundle {uri} are not those of the architecture in its {INFO}")
    prototype_class = torch.tensor(of_prototypes, dtype=torch.int64)
    return ProtoPNet(backbone, model, len(info.classes), prototype_class)


def _float32_tensors(network: ProtoPNet | Baseline) -> dict[str, Tensor]:
    """What the network computes with. Integers (counters, classes of prototypes) aren't among it."""
    return {
        name: tensor.detach().cpu().float().contiguous()
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point()
    }


def _fill(network: ProtoPNet | Baseline, tensors: Mapping[str, Tensor], uri: str) -> None:
    own = network.state_dict()
    expected = {name: tensor.shape for name, tensor in own.items() if tensor.is_floating_point()}
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise UserError(f"the tensors of bundle {uri} are not those of the architecture in its {INFO}")
    network.load_state_dict(own | dict(tensors))


def checked(uri: str, name: str, sha256: str) -> bytes:
    """A file of a bundle. `UserError` where it isn't there, or hasn't this hash."""
    try:
        data = storage.read_bytes(storage.join(uri, name))
    except FileNotFoundError as error:
        raise UserError(f"bundle {uri} is incomplete: {name} is missing") from error
    if _sha256(data) != sha256:
        raise UserError(f"bundle {uri} is damaged: {name} has not the sha256 that {INFO} records")
    return data


def parquet(prototypes: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    table = with_all_columns(prototypes).select(PROTOTYPE_SCHEMA.names).cast(PROTOTYPE_SCHEMA)
    pq.write_table(table, sink, compression="zstd", row_group_size=_GROUP)
    return sink.getvalue().to_pybytes()


def with_all_columns(prototypes: pa.Table) -> pa.Table:
    """Nobody had named the prototypes when older bundles were written."""
    for field in (PROTOTYPE_SCHEMA.field("name"), PROTOTYPE_SCHEMA.field("group")):
        if field.name not in prototypes.column_names:
            prototypes = prototypes.append_column(field, pa.nulls(len(prototypes), field.type))
    return prototypes


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _first_problem(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).splitlines()[0]
