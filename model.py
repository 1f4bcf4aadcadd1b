"""The network: a UNet whose 49 logits are put together from objectness, shape, material and colour.

    model = UNet.load("weights/clevr_unet.pt")
    labels = model.predict(frames)  # uint8 (B, 3, H, W) to uint8 (B, H, W), ids 0..48
    logits = model(frames)          # (B, 49, H, W)

It is small and made for speed: it folds the frame to half resolution, works with residual blocks
and additive skips, and decides what an object is on coarse grids before it draws the edge. What
it learns from and what it is read by are methods beside `forward`, since both depend on what its
heads mean: `answers`, the raw logits; `loss`, `labels` and `evidence`, which take them.
"""

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
from devices import has_bfloat16
from utils import UserError, no_memory

NUM_ATTRIBUTES = sum(FACTOR_SIZES)  # 13 logits of what an object is
FOLD = 2  # pixels each way that are folded into channels: no convolution runs at full resolution
CONTRAST_CELLS = 5  # each way, that local contrast is relative to: 10 pixels, half an object
FULL = 1.01  # what floats of white may be, rounded
MAX_STAGES = 8  # whose cells are 256 pixels, to which frames are filled up


class Answer(NamedTuple):
    """What one stage of the decoder says of its cells, squares of pixels.

    At the finest stage, objectness is of pixels, (B, 1, H, W), attributes of cells of 2 x 2.
    """

    objectness: Tensor  # (B, 1, h, w) logit of "there is an object"
    attributes: Tensor  # (B, 13, h, w) logits of 3 shapes, 2 materials and 8 colours


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
    """Two 3 x 3 convolutions and a shortcut around them (He et al. 2015, arXiv:1512.03385)."""

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
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class Head(nn.Conv2d):
    """A 1x1 convolution whose channels are objectness, then 13 attributes.

    Args:
        in_channels: Of the stage that it reads.
        pixels: How many logits of objectness each cell has: 1, or one for each of its pixels.
    """

    def __init__(self, in_channels: int, pixels: int = 1):
        super().__init__(in_channels, pixels + NUM_ATTRIBUTES, 1)
        self.pixels = pixels

    def forward(self, x: Tensor, coarse: Answer | None) -> Answer:
        """Return the answer for cells (B, in_channels, h, w).

        It corrects `coarse`, that of cells twice as wide: (B, 1, h/2, w/2), (B, 13, h/2, w/2).

        Objectness has the resolution of pixels, (B, 1, 2h, 2w), where cells have several.
        """
        # One convolution for each part: a slice of a common result would be slow to use.
        sizes = (self.pixels, NUM_ATTRIBUTES)
        parts = zip(self.weight.split(sizes), self.bias.split(sizes), strict=True)
        objectness, attributes = (F.conv2d(x, weight, bias) for weight, bias in parts)
        objectness = objectness.contiguous()  # else a CPU takes twice as long to shuffle it below
        if coarse:
            objectness = objectness.add_(_double(coarse.objectness))
            attributes = attributes.add_(_double(coarse.attributes))
        if self.pixels > 1:
            objectness = F.pixel_shuffle(objectness, FOLD)
        return Answer(objectness, attributes)


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
        folded = 4 * FOLD**2  # red, green, blue and local contrast of the folded pixels
        # Each stage of the encoder is a sequence of blocks, of which one has proved enough.
        self.encoder = nn.ModuleList([nn.Sequential(Layer(folded, widths[0]))])
        self.up, self.decoder, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for fine, coarse in zip(widths, widths[1:], strict=False):
            self.encoder.append(nn.Sequential(Block(fine, coarse)))
        for fine, coarse in zip(widths[-2::-1], widths[:0:-1], strict=True):
            self.up.append(nn.ConvTranspose2d(coarse, fine, 2, stride=2))
            self.decoder.append(Layer(fine, fine))
        for fine in widths[-2:0:-1]:
            self.heads.append(Head(fine))
        # The finest says of every pixel whether there is an object, of its cells what it is.
        self.heads.append(Head(widths[0], pixels=FOLD**2))
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
            with torch.device("meta"):  # a network of this device takes no memory
                size = count_weights(cls(**config).state_dict())
            if size > count_weights(checkpoint["model"]):
                raise ValueError(f"{size} weights are more than it holds")
            model = cls(**config)
            model.load_state_dict(checkpoint["model"])  # half precision becomes float32 here
            if not is_finite(model.state_dict()):
                raise ValueError("some are not finite numbers")
        except Exception as error:  # nonsense in the place of numbers raises nearly anything
            if no_memory(error):
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
        answers = self.answers(frames)
        if mask is not None:
            return self.loss(answers, mask)
        objectness, attributes = answers[-1]
        attributes = _repeat(attributes, objectness)  # (B, 13, H, W)
        shape, material, colour = (
            f - f.amax(dim=1, keepdim=True) for f in attributes.split(FACTOR_SIZES, dim=1)
        )
        logits = objectness[:, :, None, None] + shape[:, :, None, None]  # (B, 3, 1, 1, H, W)
        logits = logits + material[:, None, :, None] + colour[:, None, None]  # (B, 3, 2, 8, H, W)
        return torch.cat((torch.zeros_like(objectness), logits.flatten(1, 3)), dim=1)

    def answers(self, frames: Tensor) -> list[Answer]:
        """Return what every stage of the decoder says, coarsest first; frames as of `forward`.

        Answers are cut to the frame: (H, W) over the width of their cells, rounded up. The last
        one's cells are pixels for `objectness`, and FOLD x FOLD of them for `attributes`.
        """
        height, width = frames.shape[-2:]
        x = self._fold(frames)  # (B, 16, H/2, W/2), H and W rounded up to self.multiple
        x = self.encoder[0](x)  # (B, 32, H/2, W/2) with the default widths, as below
        skips = []
        for stage in self.encoder[1:]:
            skips.append(x)
            x = stage(_max_pool(x, self.training))  # 48 channels at H/4, 96 at H/8, 160 at H/16
        answers: list[Answer] = []
        answer, cell = None, self.multiple  # pixels that a cell is wide
        for up, layer, head in zip(self.up, self.decoder, self.heads, strict=True):
            x = layer(up(x).add_(skips.pop()))  # 96 channels at H/8, 48 at H/4, 32 at H/2
            answer, cell = head(x, answer), cell // 2
            pixel = 1 if head.pixels > 1 else cell
            objectness = _cut(answer.objectness, height, width, pixel)
            attributes = _cut(answer.attributes, height, width, cell)
            answers.append(Answer(objectness, attributes))
        return answers

    def _fold(self, frames: Tensor) -> Tensor:
        """Scale frames to about [-2, 2], add local contrast, pad to what the stages need, fold.

        Local contrast is grey less its mean over CONTRAST_CELLS x CONTRAST_CELLS cells of
        FOLD x FOLD pixels.

        Returns:
            (B, 16, H/2, W/2) channels_last, in the precision of the weights.
        """
        frames = _fill_up(frames, self.multiple)
        # As pixel_unshuffle does it, which takes a CPU six times as long for bytes.
        parts = [frames[..., i::FOLD, j::FOLD] for i in range(FOLD) for j in range(FOLD)]
        pixels = torch.stack(parts, dim=2).flatten(1, 2)  # (B, 12, H/2, W/2), colour by colour
        # In place, here and below: fresh memory costs a CPU as much as the sums.
        pixels = (4 * pixels if pixels.is_floating_point() else (pixels / 255).mul_(4)).sub_(1.8)
        grey = pixels.unflatten(1, (3, -1)).sum(dim=1).mul_(2 / 3)  # (B, 4, H/2, W/2)
        contrast = grey.sub_(_local_mean(grey))
        dtype = self.heads[-1].weight.dtype
        x = torch.cat((pixels.to(dtype), contrast.to(dtype)), dim=1)
        return x.contiguous(memory_format=torch.channels_last)

    def loss(self, answers: list[Answer], mask: Tensor) -> Tensor:
        """Return the loss (a scalar) of what `answers` says of frames with the ids (B, H, W)."""
        return loss.loss(answers, mask, self.one_hot)

    def frame_losses(self, answers: list[Answer], mask: Tensor) -> Tensor:
        """Return the loss of each frame by itself, (B,); arguments as of `loss`."""
        return loss.frame_losses(answers, mask, self.one_hot)

    def labels(self, answers: list[Answer]) -> Tensor:
        """Return labels (B, H, W) uint8: the argmax over the 49 logits, without making them.

        Cells are repeated, which is quicker than to interpolate them as the loss does: borders
        between objects are stairs, which `borders.sharpen` draws anew for infer.py.
        """
        objectness, attributes = answers[-1]
        best = (f.max(dim=1)[1] for f in attributes.split(FACTOR_SIZES, dim=1))
        ids = from_factors(*best)[:, None].to(torch.uint8)  # (B, 1, H/2, W/2)
        return (_repeat(ids, objectness) * (objectness > 0))[:, 0]

    def evidence(self, answers: list[Answer]) -> Answer:
        """Return the finest answer: `labels` sees an object where its objectness is above 0."""
        return answers[-1]

    def predict(self, frames: Tensor) -> Tensor:
        """Return labels (B, H, W) uint8 of frames (B, 3, H, W), uint8 or float in [0, 1].

        Raises:
            UserError: frames of another shape, or floats beyond 1.
        """
        if frames.dim() != 4 or frames.shape[1] != 3:
            shape = tuple(frames.shape)
            raise UserError(f"frames are {shape}, not (B, 3, H, W): give one frame as frame[None]")
        if frames.is_floating_point() and frames.numel() and frames.max() > FULL:
            most = f"{float(frames.max()):g}"
            raise UserError(f"frames are floats up to {most}: give uint8, or floats from 0 to 1")
        with torch.inference_mode():
            labels = self.labels(self.answers(frames))
        return labels.clone()  # what is made in inference mode can never be changed

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
    return model.bfloat16() if has_bfloat16(device) else model


