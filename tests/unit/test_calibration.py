"""A temperature from validation images, thresholds beside it, and what they do to everything that says a probability."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.special import log_softmax, softmax
from serving import CLASSES, SIZE, make_bundle, photo, pixels

import protopnet
from protopnet.errors import UserError
from protopnet.evidence.sources import Shown
from protopnet.exporting import explained
from protopnet.model.bundle import Bundle, load_bundle, save_bundle
from protopnet.model.calibration import Calibration, Trust
from protopnet.predictor import Predictor
from protopnet.quality.calibration import abstention, fit_temperature
from protopnet.quality.card import model_card
from protopnet.quality.classification import calibration_error, classification_metrics
from protopnet.scoring.manifest import MANIFEST_SCHEMA
from protopnet.scoring.task import ScoreOptions, Scorer, look
from protopnet.serving import answers
from protopnet.serving.app import build
from protopnet.serving.schemas import PredictOptions
from protopnet.serving.settings import AppSettings
from protopnet.serving.uploads import Picture

FITTED = Calibration(
    temperature=2.5,
    split="validation",
    images=60,
    error_before=0.12,
    error_after=0.03,
    accuracy=0.95,
    abstain_below=0.4,
    coverage=0.8,
    unknown_below=1.0,
)


def drawn(n: int, sharpness: float, K: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from the probabilities of some logits, and these logits made sharper than is true."""
    random = np.random.default_rng(0)
    logits_nK = 2 * random.normal(size=(n, K))
    labels_n = np.array([random.choice(K, p=p) for p in softmax(logits_nK, axis=1)])
    return sharpness * logits_nK, labels_n


class TestTemperature:
    @pytest.mark.parametrize("sharpness", [0.5, 1.0, 4.0])
    def test_it_undoes_what_made_the_logits_too_sharp(self, sharpness: float) -> None:
        logits_nK, labels_n = drawn(4000, sharpness)
        temperature = fit_temperature(logits_nK, labels_n)
        assert temperature == pytest.approx(sharpness, rel=0.06)
        assert calibration_error(logits_nK / temperature, labels_n) < 0.02

    def test_it_has_the_lowest_cross_entropy(self) -> None:
        logits_nK, labels_n = drawn(3000, 3.0)

        def loss(temperature: float) -> float:
            return float(-log_softmax(logits_nK / temperature, axis=1)[np.arange(3000), labels_n].mean())

        best = fit_temperature(logits_nK, labels_n)
        assert all(loss(best) < loss(best * factor) for factor in (0.95, 1.05))

    def test_a_few_images_that_are_all_right_dont_make_it_certain(self) -> None:
        few, many = (
            fit_temperature(np.tile(np.eye(4) * 3, (times, 1)), np.tile(np.arange(4), times)) for times in (1, 50)
        )
        assert 0.2 < many < few < 1

    def test_a_few_images_weigh_more_than_what_is_likely(self) -> None:
        logits_nK, labels_n = drawn(60, 4.0)
        assert 2.5 < fit_temperature(logits_nK, labels_n) < 6

    def test_where_nothing_can_be_told_it_is_1(self) -> None:
        assert fit_temperature(np.ones((3, 2)), np.ones(3, np.int64)) == 1

    def test_where_all_is_wrong_it_is_high(self) -> None:
        assert 10 < fit_temperature(np.array([[9.0, 0.0], [9.0, 0.0]]), np.ones(2, np.int64)) < 100

    def test_nothing_is_said_of_an_ensemble_of_which_one_has_none(self) -> None:
        assert Trust.of([FITTED, None]).temperature == 1
        assert Trust.of([FITTED, FITTED]).temperature == 5


class TestAbstention:
    def test_the_most_images_of_which_enough_are_right(self) -> None:
        probabilities_n = np.array([0.99, 0.9, 0.8, 0.7, 0.6])
        logits_n2 = np.log(np.stack([probabilities_n, 1 - probabilities_n], 1))
        labels_n = np.array([0, 1, 0, 0, 1])  # right: 1, 1/2, 2/3, 3/4, 3/5
        assert abstention(logits_n2, labels_n, 0.75) == (pytest.approx(0.7), 0.8)
        assert abstention(logits_n2, labels_n, 0.8) == (pytest.approx(0.99), 0.2)
        assert abstention(logits_n2, 1 - labels_n, 0.9) == (None, 0.0)

    def test_images_equally_sure_stay_together(self) -> None:
        logits_n2 = np.array([[2.0, 0.0]] * 4)
        assert abstention(logits_n2, np.array([0, 0, 0, 1]), 0.9) == (None, 0.0)


