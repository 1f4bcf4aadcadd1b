"""The network: a UNet whose 49 logits are put together from object, shape, material and colour.

    model = UNet.load("weights/clevr_unet.pt")
    labels = model.predict(frames)  # uint8 (B, 3, H, W) to uint8 (B, H, W), ids 0..48
    logits = model(frames)          # (B, 49, H, W)

It is small and made for speed: it folds the frame to half resolution, works with residual blocks
and additive skips, and decides what an object is on coarse grids before it draws the edge. What
it learns from and what it is read by are methods beside `forward`, since both depend on what its
heads mean: `stages`, the raw answers; `loss`, `labels` and `evidence`, which take them.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import loss
from checkpoints import count_weights, is_finite, load_checkpoint
from classes import FACTOR_SIZES, from_factors
from devices import has_bfloat16, same_kernels
from utils import UserError, no_memory

NUM_FACTORS = sum(FACTOR_SIZES)  # 13 logits of what an object is
FOLD = 2  # pixels each way that are folded into channels: no convolution runs at full resolution
CONTRAST_CELLS = 5  # each way, that local contrast is relative to: 10 pixels, half an object
MAX_STAGES = 8  # whose cells are 256 pixels, to which frames are filled up
DELETED_SWITCHES = {  # of networks of earlier versions, and what they were in the default one
    "in_channels": 3,
    "num_classes": 49,
    "stem_stride": FOLD,
    "residual": True,
    "light": True,
    "factored": True,
}


class Stage(NamedTuple):
    """What one stage of the decoder says of cells of 2^n x 2^n pixels."""

    thing: Tensor  # (B, 1, h, w) logit of "there is an object"
    kind: Tensor  # (B, 13, h, w) logits of 3 shapes, 2 materials and 8 colours, maybe coarser


class Layer(nn.Module):
    """One 3x3 convolution with batch normalisation."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W)."""
        return F.relu(self.norm1(self.conv1(x)), inplace=True)


