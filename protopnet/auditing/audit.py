"""The passes over a data set that an audit needs: nearest patches and what they look like, and what each prototype is
used for. What they mean is for `auditing/judgement.py`.

Memory doesn't grow with the images: candidates are k a prototype, use is added up batch by batch.

Legend: B images, P prototypes, K classes.
"""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import torch

from protopnet.auditing.close_pairs import close_pairs
from protopnet.auditing.findings import AuditSettings, UseSplit
from protopnet.auditing.judgement import Audit, audit
from protopnet.auditing.patch_table import nearest_table
from protopnet.auditing.usage import Use, use_of_batch
from protopnet.datasets.rows import Dataset
from protopnet.errors import UserError
from protopnet.evidence.explanation import explaining
from protopnet.model.bundle import Bundle
from protopnet.model.network import ProtoPNet
from protopnet.passes.describe import DescribeTask
from protopnet.passes.image_pass import NetworkTask, PassOptions, run_pass
from protopnet.passes.nearest_patches import nearest_patches


@dataclass
class UseTask(NetworkTask):
    """`ImageTask`: how each prototype is used on the images of a batch, as one row."""

    top: int

    def __call__(self, images_B3HW: torch.Tensor, rows: pa.Table) -> pa.Table:
        network = self.network
        seen = network(images_B3HW)
        classes_P = network.prototype_class.cpu().numpy()
        connections_KP = network.last_layer.weight.cpu().numpy()
        return use_of_batch(seen, connections_KP, classes_P, rows["label"].to_numpy(), self.top).to_table()


def count_use(network: ProtoPNet, rows: pa.Table, *, top: int, options: PassOptions) -> Use:
    """What each prototype is used for on manifest rows. top: how many prototypes are the top evidence for an image."""
    total = Use.nothing(len(network.prototype_class), network.last_layer.out_features)
    for _, output in run_pass(rows, UseTask(network, top), options):
        total = total + Use.from_table(output)
    return total


@dataclass(frozen=True)
class Described:
    """Patches as they look: `rows` in the columns of PROTOTYPE_SCHEMA but `thumbnail`, sorted by prototype and image;
    a JPEG of each image that has any."""

    rows: pa.Table
    thumbnails: dict[int, bytes]


def describe_patches(
    network: ProtoPNet, rows: pa.Table, places: pa.Table, classes: list[str], *, options: PassOptions
) -> Described:
    """Box, activation map and picture of patches on manifest rows. places: prototype, image_id, row, column; one patch
    at most for a prototype and an image."""
    places = places.select(["prototype", "image_id", "row", "column"])
    images = rows.filter(pc.is_in(rows["image_id"], value_set=pc.unique(places["image_id"])))
    task = DescribeTask(network, places, classes, sources=False, max_pixels=options.max_pixels)
    tables: list[pa.Table] = []
    thumbnails: dict[int, bytes] = {}
    for _, output in run_pass(images, task, options):
        pictured = output.filter(pc.is_valid(output["thumbnail"]))
        thumbnails |= dict(zip(pictured["image_id"].to_pylist(), pictured["thumbnail"].to_pylist(), strict=True))
        tables.append(output.drop_columns("thumbnail"))
    order = [("prototype", "ascending"), ("image_id", "ascending")]
    return Described(pa.concat_tables(tables).sort_by(order).combine_chunks(), thumbnails)


@dataclass(frozen=True)
class AuditResult:
    """What an audit says, JPEG thumbnails of the images it shows (by image_id), and how many images it looked at."""

    audit: Audit
    thumbnails: dict[int, bytes]
    use: Use
    use_split: UseSplit
    images: dict[str, int]

    @property
    def accuracy(self) -> float:
        """Of the images on which use was counted."""
        return float(self.use.right_K.sum()) / max(1, self.use.images)


def audit_bundle(bundle: Bundle, dataset: Dataset, settings: AuditSettings, options: PassOptions) -> AuditResult:
    """Look at a bundle's prototypes through its training and validation images; without these, through the former only.
    Never at test images: what is chosen by what an audit says would then be chosen by them.

    `UserError` for a bundle that doesn't record where its prototypes come from, or data without training images.
    """
    network = explaining(bundle)
    if bundle.prototypes is None or bundle.prototypes["thumbnail"].null_count:
        raise UserError(
            "the bundle doesn't record where its prototypes come from: expected a prototypes.parquet with thumbnails, as "
            "jobs/train.py and jobs/prune.py write it"
        )
    wanted = {"train": settings.train_patches, "validation": settings.validation_patches}
    images = {split: len(dataset.split(split)) for split in wanted if len(dataset.split(split))}
    if "train" not in images:
        raise UserError("the data has no training images: give the data that the bundle was trained on")
    candidates = {
        split: nearest_patches(network, dataset.split(split), k=wanted[split], options=options) for split in images
    }
    use_split: UseSplit = "validation" if "validation" in images else "train"
    use = count_use(network, dataset.split(use_split), top=settings.top, options=options)
    places = pa.concat_tables(candidates.values())
    seen = describe_patches(network, dataset.table, places, dataset.classes, options=options)
    class_P = network.prototype_class.cpu().numpy()
    pairs = close_pairs(
        network.prototypes,
        class_P,
        use.reach(class_P),
        network.kind,
        within_class=settings.repeat,
        across_classes=settings.twin,
    )
    nearest = nearest_table(candidates, seen.rows, dataset.table, bundle.prototypes, bundle.classes)
    found = audit(bundle.prototypes, nearest, pairs, use, bundle.classes, settings, use_split)
    return AuditResult(found, seen.thumbnails, use, use_split, images)
