"""Evidence: points that add up, boxes that lie in the image, prototypes that know their own patch."""

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from protopnet import imaging
from protopnet.config import ModelSettings
from protopnet.errors import UserError
from protopnet.evidence.records import Explanation
from protopnet.model.bundle import PROTOTYPE_SCHEMA, Bundle, load_bundle, save_bundle
from protopnet.model.network import Baseline, build_network, set_phase
from protopnet.predictor import Predictor

CLASSES = ["jay", "wren", "crow"]


def settings_of(**changes) -> ModelSettings:
    given = {"backbone": "resnet18", "cut": "layer2", "image_size": 64, "prototype_depth": 8, "prototypes": 9}
    return ModelSettings(**(given | changes))


def prototype_rows(count: int) -> pa.Table:
    row = {
        "class_name": "jay",
        "image_id": 7,
        "uri": "jay/a.jpg",
        "sha256": "ab",
        "width": 80,
        "height": 60,
        "row": 1,
        "column": 2,
        "box": [0, 10, 20, 30],
        "receptive_field": [0, 0, 60, 80],
        "self_similarity": 0.99,
        "activation_map": [[0.5, 0.25], [0.0, 1.0]],
        "thumbnail": b"\xff\xd8jpeg",
    }
    return pa.Table.from_pylist([row | {"prototype": p, "class": p // 3} for p in range(count)], PROTOTYPE_SCHEMA)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> list[Bundle]:
    """Three members that differ in similarity, in the shape of their maps and of their prototypes, random elsewhere."""
    made = []
    shapes = {"log": {}, "cosine": {"cut": "layer3", "prototypes": 6}, "linear": {"prototype_shape": (2, 2)}}
    for seed, (kind, changes) in enumerate(shapes.items()):
        torch.manual_seed(seed)
        model = settings_of(similarity=kind, **changes)
        network = build_network(model, len(CLASSES), start_weights=False)
        with torch.no_grad():
            network.last_layer.weight.normal_(0, 2)
        set_phase(network, "eval")
        folder = str(tmp_path_factory.mktemp("bundles") / kind)
        save_bundle(folder, network, model, CLASSES, {}, prototype_rows(len(network.prototype_class)))
        made.append(load_bundle(folder))
    return made


def normalised(pixels_BHWC: torch.Tensor) -> torch.Tensor:
    return imaging.normalise(pixels_BHWC, imaging.Preprocessing(size=64))


def images(count: int, seed: int = 0) -> torch.Tensor:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    return normalised(torch.from_numpy(pixels))


def explain(bundles: list[Bundle], x_B3HW: torch.Tensor, **options) -> list[Explanation]:
    return Predictor(bundles).explain(x_B3HW, [(80, 60)] * len(x_B3HW), **options)


@pytest.mark.parametrize("members", [[0], [1], [2], [0, 1, 2]])
@pytest.mark.parametrize("listed", [1, 4, 100])
def test_listed_points_and_remainder_add_up_to_the_logit(bundles, members, listed):
    chosen = [bundles[m] for m in members]
    x = images(3)
    scores = Predictor(chosen).scores(x)
    for b, explanation in enumerate(explain(chosen, x, top_classes=3, top_prototypes=listed)):
        for entry in explanation.classes:
            total = sum(e.points for e in entry.evidence) + entry.remainder.points
            assert total == pytest.approx(float(scores.logits_BK[b, entry.class_]), rel=1e-5, abs=1e-4)
            assert entry.logit == float(scores.logits_BK[b, entry.class_])
            assert entry.probability == pytest.approx(float(scores.probabilities_BK[b, entry.class_]), abs=1e-6)
            count = sum(len(bundle.network.prototype_class) for bundle in chosen)
            assert len(entry.evidence) + entry.remainder.prototypes == count
            if listed >= count:
                assert entry.remainder.points == pytest.approx(0, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(members=st.sampled_from([[0], [1], [2], [0, 1, 2]]), listed=st.integers(1, 30), seed=st.integers(0, 99))
def test_differences_and_their_remainder_add_up_to_that_of_the_logits(bundles, members, listed, seed):
    chosen, x = [bundles[m] for m in members], images(2, seed)
    logits_BK = Predictor(chosen).scores(x).logits_BK
    order_BK = logits_BK.argsort(dim=1, descending=True).tolist()
    last = [order[-1] for order in order_BK]
    found = explain(chosen, x, top_prototypes=listed, contrast=True)
    found += explain(chosen, x, top_prototypes=listed, contrast=True, asked=[[label] for label in last])
    count = sum(len(bundle.network.prototype_class) for bundle in chosen)
    for b, rival, explanation in zip([0, 1] * 2, [order[1] for order in order_BK] + last, found, strict=True):
        [contrast] = explanation.contrasts
        assert (contrast.class_, contrast.rival) == (order_BK[b][0], rival)
        apart = float(logits_BK[b, contrast.class_] - logits_BK[b, rival])
        differences = [row.difference for row in contrast.rows]
        assert sum(differences) + contrast.remainder.points == pytest.approx(apart, rel=1e-5, abs=1e-4)
        assert differences == sorted(differences, reverse=True)
        assert len(contrast.rows) == min(2 * listed, count)
        assert len({(row.member, row.prototype) for row in contrast.rows}) == len(contrast.rows)
        if 2 * listed >= count:
            assert contrast.remainder.points == pytest.approx(0, abs=1e-4)
        for row in contrast.rows:
            weights_K = chosen[row.member].network.last_layer.weight[:, row.prototype]
            assert row.points == pytest.approx(row.similarity * float(weights_K[contrast.class_]), rel=1e-5)
            assert row.rival_points == pytest.approx(row.similarity * float(weights_K[rival]), rel=1e-5)
            assert row.difference == pytest.approx(row.points - row.rival_points, rel=1e-5)


def test_a_contrast_lists_what_tells_the_classes_apart_most(bundles):
    whole, some = (explain(bundles, images(1), top_prototypes=n, contrast=True)[0].contrasts[0] for n in (200, 2))
    assert [row.difference for row in some.rows] == [whole.rows[n].difference for n in (0, 1, -2, -1)]


def test_the_answer_is_not_set_beside_itself(bundles):
    best = Predictor(bundles).scores(images(1)).logits_BK.argmax(1).tolist()
    assert explain(bundles, images(1), contrast=True, asked=[best])[0].contrasts == []
    assert explain(bundles, images(1))[0].contrasts == []


def test_every_number_is_that_of_the_members_own_forward_pass(bundles):
    x = images(2)
    outputs = [bundle.network(x) for bundle in bundles]
    for b, explanation in enumerate(explain(bundles, x, top_classes=3, top_prototypes=200)):
        for entry in explanation.classes:
            points = [e.points for e in entry.evidence]
            assert points == sorted(points, reverse=True)
            assert {(e.member, e.prototype) for e in entry.evidence} == {
                (m, p) for m, bundle in enumerate(bundles) for p in range(len(bundle.network.prototype_class))
            }
            own = 0.0
            for e in entry.evidence:
                network, output = bundles[e.member].network, outputs[e.member]
                assert e.similarity == float(output.similarities_BP[b, e.prototype])
                assert e.connection == float(network.last_layer.weight[entry.class_, e.prototype])
                assert e.points == pytest.approx(e.similarity * e.connection, rel=1e-6, abs=1e-9)
                assert e.class_ == int(network.prototype_class[e.prototype])
                assert e.class_name == CLASSES[e.class_]
                own += e.points * (e.class_ == entry.class_)
            assert entry.own_points == pytest.approx(own, abs=1e-4)


def test_maps_peak_at_the_patch_with_the_similarity_named(bundles):
    for explanation in explain(bundles, images(2), top_classes=1, top_prototypes=30, maps=True):
        shapes = set()
        for e in explanation.top.evidence:
            activation = np.array(e.activation_map)
            shapes.add(activation.shape)
            assert activation[e.row, e.column] == pytest.approx(activation.max(), abs=1e-5)
            assert activation.max() == pytest.approx(e.similarity, abs=1e-4)
        assert shapes == {(8, 8), (4, 4), (7, 7)}  # layer2, layer3, and 2 x 2 prototypes on layer2


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000), seed=st.integers(0, 99))
def test_boxes_lie_in_the_image_as_uploaded(bundles, width, height, seed):
    x = images(1, seed)
    for entry in Predictor(bundles).explain(x, [(width, height)], top_classes=3, top_prototypes=12)[0].classes:
        for e in entry.evidence:
            top, left, bottom, right = e.box
            assert 0 <= top < bottom <= height
            assert 0 <= left < right <= width


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_follow_the_exif_turn(bundles, orientation):
    """The same pixels stored upright, or turned with a note to turn them back: the same box on the picture."""
    random = np.random.default_rng(3)
    upright = Image.fromarray(random.integers(0, 256, (90, 150, 3), dtype=np.uint8)).resize((300, 180))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's inverse transposes
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    sink = io.BytesIO()
    stored.save(sink, "PNG", exif=exif)
    decoded = imaging.decode(sink.getvalue())
    assert decoded.size == upright.size
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(upright))
    pixels = torch.from_numpy(imaging.resize(decoded, 64))[None]
    boxes = [
        [e.box for e in explanation.top.evidence]
        for explanation in Predictor(bundles).explain(normalised(pixels), [decoded.size], top_classes=1)
    ]
    plain = torch.from_numpy(imaging.resize(upright, 64))[None]
    expected = Predictor(bundles).explain(normalised(plain), [upright.size], top_classes=1)
    assert boxes == [[e.box for e in expected[0].top.evidence]]


def test_a_class_asked_for_is_explained_beside_the_top_ones(bundles):
    asked = [[2], [], [0, 2]]
    best = Predictor(bundles).scores(images(3)).logits_BK.argmax(1).tolist()
    for labels, label, explanation in zip(
        asked, best, explain(bundles, images(3), top_classes=1, asked=asked), strict=True
    ):
        shown = [entry.class_ for entry in explanation.classes]
        assert shown == list(dict.fromkeys([label, *labels]))
        assert explanation.top.class_ == label


def test_an_explanation_does_not_depend_on_the_images_beside_it(bundles):
    x = images(5)
    together = explain(bundles, x, top_classes=2)
    for b in range(5):
        alone = explain(bundles, x[b : b + 1], top_classes=2)[0]
        assert [entry.class_ for entry in alone.classes] == [entry.class_ for entry in together[b].classes]
        for mine, other in zip(alone.classes, together[b].classes, strict=True):
            assert mine.logit == pytest.approx(other.logit, abs=1e-4)
            assert [(e.member, e.prototype) for e in mine.evidence] == [(e.member, e.prototype) for e in other.evidence]


def test_most_similar_prototypes_of_any_class(bundles):
    explanation = explain(bundles[:1], images(1), top_classes=1, most_similar=4)[0]
    similarities = [e.similarity for e in explanation.most_similar]
    every = bundles[0].network(images(1)).similarities_BP[0]
    assert similarities == every.sort(descending=True).values[:4].tolist()


def test_json_and_back_with_source_and_thumbnail(bundles):
    explanation = explain(bundles, images(1), maps=True, thumbnails=True, most_similar=2)[0]
    written = explanation.model_dump_json()
    assert '"class":' in written
    assert '"class_":' not in written
    assert Explanation.model_validate_json(written) == explanation
    source = explanation.top.evidence[0].source
    assert source.uri == "jay/a.jpg"
    assert source.thumbnail == b"\xff\xd8jpeg"
    assert source.box == (0, 10, 20, 30)


def test_a_bundle_that_records_no_sources_explains_without(bundles):
    bare = [Bundle(b.network, b.info, None, b.hash) for b in bundles]
    explanation = explain(bare, images(1), thumbnails=True)[0]
    assert all(e.source is None for entry in explanation.classes for e in entry.evidence)


def test_a_baseline_is_refused_in_a_sentence(bundles):
    baseline = Bundle(Baseline(bundles[0].network.backbone, 3).eval(), bundles[0].info, None, "")
    with pytest.raises(UserError, match="baseline can't explain"):
        explain([baseline], images(1))
    with pytest.raises(UserError, match="baseline can't explain"):
        _ = Predictor([baseline]).explainer
