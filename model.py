"""The network: a UNet whose 49 logits are put together from object, shape, material and colour.

The default is small and made for speed: it folds the frame to half resolution, works with
residual blocks and additive skips, and decides what an object is on coarse grids before it draws
the edge. `UNet(**CLASSIC)` is the conventional UNet of Ronneberger et al. 2015
(https://arxiv.org/abs/1505.04597) with batch normalisation and 64..1024 channels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dataset import COLOURS, MATERIALS, NUM_CLASSES, SHAPES

FACTOR_SIZES = (len(SHAPES), len(MATERIALS), len(COLOURS))
NUM_FACTORS = sum(FACTOR_SIZES)  # logits of what an object is
CLASSIC = {
    "widths": (64, 128, 256, 512, 1024),
    "stem_stride": 1,
    "residual": False,
    "light": False,
    "factored": False,
}

# Logits of one stage: (B, num_classes, h, w); or, factored, of "object" (B, 1, h, w) and of what
# kind (B, 13, h, w), the latter perhaps of coarser cells.
Stage = Tensor | tuple[Tensor, Tensor]


class Layer(nn.Module):
    """One 3x3 convolution with batch normalisation."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W)."""
        return F.relu(self.norm1(self.conv1(x)), inplace=True)


class Block(Layer):
    """Two such convolutions; `residual` adds the input to the output."""

    def __init__(self, in_channels: int, out_channels: int, residual: bool):
        super().__init__(in_channels, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = None
        if residual:
            same = in_channels == out_channels
            self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W)."""
        y = self.norm2(self.conv2(super().forward(x)))
        y = y if self.shortcut is None else y.add_(self.shortcut(x))
        return F.relu(y, inplace=True)


class UNet(nn.Module):
    """Encoder, decoder and skip connections; logits of every class for every pixel.

    Args:
        in_channels: Channels of a frame.
        num_classes: Channels of the output; 49 where `factored`.
        widths: Channels of each stage, finest first; each stage halves the resolution.
        blocks: Blocks of two convolutions in each encoder stage (one number for all, or one per
            stage).
        stem_stride: 2 folds 2x2 pixels into channels before the first stage (and unfolds the
            logits), so that no convolution runs at full resolution; 1 does not.
        residual: Residual blocks, additive skips and an input channel of local contrast; else the
            classic design.
        light: The finest stage of the encoder, and each of the decoder, is a single convolution.
        factored: The 49 logits are sums of one logit for "object" and those of its shape,
            material and colour, told by every stage of the decoder and added up; else 49
            independent channels of the last.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = NUM_CLASSES,
        widths: Sequence[int] = (32, 48, 96, 160),
        blocks: int | Sequence[int] = 1,
        stem_stride: int = 2,
        residual: bool = True,
        light: bool = True,
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
            "light": light,
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
            if light and not self.encoder:
                self.encoder.append(nn.Sequential(Layer(before, width)))
                continue
            stage = [Block(before, width, residual)]
            stage += [Block(width, width, residual) for _ in range(number - 1)]
            self.encoder.append(nn.Sequential(*stage))
        self.up = nn.ModuleList()
        self.decoder = nn.ModuleList()
        self.heads = nn.ModuleList()  # of each stage of the decoder, or of the last one alone
        for fine, coarse in zip(widths[-2::-1], widths[:0:-1], strict=True):
            self.up.append(nn.ConvTranspose2d(coarse, fine, 2, stride=2))
            before = fine if residual else 2 * fine
            self.decoder.append(Layer(before, fine) if light else Block(before, fine, residual))
            if factored:
                self.heads.append(nn.Conv2d(fine, 1 + NUM_FACTORS, 1))
        # Whether there is an object is told for every pixel, what it is for every s x s of them.
        self.outputs = (stem_stride**2 * (1 if factored else num_classes), NUM_FACTORS * factored)
        self.heads = self.heads[:-1].append(nn.Conv2d(widths[0], sum(self.outputs), 1))

    def forward(self, frames: Tensor, stages: bool = False) -> Tensor | list[Stage]:
        """Return logits (B, num_classes, H, W) of frames (B, C, H, W), uint8 or float in [0, 1].

        With `stages`, return the logits of every stage of the decoder that has some, coarsest
        first, which is what a loss works on: (B, num_classes, H/s, W/s), rounded up, for strides
        s = 2^n, the last with s = 1; where they are factored, a pair of those of "object" and of
        its 3 shapes, 2 materials and 8 colours, the latter of the last stage with s = stem_stride.

        Where the logits are factored, background has logit 0 and a class the logit of "object"
        less what each of its factors falls short of the best: the largest of the 49 is an object's
        exactly where "object" is likelier than not.
        """
        found = self._decode(frames)
        if stages or not self.factored:
            return found if stages else found[-1]
        thing, kind = found[-1]
        kind = _enlarge(kind, self.stem_stride, thing)
        shape, material, colour = (
            f - f.amax(dim=1, keepdim=True) for f in kind.split(FACTOR_SIZES, dim=1)
        )
        classes = thing[:, :, None, None] + shape[:, :, None, None]  # (B, 3, 1, 1, H, W)
        classes = classes + material[:, None, :, None] + colour[:, None, None]
        return torch.cat((torch.zeros_like(thing), classes.flatten(1, 3)), dim=1)

    @torch.inference_mode()
    def predict(self, frames: Tensor) -> Tensor:
        """Return labels (B, H, W) uint8: the argmax over `forward`, without its 49 channels."""
        return self.labels(self(frames, stages=True)[-1])

    @torch.inference_mode()
    def evidence(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return where objects are, and what speaks for each kind of object there.

        Returns:
            (B, H, W) bool, where `predict` sees an object, and (N, 13) logits of shape, material
            and colour at the N pixels so marked, or (N, num_classes - 1) if not factored.
        """
        logits = self(frames, stages=True)[-1]
        if not self.factored:
            objects = logits.argmax(dim=1) > 0
            return objects, logits[:, 1:].movedim(1, -1)[objects]
        thing, kind = logits
        objects = thing[:, 0] > 0
        return objects, at_pixels(kind, objects)

    def labels(self, logits: Stage) -> Tensor:
        """Return labels (B, H, W) uint8 of the last of forward's stages."""
        if not self.factored:
            return logits.argmax(dim=1).to(torch.uint8)
        thing, kind = logits
        shape, material, colour = (f.max(dim=1)[1] for f in kind.split(FACTOR_SIZES, dim=1))
        label = (16 * shape + 8 * material + colour + 1).to(torch.uint8)
        return (_enlarge(label[:, None], self.stem_stride, thing) * (thing > 0))[:, 0]

    def fuse(self) -> "UNet":
        """Fold the batch normalisation into the convolutions: faster, but no longer trainable."""
        for layer in self.modules():
            for n in (1, 2):
                norm = getattr(layer, f"norm{n}", None)
                if isinstance(norm, nn.BatchNorm2d):
                    conv = fuse_conv_bn_eval(getattr(layer, f"conv{n}"), norm)
                    setattr(layer, f"conv{n}", conv)
                    setattr(layer, f"norm{n}", nn.Identity())
        return self

    def _decode(self, frames: Tensor) -> list[Stage]:
        """Return what `forward` does with `stages`."""
        height, width = frames.shape[-2:]
        x = self._prepare(frames)  # (B, 4s^2, H'/s, W'/s), H' and W' multiples of self.multiple
        skips = []
        for i, stage in enumerate(self.encoder):
            x = stage(F.max_pool2d(x, 2) if i else x)  # (B, widths[i], H'/s/2^i, W'/s/2^i)
            skips.append(x)
        maps = [skips.pop()]
        for up, stage in zip(self.up, self.decoder, strict=True):
            x, skip = up(x), skips.pop()  # (B, C/2, 2h, 2w)
            x = stage(x.add_(skip) if self.residual else torch.cat((skip, x), dim=1))
            maps.append(x)
        if not self.factored:
            return [self.unfold(self.heads[0](x))[..., :height, :width]]
        things, kind = self.heads[-1](x).split(self.outputs, dim=1)
        coarse: list[Tensor] = []
        for head, x in zip(self.heads[:-1], maps[-len(self.heads) : -1], strict=True):
            logits = head(x)
            coarse.append(logits.add_(_double(coarse[-1])) if coarse else logits)
        if coarse:
            base = _double(coarse[-1])
            things, kind = things + base[:, :1], kind + base[:, 1:]
        strides = [self.stem_stride * 2**i for i in range(len(coarse), -1, -1)]
        *coarse, kind = (
            cells[..., : -(-height // s), : -(-width // s)]
            for cells, s in zip([*coarse, kind], strides, strict=True)
        )
        thing = self.unfold(things)[..., :height, :width]
        return [*(c.split((1, NUM_FACTORS), dim=1) for c in coarse), (thing, kind)]

    def _prepare(self, frames: Tensor) -> Tensor:
        """Scale frames to about [-2, 2], add local contrast, pad to what the stages need, fold.

        Local contrast is grey less its mean over 5 x 5 cells (of `stem_stride` pixels each way).
        """
        x = frames if frames.is_floating_point() else frames / 255
        x = 4 * x - 1.8
        if self.residual:
            x = torch.cat((x, 2 * x.mean(dim=1, keepdim=True)), dim=1)
        height, width = x.shape[-2:]
        pad = (-width % self.multiple, -height % self.multiple)
        if any(pad):
            x = F.pad(x, (0, pad[0], 0, pad[1]), mode="replicate")
        x = self.fold(x).contiguous(memory_format=torch.channels_last)
        if self.residual:
            grey = x[:, -(self.stem_stride**2) :]
            cells = grey.mean(dim=1, keepdim=True)
            grey -= F.avg_pool2d(cells, 5, stride=1, padding=2, count_include_pad=False)
        return x


def at_pixels(cells: Tensor, where: Tensor) -> Tensor:
    """Return (N, C): of cells (B, C, h, w), 2^n pixels wide, those at the N pixels of `where`.

    Args:
        cells: (B, C, h, w).
        where: (B, H, W) bool; h and w are H and W over the width of a cell, rounded up.
    """
    image, row, column = where.nonzero(as_tuple=True)
    stride = cell_width(cells, where)
    return cells.movedim(1, -1)[image, row // stride, column // stride]


def cell_width(cells: Tensor, pixels: Tensor) -> int:
    """Return how many pixels (..., W) wide the square cells (..., w) are, a power of two."""
    return 2 ** math.ceil(math.log2(pixels.shape[-1] / cells.shape[-1]))


def _double(logits: Tensor) -> Tensor:
    return F.interpolate(logits, scale_factor=2, mode="bilinear")


def _enlarge(cells: Tensor, stride: int, like: Tensor) -> Tensor:
    """Repeat every cell of (B, C, h, w) `stride` times each way; cut to the size of `like`."""
    if stride > 1:
        cells = F.interpolate(cells, scale_factor=stride, mode="nearest")
    return cells[..., : like.shape[-2], : like.shape[-1]]
