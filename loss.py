"""What the network learns from: is it an object, and which shape, material and colour.

Is it an object: binary cross entropy over all pixels. Which shape, material and colour: a cross
entropy each over object pixels alone, so that the 95 % of background do not drown what the objects
are. Coarse stages learn from the pixel at the middle of each cell.

All shapes are fixed, whatever the frames hold: nothing here waits for a GPU to say how many pixels
are objects, and a frame without any has a loss too.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from classes import FACTOR_SIZES, NUM_CLASSES, factors

BACKGROUND_WEIGHT = 2.0  # of "is it an object", beside one each of shape, material and colour
COARSE_WEIGHT = 0.5  # of each stage but the finest, whose answer is the one that counts

Stages = Sequence[tuple[Tensor, Tensor]]  # model.Stage, coarsest first: thing and kind


def loss(stages: Stages, mask: Tensor, one_hot: Tensor) -> Tensor:
    """Return the loss (a scalar) of what `stages` says of frames.

    Args:
        stages: The logits (B, 1, h, w) of `thing` and (B, 13, h, w) of `kind`.
        mask: Ids (B, H, W), any integer type.
        one_hot: `one_hot_factors()` on the same device.
    """
    thing, kind, objects = _sums(stages, mask, one_hot)
    kind = kind.sum(dim=1) / objects.sum(dim=1).clamp(min=1)  # (stages,), 0 without objects
    each = BACKGROUND_WEIGHT * thing.mean(dim=1) + kind
    return COARSE_WEIGHT * each[:-1].sum() + each[-1]


def frame_losses(stages: Stages, mask: Tensor, one_hot: Tensor) -> Tensor:
    """Return the loss of each frame by itself, (B,); arguments as of `loss`."""
    thing, kind, objects = _sums(stages, mask, one_hot)
    each = BACKGROUND_WEIGHT * thing + kind / objects.clamp(min=1)  # (stages, B)
    return COARSE_WEIGHT * each[:-1].sum(dim=0) + each[-1]


def one_hot_factors() -> Tensor:
    """Return what every id is, (49, 13): 1 at its shape, its material and its colour."""
    table, ids, start = torch.zeros(NUM_CLASSES, sum(FACTOR_SIZES)), torch.arange(1, NUM_CLASSES), 0
    for factor, size in zip(factors(ids), FACTOR_SIZES, strict=True):
        table[ids, start + factor] = 1
        start += size
    return table


def _sums(stages: Stages, mask: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what both losses are made of, for each stage and frame, (stages, B) each.

    They are the mean cross entropy of `thing`, the sum of those of `kind` over object pixels, and
    the number of these.
    """
    ids = [*(middle_ids(mask, thing) for thing, _ in stages[:-1]), mask]
    sums = [_stage_sums(*stage, truth, one_hot) for stage, truth in zip(stages, ids, strict=True)]
    thing, kind, objects = (torch.stack(parts) for parts in zip(*sums, strict=True))
    return thing, kind, objects


def _stage_sums(thing: Tensor, kind: Tensor, mask: Tensor, one_hot: Tensor) -> tuple[Tensor, ...]:
    """Return `_sums` of one stage, (B,) each, for ids (B, h, w) of the cells of `thing`.

    All pixels of a cell of `kind` share its logits: its cross entropy is the log-probability of
    each factor times the number of its pixels that have it.
    """
    thing = thing[:, 0].float()
    thing = F.softplus(torch.where(mask > 0, -thing, thing)).mean(dim=(1, 2))
    counts = _count_factors(mask, kind, one_hot)  # (B, 13, h, w)
    pairs = zip(*(x.split(FACTOR_SIZES, dim=1) for x in (kind.float(), counts)), strict=True)
    log_likelihood = sum((F.log_softmax(x, dim=1) * n).sum(dim=(1, 2, 3)) for x, n in pairs)
    return thing, -log_likelihood, counts[:, : FACTOR_SIZES[0]].sum(dim=(1, 2, 3))


def _count_factors(mask: Tensor, cells: Tensor, one_hot: Tensor) -> Tensor:
    """Return how many pixels of each cell have which shape, material and colour, (B, 13, h, w)."""
    batch, (height, width), pixels = len(mask), cells.shape[-2:], cell_width(cells, mask)
    below, right = height * pixels - mask.shape[1], width * pixels - mask.shape[2]
    mask = F.pad(mask, (0, right, 0, below)) if below or right else mask  # with background
    ids = mask.int().view(batch, height, pixels, width, pixels).transpose(2, 3)
    counts = F.embedding_bag(ids.reshape(-1, pixels**2), one_hot, mode="sum")  # (B * h * w, 13)
    return counts.view(batch, height, width, -1).movedim(3, 1).contiguous()


def middle_ids(mask: Tensor, cells: Tensor) -> Tensor:
    """Return the ids (B, h, w) at the middle of the cells (B, C, h, w) of a mask (B, H, W)."""
    width = cell_width(cells, mask)
    for dim, number in zip((1, 2), cells.shape[-2:], strict=True):
        last = mask.narrow(dim, mask.shape[dim] - 1, 1)
        mask = mask[:, width // 2 :: width] if dim == 1 else mask[:, :, width // 2 :: width]
        if mask.shape[dim] < number:  # the middle of the last cells lies beyond the frame
            mask = torch.cat((mask, last), dim)
    return mask


def cell_width(cells: Tensor, pixels: Tensor) -> int:
    """Return how many pixels (..., W) wide the square cells (..., w) are, a power of two."""
    return 2 ** math.ceil(math.log2(pixels.shape[-1] / cells.shape[-1]))
