"""Correcting a bundle over real images: each step, the last layer solved again, and the bundle that comes of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from protopnet.auditing.barred_patches import parse_barred
from protopnet.auditing.draft import Draft, Place
from protopnet.auditing.prune import Corrections, Corrector
from protopnet.auditing.rewrite import Rewritten, resolve, write_corrected
from protopnet.auditing.settling import Prototypes, patch_grid
from protopnet.config import AugmentSettings, DataSettings, LastLayerSettings, ModelSettings, PushSettings
from protopnet.datasets.rows import Dataset
from protopnet.datasets.trained import TrainedWith
from protopnet.errors import UserError
from protopnet.model.bundle import PROTOTYPE_SCHEMA, load_bundle, save_bundle
from protopnet.model.network import ProtoPNet, build_network, placed
from protopnet.progress import LineReporter
from protopnet.tables import read_table
from protopnet.training.connections import anchor_KP, off_class_KP
from protopnet.training.solver import RowBlock, mean_over, metric_over, solve

# As in conftest.py.
MODEL = ModelSettings(
    backbone="resnet18", cut="layer2", image_size=64, prototype_depth=16, prototypes=12, similarity="log"
)
LAST_LAYER = LastLayerSettings(copies=0, l1=1e-3, ridge=1e-2, max_iterations=300)


@pytest.fixture(scope="module")
def dataset(birds: Dataset) -> Dataset:
    """A few of the training images are for validation."""
    split = birds.table["split"].to_pylist()
    split[-6::-9] = ["validation" if name == "train" else name for name in split[-6::-9]]
    at = birds.table.schema.get_field_index("split")
    return Dataset(birds.classes, birds.table.set_column(at, "split", pa.array(split)), birds.source, birds.errors)


@pytest.fixture(scope="module")
def latents(dataset: Dataset, latents_of: Callable, network: ProtoPNet) -> dict[int, torch.Tensor]:
    """Latent maps of the training images by image_id."""
    train = dataset.split("train")
    return dict(zip(train["image_id"].to_pylist(), latents_of(network, train), strict=True))


@pytest.fixture(scope="module")
def network() -> ProtoPNet:
    torch.manual_seed(0)
    built = placed(build_network(MODEL, 3), torch.device("cpu"))
    assert isinstance(built, ProtoPNet)
    return built


@pytest.fixture(scope="module")
def start(network: ProtoPNet, dataset: Dataset, latents: dict[int, torch.Tensor]) -> Draft:
    """Four prototypes a class, the second on the same patch of a copy of the first one's image."""
    train, places = dataset.split("train"), []
    labels, ids = train["label"].to_numpy(), train["image_id"].to_numpy()
    for p, label in enumerate(network.prototype_class.tolist()):
        image = int(ids[labels == label][(0, 1, -1, -2)[p % 4]])
        places.append((image, *((3, 4), (3, 4), (2, 3), (5, 1))[p % 4]))
    with torch.no_grad():
        for p, (image, row, column) in enumerate(places):
            network.prototypes[p, :, 0, 0] = latents[image][:, row, column]
    return Draft.of(network, places)


def sources(start: Draft, dataset: Dataset) -> pa.Table:
    """Where the prototypes come from, as the bundle records it; two have a name."""
    rows = {row["image_id"]: row for row in dataset.split("train").to_pylist()}
    found = [
        {
            **{name: rows[image][name] for name in ("uri", "sha256", "class_name", "image_id")},
            "prototype": p,
            "class": rows[image]["label"],
            "row": row,
            "column": column,
            "name": {2: "red bill", 6: "white bar"}.get(p),
        }
        for p, (image, row, column) in enumerate(start.places)
    ]
    return pa.Table.from_pylist(found, PROTOTYPE_SCHEMA)


Correct = Callable[..., Corrector]


@pytest.fixture
def corrector(network: ProtoPNet, start: Draft, dataset: Dataset) -> Correct:
    def make(history: Any = (), **corrections: Any) -> Corrector:
        data, augment = DataSettings(), AugmentSettings()
        trained = TrainedWith(seed=0, data=data, push=PushSettings(), augment=augment, last_layer=LAST_LAYER)
        asked = Corrections(**corrections)
        known = Prototypes(sources(start, dataset), patch_grid(network, MODEL), "here")
        return Corrector(network, start, dataset, trained, MODEL, asked, known, history)

    return make


def whole(place: Place) -> str:
    return f"{place[0]}:all"


