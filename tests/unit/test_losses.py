"""Terms of the training loss. The authors' figures are in test_golden."""

import pytest
import torch
import torch.nn.functional as F

from protopnet.config import ModelSettings, TrainSettings
from protopnet.model.losses import Objective, baseline_loss, cross_entropy, objective_of, off_class_l1, prototype_terms
from protopnet.model.network import Output, build_network

# Two prototypes for class 0, one each for classes 1 and 2.
CLASSES = torch.tensor([0, 0, 1, 2])
DISTANCES = torch.tensor([[3.0, 1.0, 5.0, 4.0], [2.0, 6.0, 7.0, 8.0]])
LABELS = torch.tensor([0, 2])
SETTINGS = TrainSettings(cross_entropy=2, cluster=3, separation=-5, l1=7)


def terms(distances=DISTANCES, classes=CLASSES, connections=None):
    connections = torch.zeros(3, len(classes)) if connections is None else connections
    objective = Objective(SETTINGS, off_class_l1(connections, classes))
    return prototype_terms(torch.zeros(2, 3), distances, LABELS, classes, objective)


def test_cluster_is_the_mean_distance_to_the_nearest_own_prototype():
    assert terms()["cluster"] == (1 + 8) / 2


def test_separation_is_the_mean_distance_to_the_nearest_other_prototype():
    assert terms()["separation"] == (4 + 2) / 2


def test_average_separation_is_over_all_other_prototypes_and_only_for_the_log():
    distances = DISTANCES.clone().requires_grad_()
    average = terms(distances)["average_separation"]
    assert average == ((5 + 4) / 2 + (2 + 6 + 7) / 3) / 2
    assert not average.requires_grad


def test_l1_counts_connections_to_other_classes_unnormalised():
    connections = torch.tensor([[9.0, 9, -1, 0], [2, 0, 9, -3], [0, -4, 0, 9]])
    assert off_class_l1(connections, CLASSES) == 1 + 2 + 3 + 4


def test_the_total_is_weighted_by_the_settings():
    found = terms(connections=torch.ones(3, 4))
    log3 = torch.tensor(3.0).log()
    assert found["cross_entropy"] == pytest.approx(log3.item())
    assert found["total"] == pytest.approx((2 * log3 + 3 * 4.5 - 5 * 3 + 7 * 8).item())


def test_far_prototypes_are_still_pulled_nearer():
    """The authors' masked maximum has no gradient when every own-class distance exceeds D*h*w."""
    distances = (DISTANCES + 1e6).requires_grad_()
    terms(distances)["cluster"].backward()
    assert distances.grad.tolist() == [[0, 0.5, 0, 0], [0, 0, 0, 0.5]]


def test_a_class_that_lost_all_its_prototypes_does_not_spoil_the_loss():
    found = terms(DISTANCES[:, :3], CLASSES[:3])
    assert found["cluster"] == (1 + 0) / 2
    assert found["total"].isfinite()


def test_terms_on_one_minus_cosine_have_the_gradients_of_the_published_cosine_terms():
    cosine = torch.rand(2, 4, requires_grad=True)
    own = CLASSES[None] == LABELS[:, None]
    best_own = cosine.masked_fill(~own, -torch.inf).amax(1).mean()
    best_other = cosine.masked_fill(own, -torch.inf).amax(1).mean()
    (expected,) = torch.autograd.grad(-0.8 * best_own + 0.08 * best_other, cosine)
    found = terms(1 - cosine)
    (actual,) = torch.autograd.grad(0.8 * found["cluster"] - 0.08 * found["separation"], cosine)
    torch.testing.assert_close(actual, expected)


def test_the_baseline_has_cross_entropy_alone():
    logits = torch.randn(2, 3)
    found = baseline_loss(Output(logits), LABELS, Objective(SETTINGS, torch.zeros(())))
    expected = F.cross_entropy(logits, LABELS)
    assert found["cross_entropy"] == expected
    assert found["total"] == 2 * expected


def test_a_balanced_loss_counts_every_class_alike():
    labels, logits = torch.tensor([0, 0, 0, 1]), torch.randn(4, 2)
    model = ModelSettings(kind="baseline", backbone="squeezenet1_0", image_size=64)
    objective = objective_of(build_network(model, 2), TrainSettings(balance=True), labels, 2)
    each = F.cross_entropy(logits, labels, reduction="none")
    assert cross_entropy(logits, labels, objective) == pytest.approx(float((each[:3].mean() + each[3]) / 2))
    parts = [cross_entropy(logits[part], labels[part], objective) for part in (slice(0, 2), slice(2, 4))]
    assert sum(parts) / 2 == pytest.approx(float(cross_entropy(logits, labels, objective)))


def test_label_smoothing_is_pytorchs():
    logits = torch.randn(2, 3)
    objective = Objective(TrainSettings(label_smoothing=0.2), torch.zeros(()))
    expected = F.cross_entropy(logits, LABELS, label_smoothing=0.2)
    torch.testing.assert_close(cross_entropy(logits, LABELS, objective), expected)
