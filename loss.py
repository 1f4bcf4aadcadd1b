"""What the network learns from: is it an object, and which shape, material and colour.

Is it an object: binary cross entropy over all pixels. Which shape, material and colour: a cross
entropy each over object pixels alone, so that the 95 % of background do not drown what the objects
are. Coarse stages learn from the pixel at the middle of each cell. The finest has attributes for
cells of 2 x 2 pixels: they are interpolated at the pixels, much as `borders.sharpen` does it. The
four pixels of a cell teach nearly the same, so a batch looks at one of them, another one in each
quarter of its frames.
Pixels near a border between two objects weigh more, after the weight map of the first UNet
(Ronneberger et al. 2015, arXiv:1505.04597), which weighs the gaps between objects.

All shapes are fixed, whatever the frames hold: nothing here waits for a GPU to say how many pixels
are objects, and a frame without any has a loss too.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from classes import FACTOR_SIZES, NUM_CLASSES, factors
from metrics import at_borders, dilated

OBJECTNESS_WEIGHT = 2.0  # beside one each of shape, material and colour
COARSE_WEIGHT = 0.5  # of each stage but the finest, whose answer is the one that counts
BORDER_WEIGHT = 4.0  # of object pixels within two of where two classes touch; 1 elsewhere
PIXELS = ((0, 0), (0, 1), (1, 0), (1, 1))  # row and column of each in a cell of the finest answer

Answers = Sequence[tuple[Tensor, Tensor]]  # model.Answer, coarsest first


def loss(answers: Answers, mask: Tensor, one_hot: Tensor) -> Tensor:
    """Return the loss (a scalar) of what `answers` says of frames.

    Of several processes each divides by the weights of the object pixels of its own frames.

    Args:
        answers: The logits (B, 1, h, w) of objectness and (B, 13, h, w) of attributes; of
            the last (B, 1, H, W) and (B, 13, H/2, W/2), rounded up. Of these each quarter of the
            frames teaches at another of four pixels; fewer than four frames teach at all.
        mask: Ids (B, H, W), any integer type.
        one_hot: `one_hot_factors()` on the same device.
    """
    if len(mask) < len(PIXELS):
        objectness, attributes, weights = _sums_of_all(answers, mask, one_hot)
    else:
        objectness, attributes, weights = _sums(answers, mask, one_hot, PIXELS)
    attributes = attributes.sum(dim=1) / weights.sum(dim=1).clamp(min=1)  # 0 without objects
    each = OBJECTNESS_WEIGHT * objectness.mean(dim=1) + attributes  # (answers,)
    return COARSE_WEIGHT * each[:-1].sum() + each[-1]


def frame_losses(answers: Answers, mask: Tensor, one_hot: Tensor) -> Tensor:
    """Return the loss of each frame by itself, at all pixels, (B,); arguments as of `loss`."""
    objectness, attributes, weights = _sums_of_all(answers, mask, one_hot)
    each = OBJECTNESS_WEIGHT * objectness + attributes / weights.clamp(min=1)  # (answers, B)
    return COARSE_WEIGHT * each[:-1].sum(dim=0) + each[-1]


def one_hot_factors() -> Tensor:
    """Return what every id is, (49, 13): 1 at its shape, its material and its colour."""
    table = torch.zeros(NUM_CLASSES, sum(FACTOR_SIZES), device="cpu")  # where that is not default
    ids, start = torch.arange(1, NUM_CLASSES, device="cpu"), 0
    for factor, size in zip(factors(ids), FACTOR_SIZES, strict=True):
        table[ids, start + factor] = 1
        start += size
    return table


Sums = tuple[Tensor, Tensor, Tensor]


def _sums(
    answers: Answers, mask: Tensor, one_hot: Tensor, pixels: Sequence[tuple[int, int]]
) -> Sums:
    """Return what both losses are made of, for each answer and frame, (answers, B) each.

    They are the mean cross entropy of objectness, the weighted sum of that of the attributes over
    object pixels, and the sum of these weights. The cells of all answers go through in one row:
    few, large operations. `pixels` are those of `_at_pixels`.
    """
    ids = [*(middle_ids(mask, objectness) for objectness, _ in answers[:-1]), mask]
    sizes = [part[0].numel() for part in ids]
    inside = _in_a_row(ids, dim=1) > 0  # (B, all cells)
    logits = _in_a_row([objectness[:, 0] for objectness, _ in answers], dim=1).float()
    # Binary cross entropy with logits.
    objectness = F.softplus(torch.where(inside, -logits, logits))
    objectness = torch.stack([part.mean(dim=1) for part in objectness.split(sizes, dim=1)])

    cells = [attributes for _, attributes in answers]
    cells[-1], ids[-1], weight = _at_pixels(cells[-1].float(), mask, pixels)
    sizes = [part[0].numel() for part in ids]
    ids = _in_a_row(ids, dim=1)
    logits = _in_a_row(cells, dim=2).float().split(FACTOR_SIZES, dim=1)
    true = F.embedding(ids.int(), one_hot).mT.split(FACTOR_SIZES, dim=1)  # none of background
    likelihood = [F.log_softmax(x, dim=1) * y for x, y in zip(logits, true, strict=True)]
    weight = F.pad(weight.flatten(1), (sum(sizes[:-1]), 0), value=1.0)  # 1 for coarse cells
    weight = weight * (ids > 0)
    attributes = -sum(part.sum(dim=1) for part in likelihood) * weight

    # Back from the row to the answers.
    attributes, weight = (
        torch.stack([part.sum(dim=1) for part in row.split(sizes, dim=1)])
        for row in (attributes, weight)
    )
    return objectness, attributes, weight


def _sums_of_all(answers: Answers, mask: Tensor, one_hot: Tensor) -> Sums:
    """Return `_sums` at all pixels; coarse cells count four times in sums and in weights."""
    each = [_sums(answers, mask, one_hot, [pixel]) for pixel in PIXELS]
    objectness, attributes, weights = (torch.stack(part) for part in zip(*each, strict=True))
    return objectness.mean(dim=0), attributes.sum(dim=0), weights.sum(dim=0)


def _in_a_row(parts: list[Tensor], dim: int) -> Tensor:
    """Return the last two dimensions (h, w) of all parts, flat and one after the other."""
    return torch.cat([part.flatten(-2) for part in parts], dim)


def _at_pixels(
    cells: Tensor, mask: Tensor, pixels: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what there is at one pixel of each cell: the logits, the id and the weight.

    Args:
        cells: Logits (B, C, h, w) of cells of 2 x 2 pixels.
        mask: Ids (B, H, W); beyond the frame there is background.
        pixels: Row and column of the pixel in its cell, for as many equal parts of the frames.

    Returns:
        (B, C, h, w), interpolated; (B, h, w); (B, h, w).
    """
    weight = _border_weight(mask)
    beyond = (0, mask.shape[2] % 2, 0, mask.shape[1] % 2)
    whole = (cells, F.pad(mask, beyond), F.pad(weight, beyond))
    parts = [
        (
            _towards(_towards(cells, row, dim=2), column, dim=3),
            ids[:, row::2, column::2],
            weight[:, row::2, column::2],
        )
        for cells, ids, weight, (row, column) in zip(
            *(x.tensor_split(len(pixels)) for x in whole), pixels, strict=True
        )
    ]
    logits, ids, weight = (torch.cat(part) for part in zip(*parts, strict=True))
    return logits, ids, weight


def _towards(cells: Tensor, side: int, dim: int) -> Tensor:
    """Interpolate where the first (0) or the second (1) pixel of each cell is: bilinearly.

    It is a quarter of the way to the neighbour on that side, at the frame's edge the cell itself.
    """
    first, last = cells.narrow(dim, 0, 1), cells.narrow(dim, -1, 1)
    others = cells.narrow(dim, side, cells.shape[dim] - 1)
    return cells.lerp(torch.cat((others, last) if side else (first, others), dim), 0.25)


def _border_weight(mask: Tensor) -> Tensor:
    """Return BORDER_WEIGHT near where objects meet, background too, else 1; (B, H, W)."""
    return 1 + (BORDER_WEIGHT - 1) * dilated(at_borders(mask))


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
    """Return how many pixels (..., H, W) wide the square cells (..., h, w) are, a power of two."""
    sides = zip(pixels.shape[-2:], cells.shape[-2:], strict=True)
    return 2 ** max(math.ceil(math.log2(p / c)) for p, c in sides)
