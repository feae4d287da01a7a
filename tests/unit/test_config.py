"""The settings of a run, and the files in configs/."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from protopnet.cli import changed_settings, parse
from protopnet.commands.import_checkpoint import ImportSettings
from protopnet.config import ModelSettings, RunSettings, Section, TrainSettings

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.stem not in ("table", "quickstart-tune"))
PUBLISHED_DEPTH = {
    "vgg16": 128,
    "vgg19": 128,
    "resnet34": 256,
    "resnet152": 512,
    "densenet121": 128,
    "densenet161": 128,
}


def load(path: Path, *options: str) -> RunSettings:
    return parse(RunSettings, ["--config", str(path), *options])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_loads(path: Path) -> None:
    assert isinstance(load(path), RunSettings)


def test_run_names_are_unique() -> None:
    names = [load(path).name for path in FILES]
    assert len(set(names)) == len(names)


def test_quickstart_downloads_nothing() -> None:
    settings = load(CONFIGS / "quickstart.yaml")
    assert (settings.name, settings.data.source, settings.model.weights) == ("quickstart", "birds", None)


@pytest.mark.parametrize(("backbone", "depth"), PUBLISHED_DEPTH.items())
def test_the_papers_settings(backbone: str, depth: int) -> None:
    settings = load(CONFIGS / "cub200" / f"{backbone}.yaml")
    model, train = settings.model, settings.train
    assert (model.kind, model.backbone, model.prototype_depth) == ("protopnet", backbone, depth)
    assert (model.prototypes, model.prototype_shape, model.similarity) == (2000, (1, 1), "log")
    assert (model.start, model.weights, model.image_size) == ("random", "imagenet", 224)
    assert (settings.augment.recipe, settings.augment.copies) == ("paper", 30)
    assert (train.batch_size, train.warm_epochs, train.joint_epochs, train.next_joint_epochs) == (80, 5, 6, 10)
    assert (train.lr_features, train.lr_add_on, train.lr_prototypes) == (1e-4, 3e-3, 3e-3)
    assert (train.cross_entropy, train.cluster, train.separation, train.l1) == (1, 0.8, -0.08, 1e-4)
    assert (train.weight_decay, train.schedule, train.decay_epochs, train.decay) == (1e-3, "step", 5, 0.1)
    assert (settings.push.distinct, settings.last_layer.l1) == (False, 1e-4)


@pytest.mark.parametrize("backbone", PUBLISHED_DEPTH)
def test_a_baseline_shares_data_and_passes(backbone: str) -> None:
    ours = load(CONFIGS / "cub200" / f"{backbone}.yaml")
    baseline = load(CONFIGS / "cub200" / f"{backbone}-baseline.yaml")
    assert (baseline.model.kind, baseline.model.backbone) == ("baseline", backbone)
    assert (baseline.data, baseline.augment, baseline.seed) == (ours.data, ours.augment, ours.seed)
    assert baseline.train == ours.train


def test_the_cosine_is_the_default_but_of_the_authors_networks() -> None:
    assert parse(RunSettings, ["--model.backbone", "vgg16"]).model.similarity == "cosine"
    assert parse(ImportSettings, ["--model.backbone", "vgg16"]).model.similarity == "log"
    assert parse(ImportSettings, ["--model.similarity", "linear"]).model.similarity == "linear"


def test_resolved_settings_read_back(tmp_path: Path) -> None:
    settings = load(CONFIGS / "cub200" / "vgg16.yaml", "--data.classes", "20", "--compute.gpu", "false")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    again = load(path)
    assert again == settings
    assert changed_settings(yaml.safe_load(path.read_text()), again.model_dump(mode="json")) == []


def test_every_field_is_described() -> None:
    for section in (RunSettings, ModelSettings, TrainSettings):
        assert section.__doc__
        for name, field in section.model_fields.items():
            nested = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
            assert nested or field.description, name


def test_settings_are_frozen_and_closed() -> None:
    with pytest.raises(ValidationError):
        RunSettings().model.backbone = "vgg16"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        ModelSettings(backbon="vgg16")  # type: ignore[call-arg]


@pytest.mark.parametrize(("similarity", "own"), [("log", 1.0), ("linear", 1.0), ("cosine", 10.0)])
def test_own_connection(similarity: str, own: float) -> None:
    assert ModelSettings.model_validate({"similarity": similarity}).own_connection == own
    assert ModelSettings.model_validate({"similarity": similarity, "connection_scale": 2}).own_connection == 2
