"""Tracks: the parts of a video linked from frame to frame, where they are surely the same thing.

Whatever they read as: by where they are, how large they are and what they look like. Lengths and
areas below are in pixels of a frame 160 high.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from classes import FACTOR_SIZES
from parts import Parts

REACH = 11.0  # distance that weighs as much as one nat of evidence; objects move up to 20 a frame
STRANGE = 3.0  # nats; parts that differ more are not linked
LEAST_ALIKE = (0.2, 0.2, 0.02)  # Bhattacharyya coefficients of shapes, materials and colours
UNSURE_SIZE = 0.5  # weight of a change in size where something may hide a part; 1 elsewhere
PATCH_SLACK = 4.0  # a patch may make its object this much longer than in the frame before ...
PATCH_PIXELS = 10.0  # ... and so much larger
ALIKE = 0.5  # Bhattacharyya coefficient of colours, and of materials, of a patch and its object
MOST_TRACKS = 1000  # of a video; what is left of one that falls into more counts as one track
TOLERANCE = 1.1  # on the size of one object


def link(parts: Parts, frames: int) -> np.ndarray:
    """Return the number of the track that each part belongs to, (p,).

    Parts of one frame are assigned to those of the next so that they differ least in all
    (Kuhn 1955). What is left over begins a track, or is a patch of another part.
    """
    linker = _Linker(parts)
    order = np.argsort(parts.frame, kind="stable")
    starts = np.searchsorted(parts.frame[order], np.arange(frames + 1))
    heads = order[:0]
    for first, end in zip(starts[:-1], starts[1:], strict=True):
        heads = linker.step(heads, order[first:end])
    rank = np.argsort(np.argsort(-np.bincount(linker.track, parts.pixels), kind="stable"))
    return np.minimum(rank, MOST_TRACKS)[linker.track]


class _Linker:
    """Parts under way from frame to frame; a part's span and size come to include its patches."""

    def __init__(self, parts: Parts):
        count = len(parts.frame)
        self.parts = parts
        self.span, self.pixels = parts.span.copy(), parts.pixels.copy()
        self.track = np.full(count, -1)
        self.tracks = 0
        roots = np.exp(parts.evidence / 2)  # of probabilities
        self.looks = np.split(roots, np.cumsum(FACTOR_SIZES)[:-1], axis=1)
        self.free = ~parts.at_edge  # nothing hides any of it
        self.free[parts.touching // count] = False

    def step(self, before: np.ndarray, now: np.ndarray) -> np.ndarray:
        """Give the parts `now` their tracks, and return those to go on from: all but patches.

        Args:
            before: The parts of the last frame to go on from.
            now: All parts of this frame.
        """
        heads = now
        if len(before) and len(now):
            cost = np.minimum(self.differences(before, now), STRANGE)
            i, j = linear_sum_assignment(cost)
            linked = cost[i, j] < STRANGE
            old, new = before[i[linked]], now[j[linked]]
            self.track[new] = self.track[old]
            previous = dict(zip(new.tolist(), old.tolist(), strict=True))
            rest = now[self.track[now] < 0]
            patches = [part for part in rest.tolist() if self.join_patch(part, previous)]
            heads = now[~np.isin(now, patches)]
        new = now[self.track[now] < 0]
        self.track[new] = self.tracks + np.arange(len(new))
        self.tracks += len(new)
        return heads

    def differences(self, before: np.ndarray, now: np.ndarray) -> np.ndarray:
        """Return how unlike one thing the parts of one frame and the next are, (b, n), in nats."""
        free = self.free[before, None] & self.free[now]
        moved = np.abs(self.span[now] - self.span[before, None])  # (b, n, 2, 3)
        # Where one side is hidden the others still tell.
        x, y = np.where(free[..., None], moved[..., 2], moved.min(axis=3)).transpose(2, 0, 1)
        size = np.abs(np.log(self.pixels[before, None] / self.pixels[now]))
        likeness = 1.0
        for root, least in zip(self.looks, LEAST_ALIKE, strict=True):
            likeness = likeness * np.maximum(root[before] @ root[now].T, least)
        size = size * np.where(free, 1, UNSURE_SIZE)
        return np.hypot(x, y) / REACH + size - np.log(likeness)

    def join_patch(self, part: int, previous: dict[int, int]) -> bool:
        """Join `part` to one that it touches and was as large as both before; return if so.

        Args:
            part: One that continues no track.
            previous: For each part that does, the one before it.
        """
        count = len(self.track)
        touching = self.parts.touching
        first, end = np.searchsorted(touching, (part * count, (part + 1) * count))
        for host in (touching[first:end] - part * count).tolist():
            alike = all(root[part] @ root[host] >= ALIKE for root in self.looks[1:])
            if host not in previous or not alike:
                continue
            before = self.span[previous[host]]
            low = np.minimum(self.span[part, :, 0], self.span[host, :, 0])
            high = np.maximum(self.span[part, :, 1], self.span[host, :, 1])
            longer = high - low - (before[:, 1] - before[:, 0])
            pixels = self.pixels[part] + self.pixels[host]
            most = TOLERANCE * self.pixels[previous[host]] + PATCH_PIXELS
            if pixels <= most and (longer <= PATCH_SLACK).all():
                share = self.pixels[part] / pixels
                mean = (1 - share) * self.span[host, :, 2] + share * self.span[part, :, 2]
                self.span[host] = np.stack([low, high, mean], axis=1)
                self.pixels[host] = pixels
                self.track[part] = self.track[host]
                return True
        return False
