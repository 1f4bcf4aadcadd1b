"""Frames of any size: brought to the scale that the network learned, its answer back to theirs.

An object is as many pixels wide as the frame's width makes it (Blender's focal length follows the
width), so frames as wide as those of training are seen as they are, others first resized. Objects
are found at that scale; every pixel of the frame has the class of the object next to it. Squares
are no form of these frames: they were squeezed, or cut out, and are read as the one or the other.
"""

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from classes import FRAME_SIZE
from decode import MAX_PIXELS
from utils import UserError
from videos import size_text

SAME = 0.02  # of the width: so little is nothing to an object
MOST = 16.0  # times larger or smaller
SQUARE = 0.05  # of the height, that the width of a square differs from it
SQUEEZED, CUT = "squeezed to a square", "cut to a square"
EDGE_REACH = 2  # pixels at the learned scale from an edge there to the finer one, at most
AT_ONCE = 2**23  # pixels that are resized together: more would only need memory
NO_OBJECT = 255  # where no object is; 0 is one that was dropped


class View(NamedTuple):
    """How the network looks at a picture, which is a frame or what lies within its bars."""

    size: tuple[int, int]  # height and width at which it tells objects apart
    own: tuple[int, int]  # those of the picture
    reading: str = ""  # of a square, what it was made of: SQUEEZED or CUT

    @property
    def unit(self) -> float:
        """How many times larger objects are than in frames of FRAME_SIZE."""
        axis = 0 if self.reading == CUT else 1
        return self.size[axis] / FRAME_SIZE[axis]

    @property
    def finer(self) -> bool:
        """Whether the picture is larger than what is looked at, so that edges can be seen finer."""
        return any(own > size for own, size in zip(self.own, self.size, strict=True))

    def describe(self, why: str) -> str:
        """Say what is done to frames that are looked at so; "" if nothing is."""
        if self.size == self.own:
            return ""
        read = f" as frames that were {self.reading}" if self.reading else ""
        finer = ", edges are looked at once more, finer" if self.finer else ""
        frames = f"frames of {size_text(self.own)}"
        return f"{frames} are brought to {size_text(self.size)}{read}, {why}{finer}"


class Scale(NamedTuple):
    """At which scale the network sees frames.

    Attributes:
        learned: Height and width of the frames that it learned from.
        factor: What all frames are scaled by; None: to the width of `learned`.
    """

    learned: tuple[int, int] = FRAME_SIZE
    factor: float | None = None

    def views(self, height: int, width: int) -> list[View]:
        """Return how the network may look at pictures of this size: in one way, or two of squares.

        A square is a frame of the learned form that was squeezed, the first way, or what was cut
        out of one, the second.

        Raises:
            UserError: there is no memory for it.
        """
        own, factor = (height, width), self.factor
        if factor is None:
            if is_square(height, width) and not is_square(*self.learned):
                cut = round(self.learned[0] * width / height)
                return [View(self.learned, own, SQUEEZED), View((self.learned[0], cut), own, CUT)]
            factor = min(max(self.learned[1] / width, 1 / MOST), MOST)
            if abs(factor - 1) <= SAME:
                factor = 1.0
        size = (max(1, round(height * factor)), max(1, round(width * factor)))
        if math.prod(size) > max(MAX_PIXELS, height * width):
            raise UserError(
                f"frames of {size_text(own)} would be {size_text(size)} for the "
                "network, which is too large: give a smaller --scale"
            )
        return [View(size, own)]

    def describe(self, view: View) -> str:
        """Say what is done to frames that are looked at so; "" if nothing is."""
        why = "the scale that the network learned (--scale 1: as they are)"
        return view.describe(why if self.factor is None else f"as --scale {self.factor:g} says")


def is_square(height: int, width: int) -> bool:
    """Return whether a frame is a square, or nearly."""
    return abs(width / height - 1) <= SQUARE


USUAL_SCALE, AS_THEY_ARE = Scale(), Scale(factor=1.0)