class Block(nn.Module):
    """Two such convolutions and a shortcut around them (He et al. 2015, arXiv:1512.03385)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W)."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)).add_(self.shortcut(x)), inplace=True)


class UNet(nn.Module):
    """Encoder, decoder and skip connections; logits of every class for every pixel.

    Args:
        widths: Channels of each stage, finest first; each stage halves the resolution.
    """

    def __init__(self, widths: Sequence[int] = (32, 48, 96, 160)):
        super().__init__()
        if not 2 <= len(widths) <= MAX_STAGES or min(widths) < 1:
            raise ValueError(f"a UNet has 2 to {MAX_STAGES} stages, of a channel or more: {widths}")
        self.config = {"widths": list(widths)}
        self.multiple = FOLD ** len(widths)  # pixels: what height and width are padded to
        folded = 4 * FOLD**2  # red, green, blue and grey of the folded pixels
        # Each stage of the encoder is a sequence of blocks, of which one has proved enough.
        self.encoder = nn.ModuleList([nn.Sequential(Layer(folded, widths[0]))])
        self.up, self.decoder, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for fine, coarse in zip(widths, widths[1:], strict=False):
            self.encoder.append(nn.Sequential(Block(fine, coarse)))
        for fine, coarse in zip(widths[-2::-1], widths[:0:-1], strict=True):
            self.up.append(nn.ConvTranspose2d(coarse, fine, 2, stride=2))
            self.decoder.append(Layer(fine, fine))
        for fine in widths[-2:0:-1]:
            self.heads.append(nn.Conv2d(fine, 1 + NUM_FACTORS, 1))
        # The finest says of every pixel whether there is an object, of its cells what it is.
        self.heads.append(nn.Conv2d(widths[0], FOLD**2 + NUM_FACTORS, 1))
        self.register_buffer("one_hot", loss.one_hot_factors(), persistent=False)

    @classmethod
    def load(cls, path: str | Path) -> "UNet":
        """Return the network of a checkpoint, ready to label, on the CPU in float32.

        Raises:
            UserError: not a checkpoint, or of another network.
        """
        return cls.from_checkpoint(load_checkpoint(path), path).eval()

    @classmethod
    def from_checkpoint(cls, checkpoint: dict[str, Any], path: str | Path) -> "UNet":
        """Return the network of what `load_checkpoint` has read from `path`; else as `load`."""
        try:
            config = dict(checkpoint["model_config"])
            deeper = set(config.pop("blocks", ())) - {1}
            odd = [name for name, of in DELETED_SWITCHES.items() if config.pop(name, of) != of]
            if odd or deeper:
                raise UserError(
                    f"{path} is a network with another {(odd or ['blocks'])[0]}, "
                    "which this version no longer has: train anew"
                )
            with torch.device("meta"):  # which takes no memory, whatever widths are claimed
                size = count_weights(cls(**config).state_dict())
            if size > count_weights(checkpoint["model"]):
                raise ValueError(f"{size} weights are more than it holds")
            model = cls(**config)
            model.load_state_dict(checkpoint["model"])  # half precision becomes float32 here
            if not is_finite(model.state_dict()):
                raise ValueError("some are not finite numbers")
        except Exception as error:  # nonsense in the place of numbers raises nearly anything
            if isinstance(error, UserError) or no_memory(error):
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = " ".join(lines[:2])[:200]
            raise UserError(
                f"the weights in {path} do not fit the network of model.py ({reason}): "
                "give a file that train.py of this version wrote"
            ) from None
        return model

    def forward(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits (B, 49, H, W) of frames (B, 3, H, W), uint8 or float in [0, 1].

        Background has logit 0 and a class the logit of "object" less what each of its factors
        falls short of the best: the largest of the 49 is an object's exactly where "object" is
        likelier than not.

        With a mask (B, H, W) of ids, return the loss instead: training goes through here, as
        DistributedDataParallel demands, and needs no 49 channels.
        """
        stages = self.stages(frames)
        if mask is not None:
            return self.loss(stages, mask)
        thing, kind = stages[-1]
        kind = _enlarge(kind, thing)  # (B, 13, H, W)
        shape, material, colour = (
            f - f.amax(dim=1, keepdim=True) for f in kind.split(FACTOR_SIZES, dim=1)
        )
        classes = thing[:, :, None, None] + shape[:, :, None, None]  # (B, 3, 1, 1, H, W)
        classes = classes + material[:, None, :, None] + colour[:, None, None]  # (B, 3, 2, 8, H, W)
        return torch.cat((torch.zeros_like(thing), classes.flatten(1, 3)), dim=1)

    def stages(self, frames: Tensor) -> list[Stage]:
        """Return what every stage of the decoder says, coarsest first; frames as of `forward`.

        Stages are cut to the frame: (H, W) over the width of their cells, rounded up. The last
        one's cells are pixels for `thing`, and FOLD x FOLD of them for `kind`.
        """
        height, width = frames.shape[-2:]
        x = self._fold(frames)  # (B, 16, H/2, W/2), H and W rounded up to self.multiple
        x = self.encoder[0](x)  # (B, widths[0], H/2, W/2)
        skips = []
        for stage in self.encoder[1:]:
            skips.append(x)
            x = stage(_halve(x, self.training))  # (B, widths[i], H/2^(i+1), W/2^(i+1))
        found: list[Stage] = []
        for up, stage, head in zip(self.up, self.decoder, self.heads, strict=True):
            x = stage(up(x).add_(skips.pop()))  # (B, widths[i], H/2^(i+1), W/2^(i+1))
            thing, kind = _split_head(head, x)  # (B, 1, h, w), of the last 4, and (B, 13, h, w)
            coarse = Stage(*map(_double, found[-1])) if found else None
            kind = kind + coarse.kind if coarse else kind  # a finer stage only corrects it
            if head is self.heads[-1]:
                thing = _to_pixels(thing, coarse.thing if coarse else None)  # (B, 1, H, W)
            elif coarse:
                thing = thing + coarse.thing
            found.append(Stage(thing, kind))
        cells = [FOLD ** (len(found) - i) for i in range(len(found))]  # their widths, in pixels
        return [
            Stage(_cut(thing, height, width, pixels), _cut(kind, height, width, cell))
            for (thing, kind), pixels, cell in zip(found, [*cells[:-1], 1], cells, strict=True)
        ]

    def _fold(self, frames: Tensor) -> Tensor:
        """Scale frames to about [-2, 2], add local contrast, pad to what the stages need, fold.

        Local contrast is grey less its mean over CONTRAST_CELLS x CONTRAST_CELLS cells of
        FOLD x FOLD pixels.

        Returns:
            (B, 16, H/2, W/2) channels_last, in the precision of the weights.
        """
        pixels = 4 * (frames if frames.is_floating_point() else frames / 255) - 1.8
        pad = (-frames.shape[-1] % self.multiple, -frames.shape[-2] % self.multiple)
        if any(pad):
            pixels = F.pad(pixels, (0, pad[0], 0, pad[1]), mode="replicate")
        x = pixels.new_empty(len(pixels), 4, *pixels.shape[-2:])
        x[:, :3] = pixels
        grey = pixels.sum(dim=1, keepdim=True) * (2 / 3)
        x[:, 3:] = grey - _repeat(_local_mean(grey))
        return _unshuffle(x.to(self.heads[-1].weight.dtype))

    def loss(self, stages: list[Stage], mask: Tensor) -> Tensor:
        """Return the loss (a scalar) of what `stages` says of frames with the ids (B, H, W)."""
        return loss.loss(stages, mask, self.one_hot)

    def frame_losses(self, stages: list[Stage], mask: Tensor) -> Tensor:
        """Return the loss of each frame by itself, (B,); arguments as of `loss`."""
        return loss.frame_losses(stages, mask, self.one_hot)

    def labels(self, stages: list[Stage]) -> Tensor:
        """Return labels (B, H, W) uint8: the argmax over the 49 logits, without making them."""
        thing, kind = stages[-1]
        ids = from_factors(*(f.max(dim=1)[1] for f in kind.split(FACTOR_SIZES, dim=1)))
        return (_enlarge(ids[:, None].to(torch.uint8), thing) * (thing > 0))[:, 0]

    def evidence(self, stages: list[Stage]) -> tuple[Tensor, Tensor]:
        """Return where objects are, and what speaks for each kind of object.

        Returns:
            (B, H, W) bool, where `labels` sees an object, and (B, 13, h, w), of each cell of
            FOLD x FOLD pixels the logits of 3 shapes, 2 materials and 8 colours.
        """
        thing, kind = stages[-1]
        return thing[:, 0] > 0, kind

    @torch.inference_mode()
    def predict(self, frames: Tensor) -> Tensor:
        """Return labels (B, H, W) uint8 of frames (B, 3, H, W), uint8 or float in [0, 1]."""
        return self.labels(self.stages(frames))

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


