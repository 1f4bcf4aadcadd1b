"""Drawn masks: colours that differ."""

import numpy as np

import pictures
from classes import class_id


def test_each_class_has_a_paint_of_its_own():
    palette = pictures.palette()
    assert (palette.shape, palette.dtype) == ((49, 3), np.uint8)
    assert len(np.unique(palette, axis=0)) == 49
    by_hand = np.array([70, 110, 255]) * (1 - 0.11 * 2)  # blue, the third of six kinds
    assert palette[class_id("sphere", "metal", "blue")].tolist() == by_hand.astype(int).tolist()