def test_barred_prototypes_go_to_their_nearest_patch_that_is_free(
    corrector: Correct, start: Draft, dataset: Dataset, options: Callable, latents: dict[int, torch.Tensor]
) -> None:
    """Copies of a barred image are barred too; patches that stay taken aren't taken twice."""
    forbid = [whole(start.places[2]), whole(start.places[4])]
    correction = corrector(forbid=forbid).run(options(2, 5, 3), LineReporter())

    rows = {row["image_id"]: row for row in dataset.split("train").to_pylist()}
    barred = {rows[start.places[p][0]]["sha256"] for p in (2, 4)}
    moving = [2, 4, 5]
    places = [place for p, place in enumerate(start.places) if p not in moving]
    for p in moving:
        candidates = []
        for image_id, latent in latents.items():
            if rows[image_id]["label"] == start.prototype_class_P[p] and rows[image_id]["sha256"] not in barred:
                distances = (latent.double() - start.prototypes_PDhw[p].double()).square().sum(0)
                candidates += [(float(d), (image_id, *cell)) for cell, d in np.ndenumerate(distances.numpy())]
        places.append(min(each for each in candidates if each[1] not in places)[1])
        assert correction.draft.places[p] == places[-1]
        image_id, row, column = places[-1]
        patch = latents[image_id][:, row, column]
        assert float((patch - correction.draft.prototypes_PDhw[p, :, 0, 0]).square().sum()) < 1e-9
    stay = [p for p in range(12) if p not in moving]
    assert torch.equal(correction.draft.prototypes_PDhw[stay], start.prototypes_PDhw[stay])
    (step,) = correction.steps
    assert [each["prototype"] for each in step.record["moved"]] == moving
    assert {each["sha256"] for each in step.record["barred"]} == barred


def test_a_part_of_an_image_and_what_was_barred_before(corrector: Correct, start: Draft, options: Callable) -> None:
    """64 pixels, 8 cells: a box within one cell moves only what is on that cell."""
    image, row, column = start.places[2]
    cell = f"{image}:{8 * row + 2},{8 * column + 2},{8 * row + 3},{8 * column + 3}"
    elsewhere = f"{image}:0,0,1,1"
    nothing = corrector(forbid=[elsewhere]).run(options(), LineReporter())
    assert nothing.draft is start
    history = [{"steps": [{"barred": [parse_barred(cell, corrector().dataset.table).record()]}]}]
    correction = corrector(history=history, forbid=[elsewhere]).run(options(), LineReporter())
    assert correction.draft.places[2] != start.places[2]
    assert [place for p, place in enumerate(correction.draft.places) if p != 2] == [
        place for p, place in enumerate(start.places) if p != 2
    ]


def test_what_can_t_be_done_is_said_at_once(corrector: Correct, dataset: Dataset) -> None:
    train = dataset.split("train")
    of_first = train.filter(pa.compute.equal(train["label"], 0))["image_id"].to_pylist()
    with pytest.raises(UserError, match="every patch of class"):
        corrector(forbid=[f"{image}:all" for image in of_first]).check()
    with pytest.raises(UserError, match="without prototypes"):
        corrector(remove=[0, 1, 2, 3]).check()
    with pytest.raises(UserError, match="--threshold"):
        corrector(rule=True, k=3, threshold=4).check()
    corrector(remove=[0, 1, 2], forbid=[f"{image}:all" for image in of_first[:-1]]).check()


def test_the_rule_looks_at_the_nearest_images_of_all_classes(
    corrector: Correct, start: Draft, dataset: Dataset, options: Callable, latents: dict[int, torch.Tensor]
) -> None:
    correction = corrector(rule=True, k=4, threshold=3, remove=[2]).run(options(), LineReporter())

    labels = dict(zip(dataset.table["image_id"].to_pylist(), dataset.table["label"].to_pylist(), strict=True))
    own, doomed = {}, set()
    for p, label in enumerate(start.prototype_class_P.tolist()):
        nearest = sorted(
            (float((latent - start.prototypes_PDhw[p]).square().sum(0).min()), image)
            for image, latent in latents.items()
        )
        own[str(p)] = sum(labels[image] == label for _, image in nearest[:4])
        doomed |= {p} if own[str(p)] < 3 else set()
    del own["2"]
    record = correction.steps[1].record
    assert record["own_neighbours"] == own
    assert sorted(record["removed"] + record["spared"]) == sorted(doomed - {2})
    assert record["removed"]  # an untrained network: there is something to remove
    assert correction.draft.numbers_P.tolist() == [p for p in range(12) if p not in {2, *record["removed"]}]
    assert set(correction.draft.prototype_class_P) == {0, 1, 2}


