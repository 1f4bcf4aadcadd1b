"""Objects followed through a video: each is one class through all of it.

`follow` takes what the network sees in all frames of a video and returns their labels. In order:

1. Parts: connected pixels of one frame that read alike (tracks.py).
2. Tracks: parts linked from frame to frame where they are surely one thing (tracks.py).
3. Classes: the evidence along each track is summed, and all tracks of the video get their classes
   together: those seen at one time differ, unless they fit into one object, or both are surely of
   one class; the fewer the better.

Tracks of one class are one object, which so keeps its number where it is hidden for a while; two
whole objects that are surely of one class share it. `by_frame` labels each frame by itself instead.

Lengths and areas are in pixels of frames of FRAME_SIZE; `unit` scales them for others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from classes import FACTOR_SIZES, NUM_KINDS
from tracks import MEMBERS, TOLERANCE, Parts, likeliest, link, occupied, parts_of, sums

NEW_CLASS = 4.0  # nats that a further class of the video costs ...
HIDDEN = 0.7  # ... and times ln(all frames / those it is seen in) what never shows whole costs more
APART = 0.6  # nats against one object being seen in two pieces
CONFLICT = 30.0  # nats against two objects of one class
SIZE = (14.0, 0.24)  # extent of an object, at most, with its lower end in row y: 14 + 0.24 y
FILL = 0.75  # share of the square of that extent which an object covers, at most
HALF_SEEN = 60.0  # pixels of a part at which its evidence counts half
EDGE_WEIGHT = 0.5  # of the evidence of a part that the frame cuts off ...
EDGE_SHAPE = 0.4  # ... and once more of that of its shape: what is cut straight reads as a cube
UNRELIABLE = 15.0  # pixels x frames at which a third of all readings are taken as chance
SURE = 0.8  # probability at which two that are seen whole may both be of one class
DROP_PIXELS = 40  # a track that never shows more may be dropped ...
DROP = 0.7  # ... where its likeliest class has a probability below exp(-0.7), one half
SWEEPS = 6  # of improvement, at most
RIVALS = 3  # tracks that may together have to make way for one, at most


class Objects(NamedTuple):
    """The objects of one video."""

    labels: Tensor  # (T, H, W) uint8, ids 0..48
    confidence: dict[int, float]  # by class id, 0..1: how sure what is seen of it is of that class
    numbers: Sequence[int] | None = None  # (T,) those of the frames; None: from 0
    seconds: Sequence[float | None] | None = None  # (T,) of a clip, since its start
    bars: tuple[int, int, int, int] = (0, 0, 0, 0)  # pixels left, right, above, below the picture
    stills: bool = False  # whether they are pictures of different scenes, each labelled alone
    remarks: Sequence[str] = ()  # what is done to all frames of its size, for people to read


def follow(objects: Tensor, evidence: Tensor, unit: float = 1.0) -> Objects:
    """Label the object pixels of one video, each object with one class.

    Args:
        objects: (T, H, W) bool, where there is an object.
        evidence: (n, 13), for each cell of 2 x 2 pixels that holds such a pixel, in order, the
            logits of 3 shapes, 2 materials and 8 colours: `tracks.gather`.
        unit: How many times larger objects are than in frames of FRAME_SIZE.

    Returns:
        The labels; background where there is no object, and where a track never shows more than
        DROP_PIXELS pixels and is seen whole, or fits no other object of the video and has no
        likely class of its own: nearly all are objects of which only a sliver is ever seen.
    """
    labels = np.zeros(tuple(objects.shape), np.uint8)
    if not len(evidence):
        return Objects(torch.from_numpy(labels), {})
    inside = objects.cpu().numpy()
    parts, part = parts_of(inside, evidence, unit)
    track = link(parts, len(labels))
    kinds, confidence = classify(parts, track)
    labels[inside] = (kinds[track] + 1).astype(np.uint8)[part]
    return Objects(torch.from_numpy(labels), confidence)


def follow_each(objects: Tensor, evidence: Tensor, unit: float = 1.0) -> Objects:
    """Label pictures that are of different scenes, each as `follow` does a video of one frame.

    The confidence in a class is the least that any picture has in it.
    """
    labels, confidence = torch.zeros(objects.shape, dtype=torch.uint8), {}
    counts = occupied(objects).flatten(1).sum(dim=1).tolist()
    for t, part in enumerate(evidence.split(counts)):
        found = follow(objects[t : t + 1], part, unit)
        labels[t] = found.labels[0]
        for class_id, sure in found.confidence.items():
            confidence[class_id] = min(sure, confidence.get(class_id, 1.0))
    return Objects(labels, confidence)


def by_frame(objects: Tensor, evidence: Tensor) -> Objects:
    """Label each pixel as the network reads its frame alone; arguments as of `follow`.

    Nothing is known of objects then, so there is no confidence.
    """
    cells = occupied(objects)
    ids = cells.to(torch.uint8)
    ids[cells] = likeliest(evidence).to(torch.uint8)
    height, width = objects.shape[-2:]
    pixels = ids.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :height, :width]
    return Objects(pixels * objects, {})


def classify(parts: Parts, track: np.ndarray) -> tuple[np.ndarray, dict[int, float]]:
    """Return the kind of each track, 0..47 or -1 if it is dropped, and confidence by class id.

    Where a track was seen says nothing of its class: however far an object moves between two
    frames, what is of its class is that object.
    """
    # What each part says counts by how much of it is seen.
    weight = parts.pixels / (parts.pixels + HALF_SEEN)
    weight = weight * np.where(parts.at_edge, EDGE_WEIGHT, 1)
    evidence = parts.evidence.copy()
    evidence[parts.at_edge, : FACTOR_SIZES[0]] *= EDGE_SHAPE

    # The probability of each kind for each track. Neighbouring frames repeat each other's errors:
    # n of them say as much as the root of n.
    count = track.max() + 1
    seen = np.bincount(track, weights=weight)
    total = sums(track, count, evidence * weight[:, None]) / np.sqrt(seen)[:, None] @ MEMBERS.T
    p = np.exp(total - total.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)

    # What each kind costs: its surprise, where a part of what is hardly seen is taken as chance.
    most = np.zeros(count)
    np.maximum.at(most, track, parts.pixels)
    chance = UNRELIABLE / (2 * UNRELIABLE + seen * most)
    cost = -np.log((1 - chance[:, None]) * p + chance[:, None] / NUM_KINDS)
    free = parts.free()
    new = new_class_cost(parts, track, free)
    drop = np.where(most <= DROP_PIXELS, new + DROP, np.inf)

    drop[is_speck(track, most, free)] = -np.inf
    twins = are_twins(parts, track, cost, free)
    pairs = np.where(twins, 0, conflict_cost(parts, track))

    order = np.argsort(-seen * most, kind="stable")
    assignment = Assignment(cost, new, drop, pairs, order)
    assignment.improve()
    # An object is as sure of its class as its tracks are by themselves, each by its pixels.
    kind, pixels = assignment.kind, np.bincount(track, parts.pixels)
    own = np.exp(-cost[np.arange(count), kind])
    confidence = {
        int(k) + 1: float(np.average(own[kind == k], weights=pixels[kind == k]))
        for k in np.unique(kind[kind >= 0])
    }
    return kind, confidence


def new_class_cost(parts: Parts, track: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Return what it costs that each track is of a class that no other one has, (k,), in nats.

    Objects do not come and go in the midst of a scene: what is seen in few of its frames, always
    beside another object and never at the edge, is likelier a misread piece of what else is there.
    """
    lengths = np.bincount(np.unique(np.stack([track, parts.frame]), axis=1)[0])
    few = np.log(len(np.unique(parts.frame)) / lengths)
    few[track[free | parts.at_edge]] = 0
    return NEW_CLASS + HIDDEN * few


