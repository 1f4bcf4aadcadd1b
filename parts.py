"""Parts: the object pixels of a video, cut into pieces that read alike.

`gather` keeps what the network says of objects; `parts_of` takes it for all frames of a video. The
classes of the video are estimated from all of its object pixels together; each 2 x 2 pixels get the
likeliest of them, and what is connected and of one class is a part, unless it is a scrap inside
another.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn import functional as F

from classes import FACTOR_SIZES, NUM_CLASSES, factors

NUM_KINDS = NUM_CLASSES - 1  # classes of objects
HEIGHT = 160  # of the frames that lengths and areas are given for

SAMPLE = 1024  # cells that the classes of a video are estimated from
ROUNDS = 30  # of that estimate; with fewer than 20 stray classes stay
DOUBTFUL = 30  # pixels in all frames together that halve the doubt in a class
LEAST = -6.0  # log-probability: what one pixel can say against a class is bounded
SCRAP = 6  # cells of a part that may be noise inside another ...
SCRAP_EVIDENCE = 8.0  # ... unless they say this much, in nats, for being something else
MOST_PARTS = 64  # of a frame; what is left of one that falls into more counts as one part

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
    """The p parts that frames are cut into, with lengths as of a frame 160 high."""

    frame: np.ndarray  # (p,)
    span: np.ndarray  # (p, 2, 3) first, last and mean position; of columns, of rows
    pixels: np.ndarray  # (p,)
    at_edge: np.ndarray  # (p,) bool
    evidence: np.ndarray  # (p, 13) mean log-probabilities
    touching: np.ndarray  # sorted p * a + b of all parts a and b that touch, both ways


def occupied(objects: Tensor) -> Tensor:
    """Return which cells of 2 x 2 pixels hold an object, (T, h, w), for objects (T, H, W), bool."""
    height, width = objects.shape[-2:]
    if height % 2 or width % 2:
        objects = F.pad(objects, (0, width % 2, 0, height % 2))
    rows = objects[:, ::2] | objects[:, 1::2]
    return rows[..., ::2] | rows[..., 1::2]


def gather(objects: Tensor, kind: Tensor) -> Tensor:
    """Return what speaks for each kind in the cells that hold an object, in order.

    Args:
        objects: (T, H, W) bool.
        kind: (T, 13, h, w), of each cell of 2 x 2 pixels the logits of 3 shapes, 2 materials and 8
            colours.

    Returns:
        (n, 13) float16, on the device of the arguments: a twentieth of `kind`.
    """
    return kind.movedim(1, -1)[occupied(objects)].half()


def parts_of(
    where: np.ndarray, evidence: Tensor, shape: tuple[int, ...]
) -> tuple[Parts, np.ndarray]:
    """Return the parts of a video, and which of them each object pixel belongs to, (N,).

    Args:
        where: (N,) flat positions of the object pixels in (T, H, W).
        evidence: (n, 13), for each cell that holds some of them the logits of 3 shapes, 2
            materials and 8 colours.
        shape: T, H and W.
    """
    cells = to_cells(where, evidence, shape)
    part = cut(cells)
    return measure(cells, part, shape), part[cells.of_pixel]


def to_cells(where: np.ndarray, evidence: Tensor, shape: tuple[int, ...]) -> Cells:
    """Return the cells of the object pixels at the flat positions `where`, as in `parts_of`."""
    frames, height, width = shape
    rows, columns = (height + 1) // 2 + 1, (width + 1) // 2 + 2  # with margins that stay empty
    size = frames * rows * columns + columns + 2
    where = where.astype(np.int32 if size < 2**29 else np.int64)  # the former is twice as fast
    line = where // width
    frame = line // height
    cell = (frame * rows + ((line - frame * height) >> 1)) * columns
    cell += ((where - line * width) >> 1) + 1
    number = np.full(size, -1, np.int32)
    number[cell] = 0
    at = np.flatnonzero(number >= 0).astype(where.dtype)
    number[at] = np.arange(len(at), dtype=np.int32)
    pairs = []
    for step in (1, columns - 1, columns, columns + 1):
        beside = number[at + step]
        there = np.flatnonzero(beside >= 0).astype(np.int32)
        pairs.append((there, beside[there]))
    of_pixel = number[cell]
    line = at // columns
    frame = line // rows
    position = np.stack([at - line * columns - 1, line - frame * rows])
    pixels = np.bincount(of_pixel)
    return Cells(
        log_probabilities(evidence),
        pixels,
        frame,
        position,
        np.concatenate(pairs, axis=1),
        of_pixel,
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


def cut(cells: Cells) -> np.ndarray:
    """Return the part that each cell belongs to, (n,).

    Parts are connected cells of one class. A scrap joins what it touches most of, unless its
    evidence says clearly that it is something else; and all but the MOST_PARTS largest of a
    frame in pieces are taken together, so that noise costs no more time than a scene.
    """
    kinds, trust = estimate(cells.evidence, len(cells.of_pixel))
    kind = kinds[(by_class(cells.evidence, MEMBERS[kinds]) + trust).argmax(axis=1)]
    same = kind[cells.pairs[0]] == kind[cells.pairs[1]]
    n = len(kind)
    a, b = cells.pairs.compress(same, axis=1)
    graph = csr_matrix((np.ones(len(a), np.int8), (a, b)), (n, n))
    count, part = connected_components(graph, directed=False)
    kind_of = np.zeros(count, np.int64)
    kind_of[part] = kind
    size = np.bincount(part)
    a, b = part[cells.pairs.compress(~same, axis=1)].astype(np.int64)
    key, border = np.unique(np.concatenate([a * count + b, b * count + a]), return_counts=True)
    scrap, host = np.divmod(key, count)
    doubt = MEMBERS[kind_of[scrap]] - MEMBERS[kind_of[host]]
    doubt = (sums(part, count, cells.evidence)[scrap] * doubt).sum(axis=1)
    joins = (size[scrap] <= SCRAP) & (size[host] > SCRAP) & (doubt < SCRAP_EVIDENCE)
    order = np.flatnonzero(joins)[np.lexsort((-doubt[joins], border[joins]))]  # the last one wins
    joined = np.arange(count)
    joined[scrap[order]] = host[order]
    return np.unique(_bounded(joined[part], cells.frame), return_inverse=True)[1]


def _bounded(part: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Return `part` (n,) with the smallest parts of each frame as one, where it has too many."""
    size = np.bincount(part)
    frame_of = np.zeros(len(size), np.int64)
    frame_of[part] = frame
    order = np.lexsort((-size, frame_of))
    order = order[size[order] > 0]
    excess = order[MOST_PARTS:][frame_of[order[MOST_PARTS:]] == frame_of[order[:-MOST_PARTS]]]
    number = np.arange(len(size))
    number[excess] = -1 - frame_of[excess]
    return number[part]


def measure(cells: Cells, part: np.ndarray, shape: tuple[int, ...]) -> Parts:
    """Measure the parts, `part` (n,) being that of each cell, of a video (T, H, W)."""
    _, height, width = shape
    unit = height / HEIGHT
    order = np.argsort(part, kind="stable")
    starts = np.flatnonzero(np.diff(part[order], prepend=-1))
    count = len(starts)
    size = np.diff(starts, append=len(order))
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
    n = len(index)
    chosen = csr_matrix((np.ones(n, np.float32), index, np.arange(n + 1)), (n, size))
    return chosen.T @ values
