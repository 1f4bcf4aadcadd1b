"""The network: a UNet whose 49 logits are put together from object, shape, material and colour.

The default is small and made for speed: it folds the frame to half resolution, works with
residual blocks and additive skips, and decides what an object is on coarse grids before it draws
the edge. `UNet(**CLASSIC)` is the conventional UNet of Ronneberger et al. 2015
(https://arxiv.org/abs/1505.04597) with batch normalisation and 64..1024 channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dataset import COLOURS, MATERIALS, NUM_CLASSES, SHAPES

FACTOR_SIZES = (1, len(SHAPES), len(MATERIALS), len(COLOURS))  # object, shape, material, colour
CLASSIC = {
    "widths": (64, 128, 256, 512, 1024),
    "stem_stride": 1,
    "residual": False,
    "factored": False,
}


class Block(nn.Module):
    """Two 3x3 convolutions with batch normalisation; `residual` adds the input to the output."""

    def __init__(self, in_channels: int, out_channels: int, residual: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = None
        if residual:
            same = in_channels == out_channels
            self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W)."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        y = y if self.shortcut is None else y + self.shortcut(x)
        return F.relu(y, inplace=True)


class UNet(nn.Module):
    """Encoder, decoder and skip connections; logits of every class for every pixel.

    Args:
        in_channels: Channels of a frame.
        num_classes: Channels of the output; 49 where `factored`.
        widths: Channels of each stage, finest first; each stage halves the resolution.
        blocks: Blocks in each encoder stage (one number for all, or one per stage).
        stem_stride: 2 folds 2x2 pixels into channels before the first stage (and unfolds the
            logits), so that no convolution runs at full resolution; 1 does not.
        residual: Residual blocks, additive skips and an input channel of local contrast, with
            logits at every stage of the decoder added into the output; else the classic design.
        factored: The 49 logits are sums of one logit for "object" and those of its shape,
            material and colour; else 49 independent channels.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = NUM_CLASSES,
        widths: Sequence[int] = (24, 64, 128, 192),
        blocks: int | Sequence[int] = 1,
        stem_stride: int = 2,
        residual: bool = True,
        factored: bool = True,
    ):
        super().__init__()
        widths = tuple(widths)
        blocks = (blocks,) * len(widths) if isinstance(blocks, int) else tuple(blocks)
        if factored and num_classes != NUM_CLASSES:
            raise ValueError(f"factored logits are for {NUM_CLASSES} classes, not {num_classes}")
        if len(blocks) != len(widths):
            raise ValueError(f"{len(widths)} widths need as many numbers of blocks: {blocks}")
        self.config = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "widths": list(widths),
            "blocks": list(blocks),
            "stem_stride": stem_stride,
            "residual": residual,
            "factored": factored,
        }
        self.residual, self.factored, self.num_classes = residual, factored, num_classes
        self.stem_stride = stem_stride
        self.multiple = stem_stride * 2 ** (len(widths) - 1)

        self.fold = nn.PixelUnshuffle(stem_stride)
        self.unfold = nn.PixelShuffle(stem_stride)
        folded = (in_channels + residual) * stem_stride**2
        self.encoder = nn.ModuleList()
        for before, width, number in zip((folded, *widths), widths, blocks, strict=False):
            stage = [Block(before, width, residual)]
            stage += [Block(width, width, residual) for _ in range(number - 1)]
            self.encoder.append(nn.Sequential(*stage))
        self.up = nn.ModuleList()
        self.decoder = nn.ModuleList()
        self.heads = nn.ModuleList()  # of each stage of the decoder, or of the last one alone
        outputs = sum(FACTOR_SIZES) if factored else num_classes
        for fine, coarse in zip(widths[-2::-1], widths[:0:-1], strict=True):
            self.up.append(nn.ConvTranspose2d(coarse, fine, 2, stride=2))
            self.decoder.append(Block(fine if residual else 2 * fine, fine, residual))
            if residual:
                self.heads.append(nn.Conv2d(fine, outputs, 1))
        # Whether there is an object is told for every pixel, what it is for every s x s of them.
        self.fine = (stem_stride**2, outputs - 1) if factored else (outputs * stem_stride**2, 0)
        self.heads = self.heads[:-1].append(nn.Conv2d(widths[0], sum(self.fine), 1))

    def forward(self, frames: Tensor, stages: bool = False) -> Tensor | list[Tensor]:
        """Return logits (B, num_classes, H, W) of frames (B, C, H, W), uint8 or float in [0, 1].

        With `stages`, return the logits of every stage of the decoder that has some, coarsest
        first, which is what a loss works on: (B, K, H/s, W/s), rounded up, for strides s = 2^n,
        the last with s = 1. K is 14 factors (object, 3 shapes, 2 materials, 8 colours), or
        `num_classes` where the logits are not factored.

        Where the logits are factored, background has logit 0 and a class the logit of "object"
        less what each of its factors falls short of the best: the largest of the 49 is an object's
        exactly where "object" is likelier than not.
        """
        *coarse, (thing, kind) = self._decode(frames)
        if self.factored:
            kind = _enlarge(kind, self.stem_stride, thing)
            if not stages:
                shape, material, colour = (
                    f - f.amax(dim=1, keepdim=True) for f in kind.split(FACTOR_SIZES[1:], dim=1)
                )
                classes = thing[:, :, None, None] + shape[:, :, None, None]  # (B, 3, 1, 1, H, W)
                classes = classes + material[:, None, :, None] + colour[:, None, None]
                return torch.cat((torch.zeros_like(thing), classes.flatten(1, 3)), dim=1)
        logits = torch.cat((thing, kind), dim=1) if self.factored else thing
        return [*coarse, logits] if stages else logits

    @torch.inference_mode()
    def predict(self, frames: Tensor) -> Tensor:
        """Return labels (B, H, W) uint8: the argmax over `forward`, without its 49 channels."""
        thing, kind = self._decode(frames)[-1]
        if not self.factored:
            return thing.argmax(dim=1).to(torch.uint8)
        return self._labels(thing, kind, self.stem_stride)

    @torch.inference_mode()
    def evidence(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return where objects are, and what speaks for each kind of object there.

        Returns:
            (B, H, W) bool, where `predict` sees an object, and (N, 13) logits of shape, material
            and colour at the N pixels so marked, or (N, num_classes - 1) if not factored.
        """
        thing, kind = self._decode(frames)[-1]
        objects = thing[:, 0] > 0 if self.factored else thing.argmax(dim=1) > 0  # (B, H, W)
        image, row, column = objects.nonzero(as_tuple=True)
        if not self.factored:
            return objects, thing[:, 1:].movedim(1, -1)[objects]
        row, column = row // self.stem_stride, column // self.stem_stride
        return objects, kind.movedim(1, -1)[image, row, column]

    def labels(self, logits: Tensor) -> Tensor:
        """Return labels (B, H, W) uint8 of the last of forward's stages, (B, K, H, W)."""
        if not self.factored:
            return logits.argmax(dim=1).to(torch.uint8)
        return self._labels(logits[:, :1], logits[:, 1:], stride=1)

    def fuse(self) -> "UNet":
        """Fold the batch normalisation into the convolutions: faster, but no longer trainable."""
        for block in self.modules():
            if isinstance(block, Block) and isinstance(block.norm1, nn.BatchNorm2d):
                block.conv1 = fuse_conv_bn_eval(block.conv1, block.norm1)
                block.conv2 = fuse_conv_bn_eval(block.conv2, block.norm2)
                block.norm1 = block.norm2 = nn.Identity()
        return self

    def _labels(self, thing: Tensor, kind: Tensor, stride: int) -> Tensor:
        shape, material, colour = kind.split(FACTOR_SIZES[1:], dim=1)
        label = 16 * shape.argmax(dim=1) + 8 * material.argmax(dim=1) + colour.argmax(dim=1) + 1
        label = _enlarge(label[:, None].to(torch.uint8), stride, thing)
        return (label * (thing > 0))[:, 0]

    def _decode(self, frames: Tensor) -> list[Any]:
        """Return the coarse stages' logits, and last those of thing (B, 1, H, W) and kind.

        Kind is (B, 13, H/s, W/s), rounded up, for stem stride s; where the logits are not
        factored, thing has them all.
        """
        height, width = frames.shape[-2:]
        x = self._prepare(frames)  # (B, 4s^2, H'/s, W'/s), H' and W' multiples of self.multiple
        skips = []
        for i, stage in enumerate(self.encoder):
            x = stage(F.max_pool2d(x, 2) if i else x)  # (B, widths[i], H'/s/2^i, W'/s/2^i)
            skips.append(x)
        skips.pop()
        heads = list(self.heads)
        coarse: list[Tensor] = []
        for up, stage in zip(self.up, self.decoder, strict=True):
            x, skip = up(x), skips.pop()  # (B, C/2, 2h, 2w)
            x = stage(x + skip if self.residual else torch.cat((skip, x), dim=1))
            if self.residual and len(heads) > 1:
                logits = heads.pop(0)(x)
                coarse.append(logits + _double(coarse[-1]) if coarse else logits)
        thing, kind = heads[0](x).split(self.fine, dim=1)
        if coarse and self.factored:
            base = _double(coarse[-1])
            thing, kind = thing + base[:, :1], kind + base[:, 1:]
        elif coarse:
            thing = thing + _double(coarse[-1]).repeat_interleave(
                thing.shape[1] // self.num_classes, 1
            )
        strides = [self.stem_stride * 2**i for i in range(len(coarse), 0, -1)]
        coarse = [
            c[..., : -(-height // s), : -(-width // s)]
            for c, s in zip(coarse, strides, strict=True)
        ]
        return [*coarse, (self.unfold(thing)[..., :height, :width], kind)]

    def _prepare(self, frames: Tensor) -> Tensor:
        """Scale frames to about [-1, 1], add local contrast, pad to what the stages need, fold."""
        x = frames if frames.is_floating_point() else frames / 255
        if self.residual:
            grey = blurred = x.mean(dim=1, keepdim=True)
            for kernel in ((9, 1), (1, 9)):
                padding = (kernel[0] // 2, kernel[1] // 2)
                blurred = F.avg_pool2d(blurred, kernel, 1, padding, count_include_pad=False)
            x = torch.cat((4 * (x - 0.45), 8 * (grey - blurred)), dim=1)
        height, width = x.shape[-2:]
        pad = (-width % self.multiple, -height % self.multiple)
        if any(pad):
            x = F.pad(x, (0, pad[0], 0, pad[1]), mode="replicate")
        return self.fold(x).contiguous(memory_format=torch.channels_last)


def _double(logits: Tensor) -> Tensor:
    return F.interpolate(logits, scale_factor=2, mode="bilinear")


def _enlarge(cells: Tensor, stride: int, like: Tensor) -> Tensor:
    """Repeat every cell of (B, C, h, w) `stride` times each way; cut to the size of `like`."""
    if stride > 1:
        cells = F.interpolate(cells, scale_factor=stride, mode="nearest")
    return cells[..., : like.shape[-2], : like.shape[-1]]