def learned_size(checkpoint: dict[str, Any], path: str | Path) -> tuple[int, int]:
    """Return the height and width of the frames that a checkpoint learned from.

    Raises:
        UserError: what it says of them is no size.
    """
    size = checkpoint.get("frame_size", FRAME_SIZE)
    whole = isinstance(size, (list, tuple)) and all(type(s) is int and s > 0 for s in size)
    if not whole or len(size) != 2 or size[0] * size[1] > MAX_PIXELS:
        raise UserError(f"{path}: frame_size is {size}, not a height and a width: train anew")
    return tuple(size)


def scale_factor(text: str) -> float:
    """Read a factor from the command line, an argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 / MOST <= value <= MOST:
        advice = f"give a number from {1 / MOST} to {MOST:g} (1: frames as they are), not {text!r}"
        raise argparse.ArgumentTypeError(advice)
    return value


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Return uint8 frames (B, 3, H, W) in another size (height, width), without aliasing."""
    if frames.shape[-2:] == size:
        return frames
    if frames.device.type == "cpu":  # bytes, in a third of the time
        return F.interpolate(frames, size, mode="bilinear", antialias=True)
    parts = frames.split(max(1, AT_ONCE // max(frames[0, 0].numel(), size[0] * size[1])))
    return torch.cat(
        [
            F.interpolate(part.float(), size, mode="bilinear", antialias=True).round().byte()
            for part in parts
        ]
    )


def pack(outlines: Tensor) -> Tensor:
    """Return outlines (N, H, W), bool, as bits, uint8 (N, H, W / 8): of long clips all are kept."""
    return torch.from_numpy(np.packbits(outlines.numpy(), axis=-1))


def fill(labels: Tensor, objects: Tensor, packed: Tensor, size: tuple[int, int]) -> Tensor:
    """Return labels in the size of the frames, (T, H, W) uint8: each pixel that of what is nearest.

    Args:
        labels: (T, h, w) uint8 ids at the scale of the network.
        objects: (T, h, w) bool, where it sees an object, be it labelled or dropped.
        packed: Where there is an object in the frames, as of `pack`.
        size: Height and width of the frames.
    """
    outlines = np.unpackbits(packed.numpy(), axis=-1, count=size[1])

    # The pixels to fill, and where their centres lie in pixels of the network's scale.
    shape = outlines.shape
    height, width = labels.shape[1:]
    where = np.flatnonzero(outlines)
    line, column = np.divmod(where, shape[2])
    t, row = np.divmod(line, shape[1])
    y = (row + 0.5) * (height / shape[1]) - 0.5
    x = (column + 0.5) * (width / shape[2]) - 0.5

    # Those that lie in a labelled pixel have its label.
    margin = ((0, 0), (EDGE_REACH, EDGE_REACH), (EDGE_REACH, EDGE_REACH))
    known = np.where(objects.numpy(), labels.numpy(), np.uint8(NO_OBJECT))
    known = np.pad(known, margin, constant_values=NO_OBJECT)
    top, left = np.rint(y).astype(np.int64), np.rint(x).astype(np.int64)
    found = known[t, top + EDGE_REACH, left + EDGE_REACH]

    # The rest have that of the nearest labelled pixel in a window of EDGE_REACH around them.
    rest = np.flatnonzero(found == NO_OBJECT)
    step = np.arange(2 * EDGE_REACH + 1)
    window = known[
        t[rest, None, None], top[rest, None, None] + step[:, None], left[rest, None, None] + step
    ]
    down = (top[rest, None] + step - EDGE_REACH - y[rest, None]) ** 2
    right = (left[rest, None] + step - EDGE_REACH - x[rest, None]) ** 2
    distance = np.where(window == NO_OBJECT, np.inf, down[:, :, None] + right[:, None])
    nearest = distance.reshape(len(rest), step.size**2).argmin(axis=1)
    found[rest] = window.reshape(len(rest), step.size**2)[np.arange(len(rest)), nearest]

    result = np.zeros(shape, np.uint8)
    result.reshape(-1)[where] = np.where(found == NO_OBJECT, 0, found)
    return torch.from_numpy(result)
