"""What a class id means and looks like: 0 is the background, 1 to 48 the kinds of object.

An id is 1 + 16 * shape + 8 * material + colour, each counted from 0 in the order of the names
below. By hand: 29 is 1 + 28, and 28 = 16 * 1 + 8 * 1 + 4, so SHAPES[1], MATERIALS[1] and
COLOURS[4]: a brown rubber sphere.
"""

from typing import TypeVar

import numpy as np
from torch import Tensor

SHAPES = ("cube", "sphere", "cylinder")
MATERIALS = ("metal", "rubber")
COLOURS = ("gray", "red", "blue", "green", "brown", "cyan", "purple", "yellow")
FACTOR_SIZES = (len(SHAPES), len(MATERIALS), len(COLOURS))
CLASS_NAMES = ("background",) + tuple(
    f"{colour} {material} {shape}"
    for shape in SHAPES
    for material in MATERIALS
    for colour in COLOURS
)  # the position of a name is its id
NUM_CLASSES = len(CLASS_NAMES)  # 49
NUM_KINDS = NUM_CLASSES - 1  # of object

FRAME_SIZE = 160, 240  # height and width in pixels of the frames that most CLEVR videos have

PAINT = (  # red, green, blue of COLOURS in drawn masks: brighter than the objects themselves
    *((150, 150, 150), (235, 60, 60), (70, 110, 255), (60, 200, 60)),
    *((190, 120, 60), (60, 230, 230), (190, 80, 240), (255, 235, 60)),
)
BACKGROUND_PAINT = (40, 40, 40)
SHADE = 0.11  # how much darker each further kind of object of one colour is painted

Ids = TypeVar("Ids", int, np.ndarray, Tensor)


def factors(ids: Ids) -> tuple[Ids, Ids, Ids]:
    """Return the shapes (0..2), materials (0..1) and colours (0..7) of ids 1..48.

    Args:
        ids: A number, an array or a tensor of integers, none of them the background's 0.
    """
    kinds = ids - 1
    num_materials, num_colours = FACTOR_SIZES[1:]
    shape = kinds // (num_materials * num_colours)
    return shape, kinds // num_colours % num_materials, kinds % num_colours


def from_factors(shape: Ids, material: Ids, colour: Ids) -> Ids:
    """Return the ids 1..48 of shapes, materials and colours: the inverse of `factors`."""
    num_materials, num_colours = FACTOR_SIZES[1:]
    return 1 + (shape * num_materials + material) * num_colours + colour


def class_id(shape: str, material: str, colour: str) -> int:
    """Return the id, 1..48, of a kind of object. Raises ValueError for a name not in the table."""
    return from_factors(SHAPES.index(shape), MATERIALS.index(material), COLOURS.index(colour))


def palette() -> np.ndarray:
    """Return the colour in which each class is drawn, uint8 (49, 3), no two alike."""
    shape, material, colour = factors(np.arange(1, NUM_CLASSES))
    kind = shape * FACTOR_SIZES[1] + material  # 0..5, metal cube to rubber cylinder
    paint = np.array(PAINT, dtype=np.float32)[colour] * (1 - np.float32(SHADE) * kind[:, None])
    return np.concatenate([[BACKGROUND_PAINT], paint]).astype(np.uint8)
