"""What the network learns from: is it an object, and which shape, material and colour.

Is it an object: binary cross entropy over all pixels. Which shape, material and colour: a cross
entropy each over object pixels alone, so that the 95 % of background do not drown what the objects
are. Coarse stages learn from the pixel at the middle of each cell. The finest has attributes for
cells of 2 x 2 pixels: they are interpolated at the pixels, much as `borders.sharpen` does it. In
training each quarter of a batch does so at another one of the four pixels, which takes a quarter of
the time; validation looks at all.
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

    The finest attributes learn at one pixel of each cell, another one in each quarter of the
    frames; at all four in a batch of fewer frames. Of several processes each divides by the
    weights of the object pixels of its own frames.

    Args:
        answers: The logits (B, 1, h, w) of objectness and (B, 13, h, w) of attributes; of
            the last (B, 1, H, W) and (B, 13, H/2, W/2), rounded up.
        mask: Ids (B, H, W), any integer type.
        one_hot: `one_hot_factors()` on the same device.
    """
    sampled = len(mask) >= len(PIXELS)
    attributes, weights = (_attributes if sampled else _all_attributes)(answers, mask, one_hot)
    attributes = attributes.sum(dim=1) / weights.sum(dim=1).clamp(min=1)  # 0 without objects
    each = OBJECTNESS_WEIGHT * _objectness(answers, mask).mean(dim=1) + attributes  # (answers,)
    return COARSE_WEIGHT * each[:-1].sum() + each[-1]


def frame_losses(answers: Answers, mask: Tensor, one_hot: Tensor) -> Tensor:
    """Return the loss of each frame by itself, at all pixels, (B,); arguments as of `loss`."""
    attributes, weights = _all_attributes(answers, mask, one_hot)
    objectness = _objectness(answers, mask)
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


def _objectness(answers: Answers, mask: Tensor) -> Tensor:
    """Return the mean cross entropy of objectness of each answer and frame, (answers, B).

    The cells of all answers go through in one row, here and below: few, large operations.
    """
    ids = [*_coarse_ids(answers, mask), mask]
    logits = _in_a_row([objectness[:, 0] for objectness, _ in answers], dim=1).float()
    # Binary cross entropy with logits.
    each = F.softplus(torch.where(_in_a_row(ids, dim=1) > 0, -logits, logits))
    return torch.stack([part.mean(dim=1) for part in _back(each, ids)])


def _attributes(answers: Answers, mask: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the loss of attributes is made of, for each answer and frame, (answers, B) each.

    They are the weighted sum of their cross entropy over object pixels, and the sum of these
    weights. Arguments as of `loss`; each quarter of the frames is looked at at one of PIXELS.
    """
    finest, ids, weight = _at_pixels(answers[-1][1].float(), mask)
    ids = [*_coarse_ids(answers, mask), ids]
    cells = [*(attributes for _, attributes in answers[:-1]), finest]
    logits, row = _in_a_row(cells, dim=2).float(), _in_a_row(ids, dim=1)
    true = F.embedding(row.int(), one_hot).mT.split(FACTOR_SIZES, dim=1)  # none of background
    likelihood = sum(
        (F.log_softmax(x, dim=1) * y).sum(dim=1)
        for x, y in zip(logits.split(FACTOR_SIZES, dim=1), true, strict=True)
    )
    coarse = row.shape[1] - weight[0].numel()
    weight = F.pad(weight.flatten(1), (coarse, 0), value=1.0) * (row > 0)
    sums = ([part.sum(dim=1) for part in _back(x, ids)] for x in (-likelihood * weight, weight))
    attributes, weights = (torch.stack(parts) for parts in sums)
    return attributes, weights


def _all_attributes(answers: Answers, mask: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
    """Return `_attributes` at all pixels; the ratio of the two is the same for coarse cells."""
    turns = len(PIXELS)
    answers = [[part.repeat(turns, 1, 1, 1) for part in answer] for answer in answers]
    sums = _attributes(answers, mask.repeat(turns, 1, 1), one_hot)
    attributes, weights = (part.unflatten(1, (turns, len(mask))).sum(dim=1) for part in sums)
    return attributes, weights


def _coarse_ids(answers: Answers, mask: Tensor) -> list[Tensor]:
    """Return what all answers but the last learn from, (B, h, w) each."""
    return [middle_ids(mask, objectness) for objectness, _ in answers[:-1]]


def _in_a_row(parts: list[Tensor], dim: int) -> Tensor:
    """Return the last two dimensions (h, w) of all parts, flat and one after the other."""
    return torch.cat([part.flatten(-2) for part in parts], dim)


def _back(row: Tensor, parts: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the pieces of a row (B, cells) that parts (B, h, w) went into, in their order."""
    return row.split([part[0].numel() for part in parts], dim=1)


def _at_pixels(cells: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what there is at one pixel of each cell: the logits, the id and the weight.

    Each quarter of the frames has another one of PIXELS.

    Args:
        cells: Logits (B, C, h, w) of cells of 2 x 2 pixels.
        mask: Ids (B, H, W); beyond the frame there is background.

    Returns:
        (B, C, h, w), interpolated; (B, h, w); (B, h, w).
    """
    beyond = (0, mask.shape[2] % 2, 0, mask.shape[1] % 2)
    maps = (cells, F.pad(mask, beyond), F.pad(_border_weight(mask), beyond))
    shares = (x.tensor_split(len(PIXELS)) for x in maps)
    parts = [
        (
            _towards(_towards(logits, row, dim=2), column, dim=3),
            ids[:, row::2, column::2],
            weight[:, row::2, column::2],
        )
        for logits, ids, weight, (row, column) in zip(*shares, PIXELS, strict=True)
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


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