def _fill_up(frames: Tensor, multiple: int) -> Tensor:
    """Return frames whose last row and column are repeated up to multiples of some pixels."""
    below, right = (-side % multiple for side in frames.shape[-2:])
    frames = torch.cat((frames, frames[..., -1:].expand(-1, -1, -1, right)), dim=-1)
    return torch.cat((frames, frames[..., -1:, :].expand(-1, -1, below, -1)), dim=-2)


def _local_mean(grey: Tensor) -> Tensor:
    """Return of (B, 4, h, w) the mean around each cell, over the cells that are in the frame.

    A cell has FOLD x FOLD pixels, which are its channels; the result is (B, 1, h, w).
    """
    padding = CONTRAST_CELLS // 2
    if grey.device.type != "cpu":  # few launches
        cells = grey.mean(dim=1, keepdim=True)
        return F.avg_pool2d(cells, CONTRAST_CELLS, 1, padding, count_include_pad=False)
    # Sums of slices, a few megabytes each, take a tenth of the time of average pooling.
    cells = sum(grey.split(1, dim=1)) / FOLD**2
    ends = [*range(1 - CONTRAST_CELLS, 0), None]  # of slices that all have the size of `cells`
    for across in (False, True):
        margin = (padding, padding, 0, 0) if across else (0, 0, padding, padding)

        def window_sum(x: Tensor, margin: tuple = margin, across: bool = across) -> Tensor:
            x = F.pad(x, margin)
            return sum(x[..., i:n] if across else x[..., i:n, :] for i, n in enumerate(ends))

        cells = window_sum(cells) / window_sum(torch.ones_like(cells[:1]))
    return cells


def _max_pool(x: Tensor, training: bool) -> Tensor:
    """Return the largest of each 2 x 2 cells."""
    if training or x.device.type != "cpu":
        return F.max_pool2d(x, 2)
    # The same maximum in a third of max_pool2d's time on a CPU; its gradients would take longer.
    x = torch.maximum(x[..., ::2], x[..., 1::2])
    return torch.maximum(x[..., ::2, :], x[..., 1::2, :])


def _double(logits: Tensor) -> Tensor:
    return F.interpolate(logits, scale_factor=2, mode="bilinear")


def _repeat(cells: Tensor, like: Tensor) -> Tensor:
    """Repeat every cell of (B, C, h, w) FOLD times each way; cut to the size of `like`."""
    pixels = F.interpolate(cells, scale_factor=FOLD, mode="nearest")
    return _cut(pixels, *like.shape[-2:], 1)


def _cut(cells: Tensor, height: int, width: int, size: int) -> Tensor:
    """Cut cells of size x size pixels to a frame of height x width pixels."""
    return cells[..., : -(-height // size), : -(-width // size)]
