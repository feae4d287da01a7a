"""A pass sees every image once, however it is cut; what goes wrong comes out as one sentence."""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from ray import cloudpickle

from protopnet.cluster import plan_pass, plan_training, spread, survey
from protopnet.config import AugmentSettings, BirdSettings, ComputeSettings, PrepareSettings
from protopnet.datasets.open import open_source
from protopnet.datasets.rows import Dataset
from protopnet.datasets.shards import write_source
from protopnet.errors import UserError
from protopnet.imaging import Preprocessing
from protopnet.model.network import ProtoPNet
from protopnet.passes.image_pass import run_pass, run_pass_in_place, unpack
from protopnet.training.last_layer import SimilarityTask, with_copies
from protopnet.training.start import sample_patches, start_from_patches

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers don't have the tests on their path


@dataclass
class Look:
    """`ImageTask`: what arrives."""

    preprocessing: Preprocessing = field(default_factory=lambda: Preprocessing(size=64))

    def to(self, device: torch.device) -> "Look":
        return self

    def __call__(self, images_B3HW: torch.Tensor, rows: pa.Table) -> pa.Table:
        columns = {"image_id": rows["image_id"], "pixels": [image.numpy().tobytes() for image in images_B3HW]}
        columns["batch"] = [len(rows)] * len(rows)
        if "copy" in rows.column_names:
            columns["copy"] = rows["copy"]
        return pa.table(columns)


def test_every_image_is_seen_once(birds: Dataset, options: Callable, pixels_of: Callable) -> None:
    rows = birds.table
    outputs = list(run_pass(rows, Look(), options(workers=2, blocks=5, batch=4)))
    assert len(outputs) == 5
    assert sum(images for images, _ in outputs) == len(rows)
    table = pa.concat_tables([output for _, output in outputs]).sort_by("image_id")
    assert table["image_id"].to_pylist() == rows["image_id"].to_pylist()
    assert max(table["batch"].to_pylist()) == 4
    assert table["pixels"].to_pylist() == [image.numpy().tobytes() for image in pixels_of(rows)]


def test_augmented_copies_are_the_same_for_any_cut(birds: Dataset, options: Callable, pixels_of: Callable) -> None:
    rows = with_copies(birds.table, copies=2)
    training = len(birds.split("train"))
    assert len(rows) == len(birds.table) + 2 * training

    def look(**cut: int) -> dict[tuple[int, int], bytes]:
        blocks = run_pass_in_place(rows, Look(), options(**cut, augment=AugmentSettings(), seed=3))
        table = pa.concat_tables([unpack(block) for block in ray.get(blocks)])
        keys = zip(table["image_id"].to_pylist(), table["copy"].to_pylist(), strict=True)
        return dict(zip(keys, table["pixels"].to_pylist(), strict=True))

    seen = look(blocks=1)
    assert seen == look(workers=2, blocks=7, batch=3) == look(in_driver=True, batch=5)
    assert len(seen) == len(rows)
    train = birds.split("train")["image_id"].to_pylist()
    assert {key for key in seen if key[1] >= 0} == {(image, copy) for image in train for copy in (0, 1)}
    plain = [image.numpy().tobytes() for image in pixels_of(birds.table)]
    assert [seen[image, -1] for image in birds.table["image_id"].to_pylist()] == plain
    assert all(seen[image, 0] != seen[image, 1] for image in train[-5:])


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_an_image_that_is_gone_is_named_in_one_sentence(birds_on_disk: Dataset, options: Callable, damage: str) -> None:
    rows = birds_on_disk.table
    victim = Path(rows["file"][5].as_py())
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:200])
    runs = (lambda *a: list(run_pass(*a)), run_pass_in_place)
    for run, in_driver in itertools.product(runs, (False, True)):
        with pytest.raises(UserError, match="put it back") as error:
            run(rows, Look(), options(blocks=3, in_driver=in_driver))
        assert str(error.value).startswith(str(victim))
        assert "\n" not in str(error.value)


