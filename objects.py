"""Objects followed through a video: each is one class, and no class is in two places at once.

`follow` takes what the network sees in all frames of a video and returns their labels; `table`
lists the objects, frame by frame. In order:

1. Parts: connected pixels of one frame that read alike, once the classes of the video are
   estimated from all of its pixels together.
2. Tracks: parts linked from frame to frame where they are surely the same thing, whatever they
   read as: by where they are, how large they are and what they look like.
3. Classes: the evidence along each track is summed, and all tracks of the video get their classes
   together: those seen at one time differ, unless they fit into one object; the fewer the better.

As no two objects of a video share a class, tracks of one class are one object, which so keeps its
number where it is hidden for a while. Lengths below are pixels of a frame 160 high, and scale.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from classes import CLASS_NAMES, FACTOR_SIZES, NUM_CLASSES
from parts import MEMBERS, NUM_KINDS, Parts, parts_of, sums
from tracks import TOLERANCE, link

TABLE = "objects.csv"  # the file of `table`, beside mask.npy
NEW_CLASS = 4.0  # nats that a further class of the video costs
APART = 0.6  # nats against one object being seen in two pieces
CLASH = 30.0  # nats against two objects of one class
SIZE = (14.0, 0.24)  # extent of an object, at most, with its lower end in row y: 14 + 0.24 y
FILL = 0.75  # share of the square of that extent which an object covers, at most
HALF_SEEN = 60.0  # pixels of a part at which its evidence counts half
EDGE_WEIGHT = 0.5  # of the evidence of a part that the frame cuts off ...
EDGE_SHAPE = 0.4  # ... and once more of that of its shape: what is cut straight reads as a cube
UNRELIABLE = 15.0  # pixels x frames at which a third of all readings are taken as chance
SPEED = 22.0  # pixels a frame; faster means another object ...
SPEEDING = 0.3  # ... by so many nats for each pixel a frame above
DROP_PIXELS = 40  # a track that never shows more may be dropped ...
DROP = 0.7  # ... where its likeliest class has a probability below exp(-0.7), one half
SWEEPS = 6  # of improvement, at most
RIVALS = 3  # tracks that may together have to make way for one, at most


class Tracks(NamedTuple):
    """The objects of one video."""

    labels: Tensor  # (T, H, W) uint8, ids 0..48
    confidence: dict[int, float]  # by class id: how likely the object is of that class, 0..1


class Row(NamedTuple):
    """One object in one frame."""

    frame: int  # from 0
    object: int  # its number, from 1, by when it is first seen
    class_id: int  # 1..48
    name: str
    x: float  # of the mean of its pixels; the centre of the top left pixel is (0, 0)
    y: float
    left: int  # first and last column and row
    top: int
    right: int
    bottom: int
    pixels: int
    at_edge: int  # 1 where it touches the frame's edge, which may hide some of it
    confidence: float


def follow(objects: Tensor, evidence: Tensor) -> Tracks:
    """Label the object pixels of one video, each object with one class.

    Args:
        objects: (T, H, W) bool, where there is an object.
        evidence: (n, 13), for each cell of 2 x 2 pixels that holds such a pixel, in order, the
            logits of 3 shapes, 2 materials and 8 colours: `parts.gather`.

    Returns:
        The labels; background where there is no object, and where a track never shows more than
        DROP_PIXELS pixels, fits no other object of the video and has no likely class of its own:
        on rendered videos 0.02 % of the object pixels, nearly all of objects of which only a
        sliver is ever seen; on the real ones that we have, none.
    """
    labels = np.zeros(tuple(objects.shape), np.uint8)
    if not len(evidence):
        return Tracks(torch.from_numpy(labels), {})
    where = np.flatnonzero(objects.cpu().numpy())
    parts, part = parts_of(where, evidence, labels.shape)
    track = link(parts, len(labels))
    kinds, confidence = classify(parts, track)
    labels.reshape(-1)[where] = (kinds[track] + 1).astype(np.uint8)[part]
    return Tracks(torch.from_numpy(labels), confidence)


def table(tracks: Tracks) -> list[Row]:
    """Return a row for each object and frame, by frame and number."""
    labels = tracks.labels.numpy()
    _, height, width = labels.shape
    where = np.flatnonzero(labels)
    if not len(where):
        return []
    key = where // (height * width) * NUM_CLASSES + labels.reshape(-1)[where]
    order = np.argsort(key, kind="stable")
    starts = np.flatnonzero(np.diff(key[order], prepend=-1))
    y, x = where[order] // width % height, where[order] % width
    pixels = np.diff(starts, append=len(order))
    frames, ids = np.divmod(key[order][starts], NUM_CLASSES)
    columns = [frames, ids]
    columns += [np.add.reduceat(values, starts) / pixels for values in (x, y)]
    columns += [np.minimum.reduceat(values, starts) for values in (x, y)]
    columns += [np.maximum.reduceat(values, starts) for values in (x, y)]
    number = {kind: i for i, kind in enumerate(dict.fromkeys(ids.tolist()), 1)}
    rows = []
    for frame, kind, *measures, count in zip(
        *(c.tolist() for c in (*columns, pixels)), strict=True
    ):
        left, top, right, bottom = measures[2:]
        edge = int(left == 0 or top == 0 or right == width - 1 or bottom == height - 1)
        what = (frame, number[kind], kind, CLASS_NAMES[kind])
        rows.append(Row(*what, *measures, count, edge, tracks.confidence[kind]))
    return sorted(rows)


def classify(parts: Parts, track: np.ndarray) -> tuple[np.ndarray, dict[int, float]]:
    """Return the kind of each track, 0..47 or -1 for a scrap, and the confidence by class id."""
    weight = parts.pixels / (parts.pixels + HALF_SEEN)
    weight = weight * np.where(parts.at_edge, EDGE_WEIGHT, 1)
    evidence = parts.evidence.copy()
    evidence[parts.at_edge, : FACTOR_SIZES[0]] *= EDGE_SHAPE
    count = track.max() + 1
    seen = np.bincount(track, weights=weight)
    # Neighbouring frames repeat each other's errors: n of them tell as much as the root of n.
    total = sums(track, count, evidence * weight[:, None]) / np.sqrt(seen)[:, None] @ MEMBERS.T
    p = np.exp(total - total.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    most = np.zeros(count)
    np.maximum.at(most, track, parts.pixels)
    chance = UNRELIABLE / (2 * UNRELIABLE + seen * most)
    cost = -np.log((1 - chance[:, None]) * p + chance[:, None] / NUM_KINDS)
    drop = np.where(most <= DROP_PIXELS, NEW_CLASS + DROP, np.inf)
    order = np.argsort(-seen * most, kind="stable")
    choice = _Choice(cost, drop, clashes(parts, track) + haste(parts, track), order)
    choice.improve()
    confidence: dict[int, float] = {}
    for k in order.tolist():
        if choice.kind[k] >= 0:
            confidence.setdefault(int(choice.kind[k]) + 1, choice.probability(k))
    return choice.kind, confidence


def clashes(parts: Parts, track: np.ndarray) -> np.ndarray:
    """Return what speaks against track k being of the class of track l, both in view, (k, l)."""
    order = np.argsort(parts.frame, kind="stable")
    frame = parts.frame[order]
    pairs = [order[:0].repeat(2).reshape(2, -1)]
    for step in range(1, len(order)):
        i = np.flatnonzero(frame[step:] == frame[:-step])
        if not len(i):
            break
        pairs.append(np.stack([order[i], order[i + step]]))
    a, b = np.concatenate(pairs, axis=1)
    a, b = np.stack([a, b])[:, track[a] != track[b]]
    low = np.minimum(parts.span[a, :, 0], parts.span[b, :, 0])
    high = np.maximum(parts.span[a, :, 1], parts.span[b, :, 1])
    extent = SIZE[0] + SIZE[1] * high[:, 1]
    area = (parts.pixels[a] + parts.pixels[b]) / (FILL * extent**2)
    fits = np.maximum((high - low + 1).max(axis=1) / extent, area) <= TOLERANCE
    touch = np.isin(a * len(frame) + b, parts.touching)
    against = np.where(fits, np.where(touch, 0, APART), CLASH)
    count = track.max() + 1
    result = np.bincount(track[a] * count + track[b], against, count**2).reshape(count, count)
    return result + result.T


def haste(parts: Parts, track: np.ndarray) -> np.ndarray:
    """Return what speaks against tracks k and l being one object that moved in between, (k, l)."""
    order = np.lexsort((parts.frame, track))
    starts = np.flatnonzero(np.diff(track[order], prepend=-1))
    first, last = order[starts], order[np.append(starts[1:], len(order)) - 1]
    frames = parts.frame[first] - parts.frame[last, None]
    moved = parts.span[first, :, 2] - parts.span[last, None, :, 2]
    speed = np.hypot(moved[..., 0], moved[..., 1]) / np.maximum(frames, 1)
    cost = np.where(frames > 0, SPEEDING * np.maximum(speed - SPEED, 0), 0)
    return cost + cost.T


class _Choice:
    """The kinds of all tracks, chosen so that they cost the least together.

    Args:
        cost: (k, 48) of each kind for each track, in nats.
        drop: (k,) of none.
        pairs: (k, k) of track k being of the same kind as track l.
        order: (k,) the tracks, those that are known best first.
    """

    def __init__(self, cost: np.ndarray, drop: np.ndarray, pairs: np.ndarray, order: np.ndarray):
        self.cost, self.drop, self.pairs, self.order = cost, drop, pairs, order
        self.kind = np.full(len(cost), -1)
        self.member = np.zeros_like(cost)  # 1 where a track is of a kind

    def put(self, k: int, kind: int) -> None:
        """Make track k be of that kind, or of none if it is -1."""
        self.member[k] = 0
        self.kind[k] = kind
        if kind >= 0:
            self.member[k, kind] = 1

    def costs(self, k: int) -> np.ndarray:
        """Return what each kind costs for track k, as things are, (48,); k must be of none."""
        return self.cost[k] + self.pairs[k] @ self.member + NEW_CLASS * ~self.member.any(axis=0)

    def settle(self, tracks: np.ndarray) -> None:
        """Give each of `tracks` its best kind in turn, until nothing changes."""
        for _ in range(SWEEPS):
            before = self.kind[tracks]
            for k in tracks.tolist():
                self.put(k, -1)
                costs = self.costs(k)
                best = int(costs.argmin())
                self.put(k, best if costs[best] <= self.drop[k] else -1)
            if (self.kind[tracks] == before).all():
                break

    def expense(self, tracks: list[int]) -> float:
        """Return what `tracks` add to the cost of all others together."""
        kinds = self.kind[tracks]
        for k in tracks:
            self.put(k, -1)
        total = 0.0
        for k, kind in zip(tracks, kinds.tolist(), strict=True):
            total += self.drop[k] if kind < 0 else self.costs(k)[kind]
            self.put(k, kind)
        return total

    def improve(self) -> None:
        """Settle all; then let each track that others keep from its best kind try to have it."""
        self.settle(self.order)
        for k in self.order.tolist():
            wish = int(self.cost[k].argmin())
            holders = np.flatnonzero((self.kind == wish) & (self.pairs[k] > 1))
            if self.kind[k] in (-1, wish) or not 0 < len(holders) <= RIVALS:
                continue
            tracks = [k, *holders.tolist()]
            before, expense = self.kind[tracks], self.expense(tracks)
            self.put(k, wish)
            self.settle(holders)
            if self.expense(tracks) < expense:
                continue
            for i, kind in zip(tracks, before.tolist(), strict=True):
                self.put(i, kind)
        self.settle(self.order)

    def probability(self, k: int) -> float:
        """Return how likely track k is of its kind, given those of the others."""
        kind = self.kind[k]
        self.put(k, -1)
        costs = self.costs(k)
        self.put(k, kind)
        return float(1 / np.exp(costs[kind] - costs).sum())