def calibrated(folder: Path, calibration: Calibration | None, seed: int = 0) -> Bundle:
    """A bundle with random weights that says this of itself."""
    bundle = load_bundle(make_bundle(folder / "plain", seed))
    info = bundle.info
    save_bundle(str(folder / "bundle"), bundle.network, info.architecture, CLASSES, {}, bundle.prototypes, calibration)
    return load_bundle(str(folder / "bundle"))


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return [photo(seed) for seed in range(20, 26)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, images: list[bytes]) -> Bundle:
    """Half of the images are below what it knows."""
    folder = tmp_path_factory.mktemp("calibrated")
    best_B = load_bundle(make_bundle(folder / "before", 0)).network(pixels(*images)).best_B
    return calibrated(folder, FITTED.model_copy(update={"unknown_below": float(best_B.median()) + 1e-6}))


class TestEverythingThatSaysAProbability:
    def expected(self, bundle: Bundle, images: list[bytes]) -> tuple[torch.Tensor, list[bool]]:
        with torch.inference_mode():
            seen = bundle.network(pixels(*images))
        assert bundle.info.calibration is not None
        unknown_B = seen.similarities_BP.amax(1) < bundle.info.calibration.unknown_below
        assert set(unknown_B.tolist()) == {True, False}
        return (seen.logits_BK / 2.5).softmax(1), unknown_B.tolist()

    def test_the_predictor(self, bundle: Bundle, images: list[bytes]) -> None:
        probabilities_BK, unknown = self.expected(bundle, images)
        predictor = Predictor([bundle])
        scores = predictor.scores(pixels(*images))
        torch.testing.assert_close(scores.probabilities_BK, probabilities_BK)
        assert scores.unknown_B is not None
        assert scores.unknown_B.tolist() == unknown
        explanations = predictor.explain(pixels(*images), [(90, 60)] * 6)
        assert [e.top.probability for e in explanations] == pytest.approx(probabilities_BK.amax(1).tolist(), rel=1e-5)
        assert [e.unknown for e in explanations] == unknown
        plain = bundle.network(pixels(*images)).logits_BK.amax(1).tolist()
        assert [e.top.logit for e in explanations] == pytest.approx(plain, rel=1e-5)  # points stay what they are

    def test_bulk_scores(self, bundle: Bundle, images: list[bytes]) -> None:
        probabilities_BK, unknown = self.expected(bundle, images)
        rows = pa.table([range(6), ["x"] * 6, ["x"] * 6, [-1] * 6, [-1] * 6, [None] * 6], schema=MANIFEST_SCHEMA)
        pictures = [look(data, {}, [SIZE], 10**6) for data in images]
        for explain in (0, 2):
            scorer = Scorer(Predictor([bundle]), ScoreOptions(batch_size=6, explain=explain), torch.device("cpu"))
            table, _ = scorer(rows, pictures)
            np.testing.assert_allclose(table["probability"], probabilities_BK.amax(1), rtol=1e-5)
            margin = probabilities_BK.sort(1, descending=True)[0]
            np.testing.assert_allclose(table["margin"], margin[:, 0] - margin[:, 1], atol=1e-6)
            assert table["unknown"].to_pylist() == unknown

    def test_a_program(self, bundle: Bundle, images: list[bytes]) -> None:
        probabilities_BK, unknown = self.expected(bundle, images)
        predictions = protopnet.Model(Predictor([bundle])).predict(images)
        np.testing.assert_allclose([p.probabilities_K for p in predictions], probabilities_BK, rtol=1e-4)
        assert [p.unknown for p in predictions] == [p.to_dict()["unknown"] for p in predictions] == unknown

    def test_the_service(self, bundle: Bundle, images: list[bytes]) -> None:
        probabilities_BK, unknown = self.expected(bundle, images)
        scores = Predictor([bundle]).scores(pixels(*images))
        pictures = [Picture(None, 90, 60, {}) for _ in images]
        said = answers.predicted(CLASSES, pictures, scores, PredictOptions(top_classes=1), [], None)
        assert [image.unknown for image in said] == unknown
        assert [i.classes[0].probability for i in said] == pytest.approx(probabilities_BK.amax(1).tolist(), rel=1e-5)

    def test_not_answering_below_what_the_bundle_keeps(self, bundle: Bundle, images: list[bytes]) -> None:
        probabilities_BK, _ = self.expected(bundle, images)
        kept = float(probabilities_BK.amax(1).median())
        assert bundle.info.calibration is not None
        fitted = bundle.info.calibration.model_copy(update={"abstain_below": kept})
        predictor = Predictor([replace(bundle, info=bundle.info.model_copy(update={"calibration": fitted}))])
        rows = pa.table([range(6), ["x"] * 6, ["x"] * 6, [-1] * 6, [-1] * 6, [None] * 6], schema=MANIFEST_SCHEMA)
        scorer = Scorer(predictor, ScoreOptions(batch_size=6, abstain="bundle"), torch.device("cpu"))
        table, _ = scorer(rows, [look(data, {}, [SIZE], 10**6) for data in images])
        answered = [label is not None for label in table["prediction"].to_pylist()]
        assert set(answered) == {True, False}
        assert answered == [p >= kept for p in table["probability"].to_pylist()]

    def test_an_evaluation(self) -> None:
        logits_nK, labels_n = drawn(1000, 4.0)
        metrics = classification_metrics(logits_nK, labels_n, list("abcde"), 4.0)
        assert metrics["calibration_error"] < 0.05 < 0.1 < metrics["calibration_error_before"]
        assert metrics["temperature"] == 4.0
        assert metrics["top1"] == classification_metrics(logits_nK, labels_n, list("abcde"))["top1"]

    def test_other_programs(self, bundle: Bundle) -> None:
        assert explained(bundle, "torch", Shown(), int8=False)["temperature"] == 2.5

    def test_the_card(self, bundle: Bundle) -> None:
        metrics = classification_metrics(np.eye(4), np.arange(4), CLASSES)
        card = model_card(bundle.info, "", metrics)
        assert "temperature of 2.50, fitted on 60 validation images" in card
        assert "From a probability of 0.400 on" in card
        trained = FITTED.model_copy(update={"split": "train", "abstain_below": None})
        card = model_card(bundle.info.model_copy(update={"calibration": trained}), "", metrics)
        assert "There were no validation images" in card
        assert "No probability was found" in card


