"""What a job would use: images counted without reading them, memory from shapes, and the table that says it."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from protopnet.budget import Cluster, Group, Node, PassPlan
from protopnet.config import RunSettings
from protopnet.datasets.count import Images, count_images
from protopnet.datasets.open import open_dataset
from protopnet.errors import UserError
from protopnet.memory import Memory, pass_memory, training_memory
from protopnet.model.network import build_network
from protopnet.plan import plan_passes
from protopnet.training.forecast import plan_run

GPUS = Cluster((Node(0), Node(8, 1, frozenset({"on_demand"}))), (Group(Node(8, 1, frozenset({"on_demand"})), 8),))


SMALL = {"backbone": "resnet18", "cut": "layer2", "image_size": 96, "prototype_depth": 16, "prototypes": 60}


def settings_of(**sections: object) -> RunSettings:
    return RunSettings.model_validate({"model": SMALL, **sections})


def shown(settings: RunSettings, cluster: Cluster, rate: float | None = None) -> dict[str, str]:
    return {name.strip(): f"{value} {note}" for name, value, note in plan_run(settings, cluster, rate).lines}


class TestTraining:
    def test_it_counts_steps_passes_and_blocks(self) -> None:
        plan = shown(settings_of(train={"batch_size": 32, "warm_epochs": 0, "joint_epochs": 18}), Cluster((Node(2),)))
        assert plan["images"] == "648 training 72 validation, 240 test"
        assert plan["training"].startswith("1 worker ")
        assert plan["an epoch"] == "21 steps 648 image passes"
        assert plan["image passes"].startswith("11,664 training")
        assert plan["time"].startswith("give --plan.images_per_second")

    def test_hours_are_divided_among_the_workers(self) -> None:
        few = shown(settings_of(compute={"workers": 1}), GPUS, 2)
        many = shown(settings_of(compute={"workers": 8, "pass_workers": 8}), GPUS, 2)
        assert float(few["time"].split()[0]) == pytest.approx(8 * float(many["time"].split()[0]) / 60, rel=0.1)
        assert many["time"].split()[1] == "min"

    def test_elastic_workers_are_planned_for_the_fewest(self) -> None:
        plan = shown(settings_of(compute={"workers": (2, 8), "nodes": "on_demand"}), GPUS)
        assert plan["training"] == "2 to 8 workers 8 threads each, 1 GPU each, on on_demand nodes"
        assert plan["a step"] == "80 images 40 a worker at most"
        assert plan["cluster"] == "2 nodes, 8 CPUs, 1 GPU grows by up to 8 nodes, 8 GPUs"

    def test_the_start_is_planned_by_its_patches(self) -> None:
        plan = shown(settings_of(model=SMALL | {"start": "data"}), GPUS)
        assert (
            plan["memory, start"] == "29.9 MB patches of 648 images, in the driver"
        )  # 144 cells of 128 + 2 x 16 channels

    def test_a_baseline_has_no_prototypes_to_plan_for(self) -> None:
        plan = shown(settings_of(model={"kind": "baseline", "backbone": "resnet18", "image_size": 96}), GPUS)
        assert "the last layer's matrix" not in plan
        assert "prototypes" not in plan["memory a GPU, training"]

    @pytest.mark.parametrize(
        ("memory", "settings", "expected"),
        [
            (3.0, {}, "fits"),
            (2.0, {}, "float16"),
            (2.0, {"precision": "float16"}, "fits"),
            (0.5, {}, "last_layer.copies"),
            (0.5, {"precision": "float16"}, "last_layer.copies"),
        ],
    )
    def test_it_says_whether_the_last_layer_s_rows_fit(self, memory: float, settings: dict, expected: str) -> None:
        wanted = settings_of(last_layer=settings)
        images = count_images(wanted)
        rows = images.train * (1 + wanted.last_layer.copies) + images.validation + images.test
        node = Node(8, memory=memory * rows * wanted.model.prototypes * 4)
        assert expected in shown(wanted, Cluster((node,)))["what solves it"]

    def test_it_refuses_what_the_job_would_refuse(self) -> None:
        with pytest.raises(UserError, match="model.prototypes 61"):
            plan_run(settings_of(model=SMALL | {"prototypes": 61}), GPUS)
        with pytest.raises(UserError, match="compute.workers is 9"):
            plan_run(settings_of(compute={"workers": 9}), GPUS)
        with pytest.raises(UserError, match=r"train.batch_size is 12 for 8 workers.* at least 16, or .* at most 6"):
            plan_run(settings_of(compute={"workers": 8}, train={"batch_size": 12}), GPUS)

    def test_it_reads_as_a_table(self) -> None:
        lines = str(plan_run(settings_of(), GPUS)).splitlines()
        assert lines[0] == "quickstart: what it would use"
        assert all(line.startswith("  ") and line == line.rstrip() for line in lines[1:])


def test_a_pass_is_planned_from_its_images_and_its_units() -> None:
    plan = plan_passes("scores", 1_000_000, "chunks", 244, PassPlan(8, 1, 1.0, 8), Memory(1, 0, 0, 1, 1), 100)
    text = {name: value for name, value, _ in plan.lines}
    assert text == {
        "images": "1,000,000",
        "actors": "8 actors, 1 GPU each",
        "chunks": "244",
        "memory a GPU": "3 B",
        "time": "21 min",
    }


class TestMemory:
    @pytest.mark.parametrize("backbone", ["resnet18", "vgg11", "densenet121", "squeezenet1_0"])
    def test_activations_are_what_autograd_keeps(self, backbone: str) -> None:
        settings = settings_of(model={"backbone": backbone, "image_size": 64, "prototype_depth": 16})
        network = build_network(settings.model, 4, start_weights=False)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        planned = training_memory(network, settings, 2)
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())

        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if not (tensor.is_leaf and tensor.requires_grad):
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network.train()
            output = network.add_on(network.backbone(torch.randn(2, 3, 64, 64)))
        assert output.requires_grad
        assert planned.activations == sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    def test_it_grows_with_the_batch_and_halves_in_bf16(self) -> None:
        settings = settings_of()
        network = build_network(settings.model, 12, start_weights=False)
        one, ten = training_memory(network, settings, 10), training_memory(network, settings, 100)
        assert ten.activations == pytest.approx(10 * one.activations, rel=0.01)
        assert training_memory(network, settings, 10, bf16=True).activations < 0.6 * one.activations
        assert one.optimiser == 2 * one.gradients
        assert pass_memory(network, settings.model.image_size, 64).total < training_memory(network, settings, 64).total


class TestCounting:
    @pytest.mark.parametrize("classes", [None, 3])
    def test_birds_are_counted_as_they_are_made(self, classes: int | None, tmp_path: Path) -> None:
        birds = {"classes": 4, "train_per_class": 11, "test_per_class": 2, "size": 32}
        settings = settings_of(birds=birds, data={"source": "birds", "classes": classes})
        dataset = open_dataset(settings, str(tmp_path))
        counts = dataset.counts()
        expected = Images(counts["train"], counts["validation"], counts["test"], len(dataset.classes))
        assert count_images(settings) == expected

    def test_folders_are_counted_by_their_names(self, tmp_path: Path) -> None:
        from PIL import Image

        wanted = Counter({"robin": 7, "wren": 12, "gull": 3})
        for name, number in wanted.items():
            (tmp_path / name).mkdir()
            for n in range(number):
                Image.new("RGB", (8, 8), (10 * n, number, 0)).save(tmp_path / name / f"{n}.png")
        settings = settings_of(data={"source": "folder", "path": str(tmp_path)})
        counts = open_dataset(settings, str(tmp_path / "work")).counts()
        assert count_images(settings) == Images(counts["train"], counts["validation"], counts["test"], 3)

    def test_a_folder_that_isn_t_there(self) -> None:
        with pytest.raises(UserError, match="isn't a folder"):
            count_images(settings_of(data={"source": "folder", "path": "/nowhere"}))
