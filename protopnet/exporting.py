"""A bundle for others: as one file for other programs, ONNX or torch.export, with a JSON beside it that explains what comes
out; or as a bundle that says of training images only what may be told.

The graph takes normalised images (B x 3 x size x size, any B) and gives logits, similarities and places. What its numbers
mean is in the JSON: classes, prototypes and where they come from, connections, and how an image becomes the input.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch

from protopnet import imaging, storage
from protopnet.errors import UserError
from protopnet.evidence.explanation import explaining
from protopnet.evidence.redaction import redacted
from protopnet.evidence.sources import Shown, Sources
from protopnet.model.bundle import INFO, Bundle, save_bundle
from protopnet.model.one_graph import OneGraph
from protopnet.model.prototype_table import PrototypeTable

Format = Literal["onnx", "torch", "bundle"]
INPUT, OUTPUTS = "images", ("logits", "similarities", "places")
_MOST_IMAGES = 1 << 16  # of a batch
_CALIBRATION_IMAGES = 256


def export(bundle: Bundle, output: str, form: Format, shown: Shown, *, int8: bool = False) -> str:
    """Write the graph of a bundle and its JSON, and return where that is; or a bundle, and return its folder.

    int8: convolutions of the backbone in 8 bits. shown: what of training images goes along.
    `UserError` for a black-box baseline, and where what the format needs isn't installed.
    """
    if form == "bundle":
        return _handed_on(bundle, output, shown)
    network = explaining(bundle)
    if int8 and form != "onnx":
        raise UserError("--int8 is for --format onnx: torch.export's graph would be slower in 8 bits than without")
    with _cudnn_as_at_the_start():
        program = _program(OneGraph(network).eval(), bundle.info.preprocessing.size)
        data = _torch(program) if form == "torch" else _onnx(program)
    if int8:
        data = _in_8_bits(data, bundle)
    storage.write_bytes(output, data)
    beside = f"{output}.json"
    storage.write_json(beside, explained(bundle, form, shown, int8=int8))
    return beside


def explained(bundle: Bundle, form: Format, shown: Shown, *, int8: bool) -> dict[str, Any]:
    """What turns the numbers that come out into an explanation: points = similarity x connection, which add up to the
    logit; place = row x columns + column on the map of patches, which lies over the whole image."""
    network, info = explaining(bundle), bundle.info
    _, rows, columns = network.backbone.map_shape(info.preprocessing.size)
    height, width = info.architecture.prototype_shape
    prototypes: list[dict[str, Any]] = [
        {"prototype": number, "class": label, "class_name": info.classes[label]}
        for number, label in enumerate(network.prototype_class.tolist())
    ]
    table = None if bundle.prototypes is None else PrototypeTable.of(bundle.prototypes)
    sources = Sources(table, info.provenance, shown)
    for number, entry in enumerate(prototypes):
        if source := sources.of(number):
            entry["source"] = source.model_dump(exclude={"thumbnail"})
    return {
        "format": "protopnet-export",
        "version": 1,
        "graph": form,
        "precision": "int8" if int8 else "float32",
        "bundle": bundle.hash,
        "input": {"name": INPUT, "shape": ["batch", 3, info.preprocessing.size, info.preprocessing.size]},
        "outputs": list(OUTPUTS),
        "preprocessing": {**info.preprocessing.model_dump(), "channels": "RGB", "values": "(pixel / 255 - mean) / std"},
        "classes": info.classes,
        "patches": {"rows": rows - height + 1, "columns": columns - width + 1},
        "cells": {"rows": rows, "columns": columns, "of_a_prototype": [height, width]},
        "prototypes": prototypes,
        "temperature": info.calibration.temperature if info.calibration else 1.0,
        "connections": network.last_layer.weight.tolist(),
    }


def _handed_on(bundle: Bundle, output: str, shown: Shown) -> str:
    if storage.exists(storage.join(output, INFO)):
        raise UserError(f"{output} holds a bundle already (--output)")
    provenance, prototypes = redacted(bundle, shown)
    model = bundle.info.architecture
    if shown.sources != "full" and model.weights not in (None, "pretrained"):
        model = model.model_copy(update={"weights": Path(str(model.weights)).name})
    save_bundle(output, bundle.network, model, bundle.classes, provenance, prototypes, bundle.info.calibration)
    return storage.located(output)


def _program(graph: OneGraph, size: int) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=_MOST_IMAGES)
    return torch.export.export(graph, (torch.zeros(2, 3, size, size),), dynamic_shapes=({0: batch},))


@contextmanager
def _cudnn_as_at_the_start() -> Iterator[None]:
    """torch.export asks by an old name whether cuDNN rounds to TF32, which PyTorch refuses to say where a program has
    chosen float32 by the new ones (`true_float32`). Tracing computes nothing with it."""
    backends: Any = torch.backends
    flags = (backends.cudnn.conv, backends.cudnn.rnn)
    before = [flag.fp32_precision for flag in flags]
    for flag in flags:
        flag.fp32_precision = "tf32"
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.fp32_precision = value


def _torch(program: torch.export.ExportedProgram) -> bytes:
    sink = io.BytesIO()
    torch.export.save(program, sink)
    return sink.getvalue()


def _onnx(program: torch.export.ExportedProgram) -> bytes:
    _needs("onnxscript")
    made: Any = torch.onnx.export(program, dynamo=True, input_names=[INPUT], output_names=list(OUTPUTS), verbose=False)
    return bytes(made.model_proto.SerializeToString())


def _in_8_bits(model: bytes, bundle: Bundle) -> bytes:
    """The backbone's convolutions in 8 bits, scaled by what comes up on the prototypes' own training images.

    The last convolution and all after it stay in float32: rounded maps would ruin similarities.
    """
    _needs("onnxruntime")
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = _calibration(bundle)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(batches, None)

    with TemporaryDirectory() as folder:
        given, merged, small = (Path(folder) / f"{name}.onnx" for name in ("given", "merged", "small"))
        given.write_bytes(model)
        quant_pre_process(str(given), str(merged), skip_symbolic_shape=True)  # takes batch norm into convolutions
        nodes = onnx.load(str(merged)).graph.node
        last = max(place for place, node in enumerate(nodes) if node.op_type == "Conv")
        quantize_static(
            str(merged),
            str(small),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[node.name for node in nodes[last:]],
        )
        return small.read_bytes()


def _calibration(bundle: Bundle) -> Iterator[dict[str, np.ndarray]]:
    """The training images that prototypes come from, a few at a time, as the graph takes them."""
    table, wanted = bundle.prototypes, bundle.info.preprocessing
    thumbnails = [] if table is None else list(dict.fromkeys(table["thumbnail"].drop_null().to_pylist()))
    if not thumbnails:
        raise UserError("--int8 is measured on the pictures of prototypes: expected a bundle with thumbnails")
    pixels_BHWC = np.stack([imaging.load(jpeg, wanted.size) for jpeg in thumbnails[:_CALIBRATION_IMAGES]])
    for part_BHWC in torch.from_numpy(pixels_BHWC).split(8):
        yield {INPUT: imaging.normalise(part_BHWC, wanted).contiguous().numpy()}


def _needs(package: str) -> None:
    try:
        __import__(package)
    except ImportError:
        raise UserError(f"--format onnx needs {package}: pip install 'protopnet[export]'") from None
