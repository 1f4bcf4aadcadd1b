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

Answers = Sequence[tuple[Tensor, Tensor]]  # model.Answer, coarsest first


def loss(answers: Answers, mask: Tensor, one_hot: Tensor) -> Tensor:
    """Return the loss (a scalar) of what `answers` says of frames.

    Args:
        answers: The logits (B, 1, h, w) of objectness and (B, 13, h, w) of attributes; of
            the last (B, 1, H, W) and (B, 13, H/2, W/2).
        mask: Ids (B, H, W), any integer type.
        one_hot: `one_hot_factors()` on the same device.
    """
    objectness, attributes, objects = _sums(answers, mask, one_hot)
    attributes = attributes.sum(dim=1) / objects.sum(dim=1).clamp(min=1)  # 0 without objects
    each = BACKGROUND_WEIGHT * objectness.mean(dim=1) + attributes  # (answers,)
    return COARSE_WEIGHT * each[:-1].sum() + each[-1]


def frame_losses(answers: Answers, mask: Tensor, one_hot: Tensor) -> Tensor:
    """Return the loss of each frame by itself, (B,); arguments as of `loss`."""
    objectness, attributes, objects = _sums(answers, mask, one_hot)
    each = BACKGROUND_WEIGHT * objectness + attributes / objects.clamp(min=1)  # (answers, B)
    return COARSE_WEIGHT * each[:-1].sum(dim=0) + each[-1]


def one_hot_factors() -> Tensor:
    """Return what every id is, (49, 13): 1 at its shape, its material and its colour."""
    table = torch.zeros(NUM_CLASSES, sum(FACTOR_SIZES), device="cpu")  # where that is not default
    ids, start = torch.arange(1, NUM_CLASSES, device="cpu"), 0
    for factor, size in zip(factors(ids), FACTOR_SIZES, strict=True):
        table[ids, start + factor] = 1
        start += size
    return table


def _sums(answers: Answers, mask: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what both losses are made of, for each answer and frame, (answers, B) each.

    They are the mean cross entropy of objectness, the sum of that of the attributes over object
    pixels, and the number of these. The cells of all answers go through in one row: few, large
    operations.
    """
    masks = [*(middle_ids(mask, objectness) for objectness, _ in answers[:-1]), mask]
    logits = _in_a_row([objectness[:, 0] for objectness, _ in answers], dim=1).float()
    inside = _in_a_row(masks, dim=1) > 0  # (B, all cells)
    # Binary cross entropy with logits.
    objectness = F.softplus(torch.where(inside, -logits, logits))

    cells = [attributes for _, attributes in answers]
    counts = _count_factors(masks, cells, one_hot)  # (B, 13, all cells of attributes)
    logits = _in_a_row(cells, dim=2).float().split(FACTOR_SIZES, dim=1)
    # All pixels of a cell share its logits: its cross entropy is the log-probability of each
    # factor times the number of its pixels that have it.
    log_likelihood = torch.cat([F.log_softmax(factor, dim=1) for factor in logits], dim=1)
    attributes = -(log_likelihood * counts).sum(dim=1)
    objects = counts[:, : FACTOR_SIZES[0]].sum(dim=1)

    # Back from the row to the answers.
    sizes = [[part[0, 0].numel() for part in parts] for parts in zip(*answers, strict=True)]
    return (
        torch.stack([part.mean(dim=1) for part in objectness.split(sizes[0], dim=1)]),
        torch.stack([part.sum(dim=1) for part in attributes.split(sizes[1], dim=1)]),
        torch.stack([part.sum(dim=1) for part in objects.split(sizes[1], dim=1)]),
    )


def _in_a_row(parts: list[Tensor], dim: int) -> Tensor:
    """Return the last two dimensions (h, w) of all parts, flat and one after the other."""
    return torch.cat([part.flatten(-2) for part in parts], dim)


def _count_factors(masks: list[Tensor], cells: list[Tensor], one_hot: Tensor) -> Tensor:
    """Return how many pixels of each cell have which shape, material and colour, (B, 13, cells)."""
    widths = [cell_width(c, mask) for c, mask in zip(cells, masks, strict=True)]
    rows = []
    for mask, c, width in zip(masks, cells, widths, strict=True):
        # The ids of the pixels of each cell, (B, cells, width^2), background beyond the frame.
        batch, (height, columns) = len(mask), c.shape[-2:]
        below, right = height * width - mask.shape[1], columns * width - mask.shape[2]
        mask = F.pad(mask, (0, right, 0, below)) if below or right else mask
        ids = mask.reshape(batch, height, width, columns, width).transpose(2, 3)
        ids = ids.reshape(batch, height * columns, width**2)
        rows.append(F.pad(ids, (0, max(widths) ** 2 - width**2)))
    ids = torch.cat(rows, dim=1)
    counts = F.embedding_bag(ids.flatten(0, 1).int(), one_hot, mode="sum")  # background is none
    return counts.view(*ids.shape[:2], -1).mT.contiguous()


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
