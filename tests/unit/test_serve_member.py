"""A member of the ensemble without Serve around it: what it computes, and how it knows that it is broken."""

import asyncio

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import SIZE, make_bundle, photo, pixels

from protopnet import imaging, storage
from protopnet.errors import UserError
from protopnet.predictor import Predictor
from protopnet.serving.app import references
from protopnet.serving.members import KEPT, BrokenMember, BundleRef, Member, Question, in_parts
from protopnet.serving.settings import MemberSettings

ENCODED = [photo(seed) for seed in range(6)]
PIXELS = [imaging.load(data, SIZE) for data in ENCODED]


@pytest.fixture(scope="module")
def refs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return references([make_bundle(folder / name, seed) for seed, name in enumerate("abc")])


@pytest.fixture
def member(refs):
    started = Member(refs[0], MemberSettings(), threads=1)
    yield started
    started._precision.close()  # which a process of its own never does


def test_a_batch_is_seen_as_the_predictor_sees_that_batch(member, refs):
    seen = member._look([Question(image, refs[0], whole=True) for image in PIXELS])
    [view] = Predictor.load([refs[0].uri]).views(pixels(*ENCODED))
    for place, each in enumerate(seen):
        assert np.array_equal(each.logits_K, view.logits_BK[place])
        assert np.array_equal(each.similarities_P, view.similarities_BP[place])
        assert np.array_equal(each.index_P, view.index_BP[place])
        assert np.array_equal(each.latent_DHW, view.latent_BDHW[place])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1), st.booleans()), min_size=1, max_size=6))
def test_questions_about_several_bundles_are_answered_in_their_order(shared_member, refs, asked):
    seen = shared_member._look([Question(PIXELS[image], refs[bundle], whole) for image, bundle, whole in asked])
    for each, (image, bundle, whole) in zip(seen, asked, strict=True):
        [alone] = shared_member._look([Question(PIXELS[image], refs[bundle], whole)])
        assert np.allclose(each.logits_K, alone.logits_K, rtol=1e-4, atol=1e-5)
        assert (each.latent_DHW is not None) is whole


@pytest.fixture(scope="module")
def shared_member(refs):
    started = Member(refs[0], MemberSettings(), threads=1)
    yield started
    started._precision.close()


def test_only_the_last_bundles_are_kept(member, refs):
    for ref in refs:
        member._look([Question(PIXELS[0], ref, whole=False)])
    assert list(member._predictors) == refs[-KEPT:]


def test_a_bundle_that_was_replaced_in_its_place_is_not_taken_for_the_old_one(member, tmp_path):
    [ref] = references([make_bundle(tmp_path, 7)])
    make_bundle(tmp_path, 8)
    with pytest.raises(BrokenMember, match="deploy it again"):
        member._look([Question(PIXELS[0], ref, whole=False)])


def test_health(member):
    asyncio.run(member.check_health())


@pytest.mark.parametrize("damage", [float("nan"), 0.0])
def test_a_network_that_no_longer_sees_what_it_saw_is_unwell(member, refs, damage):
    member._predictors[refs[0]].bundles[0].network.add_on[0].weight.data.fill_(damage)
    for _ in range(2):
        with pytest.raises(BrokenMember):
            asyncio.run(member.check_health())


def test_no_answer_is_better_than_one_that_is_no_number(member, refs):
    network = member._predictors[refs[0]].bundles[0].network
    network.prototypes.data[0] = float("nan")
    with pytest.raises(BrokenMember, match="aren't numbers"):
        member._look([Question(PIXELS[0], refs[0], whole=False)])
    network.prototypes.data[0] = 0.5
    with pytest.raises(BrokenMember):  # once broken, always broken
        asyncio.run(member.check_health())


def test_float32_flags_survive_threads_that_come_and_go(member):
    """Set for the life of the process: the context inside a pass restores what it found, whoever is in it too."""
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


def test_references_name_what_is_wrong(tmp_path, refs):
    with pytest.raises(UserError, match="no complete bundle"):
        references([str(tmp_path / "nothing")])
    other = storage.read_bytes(f"{refs[0].uri}/model.json").replace(b"001.Blue_Jay", b"001.Grey_Jay")
    for name in ("model.safetensors", "prototypes.parquet"):
        storage.write_bytes(str(tmp_path / "other" / name), storage.read_bytes(f"{refs[0].uri}/{name}"))
    storage.write_bytes(str(tmp_path / "other/model.json"), other)
    with pytest.raises(UserError, match="same classes"):
        references([refs[0].uri, str(tmp_path / "other")])
    assert references([refs[0].uri]) == [BundleRef(refs[0].uri, Predictor.load([refs[0].uri]).bundles[0].hash)]


@given(st.integers(1, 400), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_images_in_parts_are_the_images(size, images):
    """Parts small enough for Ray to send along with a call, as long as there aren't too many."""
    pixels = [np.random.default_rng(n).integers(0, 256, (size, size, 3), dtype=np.uint8) for n in range(images)]
    parts = in_parts(pixels)
    assert np.array_equal(np.split(np.concatenate(parts), images), pixels)
    assert max(part.nbytes for part in parts) < 100 * 1024
