"""Masks drawn by the pixel: borders between objects, and no holes in them.

Objects are told apart in cells of 2 x 2 pixels, and in larger frames every pixel gets the class of
what is nearest: where two touch, the border is a stair. `sharpen` moves it to where all looks of
the network say that it is. `fill_holes` closes what an object encloses.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from classes import NUM_CLASSES
from details import FIRST_LOOK, Details
from model import NUM_ATTRIBUTES
from tracks import log_probabilities, occupied, sums

BORDER_REACH = 2  # pixels of the first look that a border moves, at most


def sharpen(
    labels: Tensor, coarse: Tensor, objects: Tensor, evidence: Tensor, details: Details
) -> Tensor:
    """Draw the borders between objects in labels of one video by the pixel; return these labels.

    Of the two objects near a pixel it goes to the one whose mean in that frame is closer to what
    all looks say of it.

    Args:
        labels: (T, H, W) uint8 ids, in the picture's own size, changed in place.
        coarse: (T, h, w) uint8 ids, at the size of the first look.
        objects: (T, h, w) bool, where that sees an object.
        evidence: (n, 13) logits of its cells that hold one, in order.
        details: Of these frames.
    """
    where = details.where.numpy()
    if not len(where):
        return labels
    flat, shape = labels.numpy().reshape(-1), tuple(coarse.shape)

    # The pixels that were looked at again, in the picture's own size, and the two objects there.
    pair = around(coarse.numpy(), where)
    at, source = in_own_size(where, shape, tuple(labels.shape))
    inside = flat[at] > 0
    at, pair = at[inside], pair[:, source[inside]]
    near = pair[0] != pair[1]

    # What all looks say there, interpolated between the cells that hold an object.
    t, y, x = np.unravel_index(at, labels.shape)
    v, u = ((z + 0.5) * n / m for z, n, m in zip((y, x), shape[1:], labels.shape[1:], strict=True))
    known = np.zeros(shape, bool)
    known.reshape(-1)[where] = True
    cells = occupied(objects).numpy()
    first = _interpolate(log_probabilities(evidence), cells, t, v / 2, u / 2)
    first *= 1 if labels.shape == coarse.shape else FIRST_LOOK
    looks = [first]
    for n, part in enumerate(details.evidence.split(NUM_ATTRIBUTES, dim=1)):
        looks.append(_interpolate(log_probabilities(part), known, t, v - n / 2, u - n / 2))
    looks = np.concatenate(looks, axis=1)
    flat[at[near]] = choose(looks, t, flat[at], near, pair[:, near])
    return labels


def in_own_size(
    where: np.ndarray, shape: tuple[int, ...], own: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels whose centres lie in given ones of another size.

    Args:
        where: (m,) flat positions in `shape`.
        shape: T, h and w.
        own: T, H and W.

    Returns:
        (p,) flat positions in `own`, and (p,) which of `where` each lies in.
    """
    if shape == own:
        return where, np.arange(len(where))
    at = np.unravel_index(where, shape)
    # Of each row the first one that lies in it, and how many do; of each column likewise.
    spans = []
    for position, side, own_side in zip(at[1:], shape[1:], own[1:], strict=True):
        inside = ((np.arange(own_side) + 0.5) * side / own_side).astype(int)
        first = np.searchsorted(inside, np.arange(side + 1))
        spans.append((first[position], np.diff(first)[position]))
    (y, rows), (x, columns) = spans
    found, source = [], []
    for down in range(rows.max()):
        for along in range(columns.max()):
            there = np.flatnonzero((down < rows) & (along < columns))
            place = (at[0][there], y[there] + down, x[there] + along)
            found.append(np.ravel_multi_index(place, own))
            source.append(there)
    empty = np.zeros(0, np.int64)
    return np.concatenate([empty, *found]), np.concatenate([empty, *source])


