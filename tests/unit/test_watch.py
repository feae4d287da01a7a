"""A model in use: counts that add up, beside what was usual, and how far apart the two are."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2
from serving import CLASSES, SIZE, make_bundle, photo, pixels

from protopnet.model.bundle import load_bundle
from protopnet.model.usual import TENTHS, Usual
from protopnet.predictor import Predictor
from protopnet.quality.watch import OfClass, added, report, watched
from protopnet.scoring.manifest import MANIFEST_SCHEMA
from protopnet.scoring.tally import Tally
from protopnet.scoring.task import Picture, ScoreOptions, Scorer, look
from protopnet.serving.metrics import samples_of, seen_by, shadow_of
from protopnet.serving.shadow import Shadow

COUNTS = st.lists(st.integers(0, 50), min_size=TENTHS, max_size=TENTHS)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor.load([make_bundle(tmp_path_factory.mktemp("watch") / "bundle", 0, calibrated=True)])


def test_tenths_hold_a_tenth_each() -> None:
    usual = Usual.of(np.random.default_rng(0).permutation(100).astype(float))
    assert usual.counts == [10] * TENTHS
    assert usual.counted(np.array([-1e9, 1e9, 49.4])) == [1, 0, 0, 0, 1, 0, 0, 0, 0, 1]


@given(st.lists(st.floats(-1, 1, width=16), min_size=1, max_size=30))
def test_all_that_is_counted_is_somewhere(values: list[float]) -> None:
    usual = Usual.of(np.array(values))
    assert sum(usual.counts) == len(values)
    assert usual.drift(usual.counts).index == 0


@given(COUNTS, COUNTS)
def test_the_index_is_that_of_its_formula(usual: list[int], seen: list[int]) -> None:
    p, q = ((np.array(each) + 0.5) / (sum(each) + 5) for each in (usual, seen))
    drift = Usual(edges=range(9), counts=usual).drift(seen)
    assert drift.index == pytest.approx(np.sum((q - p) * np.log(q / p)), abs=1e-4)
    assert drift.index >= 0


def test_without_a_change_nineteen_of_twenty_stay_below_what_chance_gives() -> None:
    random = np.random.default_rng(0)
    usual = Usual.of(random.normal(size=200))
    drifts = [Usual.of(random.normal(size=200)).drift(usual.counted(random.normal(size=300))) for _ in range(3)]
    assert {d.by_chance for d in drifts} == {round(chi2.ppf(0.95, 9) * (1 / 200 + 1 / 300), 4)}
    below = []
    for _ in range(400):
        known = Usual.of(random.normal(size=200))
        drift = known.drift(known.counted(random.normal(size=300)))
        below.append(drift.index <= drift.by_chance)
    assert 0.9 < np.mean(below) <= 1
    moved = usual.drift(usual.counted(random.normal(0.7, size=300)))
    assert moved.index > max(0.25, moved.by_chance)


def rows_of(count: int) -> pa.Table:
    columns = [range(count), [""] * count, [""] * count, [-1] * count, [-1] * count, [None] * count]
    return pa.table([list(column) for column in columns], schema=MANIFEST_SCHEMA)


def test_a_job_counts_what_the_network_says(predictor: Predictor) -> None:
    encoded = [photo(n) for n in range(30, 41)]
    scores = predictor.scores(pixels(*encoded))
    pictures = [look(data, {}, [SIZE], 10**6) for data in (*encoded[:5], b"no image", *encoded[5:])]
    tally = Tally()
    scorer = Scorer(predictor, ScoreOptions(batch_size=8, abstain=0.5), torch.device("cpu"))
    for start in (0, 8):
        part = pictures[start : start + 8]
        tally = tally.plus(scorer(rows_of(len(part)), part)[1])
    found = report(tally.watched, predictor.trust)
    assert isinstance(pictures[0], Picture)
    first_B = scores.logits_BK.argmax(1).tolist()
    assert {name: counts.images for name, counts in found.classes.items()} == {
        CLASSES[label]: first_B.count(label) for label in set(first_B)
    }
    top_B2 = scores.probabilities_BK.topk(2).values.numpy().astype(float)
    assert (found.images, found.abstained) == (11, int((top_B2[:, 0] < 0.5).sum()))
    expected = {"margin": top_B2[:, 0] - top_B2[:, 1], "similarity 0": scores.best_MB[0].numpy()}
    assert {each.measure for each in found.measures} == set(expected)
    for each in found.measures:
        usual = Usual(edges=each.edges, counts=each.usual)
        assert each.seen == usual.counted(expected[each.measure])
        assert each.drift == usual.drift(each.seen)
    assert Tally.model_validate_json(tally.model_dump_json()) == tally  # as a chunk's record keeps it


def test_counts_of_parts_are_those_of_the_whole(predictor: Predictor) -> None:
    scores = predictor.scores(pixels(*(photo(n) for n in range(9))))
    first, rest = torch.arange(9) < 4, torch.arange(9) >= 4
    of_parts = added(*(watched(scores.only(keep), CLASSES, [True] * int(keep.sum())) for keep in (first, rest)))
    assert of_parts == watched(scores, CLASSES, [True] * 9)


def test_a_bundle_that_does_not_keep_the_usual_is_counted_too(tmp_path: Path) -> None:
    plain = Predictor([load_bundle(make_bundle(tmp_path / "plain", 0))])
    found = report(watched(plain.scores(pixels(photo(0))), CLASSES, [False]), plain.trust)
    assert (found.images, found.measures) == (1, [])


def test_the_counts_of_all_replicas_of_one_model_are_read_back() -> None:
    def line(name: str, value: int, **labels: str) -> str:
        said = ",".join(f"{key}={json.dumps(text)}" for key, text in labels.items())
        return f"ray_protopnet_{name}{{{said}}} {value}.0\n"

    said = '7 "quoted", with }'
    text = "# TYPE ray_protopnet_tenths_total counter\n" + "".join(
        [
            line("tenths_total", 2, class_name=said, model="m", measure="margin", tenth="9", replica="a"),
            line("tenths_total", 3, class_name=said, model="m", measure="margin", tenth="9", replica="b"),
            line("tenths_total", 8, class_name=said, model="other", measure="margin", tenth="9", replica="c"),
            "# TYPE ray_protopnet_predictions_total counter\n",
            line("predictions_total", 5, class_name=said, model="m"),
            line("predictions_total", 8, class_name=said, model="other"),
            line("images_total", 13, route="/v1/predict"),
        ]
    )
    assert seen_by(samples_of(text, "m")) == {said: OfClass(images=5, tenths={"margin": [0] * 9 + [5]})}
    assert seen_by(samples_of("", "m")) == {}


def test_what_the_shadow_said_is_read_back() -> None:
    text = "".join(
        f'ray_protopnet_shadow_total{{class_name="a",model="{model}",shadow="s",answer="{answer}",replica="{n}"}} {n}.0\n'
        for n, (model, answer) in enumerate([("m", "same"), ("m", "other"), ("m", "other"), ("old", "other")], 1)
    )
    assert shadow_of(samples_of("# TYPE ray_protopnet_shadow_total counter\n" + text, "m"), "s") == {
        "a": {"same": 1, "other": 5, "missed": 0}
    }
    assert shadow_of(samples_of("", "m"), "s") == {}


def test_a_shadow_that_fails_or_is_busy_costs_nothing(predictor: Predictor) -> None:
    """Its classes are counted beside the answers; nothing that it raises comes out."""
    scores = predictor.scores(pixels(photo(0), photo(1)))

    class Recorder:
        def __init__(self) -> None:
            self.counts: Counter[str] = Counter()

        def shadowed(self, shadow: str, answers: list[tuple[str, str]]) -> None:
            self.counts.update(answer for _, answer in answers)

    class Answering:
        classes, hash = CLASSES, "s"

        def __init__(self, logits_BK: torch.Tensor | None) -> None:
            self.logits_BK, self.waits = logits_BK, asyncio.Event()

        async def look(self, pixels_B: list, whole: bool) -> list:
            await self.waits.wait()
            if self.logits_BK is None:
                raise RuntimeError("broken")
            return []

        def scores(self, seen_MB: list) -> Any:
            return SimpleNamespace(logits_BK=self.logits_BK)

    async def counted(logits_BK: torch.Tensor | None, times: int) -> Counter[str]:
        recorder, ensemble = Recorder(), Answering(logits_BK)
        shadow = Shadow(ensemble, recorder)  # type: ignore[arg-type]
        for _ in range(times):
            shadow.look([{}, {}], scores)
        ensemble.waits.set()
        await asyncio.gather(*shadow._tasks)
        return recorder.counts

    turned = scores.logits_BK.clone()
    turned[1] = -turned[1]
    assert asyncio.run(counted(turned, 1)) == {"same": 1, "other": 1}
    assert asyncio.run(counted(None, 1)) == {"missed": 2}
    assert asyncio.run(counted(scores.logits_BK, 5)) == {"same": 8, "missed": 2}  # four at once
