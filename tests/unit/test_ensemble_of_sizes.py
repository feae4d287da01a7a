"""Members that take images of different sizes, normalised differently: each sees the image its own way."""

import asyncio

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from serving import CLASSES, photo

from protopnet import imaging
from protopnet.config import ModelSettings
from protopnet.errors import UserError
from protopnet.evidence.sources import Shown
from protopnet.model.bundle import save_bundle
from protopnet.model.network import build_network, set_phase
from protopnet.predictor import Predictor
from protopnet.scoring.manifest import MANIFEST_SCHEMA
from protopnet.scoring.task import ScoreOptions, Scorer, look
from protopnet.serving.app import references
from protopnet.serving.ensemble import Ensemble
from protopnet.serving.members import Member
from protopnet.serving.settings import AppSettings, MemberSettings
from protopnet.serving.uploads import Upload, decode

ENCODED = [photo(n, width=60 + 10 * n) for n in range(3)]
MODELS = (
    {"backbone": "resnet18", "cut": "layer2", "image_size": 64},
    {"backbone": "timm/test_vit", "image_size": 96},  # [-1, 1]
    {"backbone": "timm/test_efficientnet", "image_size": 64},
)


@pytest.fixture(scope="module")
def uris(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("bundles")
    made = []
    for number, model in enumerate(MODELS):
        torch.manual_seed(number)
        settings = ModelSettings.model_validate(model | {"prototypes": 8, "prototype_depth": 8})
        network = build_network(settings, len(CLASSES))
        set_phase(network, "eval")
        made.append(str(folder / str(number)))
        save_bundle(made[-1], network, settings, CLASSES, {})
    return made


@pytest.fixture(scope="module")
def predictor(uris: list[str]) -> Predictor:
    return Predictor.load(uris)


def photos() -> list[Image.Image]:
    return [imaging.decode(data) for data in ENCODED]


def alone(uri: str) -> torch.Tensor:
    """Logits of one member by itself."""
    member = Predictor.load([uri])
    pixels_BHWC = torch.from_numpy(np.stack([imaging.load(data, member.size) for data in ENCODED]))
    return member.scores(imaging.normalise(pixels_BHWC, member.preprocessing)).logits_BK


def test_each_member_sees_what_it_sees_alone(predictor: Predictor, uris: list[str]) -> None:
    assert predictor.sizes == (64, 96)
    assert len(set(predictor.inputs)) == 3 or predictor.inputs[0] == predictor.inputs[2]
    scores = predictor.scores(predictor.look_at(photos()))
    for member, uri in enumerate(uris):
        assert torch.equal(scores.members_MBK[member], alone(uri))
    padded = predictor.scores(predictor.look_at(photos()), pad_to=5)
    torch.testing.assert_close(padded.logits_BK, scores.logits_BK)
    with pytest.raises(UserError, match="take different images"):
        _ = predictor.preprocessing


def test_points_add_up_and_boxes_lie_in_the_image(predictor: Predictor) -> None:
    given = photos()
    images = predictor.look_at(given)
    explained = predictor.explain(images, [image.size for image in given], top_prototypes=24)
    for logits_K, explanation, image in zip(predictor.scores(images).logits_BK, explained, given, strict=True):
        evidence = explanation.top.evidence
        assert {each.member for each in evidence} == {0, 1, 2}
        assert sum(each.points for each in evidence) == pytest.approx(float(logits_K.max()), rel=1e-4)
        for top, left, bottom, right in (each.box for each in evidence):
            assert 0 <= top < bottom <= image.height
            assert 0 <= left < right <= image.width
    # A member's boxes don't depend on the sizes that others take.
    [first] = Predictor([predictor.bundles[1]]).explain(images[1][:1], [given[0].size], top_prototypes=8)
    boxes = {each.prototype: each.box for each in first.top.evidence}
    same = [each for each in explained[0].classes[0].evidence if each.member == 1]
    assert same
    assert all(boxes.get(each.prototype, each.box) == each.box for each in same)


def test_bulk_scoring_and_the_service_say_the_same(predictor: Predictor, uris: list[str]) -> None:
    expected = predictor.scores(predictor.look_at(photos())).logits_BK
    pictures = [look(data, {}, predictor.sizes, 10**6) for data in ENCODED]
    rows = pa.table([range(3), list("abc"), list("abc"), [-1] * 3, [-1] * 3, [0] * 3], schema=MANIFEST_SCHEMA)
    table, _ = Scorer(predictor, ScoreOptions(batch_size=3, explain=2), torch.device("cpu"))(rows, pictures)
    assert table["logit"].to_pylist() == pytest.approx(expected.max(1).values.tolist(), rel=1e-5)

    refs = references(uris)
    members = [Member(ref, MemberSettings(), threads=1) for ref in refs]
    try:
        seen_B = asyncio.run(_served(refs, members))
    finally:
        for member in members:
            member._precision.close()
    torch.testing.assert_close(seen_B, expected, rtol=1e-4, atol=1e-5)


async def _served(refs: list, members: list[Member]) -> torch.Tensor:
    """Logits as the ingress adds them up."""

    ensemble = Ensemble(refs, [member.see for member in members], MemberSettings(), Shown())
    uploads = [decode(Upload(None, data), ensemble.sizes, AppSettings()) for data in ENCODED]
    return ensemble.scores(await ensemble.look([each.pixels for each in uploads], whole=True)).logits_BK