def test_a_start_is_the_same_for_any_cut(birds: Dataset, network: ProtoPNet, options: Callable) -> None:
    rows, before = birds.split("train"), {name: t.clone() for name, t in network.state_dict().items()}
    starts = []
    for cut in ({"blocks": 1}, {"workers": 2, "blocks": 7, "batch": 5}, {"in_driver": True}):
        network.load_state_dict(before)
        seen: list[int] = []
        patches = sample_patches(network, rows, seed=0, options=options(**cut), on_images=seen.append)
        assert sum(seen) == patches.images == len(rows)
        assert len(patches.labels_N) == len(rows) * 64  # every cell of the 8 x 8 map
        start_from_patches(network, patches, seed=0)
        starts.append({name: t.clone() for name, t in network.state_dict().items()})
    for name, tensor in starts[0].items():
        for other in starts[1:]:
            torch.testing.assert_close(other[name], tensor, rtol=1e-2, atol=1e-2, msg=name)
    assert torch.equal(starts[0]["last_layer.weight"], before["last_layer.weight"])
    assert not torch.equal(starts[0]["prototypes"], before["prototypes"])


class TestPlans:
    """The fixture's Ray has four CPUs on paper."""

    @pytest.mark.parametrize("workers", [None, 1, 2, 3, 8])
    def test_a_pass_leaves_a_place_for_the_tasks_between_its_actors(self, workers: int | None) -> None:
        plan = plan_pass(ComputeSettings(pass_workers=workers))
        assert plan.actors == (workers or 1)
        assert plan.actors * plan.cpus <= ray.cluster_resources()["CPU"] - 1
        assert plan.threads >= 1
        assert plan.gpus == 0

    def test_the_survey_finds_what_ray_has(self) -> None:
        found = survey()
        assert len(found.nodes) == 1
        assert found.nodes[0].cpus + found.spare_cpus == ray.cluster_resources()["CPU"]
        assert found.groups == ()

    def test_training_takes_one_worker_without_gpus(self) -> None:
        assert plan_training(ComputeSettings()).workers == 1
        assert plan_training(ComputeSettings(workers=2, threads=1)).threads == 1

    def test_more_workers_than_there_are_cpus_are_refused(self) -> None:
        with pytest.raises(UserError, match=r"compute.workers is 64.*at most"):
            plan_training(ComputeSettings(workers=64))

    def test_a_gpu_that_isn_t_there_is_refused(self) -> None:
        if ray.cluster_resources().get("GPU"):
            pytest.skip("this machine has a GPU")
        with pytest.raises(UserError, match="compute.gpu"):
            plan_training(ComputeSettings(gpu=True))


def test_block_sizes_differ_by_one_at_most(birds: Dataset, options: Callable) -> None:
    sizes = [images for images, _ in run_pass(birds.table, Look(), options(blocks=7))]
    assert sorted(np.unique(sizes)) in ([len(birds.table) // 7], [len(birds.table) // 7, len(birds.table) // 7 + 1])


def test_a_pass_in_the_driver_leaves_the_network_as_it_is(
    birds: Dataset, network: ProtoPNet, options: Callable
) -> None:
    network.train()
    rows = with_copies(birds.split("train"), 0)
    list(run_pass(rows, SimilarityTask(network), options(in_driver=True)))
    assert network.training
    assert next(network.parameters()).requires_grad


def test_shards_that_many_tasks_wrote_are_those_of_one_process(tmp_path: Path) -> None:
    settings = PrepareSettings(birds=BirdSettings(classes=3, train_per_class=12, test_per_class=4, size=32))
    source = replace(open_source(settings), chunk=9)
    here = write_source(source, str(tmp_path / "here"))
    there = write_source(source, str(tmp_path / "there"), spread=partial(spread, ComputeSettings()), cores=1)
    assert there.table.drop_columns(["file"]).equals(here.table.drop_columns(["file"]))
    ours, theirs = (sorted((tmp_path / place).glob("shard-*")) for place in ("there", "here"))
    assert [file.read_bytes() for file in ours] == [file.read_bytes() for file in theirs]


def test_what_a_task_cannot_do_is_said_in_one_line() -> None:
    def refuses(item: int) -> int:
        if item == 3:
            raise UserError("3 is no good")
        return item

    with pytest.raises(UserError, match=r"^3 is no good$"):
        list(spread(ComputeSettings(), refuses, range(40)))
    assert sorted(spread(ComputeSettings(), lambda item: -item, range(40))) == list(range(-39, 1))
