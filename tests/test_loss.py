"""The loss of fixed shapes against the plain one, which picks out the object pixels."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from classes import FACTOR_SIZES, NUM_CLASSES, factors
from loss import (
    BORDER_WEIGHT,
    COARSE_WEIGHT,
    OBJECTNESS_WEIGHT,
    PIXELS,
    frame_losses,
    loss,
    middle_ids,
    one_hot_factors,
)

SIZES = [(64, 96), (37, 53), (16, 16), (20, 3)]


def plain_loss(
    answers: list[tuple[Tensor, Tensor]], mask: Tensor, taught: Tensor | None = None
) -> Tensor:
    """The definition, pixel by pixel; the finest attributes learn where `taught` is not 0."""
    total = torch.zeros(())
    for i, (objectness, attributes) in enumerate(answers):
        finest = i == len(answers) - 1
        ids = mask if finest else middle_ids(mask, objectness)
        inside, weight = ids > 0, torch.ones(ids.shape)
        part = F.binary_cross_entropy_with_logits(objectness[:, 0].float(), inside.float())
        part = part * OBJECTNESS_WEIGHT
        if inside.any():
            if finest:
                attributes = F.interpolate(attributes, scale_factor=2, mode="bilinear")
                attributes = attributes[..., : ids.shape[1], : ids.shape[2]]
                weight = border_weight(ids) * (1 if taught is None else taught)
            logits = attributes.movedim(1, -1)[inside].split(FACTOR_SIZES, dim=1)
            weight = weight[inside]
            for answer, truth in zip(logits, factors(ids[inside].long()), strict=True):
                each = F.cross_entropy(answer, truth, reduction="none")
                part = part + (weight * each).sum() / weight.sum()
        total = total + (1 if finest else COARSE_WEIGHT) * part
    return total


def border_weight(ids: Tensor) -> Tensor:
    """The definition: pixels up to one away, corners too, from one beside another class."""
    weight = torch.ones(ids.shape)
    for n, frame in enumerate(ids.tolist()):
        beside = {
            (y + down, x + right)
            for y, row in enumerate(frame)
            for x, own in enumerate(row)
            for v, u in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1))
            if 0 <= v < len(frame) and 0 <= u < len(row) and own and frame[v][u] not in (0, own)
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
        }
        for y, x in beside:
            if 0 <= y < len(frame) and 0 <= x < len(frame[0]):
                weight[n, y, x] = BORDER_WEIGHT
    return weight


def answers(
    size: tuple[int, int], scale: float = 1.0, frames: int = 3
) -> list[tuple[Tensor, Tensor]]:
    """Two coarse stages and a fine one, whose attributes are of cells of 2 x 2 pixels."""
    cells = [(-(-size[0] // w), -(-size[1] // w)) for w in (8, 4, 2)]
    sizes = [*cells[:2], size]
    return [
        (
            (scale * torch.randn(frames, 1, *objectness)).requires_grad_(),
            (scale * torch.randn(frames, 13, *cell)).requires_grad_(),
        )
        for objectness, cell in zip(sizes, cells, strict=True)
    ]


def masks(size: tuple[int, int]) -> Tensor:
    """Ids (3, H, W): a frame full of objects, one with a few, one with none."""
    mask = torch.randint(0, NUM_CLASSES, (3, *size), dtype=torch.uint8)
    mask[0, :, :4], mask[0, :, 4:] = 7, 8 * (mask[0, :, 4:] > 9)  # two objects, and holes
    mask[1, 5:] = 0
    mask[2] = 0
    return mask


def quarters(mask: Tensor) -> Tensor:
    """1 at the pixels (B, H, W) at which a batch of four frames or more learns what objects are."""
    taught = torch.zeros(mask.shape)
    for frames, (row, column) in zip(taught.tensor_split(4), PIXELS, strict=True):
        frames[:, row::2, column::2] = 1
    return taught


@pytest.mark.parametrize("frames", [3, 4, 5, 6])
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_plain_one_and_so_are_its_gradients(size, scale, frames):
    """Four frames and more learn from a quarter of the pixels each, three from all."""
    torch.manual_seed(0)
    found_by, mask = answers(size, scale, frames), masks(size)
    mask = torch.cat((mask, mask.flip(1)))[:frames]
    leaves = [part for stage in found_by for part in stage]
    found = loss(found_by, mask, one_hot_factors())
    expected = plain_loss(found_by, mask, quarters(mask) if frames > 3 else None)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("size", SIZES)
def test_frames_have_the_loss_of_each_alone(size):
    torch.manual_seed(1)
    found_by, mask = answers(size), masks(size)
    found = frame_losses(found_by, mask, one_hot_factors())
    alone = [
        plain_loss(
            [(objectness[i : i + 1], attributes[i : i + 1]) for objectness, attributes in found_by],
            mask[i : i + 1],
        )
        for i in range(len(mask))
    ]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-6, atol=0)


@pytest.mark.parametrize("frames", [3, 4])
def test_without_an_object_what_it_is_teaches_nothing(frames):
    found_by = answers((16, 16), frames=frames)
    mask = torch.zeros(frames, 16, 16, dtype=torch.uint8)
    loss(found_by, mask, one_hot_factors()).backward()
    for objectness, attributes in found_by:
        assert not attributes.grad.any()
        assert objectness.grad.isfinite().all()


def test_what_an_id_is_by_hand():
    assert one_hot_factors()[29].nonzero().flatten().tolist() == [1, 3 + 1, 5 + 4]  # brown ...
    assert not one_hot_factors()[0].any()
