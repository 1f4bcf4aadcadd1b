"""Tracks: parts of a video's frames, linked from frame to frame where they are surely one thing.

A part is a connected piece of one frame that reads alike: the classes of the video are estimated
from all of its object pixels together, each cell of 2 x 2 pixels gets the likeliest of them, and
what is connected and of one class is a part, unless it is a speck inside another. Parts are linked
whatever they read as: by where they are, how large they are and what they look like.

Lengths and areas are in pixels of frames of FRAME_SIZE. The file is long for what is said
between its lines of index arithmetic.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from classes import FACTOR_SIZES, NUM_CLASSES, NUM_KINDS, factors, from_factors

# Parts.
FRAMES_AT_ONCE = 64  # that are cut into parts
SAMPLE = 1024  # cells that the classes of a video are estimated from
ROUNDS = 30  # of that estimate; with fewer than 20 stray classes stay
DOUBTFUL = 30  # pixels in all frames together that halve the doubt in a class
LEAST = -6.0  # log-probability: what one pixel can say against a class is bounded
SPECK = 6  # cells of a part that may be noise inside another ...
SPECK_EVIDENCE = 8.0  # ... unless they say this much, in nats, for being something else
MOST_PARTS = 64  # of a frame; what is left of one that falls into more counts as one part

# Links.
DISTANCE = 11.0  # that weighs as much as one nat of evidence; objects move up to 20 a frame
STRANGE = 3.0  # nats; parts that differ more are not linked
LEAST_ALIKE = (0.3, 0.3, 0.02)  # Bhattacharyya coefficients of shapes, materials and colours
UNSURE_SIZE = 0.5  # weight of a change in size where something may hide a part; 1 elsewhere
PATCH_SLACK = 4.0  # a patch may make its object this much longer than in the frame before ...
PATCH_PIXELS = 10.0  # ... and so much larger
ALIKE = 0.5  # Bhattacharyya coefficient of colours, and of materials, of a patch and its object
MOST_TRACKS = 1000  # of a video; what is left of one that falls into more counts as one track
TOLERANCE = 1.1  # on the size of one object

# Which of the 13 logits each class adds up, (48, 13).
MEMBERS = np.concatenate(
    [
        np.eye(size, dtype=np.float32)[factor]
        for size, factor in zip(FACTOR_SIZES, factors(np.arange(1, NUM_CLASSES)), strict=True)
    ],
    axis=1,
)


class Cells(NamedTuple):
    """The n cells of 2 x 2 pixels that hold an object; the network tells classes by cells."""

    evidence: np.ndarray  # (n, 13) float32, log-probabilities of shape, material and colour
    pixels: np.ndarray  # (n,) pixels of an object in it, 1..4
    frame: np.ndarray  # (n,)
    position: np.ndarray  # (2, n) column and row, in cells
    pairs: np.ndarray  # (2, m) which cells touch, each pair once
    of_pixel: np.ndarray  # (N,) the cell of each object pixel


class Parts(NamedTuple):
    """The p parts that frames are cut into."""

    frame: np.ndarray  # (p,)
    span: np.ndarray  # (p, 2, 3) first, last and mean position; of columns, of rows
    pixels: np.ndarray  # (p,)
    at_edge: np.ndarray  # (p,) bool
    evidence: np.ndarray  # (p, 13) mean log-probabilities
    touching: np.ndarray  # sorted p * a + b of all parts a and b that touch, both ways

    def free(self) -> np.ndarray:
        """Return which parts nothing can hide any of: no edge, no other part, (p,) bool."""
        free = ~self.at_edge
        free[self.touching // len(free)] = False
        return free


def occupied(objects: Tensor) -> Tensor:
    """Return which cells of 2 x 2 pixels hold an object, (T, h, w), for objects (T, H, W), bool."""
    height, width = objects.shape[-2:]
    if height % 2 or width % 2:
        objects = F.pad(objects, (0, width % 2, 0, height % 2))
    rows = objects[:, ::2] | objects[:, 1::2]
    return rows[..., ::2] | rows[..., 1::2]


def gather(objects: Tensor, attributes: Tensor) -> Tensor:
    """Return what speaks for each attribute in the cells that hold an object, in order.

    Args:
        objects: (T, H, W) bool.
        attributes: (T, 13, h, w), of each cell of 2 x 2 pixels the logits of 3 shapes, 2 materials
            and 8 colours.

    Returns:
        (n, 13), on the device of the arguments: a twentieth of `attributes`.
    """
    return attributes.movedim(1, -1)[occupied(objects)]


def likeliest(evidence: Tensor) -> Tensor:
    """Return the ids 1..48 that cells, (n, 13) logits, read as by themselves, (n,) int64."""
    return from_factors(*(part.argmax(dim=1) for part in evidence.float().split(FACTOR_SIZES, 1)))


def parts_of(objects: np.ndarray, evidence: Tensor, unit: float = 1.0) -> tuple[Parts, np.ndarray]:
    """Return the parts of a video, and which of them each object pixel belongs to, (N,).

    A few frames at a time: but for the evidence of all cells, a clip of ten minutes takes no more
    memory for it than one of seconds.

    Args:
        objects: (T, H, W) bool, where there is an object.
        evidence: (n, 13), for each cell of 2 x 2 pixels that holds some of one, in order, the
            logits of 3 shapes, 2 materials and 8 colours.
        unit: How many times larger objects are than in frames of FRAME_SIZE.
    """
    logs = log_probabilities(evidence)
    kinds, trust = estimate(logs, np.count_nonzero(objects))
    found: list[Parts] = []
    of_pixel: list[np.ndarray] = []
    touching: list[np.ndarray] = []
    count = used = 0
    for start in range(0, len(objects), FRAMES_AT_ONCE):
        block = objects[start : start + FRAMES_AT_ONCE]
        where = np.flatnonzero(block)
        if not len(where):
            continue
        cells = to_cells(where, logs[used:], block.shape)
        used += len(cells.pixels)
        part = cut(cells, kinds, trust)
        parts = measure(cells, part, block.shape, unit)

        # The numbers of its frames and parts follow those of the blocks before.
        found.append(parts._replace(frame=parts.frame + start))
        of_pixel.append((part[cells.of_pixel] + count).astype(np.int32))
        touching.append(count + np.stack(np.divmod(parts.touching, len(parts.frame))))
        count += len(parts.frame)
    columns = [np.concatenate(column) for column in list(zip(*found, strict=True))[:-1]]
    a, b = np.concatenate(touching, axis=1)
    return Parts(*columns, touching=a * count + b), np.concatenate(of_pixel)


def to_cells(where: np.ndarray, evidence: np.ndarray, shape: tuple[int, ...]) -> Cells:
    """Return the cells of the object pixels at flat positions in (T, H, W).

    Args:
        where: (N,) the positions.
        evidence: Log-probabilities as of `Cells`, for these cells and perhaps for later ones.
        shape: T, H and W.
    """
    # The cells of a frame are numbered row by row, with margins that stay empty, so that the
    # neighbours of a cell lie at fixed steps from it.
    frames, height, width = shape
    rows, columns = (height + 1) // 2 + 1, (width + 1) // 2 + 2
    size = frames * rows * columns + columns + 2

    # The cell of each object pixel, by its place in that grid.
    where = where.astype(np.int32 if size < 2**29 else np.int64)  # the former is twice as fast
    line = where // width
    frame = line // height
    cell = (frame * rows + ((line - frame * height) >> 1)) * columns
    cell += ((where - line * width) >> 1) + 1

    # The cells that hold a pixel, numbered in order; -1 elsewhere.
    number = np.full(size, -1, np.int32)
    number[cell] = 0
    at = np.flatnonzero(number >= 0).astype(where.dtype)
    number[at] = np.arange(len(at), dtype=np.int32)

    # Pairs that touch: each cell with those to its right and below, diagonals too.
    pairs = []
    for step in (1, columns - 1, columns, columns + 1):
        beside = number[at + step]
        there = np.flatnonzero(beside >= 0).astype(np.int32)
        pairs.append((there, beside[there]))

    of_pixel = number[cell]
    line = at // columns
    frame = line // rows
    return Cells(
        evidence=evidence[: len(at)],
        pixels=np.bincount(of_pixel),
        frame=frame,
        position=np.stack([at - line * columns - 1, line - frame * rows]),
        pairs=np.concatenate(pairs, axis=1),
        of_pixel=of_pixel,
    )


def log_probabilities(evidence: Tensor) -> np.ndarray:
    """Return log-probabilities of shapes, materials and colours, (n, 13), from LEAST to 0."""
    by_factor = evidence.float().T.contiguous().split(FACTOR_SIZES)
    logs = torch.cat([logits.log_softmax(dim=0) for logits in by_factor]).T
    return logs.clamp(min=LEAST).contiguous().numpy()


def estimate(evidence: np.ndarray, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the kinds, 0..47, that a video may hold, and the log of how much each is trusted.

    The share of each among the object pixels is estimated by expectation maximisation (Saerens,
    Latinne and Decaestecker 2002, https://doi.org/10.1162/089976602753284446): classes that only
    come second, or first on scattered pixels, fade.

    Args:
        evidence: (n, 13) log-probabilities.
        pixels: of objects in the video.
    """
    p = np.exp(by_class(evidence[:: 1 + len(evidence) // SAMPLE], MEMBERS))
    p = torch.from_numpy(p)
    transposed = p.T.contiguous()
    share = torch.full((NUM_KINDS,), 1 / NUM_KINDS)
    for _ in range(ROUNDS):
        share = share * (transposed @ (1 / (p @ share))) / len(p)
    pixels = share.numpy() * pixels
    kinds = np.flatnonzero(pixels >= min(pixels.max(), 0.5))
    return kinds, np.log(pixels[kinds] / (pixels[kinds] + DOUBTFUL))


def by_class(evidence: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Return the log-probabilities of the classes, (n, k), for `members` (k, 13) of them.

    By torch, since the threads of NumPy's own library would take the cores of other videos.
    """
    return (torch.from_numpy(evidence) @ torch.from_numpy(members).T).numpy()


def cut(cells: Cells, kinds: np.ndarray, trust: np.ndarray) -> np.ndarray:
    """Return the part that each cell belongs to, (n,).

    Parts are connected cells of one class. A speck joins what it touches most of, unless its
    evidence says clearly that it is something else; and all but the MOST_PARTS largest of a
    frame in pieces are taken together, so that noise costs no more time than a scene.

    Args:
        cells: Of a few frames.
        kinds: That the video may hold, as of `estimate`.
        trust: In each of them.
    """
    from scipy.sparse import csr_matrix  # a good part of a second, for what is labelled alone
    from scipy.sparse.csgraph import connected_components

    # Each cell gets its likeliest class; connected cells of one class are a part.
    kind = kinds[(by_class(cells.evidence, MEMBERS[kinds]) + trust).argmax(axis=1)]
    same = kind[cells.pairs[0]] == kind[cells.pairs[1]]
    n = len(kind)
    a, b = cells.pairs.compress(same, axis=1)
    graph = csr_matrix((np.ones(len(a), np.int8), (a, b)), (n, n))
    count, part = connected_components(graph, directed=False)
    kind_of = np.zeros(count, np.int64)
    kind_of[part] = kind
    size = np.bincount(part)

    # Parts that touch one another, both ways, and along how many pairs of cells.
    a, b = part[cells.pairs.compress(~same, axis=1)].astype(np.int64)
    key, border = np.unique(np.concatenate([a * count + b, b * count + a]), return_counts=True)
    speck, host = np.divmod(key, count)

    # How much the evidence of a speck says for its own class rather than for its host's.
    doubt = MEMBERS[kind_of[speck]] - MEMBERS[kind_of[host]]
    doubt = (sums(part, count, cells.evidence)[speck] * doubt).sum(axis=1)
    joins = (size[speck] <= SPECK) & (size[host] > SPECK) & (doubt < SPECK_EVIDENCE)

    # Of several hosts the one with the longest border, which is written last, wins.
    order = np.flatnonzero(joins)[np.lexsort((-doubt[joins], border[joins]))]
    joined = np.arange(count)
    joined[speck[order]] = host[order]
    return np.unique(_bounded(joined[part], cells.frame), return_inverse=True)[1]


def _bounded(part: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Return `part` (n,) with the smallest parts of each frame as one, where it has too many."""
    size = np.bincount(part)
    frame_of = np.zeros(len(size), np.int64)
    frame_of[part] = frame

    # By frame, largest first: whatever has MOST_PARTS of its frame before it is in excess.
    order = np.lexsort((-size, frame_of))
    order = order[size[order] > 0]
    excess = order[MOST_PARTS:][frame_of[order[MOST_PARTS:]] == frame_of[order[:-MOST_PARTS]]]
    number = np.arange(len(size))
    number[excess] = -1 - frame_of[excess]
    return number[part]


def measure(cells: Cells, part: np.ndarray, shape: tuple[int, ...], unit: float) -> Parts:
    """Measure the parts, `part` (n,) being that of each cell, of a video (T, H, W)."""
    _, height, width = shape

    # The cells in the order of their parts, and where each part begins.
    order = np.argsort(part, kind="stable")
    starts = np.flatnonzero(np.diff(part[order], prepend=-1))
    count = len(starts)
    size = np.diff(starts, append=len(order))

    # First, last and mean pixel of each part; a cell is two pixels wide.
    position = cells.position[:, order]
    span = np.stack(
        [
            2 * np.minimum.reduceat(position, starts, axis=1),
            2 * np.maximum.reduceat(position, starts, axis=1) + 1,
            2 * np.add.reduceat(position, starts, axis=1) / size + 0.5,
        ],
        axis=-1,
    ).transpose(1, 0, 2)  # (p, 2, 3)
    last = np.array([width, height]) - 1

    a, b = part[cells.pairs].astype(np.int64)
    a, b = a[a != b], b[a != b]
    return Parts(
        frame=cells.frame[order][starts],
        span=span / unit,
        pixels=np.bincount(part, weights=cells.pixels) / unit**2,
        at_edge=(span[..., 0] == 0).any(axis=1) | (span[..., 1] >= last).any(axis=1),
        evidence=sums(part, count, cells.evidence) / size[:, None],
        touching=np.unique(np.concatenate([a * count + b, b * count + a])),
    )


def sums(index: np.ndarray, size: int, values: np.ndarray) -> np.ndarray:
    """Return (size, C): the sums of those of `values` (n, C) that have each index."""
    from scipy.sparse import csr_matrix

    n = len(index)
    chosen = csr_matrix((np.ones(n, np.float32), index, np.arange(n + 1)), (n, size))
    return chosen.T @ values


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
        roots = np.exp(parts.evidence / 2)  # of geometric means, whose sum is less than 1
        by_factor = np.split(roots, np.cumsum(FACTOR_SIZES)[:-1], axis=1)
        self.looks = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in by_factor]
        self.free = parts.free()

    def step(self, before: np.ndarray, now: np.ndarray) -> np.ndarray:
        """Give the parts `now` their tracks, and return those to go on from: all but patches.

        Args:
            before: The parts of the last frame to go on from.
            now: All parts of this frame.
        """
        from scipy.optimize import linear_sum_assignment

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
        # Where one side is hidden the other ones still count.
        x, y = np.where(free[..., None], moved[..., 2], moved.min(axis=3)).transpose(2, 0, 1)
        size = np.abs(np.log(self.pixels[before, None] / self.pixels[now]))
        likeness = 1.0
        for root, least in zip(self.looks, LEAST_ALIKE, strict=True):
            likeness = likeness * np.maximum(root[before] @ root[now].T, least)
        size = size * np.where(free, 1, UNSURE_SIZE)
        return np.hypot(x, y) / DISTANCE + size - np.log(likeness)

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