def around(labels: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Return the least and the greatest label, (2, m), within BORDER_REACH; background apart.

    Args:
        labels: (T, h, w) uint8.
        where: (m,) flat positions; near each of them is a label.
    """
    padded = np.pad(labels, ((0, 0), (BORDER_REACH, BORDER_REACH), (BORDER_REACH, BORDER_REACH)))
    t, y, x = np.unravel_index(where, labels.shape)
    corner = (t * padded.shape[1] + y) * padded.shape[2] + x
    steps = np.arange(2 * BORDER_REACH + 1)
    steps = (steps[:, None] * padded.shape[2] + steps).reshape(-1, 1)
    near = padded.reshape(-1)[corner + steps]  # ((2 BORDER_REACH + 1)^2, m)
    least = (near - 1).min(axis=0) + 1  # background, which wraps to 255, is never it
    return np.stack([least, near.max(axis=0)]).astype(np.int64)


def choose(
    looks: np.ndarray, t: np.ndarray, labels: np.ndarray, near: np.ndarray, pair: np.ndarray
) -> np.ndarray:
    """Return for pixels near two objects the label of the one that they are of, (q,).

    A pixel is compared with the mean of each object in its frame, by squared distance. One of a
    third object keeps its label, as one does near an object of which nothing is known.

    Args:
        looks: (p, C) what is known of each pixel.
        t: (p,) their frames.
        labels: (p,) of them.
        near: (p,) bool, which are near two objects, q in number.
        pair: (2, q) the labels of the two.
    """
    keys, of = np.unique(t * NUM_CLASSES + labels, return_inverse=True)
    mean = sums(of, len(keys), looks) / np.bincount(of)[:, None]
    wanted = t[near] * NUM_CLASSES + pair
    rows = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    distance = ((looks[near] - mean[rows]) ** 2).sum(axis=2)
    own = labels[near]
    stays = (keys[rows] != wanted).any(axis=0) | (own != pair).all(axis=0)
    return np.where(stays, own, np.where(distance[0] <= distance[1], *pair))


def fill_holes(labels: Tensor) -> Tensor:
    """Return labels (T, H, W) in which background that one object encloses is that object.

    Background is enclosed if no path of it leads up, down, left, and right to the frame's edge.
    """
    flat, (_, height, width) = labels.numpy().reshape(-1), labels.shape
    gaps = _Gaps.between(np.flatnonzero(flat != 0), width)
    if not len(gaps.first):
        return labels

    # Gaps that lead out of the object at once: background beside them lies in no gap.
    lines = gaps.first // width
    out = (lines % height == 0) | (lines % height == height - 1)
    for step in (-width, width):
        out |= gaps.open(step)
    if out.all():
        return labels

    # Gaps that touch lead out together.
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    above, below = gaps.touching(width)
    count = len(gaps.first)
    graph = csr_matrix((np.ones(len(above), np.int8), (above, below)), (count, count))
    holes, hole = connected_components(graph, directed=False)
    leads_out = np.zeros(holes, bool)
    leads_out[hole[out]] = True

    # The labels around each hole; where they are all one, it is filled.
    kept = np.flatnonzero(~leads_out[hole])
    length = gaps.last[kept] - gaps.first[kept] + 1
    of = np.repeat(hole[kept], length)
    pixels = np.arange(length.sum()) + np.repeat(
        gaps.first[kept] - np.cumsum(length) + length, length
    )
    low, high = np.full(holes, 255, np.uint8), np.zeros(holes, np.uint8)
    for step in (-width, -1, 1, width):
        around = flat[pixels + step]
        np.minimum.at(low, of, np.where(around, around, 255))
        np.maximum.at(high, of, around)
    filled = (low == high)[of]
    result = flat.copy()
    result[pixels[filled]] = low[of[filled]]
    return torch.from_numpy(result.reshape(labels.shape))


class _Gaps(NamedTuple):
    """Runs of background between two pixels of objects in one row, in order; flat positions."""

    objects: np.ndarray  # (N,) where there is an object
    first: np.ndarray  # (g,)
    last: np.ndarray  # (g,)

    @classmethod
    def between(cls, objects: np.ndarray, width: int) -> "_Gaps":
        """Return the gaps between the pixels of objects, in rows of this width."""
        ends = np.flatnonzero(np.diff(objects) > 1)
        before, after = objects[ends], objects[ends + 1]
        one_row = before // width == after // width
        return cls(objects, before[one_row] + 1, after[one_row] - 1)

    def open(self, step: int) -> np.ndarray:
        """Return which gaps have background `step` pixels on that lies in no gap, (g,) bool."""
        first, end = self.first + step, self.last + 1 + step
        objects = np.searchsorted(self.objects, end) - np.searchsorted(self.objects, first)
        return self.pixels_before(end) - self.pixels_before(first) + objects < end - first

    def pixels_before(self, at: np.ndarray) -> np.ndarray:
        """Return how many pixels of gaps lie before each of some flat positions."""
        total = np.append(0, np.cumsum(self.last - self.first + 1))
        count = np.searchsorted(self.first, at)  # of gaps that begin before it; the last may go on
        beyond = np.append(-1, self.last)[count] + 1 - at
        return total[count] - np.maximum(beyond, 0)

    def touching(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of all pairs of gaps of which one lies `step` pixels on, in part."""
        start = np.searchsorted(self.last, self.first + step)
        count = np.searchsorted(self.first, self.last + step, side="right") - start
        number = np.repeat(np.arange(len(count)), count)
        return number, np.arange(count.sum()) + np.repeat(start - np.cumsum(count) + count, count)


def _interpolate(
    values: np.ndarray, cells: np.ndarray, t: np.ndarray, v: np.ndarray, u: np.ndarray
) -> np.ndarray:
    """Interpolate what cells say bilinearly between those that say something; (p, C).

    Args:
        values: (n, C) float32 of the cells, in order.
        cells: (T, rows, columns) bool, which have some.
        t: (p,) frames.
        v: (p,) rows, in cells; 0 is the upper end of the first.
        u: (p,) columns.
    """
    number = np.full((len(cells), *(side + 2 for side in cells.shape[1:])), -1, np.int32)
    number[:, 1:-1, 1:-1][cells] = np.arange(len(values))
    columns, v, u = number.shape[2], v - 0.5, u - 0.5
    top, left = np.floor(v).astype(int), np.floor(u).astype(int)
    down, along = (v - top).astype(np.float32), (u - left).astype(np.float32)
    corner = (t * number.shape[1] + top + 1) * columns + left + 1
    number = number.reshape(-1)
    total, weights = np.zeros((len(t), values.shape[1]), np.float32), np.float32(1e-6)
    for step, share in (
        (0, (1 - down) * (1 - along)),
        (1, (1 - down) * along),
        (columns, down * (1 - along)),
        (columns + 1, down * along),
    ):
        which = number[corner + step]
        share = share * (which >= 0)
        total += share[:, None] * values[which]
        weights = weights + share
    return total / weights[:, None]
