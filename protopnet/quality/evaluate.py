"""A bundle on labelled images, its accuracy and the quality of its explanations: what the last stage of a run and
`jobs/evaluate.py` share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from protopnet import storage
from protopnet.datasets.rows import Dataset
from protopnet.errors import UserError
from protopnet.imaging import Preprocessing
from protopnet.passes.image_pass import ImageTask, PassOptions, run_pass
from protopnet.predictor import Predictor
from protopnet.quality.classification import Seen, classification_metrics
from protopnet.quality.quality_pass import QualityOptions, quality_of, quality_task, with_sample
from protopnet.tables import write_table
from protopnet.words import first_few


@dataclass
class ScoreTask:
    """`ImageTask`: the logits of bundles, for batches of one size."""

    predictor: Predictor
    batch_size: int

    @property
    def preprocessing(self) -> Preprocessing:
        return self.predictor.preprocessing

    def to(self, device: torch.device) -> "ScoreTask":
        self.predictor.to(device)
        return self

    def __call__(self, images_B3HW: torch.Tensor, rows: pa.Table) -> pa.Table:
        logits_BK = self.predictor.scores(images_B3HW, pad_to=self.batch_size).logits_BK.cpu().numpy()
        column = pa.FixedSizeListArray.from_arrays(pa.array(logits_BK.reshape(-1), pa.float32()), logits_BK.shape[1])
        return rows.select(["image_id", "uri", "label"]).append_column("logits", column)


def evaluate(
    predictor: Predictor,
    rows: pa.Table,
    output_uri: str,
    *,
    options: PassOptions,
    quality: QualityOptions | None = None,
    source: Mapping[str, Any] | None = None,
    on_images: Callable[[int], None] = lambda images: None,
) -> dict[str, Any]:
    """Score manifest rows whose labels are the predictor's (see `with_labels_of`).

    Writes `metrics.json` and `predictions.parquet` under `output_uri`; returns the metrics. With `quality` they have
    the quality of explanations too, and `prototype_quality.parquet` has it for each prototype; `source` (of the
    dataset) says whether the images are generated birds, about which the truth is known.
    """
    task: ImageTask = ScoreTask(predictor, options.batch_size)
    if quality is not None:
        task = quality_task(predictor, source or {}, quality, options.batch_size)
        rows = with_sample(rows, quality)
    outputs = []
    for images, output in run_pass(rows, task, options):
        outputs.append(output)
        on_images(images)
    table = pa.concat_tables(outputs).sort_by("image_id").combine_chunks()
    outputs.clear()  # all logits, once more
    logits_nK = table["logits"].chunk(0).flatten().to_numpy().reshape(len(table), -1)
    temperature = predictor.trust.temperature
    metrics = classification_metrics(logits_nK, table["label"].to_numpy(), predictor.classes, temperature)
    if quality is not None:
        measured = quality_of(predictor, table, source or {}, quality)
        metrics["quality"] = measured.metrics
        write_table(storage.join(output_uri, "prototype_quality.parquet"), measured.prototypes)
    table = table.select(["image_id", "uri", "label", "logits"])
    table = predictions(table, logits_nK, predictor.classes, temperature)
    write_table(storage.join(output_uri, "predictions.parquet"), table)
    storage.write_json(storage.join(output_uri, "metrics.json"), metrics)
    return metrics


def predictions(table: pa.Table, logits_nK: np.ndarray, classes: list[str], temperature: float) -> pa.Table:
    """A row an image: what it is, what it was taken for, and how sure."""
    seen = Seen.of(logits_nK, table["label"].to_numpy().astype(np.int64), temperature)
    names = pa.array(classes)
    return (
        table.append_column("class_name", names.take(table["label"]))
        .append_column("prediction", pa.array(seen.predicted_n, pa.int32()))
        .append_column("predicted_name", names.take(pa.array(seen.predicted_n)))
        .append_column("probability", pa.array(seen.confidence_n.astype(np.float32)))
    )


def with_labels_of(classes: list[str], dataset: Dataset, split: str) -> pa.Table:
    """The rows of a split (or of `all`) with the labels that their class names have among `classes`.

    The data may lack some of the classes. `UserError` where it has others, naming some of them.
    """
    known = set(classes)
    unknown = [name for name in dataset.classes if name not in known]
    if unknown:
        raise UserError(
            f"the data has classes that the bundle of {len(classes)} doesn't know: {first_few(unknown, 3)}; expected names "
            f"such as {first_few(classes, 3)}: leave them out with --classes, or rename them"
        )
    rows = dataset.table if split == "all" else dataset.split(split)
    if not len(rows):
        raise UserError(f"the data has no image in its {split} split; choose another --split, or all")
    labels = pc.index_in(rows["class_name"], value_set=pa.array(classes)).cast(pa.int32())
    return rows.set_column(rows.column_names.index("label"), "label", labels)
