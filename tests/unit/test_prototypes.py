"""Nearest patches and similarities: exact, differentiable, small in memory."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from protopnet.model import prototypes as module
from protopnet.model.prototypes import distance_maps, min_distances, patches, similarity, true_float32

KINDS = ["log", "linear", "cosine"]


@st.composite
def layers(draw):
    """A latent map and prototypes of any sizes that fit together, in float64."""
    h, w = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    H, W = h + draw(st.integers(0, 4)), w + draw(st.integers(0, 4))
    B, P, D = draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 6))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z = torch.rand(B, D, H, W, generator=rng, dtype=torch.float64)
    return z, torch.rand(P, D, h, w, generator=rng, dtype=torch.float64)


def brute_force(z_BDHW, prototypes_PDhw, kind):
    """Distances by differences (or by the definition of the cosine), patch by patch."""
    P, _, h, w = prototypes_PDhw.shape
    B, _, H, W = z_BDHW.shape
    d = torch.empty(B, P, H - h + 1, W - w + 1, dtype=torch.float64)
    for row in range(H - h + 1):
        for column in range(W - w + 1):
            patch = z_BDHW[:, None, :, row : row + h, column : column + w].flatten(2)
            prototype = prototypes_PDhw[None].flatten(2)
            if kind == "cosine":
                norms = ((patch**2).sum(2) + 1e-4).sqrt() * ((prototype**2).sum(2) + 1e-4).sqrt()
                d[:, :, row, column] = 1 - (patch * prototype).sum(2) / norms
            else:
                d[:, :, row, column] = ((patch - prototype) ** 2).sum(2)
    return d


@pytest.mark.parametrize("kind", KINDS)
@given(layer=layers())
@settings(max_examples=40, deadline=None)
def test_the_nearest_patch_is_that_of_a_brute_force_search(kind, layer):
    expected = brute_force(*layer, kind)
    distances, index = min_distances(*layer, kind)
    torch.testing.assert_close(distances, expected.flatten(2).amin(2), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(expected.flatten(2).gather(2, index[..., None])[..., 0], distances)
    torch.testing.assert_close(distance_maps(*layer, kind), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@given(layer=layers())
@settings(max_examples=25, deadline=None)
def test_gradients_are_those_of_a_brute_force_search(kind, layer):
    z, prototypes = (tensor.requires_grad_() for tensor in layer)
    weights = torch.rand(len(z), len(prototypes), dtype=torch.float64)
    expected = torch.autograd.grad(
        (brute_force(z, prototypes, kind).flatten(2).amin(2) * weights).sum(), (z, prototypes)
    )
    actual = torch.autograd.grad((min_distances(z, prototypes, kind)[0] * weights).sum(), (z, prototypes))
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["log", "cosine"])
def test_gradcheck(kind):
    z = torch.rand(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    prototypes = torch.rand(7, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: min_distances(a, b, kind)[0], (z, prototypes))


@given(seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_of_equally_near_patches_the_first_is_taken(seed):
    rng = torch.Generator().manual_seed(seed)
    # Small integers: every distance is exact, and many are equal.
    z = torch.randint(0, 2, (4, 3, 5, 5), generator=rng).float()
    prototypes = torch.randint(0, 2, (6, 3, 1, 1), generator=rng).float()
    expected = brute_force(z.double(), prototypes.double(), "log").flatten(2).numpy()
    assert np.array_equal(min_distances(z, prototypes, "log")[1].numpy(), expected.argmin(2))


def test_results_do_not_depend_on_how_prototypes_are_chunked(monkeypatch):
    z = torch.rand(3, 8, 6, 6, requires_grad=True)
    prototypes = torch.rand(300, 8, 1, 1, requires_grad=True)

    def run():
        distances, index = min_distances(z, prototypes, "log")
        return distances, index, *torch.autograd.grad(distances.square().sum(), (z, prototypes))

    whole = run()
    monkeypatch.setattr(module, "_BUFFER_CPU", 1)
    monkeypatch.setattr(module, "_PAIRS", 1)
    torch.testing.assert_close(run(), whole)


def test_the_same_input_gives_the_same_gradients_bit_for_bit():
    z = torch.rand(8, 16, 7, 7, requires_grad=True)
    prototypes = torch.rand(100, 16, 1, 1, requires_grad=True)
    first, second = (
        torch.autograd.grad(min_distances(z, prototypes, "log")[0].sum(), (z, prototypes)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_channels_last_maps_give_the_same():
    z, prototypes = torch.rand(4, 16, 7, 7), torch.rand(10, 16, 1, 1)
    last = z.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(min_distances(last, prototypes, "log"), min_distances(z, prototypes, "log"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prototype_on_its_patch_is_at_distance_zero_even_under_autocast(kind):
    z = torch.rand(4, 512, 7, 7)
    prototypes = z[torch.arange(4), :, 3, 2][:, :, None, None].clone()
    with torch.autocast("cpu", torch.bfloat16):
        distances, index = min_distances(z, prototypes, kind)
        maps = distance_maps(z, prototypes, kind)
    assert distances.dtype == torch.float32
    assert index.diagonal().tolist() == [3 * 7 + 2] * 4
    torch.testing.assert_close(maps.flatten(2).amin(2), distances, rtol=1e-5, atol=1e-6)
    if kind == "cosine":  # 1e-4 is added to the squared norm
        assert distances.diagonal().max() < 2e-6
    else:
        assert distances.diagonal().tolist() == [0.0] * 4
        assert maps[:, :, 3, 2].diagonal().tolist() == [0.0] * 4


def test_in_training_a_prototype_on_its_patch_is_nearly_as_similar_as_can_be():
    z = torch.rand(4, 128, 7, 7)
    prototypes = z[torch.arange(4), :, 3, 2][:, :, None, None].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        distances, _ = min_distances(z, prototypes, "log")
        found = similarity(distances, "log")
    assert distances.diagonal().max() < 5e-5
    assert found.diagonal().min() > 8.8  # of 9.21; bfloat16 gives 2.3


def test_bf16_matrix_products_are_switched_off_and_on_again():
    z, prototypes = torch.rand(2, 128, 7, 7), torch.rand(64, 128, 1, 1)
    exact = min_distances(z, prototypes, "log")[0]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # bfloat16 on CPUs that have it, TF32 on GPUs
        assert torch.equal(min_distances(z, prototypes, "log")[0], exact)
        with true_float32():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_flags_are_restored_after_an_error():
    before = torch.backends.cudnn.conv.fp32_precision
    with pytest.raises(RuntimeError), true_float32():
        raise RuntimeError
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_similarities_are_as_published():
    d = torch.tensor([0.0, 1e-3, 1.0, 128.0], dtype=torch.float64)
    expected = [math.log((x + 1) / (x + 1e-4)) for x in d.tolist()]
    assert similarity(d, "log").tolist() == pytest.approx(expected, rel=1e-12)
    assert similarity(d, "linear").tolist() == [0.0, -1e-3, -1.0, -128.0]
    assert similarity(torch.tensor([0.0, 0.495, 1.5]), "cosine").tolist() == pytest.approx([1 / 1.01, 0.5, 0])


def test_cosine_is_that_of_the_vectors():
    z, prototypes = torch.rand(3, 32, 4, 4) + 0.1, torch.rand(5, 32, 1, 1) + 0.1
    expected = F.cosine_similarity(z[:, None], prototypes[None], dim=2)
    torch.testing.assert_close(1 - distance_maps(z, prototypes, "cosine"), expected, rtol=1e-4, atol=1e-4)


def test_patches_are_in_row_major_order():
    z = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    found = patches(z, 2, 3)
    assert found.shape == (2, 3 * 3, 3 * 2 * 3)
    assert torch.equal(found[1, 1 * 3 + 2], z[1, :, 1:3, 2:5].flatten())


def test_no_tensor_as_large_as_all_distances_is_made():
    """Counts what torch allocates: the full map would be 49 times the result."""
    z = torch.rand(4, 8, 7, 7, requires_grad=True)
    prototypes = torch.rand(20_000, 8, 1, 1, requires_grad=True)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        min_distances(z, prototypes, "log")[0].sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 4 * 20_000 * 49 * 4
