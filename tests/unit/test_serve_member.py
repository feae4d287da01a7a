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
from protopnet.serving.members import KEPT, BrokenMember, BundleRef, Member, in_parts
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
    seen = asyncio.run(member.see(refs[0], True, len(PIXELS), *in_parts(PIXELS)))
    [view] = Predictor.load([refs[0].uri]).views(pixels(*ENCODED))
    for place, each in enumerate(seen):
        assert np.array_equal(each.logits_K, view.logits_BK[place])
        assert np.array_equal(each.similarities_P, view.similarities_BP[place])
        assert np.array_equal(each.index_P, view.index_BP[place])
        assert np.array_equal(each.latent_DHW, view.latent_BDHW[place])
    without_evidence = asyncio.run(member.see(refs[0], False, 1, PIXELS[0]))
    assert without_evidence[0].latent_DHW is None


def test_only_the_last_bundles_are_kept(member, refs):
    for ref in refs:
        asyncio.run(member.see(ref, False, 1, PIXELS[0]))
    assert list(member._predictors) == refs[-KEPT:]


def test_a_bundle_that_was_replaced_in_its_place_is_not_taken_for_the_old_one(member, tmp_path):
    [ref] = references([make_bundle(tmp_path, 7)])
    make_bundle(tmp_path, 8)
    with pytest.raises(BrokenMember, match="deploy it again"):
        asyncio.run(member.see(ref, False, 1, PIXELS[0]))


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
        asyncio.run(member.see(refs[0], False, 1, PIXELS[0]))
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
