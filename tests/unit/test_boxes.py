"""Boxes on images: half-open (top, left, bottom, right). The authors' figures are in test_golden."""

import numpy as np
import torch

from protopnet.model.boxes import (
    activation_boxes,
    high_boxes,
    receptive_field_boxes,
    scale_boxes,
    upsample,
)
from protopnet.model.receptive_field import ReceptiveField

VGG16 = ReceptiveField(cells=7, jump=32, size=212, start=16.0)


def test_a_box_holds_exactly_what_is_at_or_above_the_percentile():
    maps = torch.zeros(2, 20, 30)
    maps[0, 3:5, 7:11] = 1
    maps[1, 0, 0] = maps[1, 19, 29] = 1  # two blobs: one box around both
    assert high_boxes(maps, percentile=99).tolist() == [[3, 7, 5, 11], [0, 0, 20, 30]]


def test_a_flat_map_gives_the_whole_image():
    assert activation_boxes(torch.full((1, 7, 7), 2.0), 64).tolist() == [[0, 0, 64, 64]]


def test_the_box_lies_over_the_most_active_cell():
    maps = torch.zeros(1, 7, 7)
    maps[0, 5, 1] = 1
    top, left, bottom, right = activation_boxes(maps, 224)[0]
    assert top < 5.5 * 32 < bottom
    assert left < 1.5 * 32 < right
    assert bottom - top < 64


def test_maps_can_be_enlarged_to_sides_of_different_length():
    assert upsample(torch.rand(3, 7, 7), 50, 80).shape == (3, 50, 80)


def test_receptive_fields_end_at_the_border():
    boxes = receptive_field_boxes([(0, 6), (3, 3)], VGG16, 224)
    assert boxes.tolist() == [[0, 102, 122, 224], [6, 6, 218, 218]]


def test_a_prototype_of_two_cells_sees_one_jump_more():
    wide = VGG16.after(kernel=2, stride=1, padding=0)
    assert (wide.cells, wide.jump, wide.size, wide.start) == (6, 32, 244, 32.0)
    one, two = (receptive_field_boxes([(3, 3)], VGG16, 1000, shape)[0] for shape in ((1, 1), (1, 2)))
    assert two[3] - two[1] == one[3] - one[1] + 32
    assert two[2] - two[0] == one[2] - one[0]


def test_boxes_are_scaled_outwards_to_the_image_itself():
    boxes = np.array([[0, 0, 224, 224], [10, 20, 30, 40]])
    scaled = scale_boxes(boxes, 224, width=500, height=333)
    assert scaled.tolist() == [[0, 0, 333, 500], [14, 44, 45, 90]]


def test_scaling_to_the_same_size_changes_nothing():
    boxes = np.array([[1, 2, 3, 4]])
    assert scale_boxes(boxes, 224, 224, 224).tolist() == boxes.tolist()
