"""A second look where it matters: the edges of large frames, the borders between objects.

The network tells objects apart at the scale that it learned, in cells of 2 x 2 pixels. It looks
again, but only at windows of the picture: in larger frames around objects, at twice that scale,
for edges in the frame's own size; and around borders between two objects a pixel aside, so that
its cells lie between those of the other look at that scale.

Windows are of few sizes, in the order of frames, and looked at in batches that are always full, so
that what they tell does not depend on how many frames come together.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from classes import NUM_CLASSES
from devices import to_cpu
from metrics import dilated
from model import NUM_ATTRIBUTES, Answer
from scale import View, pack, resize
from tracks import likeliest, occupied

FINER = 2  # times the scale of the first look, at which larger frames are looked at again
CELL = 2  # pixels of the first look
SIDES = {1: (32,), FINER: (48, 64, 80, 96)}  # pixels that windows are high and wide, by scale
MARGIN = 4  # pixels on each side of a window that only show what is around
WINDOWS_AT_ONCE = {1: 24, FINER: 8}
BAND = 6  # pixels of the first look on each side of a border that are kept to compare it with
FIRST_LOOK = 0.5  # weight of what it says, where frames have another size than it
SURROUNDINGS = 2  # cells each way that are looked at for another kind of object ...
SOLID = 5  # ... of which so many make it more than noise
BUSY = 0.1  # of all cells; a frame that has more where kinds meet is not looked at for borders
NOWHERE = 2**31  # beyond all rows and columns


class Details(NamedTuple):
    """What second looks tell of N frames, whose first look was at h x w pixels."""

    outlines: Tensor | None  # packed, (N, H, W): objects in the picture's own size, if that differs
    where: Tensor  # (m,) int64, flat positions in (N, h, w), rising: around borders
    # Logits of shape, material and colour there, half: (m, 13); of larger frames (m, 26), those of
    # the finer look, then those of the one aside, taken as if all lay half a position further on.
    evidence: Tensor


class Windows(NamedTuple):
    """Where the network looks again: windows of one size. Lengths are in pixels of that look."""

    frame: np.ndarray  # (n,) rising
    top: np.ndarray  # (n,)
    left: np.ndarray  # (n,)
    scale: int  # of that look: FINER, or 1
    picture: tuple[int, int]  # height and width of the whole picture
    sides: tuple[int, int]  # those of a window

    def corners(self) -> Iterator[tuple[int, int, int]]:
        """Yield frame, top and left of each."""
        return zip(self.frame.tolist(), self.top.tolist(), self.left.tolist(), strict=True)

    def cut(self, maps: Tensor, coarser: int = 1, more: int = 0) -> list[Tensor]:
        """Return what each shows of maps (N, ..., H, W).

        Args:
            maps: Of the picture, at the scale of the windows or a coarser one.
            coarser: How many times; 1 for maps of the windows' own scale.
            more: Rows and columns of them beyond the end of a window.
        """
        rows, columns = (side // coarser + more for side in self.sides)
        corners = ((n, y // coarser, x // coarser) for n, y, x in self.corners())
        return [maps[n, ..., y : y + rows, x : x + columns] for n, y, x in corners]

    def inner(self) -> Iterator[tuple[slice, slice]]:
        """Yield which rows and columns of each count: all but a margin, within the picture."""
        for _, *corner in self.corners():
            sides = []
            for first, length, whole in zip(corner, self.sides, self.picture, strict=True):
                end = length if first + length == whole else length - MARGIN
                sides.append(slice(MARGIN if first else 0, end))
            yield tuple(sides)


def look_again(
    network: Callable[[Tensor], Answer],
    picture: Tensor,
    objects: Tensor,
    evidence: Tensor,
    objectness: Tensor | None,
    view: View,
    with_borders: bool,
) -> Details:
    """Look at windows of pictures once more, where that tells something.

    Args:
        network: Gives the finest answer to uint8 (B, 3, S, S).
        picture: uint8 (N, 3, H, W) in its own size, or as it was looked at, on its device; all else
            is on the CPU.
        objects: (N, h, w) bool, where the first look sees an object.
        evidence: (n, 13) logits of its cells that hold one, in order.
        objectness: (N, 1, h, w) logits, if the picture's own size is another.
        view: How it was looked at.
        with_borders: Whether borders between objects are looked at.
    """
    cells = border_cells(objects, evidence) if with_borders else np.zeros((3, 0), np.int64)
    scale = FINER if view.finer else 1
    straight = cover(object_cells(objects), scale, view.size) if view.finer else []
    aside = cover(cells, scale, view.size, aside=1)
    groups = straight + aside
    if groups:
        picture = resize(picture, groups[0].picture)
    answers = [answer_windows(network, picture, windows) for windows in groups]
    if answers:  # all that is looked at is waited for once
        found = to_cpu([part for answer in answers for part in answer])
        answers = [Answer(*found[n : n + 2]) for n in range(0, len(found), 2)]

    outlines = None
    if objectness is not None:
        if view.finer:
            fine = [part.objectness for part in answers[: len(straight)]]
            outlines = edges(objectness, straight, fine, view.own)
        else:
            outlines = F.interpolate(objectness.float(), view.own, mode="bilinear")[:, 0] > 0
        outlines = pack(outlines)
    attributes = [part.attributes for part in answers]
    if scale == 1:  # cells are as wide as those of the first look
        attributes = [
            F.interpolate(part.float(), scale_factor=CELL, mode="bilinear") for part in attributes
        ]
    n = len(straight)
    looks = [(straight, attributes[:n])] if view.finer else []
    looks.append((aside, attributes[n:]))
    return Details(outlines, *evidence_at(cells, looks, tuple(objects.shape)))


def answer_windows(
    network: Callable[[Tensor], Answer], picture: Tensor, windows: Windows
) -> Answer:
    """Return the answer to n windows of pictures uint8 (N, 3, H, W), on their device.

    They are looked at in full batches; the last is filled up with its last window.
    """
    shown = windows.cut(picture)
    count, full = len(shown), WINDOWS_AT_ONCE[windows.scale]
    shown += shown[-1:] * (-count % full)
    batches = (torch.stack(shown[start : start + full]) for start in range(0, count, full))
    parts = zip(*(network(batch) for batch in batches), strict=True)
    return Answer(*(torch.cat(part)[:count] for part in parts))


def join(parts: list[Details], frames: Sequence[int], pixels: int) -> Details:
    """Return the details of consecutive frames as one.

    Args:
        parts: In order.
        frames: How many each is of.
        pixels: h x w of the first look.
    """
    starts = np.cumsum([0, *frames[:-1]]) * pixels
    where = [part.where + int(start) for part, start in zip(parts, starts, strict=True)]
    outlines = None
    if parts[0].outlines is not None:
        outlines = torch.cat([part.outlines for part in parts])
    evidence = torch.cat([part.evidence for part in parts])
    return Details(outlines, torch.cat(where), evidence)


def split(details: Details, frames: Sequence[int], pixels: int) -> Iterator[Details]:
    """Yield the details of each of several videos; arguments as of `join`."""
    start = 0
    for count in frames:
        ends = torch.tensor([start, start + count]) * pixels
        first, last = torch.searchsorted(details.where, ends).tolist()
        outlines = None if details.outlines is None else details.outlines[start : start + count]
        where = details.where[first:last] - int(ends[0])
        yield Details(outlines, where, details.evidence[first:last])
        start += count


def border_cells(objects: Tensor, evidence: Tensor) -> np.ndarray:
    """Return where two kinds of object meet: cells of 2 x 2 pixels, (3, m): frame, row, column.

    Args:
        objects: (N, h, w) bool, on the CPU.
        evidence: (n, 13) logits of the cells that hold an object, in order.
    """
    cells, margin = occupied(objects), SURROUNDINGS
    cells = F.pad(cells, [margin] * 4).numpy()
    at = np.flatnonzero(cells)
    ids = np.zeros(cells.size, np.uint8)
    ids[at] = likeliest(evidence).numpy()

    # Cells beside another kind: most borders are within one object, noise of a few cells.
    columns, own = cells.shape[2], ids[at]
    beside = np.zeros(len(at), bool)
    for step in (1, columns - 1, columns, columns + 1):
        for other in (ids[at + step], ids[at - step]):
            beside |= (other != own) & (other > 0)
    at = at[beside]

    # A frame that is full of them shows noise, not objects.
    area = cells.shape[1] * columns
    many = np.bincount(at // area, minlength=len(cells)) > BUSY * area
    at = at[~many[at // area]]

    # Those whose surroundings hold more than noise of two kinds.
    step = np.arange(-margin, margin + 1)
    around = ids[at[:, None] + (step[:, None] * columns + step).reshape(-1)]
    count = np.zeros((len(at), NUM_CLASSES), np.int64)
    np.add.at(count, (np.arange(len(at))[:, None], around), 1)
    second = np.partition(count[:, 1:], -2, axis=1)[:, -2] if len(at) else count[:, 0]
    frame, row, column = np.unravel_index(at[second >= SOLID], cells.shape)
    return np.stack([frame, row - margin, column - margin])


def object_cells(objects: Tensor) -> np.ndarray:
    """Return the cells that hold an object, and those around them; as `border_cells`."""
    return np.stack(np.nonzero(dilated(occupied(objects)).numpy()))


def cover(cells: np.ndarray, scale: int, size: tuple[int, int], aside: int = 0) -> list[Windows]:
    """Return windows whose inner parts hold all of the cells (3, m), by their size.

    Each has the topmost cells that are left, and of those as wide as it is the leftmost; it is then
    as small as they allow.

    Args:
        cells: As of `border_cells`.
        scale: Of the look at the windows.
        size: Height and width of the first look.
        aside: Pixels that windows lie off the cells of a look at all of the picture, unless they
            are at its edge.
    """
    cell, picture = CELL * scale, tuple(scale * side for side in size)
    limits = [(side - 2 * (MARGIN + aside)) // cell for side in SIDES[scale]]  # cells each way
    frames, spans = [], []
    while cells.shape[1]:
        # In each frame: the rows that a window takes in from the topmost cell on, and of the cells
        # in them those that it takes in from the leftmost on.
        frame, row, column = cells
        starts = np.flatnonzero(np.diff(frame, prepend=-1))
        of = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(frame)))
        strip = row < np.minimum.reduceat(row, starts)[of] + limits[-1]
        first = np.minimum.reduceat(np.where(strip, column, NOWHERE), starts)
        taken = strip & (column < first[of] + limits[-1])
        ends = []
        for position in (row, column):
            ends.append(np.minimum.reduceat(np.where(taken, position, NOWHERE), starts))
            ends.append(np.maximum.reduceat(np.where(taken, position, -1), starts) + 1)
        frames.append(frame[starts])
        spans.append(ends)
        cells = cells[:, ~taken]
    if not frames:
        return []

    # In order of frames; the cells in the middle, if that is within the picture.
    order = np.argsort(np.concatenate(frames), kind="stable")
    frame, (top, bottom, left, right) = (
        np.concatenate(frames)[order],
        np.concatenate(spans, 1)[:, order],
    )
    wanted = np.searchsorted(limits, np.maximum(bottom - top, right - left))
    groups = []
    for k in np.unique(wanted).tolist():
        chosen, corner, sides = wanted == k, [], []
        for low, high, whole in ((top, bottom, picture[0]), (left, right, picture[1])):
            begin = ((low + high)[chosen] * cell - SIDES[scale][k]) // 2 // 2 * 2 + aside
            sides.append(min(SIDES[scale][k], whole))
            corner.append(np.clip(begin, 0, whole - sides[-1]))
        groups.append(Windows(frame[chosen], *corner, scale, picture, tuple(sides)))
    return groups


def edges(
    coarse: Tensor, groups: list[Windows], fine: list[Tensor], own: tuple[int, int]
) -> Tensor:
    """Return where there is an object in pictures of their own size, (N, H, W) bool.

    A finer look moves an edge by about a pixel of the first one at most: what the network says of
    objects that are larger than those it learned is right at edges, but may be wrong within.

    Args:
        coarse: (N, 1, h, w) objectness of the first look, on the CPU.
        groups: Windows, which cover all objects.
        fine: Their objectness, (n, 1, S, S) each.
        own: Height and width of the pictures.
    """
    coarse, margin = coarse.float(), 1
    objects = coarse[:, 0] > 0
    surely, maybe = ~dilated(~objects), dilated(objects)  # an object all around; somewhere around
    coarse = F.pad(coarse, [margin] * 4, mode="replicate")
    picture = tuple(FINER * side for side in surely.shape[1:])
    result = torch.full((len(coarse), 1, *picture), -1.0)
    for windows, logits in zip(groups, fine, strict=True):
        first = torch.stack(windows.cut(coarse, FINER, 2 * margin))
        first = F.interpolate(first, scale_factor=FINER, mode="bilinear")
        edge = margin * FINER
        logits = logits[:, 0].float() + FIRST_LOOK * first[:, 0, edge:-edge, edge:-edge]
        inside, near = (torch.stack(windows.cut(maps, FINER)) for maps in (surely, maybe))
        inside, near = (
            maps.repeat_interleave(FINER, 1).repeat_interleave(FINER, 2) for maps in (inside, near)
        )
        logits = torch.where(inside, 1.0, torch.where(near, logits, -1.0))
        for n, ((frame, top, left), (rows, columns)) in enumerate(
            zip(windows.corners(), windows.inner(), strict=True)
        ):
            result[frame, 0, top:, left:][rows, columns] = logits[n, rows, columns]
    if picture != own:
        result = F.interpolate(result, own, mode="bilinear")
    return result[:, 0] > 0


def evidence_at(
    cells: np.ndarray, looks: list[tuple[list[Windows], list[Tensor]]], shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return what windows tell around cells: flat positions in `shape` (N, h, w), and logits.

    Positions (m,) are those of which the first look tells something; it stands in for others, where
    they tell nothing.

    Args:
        cells: As of `border_cells`.
        looks: Of each its windows, which cover the cells, and their attributes, (n, 13, s, s) by
            pixels of the first look at the picture. Logits are (m, 13) for each, side by side.
        shape: N, h and w.
    """
    # The pixels around them, in the frames that have some.
    _, height, width = shape
    frame, row, column = cells
    if not len(frame):
        nothing = torch.zeros(0, len(looks) * NUM_ATTRIBUTES, dtype=torch.float16)
        return torch.zeros(0, dtype=torch.int64), nothing
    chosen, of = np.unique(frame, return_inverse=True)
    reach = np.arange(-(BAND // 2), BAND // 2 + 1)
    down = (row[:, None] + reach).clip(0, (height - 1) // 2)
    along = (column[:, None] + reach).clip(0, (width - 1) // 2)
    near = np.zeros((len(chosen), (height + 1) // 2, (width + 1) // 2), bool)
    near[of[:, None, None], down[:, :, None], along[:, None]] = True
    near = near.repeat(2, 1).repeat(2, 2)[:, :height, :width]
    where = np.flatnonzero(near)
    count, number = len(where), np.full(near.shape, -1, np.int32)
    number.reshape(-1)[where] = np.arange(count)

    # What each window of a look tells of those in its inner part.
    place = np.full(shape[0], -1)
    place[chosen] = np.arange(len(chosen))

    def told(groups: list[Windows], attributes: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        result, known = np.zeros((count, NUM_ATTRIBUTES), np.float16), np.zeros((count, 1), bool)
        for windows, logits in zip(groups, attributes, strict=True):
            scale = windows.scale
            values = logits.movedim(1, -1).half().numpy()
            for n, ((frame, top, left), sides) in enumerate(
                zip(windows.corners(), windows.inner(), strict=True)
            ):
                if place[frame] < 0:
                    continue
                rows, columns = (slice(side.start // scale, side.stop // scale) for side in sides)
                block = number[place[frame], top // scale :, left // scale :][rows, columns]
                there = block >= 0
                which = block[there]
                result[which] = values[n, rows, columns][there]
                known[which] = True
        return result, known

    (first, certain), *others = (told(*look) for look in looks)
    logits = [first, *(np.where(known, result, first) for result, known in others)]
    where += (chosen - np.arange(len(chosen)))[where // (height * width)] * (height * width)
    certain = certain[:, 0]
    return torch.from_numpy(where[certain]), torch.from_numpy(np.concatenate(logits, 1)[certain])
