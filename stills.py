"""Pictures of unrelated scenes that lie in one folder like the frames of a video.

In a video a fixed camera sees the same ground, and mostly the same objects, however few frames are
kept of it. Two consecutive frames are of different scenes if neither agrees, or if they have
several kinds of object each and none in common: scenes may share camera and lamps.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from classes import NUM_CLASSES
from tracks import likeliest, occupied

BLOCK = 8  # pixels each way that the ground is averaged over: noise matters little then
CELLS = 8  # of 2 x 2 pixels that a kind of object has at least to count
KINDS = 2  # of object, at least, in each of two frames that are compared
STRANGERS = 3  # kinds in each, none of them the other's, are another scene on any ground
IN_COMMON = 0.5  # of the kinds of the frame with fewer; less is another scene ...
GROUND = 0.5  # ... if the ground differs by more grey levels too, the median over all blocks


def thumbnails(frames: Tensor) -> Tensor:
    """Return the green of frames (N, 3, H, W), uint8, averaged over blocks: half (N, h, w)."""
    rows = frames[:, 1:2, ::2].float()  # every other one: as good, in half the time
    return F.avg_pool2d(rows, (BLOCK // 2, BLOCK), ceil_mode=True)[:, 0].half()


def are_stills(ground: Tensor, objects: Tensor, evidence: Tensor) -> bool:
    """Return whether most frames of a video are of another scene than the one before.

    Args:
        ground: (T, h, w), its `thumbnails`.
        objects: (T, H, W) bool, where there is an object.
        evidence: (n, 13) logits of the cells of 2 x 2 pixels that hold one, in order.
    """
    if len(objects) < 2:
        return False
    cells = occupied(objects)
    frame = torch.nonzero(cells)[:, 0]
    kind = frame * NUM_CLASSES + likeliest(evidence)
    count = torch.bincount(kind, minlength=len(objects) * NUM_CLASSES)
    there = count.view(-1, NUM_CLASSES).numpy() >= CELLS
    fewer = np.minimum(there[1:].sum(axis=1), there[:-1].sum(axis=1))
    shared = (there[1:] & there[:-1]).sum(axis=1)
    compared = fewer >= KINDS
    differ = compared & (shared < IN_COMMON * fewer)
    if len(differ) > 2 * compared.sum() or 2 * differ.sum() <= compared.sum():  # nearly always
        return False
    ground = ground.float().numpy()
    for t in np.flatnonzero(differ & ((shared > 0) | (fewer < STRANGERS))):
        busy = F.max_pool2d(objects[t : t + 2].float(), BLOCK, ceil_mode=True).any(dim=0)
        moved = np.abs(ground[t + 1] - ground[t])[~busy.numpy()]
        differ[t] = len(moved) == 0 or np.median(moved) > GROUND
    return 2 * int(differ.sum()) > int(compared.sum())