ABOUT = {"who": "anna", "when": "2026-11-25T22:00:00Z", "why": "seen"}


def test_decisions_of_people_are_carried_out(
    corrector: Correct, start: Draft, dataset: Dataset, options: Callable, latents: dict[int, torch.Tensor]
) -> None:
    """Prototype 2 to its next nearest patch, 6 to another image, all of class 2 off the lower half, 1 into 0; the same
    choices whatever the batches and the workers."""
    known = corrector().known
    refs = [known.ref(p).model_dump(by_alias=True) for p in range(len(start))]
    decisions = [
        ABOUT | {"decide": "not-this-patch", "prototype": refs[2]},
        ABOUT | {"decide": "not-this-patch", "prototype": refs[6], "elsewhere": True},
        ABOUT | {"decide": "not-in-region", "region": [0.5, 0, 1, 1], "class": dataset.classes[2]},
        ABOUT | {"decide": "merge", "prototype": refs[1], "into": refs[0]},
        ABOUT | {"decide": "drop", "prototype": refs[3]},
    ]
    correction = corrector(decisions=decisions, made_for="here").run(options(2, 5, 3), LineReporter())
    assert [step.name for step in correction.steps] == ["remove", "merge", "forbid"]

    draft, again = correction.draft, corrector(decisions=decisions).run(options(), LineReporter()).draft
    assert draft.places == again.places
    torch.testing.assert_close(draft.prototypes_PDhw, again.prototypes_PDhw, rtol=0, atol=1e-5)
    places = dict(zip(draft.numbers_P.tolist(), draft.places, strict=True))
    assert sorted(places) == [0, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    torch.testing.assert_close(draft.connections_KP[:, 0], start.connections_KP[:, :2].sum(1))
    moved = {each["prototype"] for each in correction.steps[-1].record["moved"]}
    assert moved == {2, 6} | {p for p in range(8, 12) if start.places[p][1] >= 4}
    assert all(places[p][1] < 4 for p in range(8, 12))
    assert places[6][0] != start.places[6][0]

    labels = dict(zip(dataset.table["image_id"].to_pylist(), dataset.table["label"].to_pylist(), strict=True))
    others = {start.places[0], start.places[2]}
    nearest = min(
        (float(d), (image, *cell))
        for image, latent in latents.items()
        if labels[image] == 0
        for cell, d in np.ndenumerate((latent - start.prototypes_PDhw[2]).square().sum(0).numpy())
        if (image, *cell) not in others
    )
    assert places[2] == nearest[1]


def test_kept_prototypes_are_spared_by_the_rule(corrector: Correct, options: Callable) -> None:
    removed = corrector(rule=True, k=4, threshold=3).run(options(), LineReporter()).steps[0].record["removed"]
    keep = [ABOUT | {"decide": "keep", "prototype": removed[0]}]
    again = corrector(rule=True, k=4, threshold=3, decisions=keep).run(options(), LineReporter())
    assert again.steps[0].record["removed"] == removed[1:]


Accuracies = Callable[[ProtoPNet], dict[str, float]]


@pytest.fixture
def accuracies(dataset: Dataset, pixels_of: Callable) -> Accuracies:
    """Accuracy on each split, computed here."""

    def measure(network: ProtoPNet) -> dict[str, float]:
        found = {}
        for split in ("validation", "test"):
            rows = dataset.split(split)
            with torch.inference_mode():
                predicted = network(pixels_of(rows)).logits_BK.argmax(1).numpy()
            found[split] = float((predicted == rows["label"].to_numpy()).mean())
        return found

    return measure


def optimum(draft: Draft, network: ProtoPNet, dataset: Dataset, pixels_of: Callable) -> np.ndarray:
    """The last layer of these prototypes, solved here."""
    train = dataset.split("train")
    with torch.inference_mode():
        similarities = draft.network(network, MODEL)(pixels_of(train)).similarities_BP.numpy()
    blocks = [RowBlock(similarities, train["label"].to_numpy(), 3)]
    off = off_class_KP(draft.prototype_class_P, 3)
    how: dict[str, Any] = LAST_LAYER.model_dump(include={"l1", "ridge", "tolerance"}) | {"max_iterations": 20_000}
    solution = solve(mean_over(blocks), anchor_KP(off, MODEL.own_connection), off, metric=metric_over(blocks), **how)
    assert solution.converged
    return solution.weights


def test_the_whole_way_to_a_new_bundle(
    corrector: Correct,
    network: ProtoPNet,
    start: Draft,
    dataset: Dataset,
    options: Callable,
    pixels_of: Callable,
    accuracies: Accuracies,
    tmp_path: Path,
) -> None:
    save_bundle(str(tmp_path / "old"), network, MODEL, dataset.classes, {"run": "x"}, sources(start, dataset))
    bundle = load_bundle(str(tmp_path / "old"))
    named = [ABOUT | {"decide": "name", "prototype": p, "name": f"part {p}"} for p in (4, 10, 99)]
    corrections = corrector(
        remove=[5], forbid=[whole(start.places[10]), whole(start.places[6])], merge=True, decisions=named
    )
    how = options(2, 5, 7)
    correction = corrections.run(how, LineReporter())
    rewritten = resolve(corrections, correction, how, keep_connections=False)
    uri = str(tmp_path / "new")
    write_corrected(uri, bundle, corrections, correction, rewritten, how)

    new = load_bundle(uri)
    assert isinstance(new.network, ProtoPNet)
    assert new.prototypes is not None
    assert new.prototypes["prototype"].to_pylist() == list(range(9))
    columns = (new.prototypes[name].to_pylist() for name in ("image_id", "row", "column"))
    assert list(zip(*columns, strict=True)) == correction.draft.places
    names = dict(zip(correction.draft.numbers_P.tolist(), new.prototypes["name"].to_pylist(), strict=True))
    assert {p: name for p, name in names.items() if name} == {2: "red bill", 4: "part 4", 10: "part 10"}  # 6 has moved
    assert read_table(f"{uri}/decisions.parquet")["applied"].to_pylist() == [True, True, False]
    assert new.prototypes["class"].to_pylist() == new.network.prototype_class.tolist()
    assert new.info.architecture.prototypes == 9
    assert new.info.calibration is not None
    seen = (new.info.calibration.split, new.info.calibration.images)
    assert seen == ("validation", len(dataset.split("validation")))
    assert torch.equal(new.network.prototypes, correction.draft.prototypes_PDhw)

    weights = new.network.last_layer.weight.detach().numpy()
    np.testing.assert_allclose(weights, optimum(correction.draft, network, dataset, pixels_of), rtol=1e-2, atol=1e-2)
    assert rewritten.before == accuracies(network)
    assert rewritten.corrected == accuracies(correction.draft.network(network, MODEL))
    assert rewritten.after == accuracies(new.network)

    assert new.info.provenance["run"] == "x"
    (entry,) = new.info.provenance["history"]
    assert entry["bundle"] == bundle.hash
    assert [each["decision"] for each in entry["lapsed"]] == [3]
    assert entry["numbers"] == [0, 2, 3, 4, 6, 7, 8, 10, 11]
    assert entry["prototypes"] == {"before": 12, "after": 9}
    assert [step["step"] for step in entry["steps"]] == ["remove", "merge", "forbid"]
    assert entry["steps"][1]["merged"] == [{"kept": 0, "repeats": [1]}, {"kept": 8, "repeats": [9]}]
    stages = {"before": rewritten.before, "corrected": rewritten.corrected, "after": rewritten.after}
    assert entry["accuracy"]["test"] == {name: of["test"] for name, of in stages.items()}


def test_what_must_be_used_keeps_its_connection(corrector: Correct, start: Draft, options: Callable) -> None:
    floor = float(start.connections_KP[1, 5]) + 3
    corrections = corrector(decisions=[ABOUT | {"decide": "must-be-used", "prototype": 5, "floor": floor}], remove=[4])
    correction = corrections.run(options(), LineReporter())
    rewritten = resolve(corrections, correction, options(), keep_connections=False)
    assert float(rewritten.network.last_layer.weight[1, 4]) == pytest.approx(floor)


def test_kept_connections_are_only_measured(
    corrector: Correct, network: ProtoPNet, start: Draft, options: Callable, accuracies: Accuracies
) -> None:
    corrections = corrector(remove=[5])
    correction = corrections.run(options(), LineReporter())
    rewritten = resolve(corrections, correction, options(), keep_connections=True)
    assert torch.equal(rewritten.network.last_layer.weight, start.without([5]).connections_KP)
    assert rewritten.last_layer is None
    assert rewritten.before == accuracies(network)
    assert rewritten.corrected == rewritten.after == accuracies(rewritten.network)


def test_without_images_to_measure_on(corrector: Correct, dataset: Dataset, options: Callable) -> None:
    corrections = corrector(remove=[5])
    corrections.dataset = Dataset(dataset.classes, dataset.split("train"), dataset.source, dataset.errors)
    measured = resolve(corrections, corrections.run(options(), LineReporter()), options(), keep_connections=True)
    assert measured == Rewritten(measured.network, {}, {}, {}, None)
