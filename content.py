"""Where the picture is: frames without bars, and frames that show nothing.

Bars are whole rows or columns along a side of the frame that are of one colour in all frames of a
video, up to LEVELS steps in each channel: the flattest rows of real frames have 6.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LEVELS = 4  # of 256, that what shows nothing differs by in a channel
THIN = 2  # rows or columns that are no bar yet
SHARE = 0.25  # of the height and of the width that the picture has at least; else there are no bars
SPARSE = 8  # pixels between those of which most frames are seen to show something


class Box(NamedTuple):
    """A part of a frame: so many rows and columns of pixels lie around it."""

    left: int = 0
    right: int = 0
    above: int = 0
    below: int = 0

    def cut(self, frames: Tensor) -> Tensor:
        """Return that part of frames (..., H, W), a view."""
        height, width = frames.shape[-2:]
        return frames[..., self.above : height - self.below, self.left : width - self.right]


WHOLE = Box()


def is_flat(frames: Tensor) -> Tensor:
    """Return which of the frames (N, 3, H, W), uint8, show nothing, (N,) bool."""
    flat = _range(frames[..., ::SPARSE, ::SPARSE], (2, 3)) <= LEVELS  # (N, 3)
    flat = flat.all(dim=1)
    for n in torch.nonzero(flat).flatten().tolist():  # few, if any
        flat[n] = bool((_range(frames[n], (1, 2)) <= LEVELS).all())
    return flat


class Bars:
    """The bars of a video, as far as its frames were shown to this; more frames may shrink them."""

    def __init__(self):
        self.low = self.high = None  # of each row, then of each column: (3, H) and (3, W)
        self.size = (0, 0)
        self.sides = [0, 0, 0, 0]  # rows above and below, columns left and right

    def add(self, frames: Tensor) -> None:
        """Take frames uint8 (N, 3, H, W) into account; those that show nothing say nothing."""
        flat = is_flat(frames)
        if flat.any():
            frames = frames[~flat]
        if not len(frames):
            return
        if not any(self.size):
            self.size = tuple(frames.shape[2:])
            if _may_have_bars(frames[0]):
                self.sides = [side for side in self.size for _ in range(2)]
        if not any(self.sides):  # as nearly always
            return
        if self.low is None:
            self.low = [torch.full((3, side), 255, dtype=torch.uint8) for side in self.size]
            self.high = [torch.zeros(3, side, dtype=torch.uint8) for side in self.size]
        self._narrow(frames, 0)
        top, bottom = self.sides[:2]
        if top + bottom < self.size[0]:
            self._narrow(frames[:, :, top : self.size[0] - bottom].transpose(2, 3), 1)

    def _narrow(self, frames: Tensor, axis: int) -> None:
        """Shrink the bars at both ends of an axis, whose lines are the rows of `frames`."""
        low, high, length = self.low[axis], self.high[axis], self.size[axis]
        for end in (0, 1):
            most = self.sides[2 * axis + end]
            for count in (
                (1, most) if most else ()
            ):  # mostly the first line shows that none is there
                at = slice(0, count) if end == 0 else slice(length - count, length)
                lines = frames[:, :, at]
                low[:, at] = torch.minimum(low[:, at], lines.amin(dim=(0, 3)))
                high[:, at] = torch.maximum(high[:, at], lines.amax(dim=(0, 3)))
                lowest, highest = low[:, at].int(), high[:, at].int()
                if end:
                    lowest, highest = lowest.flip(1), highest.flip(1)
                spread = highest.cummax(dim=1).values - lowest.cummin(dim=1).values
                same = int((spread <= LEVELS).all(dim=0).sum())
                self.sides[2 * axis + end] = min(same, most)
                if same < count:
                    break

    @property
    def box(self) -> Box:
        """Return where the picture is: everywhere, if there are no bars."""
        above, below, left, right = (side if side >= THIN else 0 for side in self.sides)
        height, width = self.size
        if height - above - below < SHARE * height or width - left - right < SHARE * width:
            return WHOLE
        return Box(left, right, above, below)


def box_of(frames: Tensor) -> Box:
    """Return where the picture is in all frames of a video, uint8 (T, 3, H, W)."""
    bars = Bars()
    bars.add(frames)
    return bars.box


def _may_have_bars(frame: Tensor) -> bool:
    """Return whether some side of a frame (3, H, W) is a line of one colour."""
    pixels = frame.numpy()
    lines = pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]
    return any((np.ptp(line, axis=1) <= LEVELS).all() for line in lines)


def _range(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    return values.amax(dim=dims).int() - values.amin(dim=dims).int()
