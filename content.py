"""Where the picture is: frames without bars, and frames that show nothing.

Bars are whole rows or columns along a side of the frame that are of one colour in all frames of a
video, up to LEVELS steps in each channel: the flattest rows of real frames have 6. Where they were
resized or compressed, their inner edge is soft, and belongs to them.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LEVELS = 4  # of 256, that what shows nothing differs by in a channel
THIN = 2  # rows or columns that are no bar yet
SHARE = 0.25  # of the height and of the width that the picture has at least; else there are no bars
SOFT = 16  # rows or columns of an edge that is soft, at most
BLOCK = 8  # further on, that a soft row is compared with: the blocks of codecs are as wide
CONTRAST = 0.85  # a row is soft if it differs from the bar by less than so much of that one's ...
DIFFERENT = 24.0  # ... if that is so many levels at least: beside gray bars nothing shows
SPARSE = 8  # pixels between those of which most frames are seen to show something


class Box(NamedTuple):
    """A part of a frame: so many columns and rows of pixels lie around it."""

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
    """Return which of the frames uint8 (N, 3, H, W), on the CPU, show nothing, (N,) bool."""
    flat = _range(frames[..., ::SPARSE, ::SPARSE], (2, 3)) <= LEVELS  # (N, 3)
    flat = flat.all(dim=1)
    for n in torch.nonzero(flat).flatten().tolist():  # few, if any
        flat[n] = bool((_range(frames[n], (1, 2)) <= LEVELS).all())
    return flat


def may_have_bars(frame: Tensor) -> bool:
    """Return whether some side of a frame (3, H, W), on the CPU, is a line of one colour.

    A video of which some frame has no such side has no bars.
    """
    pixels = frame.numpy()
    lines = pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]
    return any((np.ptp(line, axis=1) <= LEVELS).all() for line in lines)


class Bars:
    """The bars of a video, as far as its frames were shown to this; more frames may shrink them."""

    def __init__(self):
        self.first: Tensor | None = None  # frame that shows something
        self.ends = [0, 0, 0, 0]  # rows above and below, columns left and right
        self.low: list[Tensor] = []  # of each row, then of each column: (3, H) and (3, W)
        self.high: list[Tensor] = []

    def add(self, frames: Tensor) -> None:
        """Take frames uint8 (N, 3, H, W) into account; those that show nothing say nothing."""
        flat = is_flat(frames)
        if flat.any():
            frames = frames[~flat]
        if not len(frames):
            return
        if self.first is None:
            self.first, size = frames[0].clone(), frames.shape[2:]
            if may_have_bars(self.first):
                self.ends = [side for side in size for _ in range(2)]
            self.low = [torch.full((3, side), 255, dtype=torch.uint8) for side in size]
            self.high = [torch.zeros(3, side, dtype=torch.uint8) for side in size]
        if not any(self.ends):  # as nearly always
            return
        height = frames.shape[2]
        self._narrow(frames, 0)
        above, below = self.ends[:2]
        if above + below < height:
            self._narrow(frames[:, :, above : height - below].transpose(2, 3), 1)

    def _narrow(self, frames: Tensor, axis: int) -> None:
        """Shrink the bars at both ends of an axis, whose lines are the rows of `frames`."""
        low, high, length = self.low[axis], self.high[axis], frames.shape[2]
        for end in (0, 1):
            most = self.ends[2 * axis + end]
            if not most:
                continue
            at = slice(0, most) if end == 0 else slice(length - most, length)
            lines = frames[:, :, at]
            low[:, at] = torch.minimum(low[:, at], lines.amin(dim=(0, 3)))
            high[:, at] = torch.maximum(high[:, at], lines.amax(dim=(0, 3)))
            lowest, highest = low[:, at].int(), high[:, at].int()
            if end:
                lowest, highest = lowest.flip(1), highest.flip(1)
            spread = highest.cummax(dim=1).values - lowest.cummin(dim=1).values
            self.ends[2 * axis + end] = int((spread <= LEVELS).all(dim=0).sum())

    @property
    def box(self) -> Box:
        """Return where the picture is: everywhere, if there are no bars."""
        if self.first is None or not any(self.ends):
            return WHOLE
        height, width = self.first.shape[1:]
        above, below, left, right = (end if end >= THIN else 0 for end in self.ends)
        if min(height - above - below, width - left - right) > 0:
            picture = Box(left, right, above, below).cut(self.first).float().mean(dim=0)
            rows, columns = picture.mean(dim=1).numpy(), picture.mean(dim=0).numpy()
            whole = self.first.float().mean(dim=0)
            above += _soft(rows, above, whole[0])
            below += _soft(rows[::-1], below, whole[-1])
            left += _soft(columns, left, whole[:, 0])
            right += _soft(columns[::-1], right, whole[:, -1])
        if height - above - below < SHARE * height or width - left - right < SHARE * width:
            return WHOLE
        return Box(left, right, above, below)


def _soft(lines: np.ndarray, bar: int, outermost: Tensor) -> int:
    """Return how many lines of a picture, by their means, are the soft edge of a bar."""
    count = 0
    away = np.abs(lines - float(outermost.mean()))
    while bar and count < min(SOFT, len(away) - BLOCK):
        beyond = away[count + BLOCK]
        if beyond < DIFFERENT or away[count] >= CONTRAST * beyond:
            break
        count += 1
    return count


def _range(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    return values.amax(dim=dims).int() - values.amin(dim=dims).int()
