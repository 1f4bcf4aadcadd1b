"""What an id means: by hand, there and back, for numbers, arrays and tensors."""

import numpy as np
import pytest
import torch

import classes
from classes import class_id, factors, from_factors


def test_class_ids_worked_out_by_hand():
    assert len(classes.CLASS_NAMES) == classes.NUM_CLASSES == 49
    assert classes.CLASS_NAMES[0] == "background"
    by_hand = {1: "gray metal cube", 12: "green rubber cube", 17: "gray metal sphere"}
    by_hand |= {21: "brown metal sphere", 29: "brown rubber sphere", 48: "yellow rubber cylinder"}
    for i, name in by_hand.items():
        colour, material, shape = name.split()
        assert classes.CLASS_NAMES[i] == name
        assert class_id(shape, material, colour) == i
    with pytest.raises(ValueError, match="not in"):
        class_id("cube", "metal", "pink")


def test_factors_are_those_of_the_name_and_lead_back():
    ids = torch.arange(1, classes.NUM_CLASSES)
    shape, material, colour = factors(ids)
    names = [
        f"{classes.COLOURS[c]} {classes.MATERIALS[m]} {classes.SHAPES[s]}"
        for s, m, c in zip(shape, material, colour, strict=True)
    ]
    assert tuple(names) == classes.CLASS_NAMES[1:]
    assert torch.equal(from_factors(shape, material, colour), ids)


def test_numbers_arrays_and_tensors_are_taken_apart_alike():
    assert factors(29) == (1, 1, 4)
    assert [part.tolist() for part in factors(np.array([1, 29, 48]))] == [
        [0, 1, 2],
        [0, 1, 1],
        [0, 4, 7],
    ]
    assert [part.tolist() for part in factors(torch.tensor([29], dtype=torch.uint8))] == [
        [1],
        [1],
        [4],
    ]
    assert from_factors(1, 1, 4) == 29