def is_speck(track: np.ndarray, most: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Return which tracks are smaller than any object, `most` pixels, though nothing hides them."""
    hidden = np.zeros(len(most), bool)
    hidden[track[~free]] = True
    return ~hidden & (most <= DROP_PIXELS)


def are_twins(parts: Parts, track: np.ndarray, cost: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Return which tracks k and l are two objects of one class, (k, l) bool.

    Both are surely of it, and seen whole in one frame. In a video each is free of others sooner or
    later; of what touches another in the only frame there is we believe it.
    """
    best, sure = cost.argmin(axis=1), cost.min(axis=1) <= -np.log(SURE)
    whole = free if np.ptp(parts.frame) else ~parts.at_edge
    seen = np.flatnonzero(whole & sure[track])
    frames, of_frame = np.unique(parts.frame[seen], return_inverse=True)
    who, of_who = np.unique(track[seen], return_inverse=True)
    there = np.zeros((len(who), len(frames)), np.float32)
    there[of_who, of_frame] = 1
    together = np.zeros((len(cost), len(cost)), bool)
    together[np.ix_(who, who)] = there @ there.T > 0
    return together & (best[:, None] == best)


def conflict_cost(parts: Parts, track: np.ndarray) -> np.ndarray:
    """Return what speaks against track k being of the class of track l, both in view, (k, l)."""
    # All pairs of parts of one frame: of those in order of their frames, first the neighbours,
    # then the next but one, until no two of a frame are so far apart.
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

    # Whether both fit into one object, by the box around them and by their pixels together.
    low = np.minimum(parts.span[a, :, 0], parts.span[b, :, 0])
    high = np.maximum(parts.span[a, :, 1], parts.span[b, :, 1])
    extent = SIZE[0] + SIZE[1] * high[:, 1]
    area = (parts.pixels[a] + parts.pixels[b]) / (FILL * extent**2)
    fits = np.maximum((high - low + 1).max(axis=1) / extent, area) <= TOLERANCE

    # The sum over all frames, for each two tracks.
    touch = np.isin(a * len(frame) + b, parts.touching)
    against = np.where(fits, np.where(touch, 0, APART), CONFLICT)
    count = track.max() + 1
    result = np.bincount(track[a] * count + track[b], against, count**2).reshape(count, count)
    return result + result.T


class Assignment:
    """The kinds of all tracks, chosen so that they cost the least together.

    Args:
        cost: (k, 48) of each kind for each track, in nats.
        new: (k,) more of a kind that no other track has.
        drop: (k,) of none.
        pairs: (k, k) of track k being of the same kind as track l.
        order: (k,) the tracks, those that are known best first.
    """

    def __init__(
        self,
        cost: np.ndarray,
        new: np.ndarray,
        drop: np.ndarray,
        pairs: np.ndarray,
        order: np.ndarray,
    ):
        self.cost, self.new, self.drop, self.pairs, self.order = cost, new, drop, pairs, order
        self.kind = np.full(len(cost), -1)
        self.member = np.zeros_like(cost)  # 1 where a track is of a kind

    def assign(self, k: int, kind: int) -> None:
        """Make track k be of that kind, or of none if it is -1."""
        self.member[k] = 0
        self.kind[k] = kind
        if kind >= 0:
            self.member[k, kind] = 1

    def costs(self, k: int) -> np.ndarray:
        """Return what each kind costs for track k, as things are, (48,); k must be of none."""
        return self.cost[k] + self.pairs[k] @ self.member + self.new[k] * ~self.member.any(axis=0)

    def descend(self, tracks: np.ndarray) -> None:
        """Give each of `tracks` its best kind in turn, until nothing changes."""
        for _ in range(SWEEPS):
            before = self.kind[tracks]
            for k in tracks.tolist():
                self.assign(k, -1)
                costs = self.costs(k)
                best = int(costs.argmin())
                self.assign(k, best if costs[best] <= self.drop[k] else -1)
            if (self.kind[tracks] == before).all():
                break

    def cost_of(self, tracks: list[int]) -> float:
        """Return what `tracks` add to the cost of all others together."""
        kinds = self.kind[tracks]
        for k in tracks:
            self.assign(k, -1)
        total = 0.0
        for k, kind in zip(tracks, kinds.tolist(), strict=True):
            total += self.drop[k] if kind < 0 else self.costs(k)[kind]
            self.assign(k, kind)
        return total

    def improve(self) -> None:
        """Descend; then let each track that others keep from its best kind try to have it."""
        self.descend(self.order)
        for k in self.order.tolist():
            best = int(self.cost[k].argmin())
            holders = np.flatnonzero((self.kind == best) & (self.pairs[k] > 1))
            if self.kind[k] in (-1, best) or not 0 < len(holders) <= RIVALS:
                continue
            tracks = [k, *holders.tolist()]
            before, cost = self.kind[tracks], self.cost_of(tracks)
            self.assign(k, best)
            self.descend(holders)
            if self.cost_of(tracks) < cost:
                continue
            for i, kind in zip(tracks, before.tolist(), strict=True):
                self.assign(i, kind)
        self.descend(self.order)
