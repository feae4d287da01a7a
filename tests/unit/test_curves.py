"""Deletion and insertion, and what is beside a box, on images whose answers are known."""

import numpy as np
import pytest
import torch

from protopnet.quality.metrics import curve_quality
from protopnet.quality.perturbations import area_under, deletion_and_insertion, only_in_focus, overlaps


class TestCurves:
    """The score is what is left of the one bright pixel there is."""

    @staticmethod
    def left(images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 10, 20]

    def one_pixel(self) -> tuple[torch.Tensor, torch.Tensor]:
        image, saliency = torch.zeros(3, 32, 32), torch.zeros(32, 32)
        image[:, 10, 20] = saliency[10, 20] = 1
        return image, saliency

    def test_where_the_map_is_right_deletion_falls_and_insertion_rises_at_once(self) -> None:
        deletion, insertion = deletion_and_insertion(self.left, *self.one_pixel(), steps=16)
        assert deletion == [1.0] + [0.0] * 16
        assert insertion[1:] == [1.0] * 16
        assert 0.2 < insertion[0] < 0.6  # blurred, not blank
        assert area_under(deletion) == pytest.approx(0.5 / 16)

    def test_where_it_is_wrong_they_do_so_last(self) -> None:
        image, saliency = self.one_pixel()
        deletion, insertion = deletion_and_insertion(self.left, image, -saliency, steps=16)
        assert deletion == [1.0] * 16 + [0.0]
        assert insertion == [insertion[0]] * 16 + [1.0]
        assert insertion[0] < 0.6

    def test_pixels_go_in_equal_steps_the_first_of_equal_ones_first(self) -> None:
        def left(images: torch.Tensor) -> torch.Tensor:
            return images.sum((1, 2, 3)) / 3

        deletion, insertion = deletion_and_insertion(left, torch.full((3, 4, 4), 1 / 16), torch.zeros(4, 4), 8)
        assert deletion == pytest.approx(np.linspace(1, 0, 9).tolist())
        assert insertion == pytest.approx([1.0] * 9)  # it is all one colour, blurred or not
        assert area_under(deletion) == pytest.approx(0.5)

    def test_published_steps(self) -> None:
        sizes: list[int] = []

        def count(images: torch.Tensor) -> torch.Tensor:
            sizes.append(len(images))
            return (images == 0).all(1).sum((1, 2)).float()

        deletion, _ = deletion_and_insertion(count, torch.ones(3, 224, 224), torch.rand(224, 224))
        assert sizes == [29 + 28]  # the whole image is shared
        assert deletion == [1792.0 * step for step in range(29)]

    def test_what_is_beside_a_box_is_blurred_and_boxes_overlap_as_they_do(self) -> None:
        image = torch.rand(3, 32, 32)
        boxes = np.array([[0, 0, 16, 32], [8, 8, 10, 12]])
        first, second = only_in_focus(image, boxes)
        assert torch.equal(first[:, :16], image[:, :16])
        assert float(first[:, 16:].std()) < 0.7 * float(image[:, 16:].std())
        assert torch.equal(second[:, 8:10, 8:12], image[:, 8:10, 8:12])
        assert overlaps(boxes, np.array([[0, 0, 16, 16], [20, 20, 30, 30]])).tolist() == [0.5, 0.0]

    def test_the_mean_over_images(self) -> None:
        assert curve_quality([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]) == {"value": 0.5, "images": 2, "curve": [1, 0.5, 0]}
        assert curve_quality([]) is None