def for_labelling(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a network, itself changed, as it labels fastest: fused, its weights cast once."""
    model = model.to(device, memory_format=torch.channels_last).eval().fuse()
    same_kernels(model, device)
    return model.bfloat16() if has_bfloat16(device) else model


def _split_head(head: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of "object" and those of its kind: a slice of them would be slow to use."""
    sizes = (head.out_channels - NUM_FACTORS, NUM_FACTORS)
    parts = zip(head.weight.split(sizes), head.bias.split(sizes), strict=True)
    thing, kind = (F.conv2d(x, weight, bias, dilation=head.dilation) for weight, bias in parts)
    return thing, kind


def _halve(x: Tensor, training: bool) -> Tensor:
    """Return the maxima of 2 x 2 (B, C, h, w); two steps take a quarter of the time on a CPU."""
    if training or x.device.type != "cpu":  # their gradient, or two launches, would cost more
        return F.max_pool2d(x, 2)
    x = torch.maximum(x[..., ::2, :], x[..., 1::2, :])
    return torch.maximum(x[..., ::2], x[..., 1::2])


def _local_mean(grey: Tensor) -> Tensor:
    """Return of (B, 1, H, W) the mean around each cell, over the cells that are in the frame."""
    padding = CONTRAST_CELLS // 2
    if grey.device.type != "cpu":  # few launches
        cells = F.avg_pool2d(grey, FOLD)
        return F.avg_pool2d(cells, CONTRAST_CELLS, 1, padding, count_include_pad=False)
    # Sums of slices, a few megabytes each, take a tenth of the time of average pooling.
    cells = sum(grey[..., i::FOLD, :] for i in range(FOLD))
    cells = sum(cells[..., i::FOLD] for i in range(FOLD)) / FOLD**2  # (B, 1, H/2, W/2)
    for dim in (-2, -1):
        size = cells.shape[dim]
        padded = F.pad(cells, (padding, padding) if dim == -1 else (0, 0, padding, padding))
        total = sum(padded.narrow(dim, i, size) for i in range(CONTRAST_CELLS))
        place = torch.arange(size)
        count = (place + padding).clamp(max=size - 1) - (place - padding).clamp(min=0) + 1
        cells = total / (count if dim == -1 else count[:, None])
    return cells


def _unshuffle(x: Tensor) -> Tensor:
    """Fold pixels (B, C, H, W) as pixel_unshuffle does to (B, 4 C, H/2, W/2), channels_last.

    Two neighbours in a row move as one number, which takes two thirds of the time.
    """
    batch, channels, height, width = x.shape
    pairs = x.view(_pair_type(x))  # (B, C, H, W/2)
    pairs = pairs.view(batch, channels, height // FOLD, FOLD, width // FOLD)
    cells = pairs.permute(0, 2, 4, 1, 3).contiguous().view(x.dtype)  # (B, H/2, W/2, C, 4)
    return cells.flatten(3).permute(0, 3, 1, 2)


def _to_pixels(thing: Tensor, cells: Tensor | None) -> Tensor:
    """Return logits (B, 1, H, W): of pixels, (B, 4, H/2, W/2), and of their cells if there are."""
    plain = thing.device.type == "cpu" and not torch.is_grad_enabled()
    if not (plain and thing.is_contiguous(memory_format=torch.channels_last)):
        return F.pixel_shuffle(thing if cells is None else thing + cells, FOLD)
    batch, _, height, width = thing.shape  # pairs, as in `_unshuffle`, in an eighth of the time
    pairs = thing.permute(0, 2, 3, 1).view(_pair_type(thing))  # (B, H/2, W/2, 2)
    pixels = pairs.transpose(2, 3).contiguous().view(thing.dtype)  # (B, H/2, 2, W)
    pixels = pixels.view(batch, height, FOLD, width, FOLD)
    if cells is not None:
        pixels += cells.view(batch, height, 1, width, 1)
    return pixels.view(batch, 1, FOLD * height, FOLD * width)


def _pair_type(x: Tensor) -> torch.dtype:
    """Return the type of number that is as large as two of x."""
    return torch.int32 if x.element_size() == 2 else torch.int64


def _double(logits: Tensor) -> Tensor:
    return F.interpolate(logits, scale_factor=2, mode="bilinear")


def _repeat(cells: Tensor) -> Tensor:
    """Repeat every cell of (B, C, h, w) FOLD times each way."""
    return F.interpolate(cells, scale_factor=FOLD, mode="nearest")


def _enlarge(cells: Tensor, like: Tensor) -> Tensor:
    """Repeat every cell of (B, C, h, w) FOLD times each way; cut to the size of `like`."""
    return _cut(_repeat(cells), *like.shape[-2:], 1)


def _cut(cells: Tensor, height: int, width: int, size: int) -> Tensor:
    """Cut cells of size x size pixels to a frame of height x width pixels."""
    return cells[..., : math.ceil(height / size), : math.ceil(width / size)]
