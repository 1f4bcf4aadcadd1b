"""One object, one class: scenes of which the right labels are known."""

import pytest
import torch

from classes import COLOURS, class_id
from objects import consistent_labels


def logits_of(name, margin):
    """Return the 13 logits of a pixel that looks like, say, "cube metal red" by a margin."""
    names = ("cube", "sphere", "cylinder", "metal", "rubber", *COLOURS)
    return torch.tensor([margin * (n in name.split()) for n in names])


def scene(*blocks, frames=22):
    """Return objects and evidence of blocks (frames, rows, columns, name, margin)."""
    objects = torch.zeros(frames, 40, 60, dtype=torch.bool)
    logits = torch.zeros(frames, 40, 60, 13)
    for when, rows, columns, name, margin in blocks:
        for t in when:
            objects[t, rows, columns] = True
            logits[t, rows, columns] = logits_of(name, margin)
    return objects, logits[objects]


LEFT, MIDDLE, RIGHT = slice(0, 20), slice(20, 40), slice(40, 60)
ROWS = slice(10, 30)


def test_a_class_that_flips_is_set_right_and_foreground_stays():
    flips = [3, 17]  # by a margin of 2, against 20 frames in which it is a cube by 6
    rest = [t for t in range(22) if t not in flips]
    objects, evidence = scene(
        (rest, ROWS, LEFT, "cube metal red", 6.0),
        (flips, ROWS, LEFT, "cylinder metal red", 2.0),
        (range(22), slice(10, 11), LEFT, "cube metal gray", 1.0),  # its edge, in doubt
    )
    labels = consistent_labels(objects, evidence)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels > 0, objects)
    assert labels[objects].unique().tolist() == [class_id("cube", "metal", "red")]


@pytest.mark.parametrize("frame", [0, 9, 21])
def test_a_briefly_seen_object_keeps_its_class(frame):
    """8 pixels in one frame, beside 8,800 of an object that differs in shape alone."""
    objects, evidence = scene(
        (range(22), ROWS, LEFT, "cube metal red", 8.0),
        ([frame], slice(0, 4), slice(58, 60), "sphere metal red", 12.0),
    )
    labels = consistent_labels(objects, evidence)
    assert torch.equal(labels > 0, objects)
    assert (labels[frame, 0:4, 58:60] == class_id("sphere", "metal", "red")).all()
    assert (labels[:, ROWS, LEFT] == class_id("cube", "metal", "red")).all()


def test_touching_objects_of_one_colour_keep_their_classes():
    objects, evidence = scene(
        (range(22), ROWS, LEFT, "cube rubber blue", 3.0),
        (range(22), ROWS, MIDDLE, "cylinder rubber blue", 3.0),
        (range(5), ROWS, RIGHT, "cylinder metal blue", 3.0),
    )
    labels = consistent_labels(objects, evidence)
    assert (labels[:, ROWS, LEFT] == class_id("cube", "rubber", "blue")).all()
    assert (labels[:, ROWS, MIDDLE] == class_id("cylinder", "rubber", "blue")).all()
    assert (labels[:5, ROWS, RIGHT] == class_id("cylinder", "metal", "blue")).all()
    assert not labels[5:, ROWS, RIGHT].any()


@pytest.mark.parametrize("pixels", [0, 1, 2])
def test_one_frame_and_hardly_an_object(pixels):
    blocks = [([0], slice(0, 1), slice(0, pixels), "sphere rubber cyan", 5.0)] if pixels else []
    objects, evidence = scene(*blocks, frames=1)
    labels = consistent_labels(objects, evidence)
    assert labels.shape == (1, 40, 60)
    assert (labels[objects] == class_id("sphere", "rubber", "cyan")).all()
    assert (labels > 0).sum() == pixels
