"""Of a bundle what is above the backbone: what a service needs that explains what others have seen.

Of a local bundle nothing large is in memory: the class connections of 10,000 classes and 100,000 prototypes are 4 GB, of
which an explanation looks at a few rows. The system reads what is looked at, and drops it when it needs the memory.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import safetensors
import safetensors.torch
from torch import Tensor

from protopnet import storage
from protopnet.errors import UserError
from protopnet.model.backbones import build_backbone
from protopnet.model.bundle import INFO, PROTOTYPES, TENSORS, BundleInfo, checked, read_info
from protopnet.model.prototype_table import PrototypeTable

_NAMES = ("prototypes", "last_layer.weight")


@dataclass(frozen=True)
class BundleHead:
    """`hash` is the bundle's. A black-box baseline has neither prototypes nor connections."""

    info: BundleInfo
    hash: str
    prototypes_PDhw: Tensor | None
    weights_KP: Tensor | None
    table: PrototypeTable | None

    def map_cells(self) -> int:
        """Patches of an image."""
        if self.table is not None and (map_HW := self.table.activation_map(0)):
            return len(map_HW) * len(map_HW[0])
        model = self.info.architecture
        _, rows, columns = build_backbone(model.backbone, model.cut, model.image_size).map_shape(model.image_size)
        return rows * columns


def open_head(uri: str) -> BundleHead:
    """Raises `UserError` where the bundle is missing, incomplete, damaged or of a newer version, as `load_bundle`."""
    info, written = read_info(uri)
    tensors: dict[str, Tensor] = {}
    if info.prototype_class is not None:
        tensors = _tensors(uri, info)
        shape = (len(info.classes), len(info.prototype_class))
        if tensors["last_layer.weight"].shape != shape or len(tensors["prototypes"]) != shape[1]:
            raise UserError(f"the tensors of bundle {uri} are not those of the architecture in its {INFO}")
    table = None
    if info.prototypes_sha256 is not None:
        table = PrototypeTable.opened(_source(uri, PROTOTYPES, info.prototypes_sha256))
    prototypes_PDhw, weights_KP = (tensors.get(name) for name in _NAMES)
    return BundleHead(info, hashlib.sha256(written).hexdigest(), prototypes_PDhw, weights_KP, table)


def _tensors(uri: str, info: BundleInfo) -> dict[str, Tensor]:
    try:
        if storage.is_remote(uri):
            found = safetensors.torch.load(checked(uri, TENSORS, info.sha256))
            return {name: found[name] for name in _NAMES}
        path = _check_local(uri, TENSORS, info.sha256)
        with safetensors.safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            return {name: file.get_tensor(name) for name in _NAMES}
    except (KeyError, safetensors.SafetensorError) as error:
        raise UserError(f"the tensors of bundle {uri} are not those of the architecture in its {INFO}") from error


def _source(uri: str, name: str, sha256: str) -> Any:
    if storage.is_remote(uri):
        return pa.BufferReader(checked(uri, name, sha256))
    return pa.memory_map(_check_local(uri, name, sha256))


def _check_local(uri: str, name: str, sha256: str) -> str:
    """The path of a file with this hash, which is read piece by piece."""
    path = storage.located(storage.join(uri, name))
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise UserError(f"bundle {uri} is incomplete: {name} is missing") from error
    if found != sha256:
        raise UserError(f"bundle {uri} is damaged: {name} has not the sha256 that {INFO} records")
    return path