def test_an_ensemble_knows_an_image_that_one_of_its_members_knows(tmp_path: Path, images: list[bytes]) -> None:
    members = [
        calibrated(tmp_path / str(below), FITTED.model_copy(update={"unknown_below": below})) for below in (1e3, -1e3)
    ]
    assert Predictor(members[:1]).scores(pixels(*images)).unknown_B.tolist() == [True] * 6  # type: ignore[union-attr]
    assert Predictor(members).scores(pixels(*images)).unknown_B.tolist() == [False] * 6  # type: ignore[union-attr]
    scores = Predictor(members).scores(pixels(*images))
    torch.testing.assert_close(scores.probabilities_BK, (scores.logits_BK / 5).softmax(1))


@pytest.mark.parametrize(
    "calibrations", [[None], [FITTED, FITTED], [FITTED.model_copy(update={"abstain_below": None})]]
)
def test_a_threshold_that_there_isnt_is_refused(calibrations: list[Calibration | None]) -> None:
    with pytest.raises(UserError, match=r"--abstain bundle: expected one bundle .*calibration\.accuracy"):
        Trust.of(calibrations).threshold("bundle", "--abstain")
    assert Trust.of(calibrations).threshold(0.5, "--abstain") == 0.5


def test_the_service_is_refused_a_threshold_that_there_isnt(tmp_path: Path) -> None:
    plain = make_bundle(tmp_path / "plain", 0)
    with pytest.raises(UserError, match="abstain_below bundle: expected one bundle"):
        build(AppSettings(bundles=[plain], abstain_below="bundle"))
    bundle = calibrated(tmp_path / "fitted", FITTED)
    build(AppSettings(bundles=[str(tmp_path / "fitted" / "bundle")], abstain_below="bundle"))
    assert Trust.of([bundle.info.calibration]).threshold("bundle", "abstain_below") == 0.4


def test_an_older_bundle_says_what_it_said(tmp_path: Path, images: list[bytes]) -> None:
    scores = Predictor([calibrated(tmp_path, None)]).scores(pixels(*images))
    assert torch.equal(scores.probabilities_BK, scores.logits_BK.softmax(1))
    assert scores.unknown_B is None
