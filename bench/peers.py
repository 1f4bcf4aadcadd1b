"""The networks that benchmark.py compares with: the classic UNet and those of other projects.

Each is used as the project's own UNet is: `network(frames)` are logits, `network(frames, mask)` is
the loss, `predict` labels. They learn by cross entropy over the 49 classes of every pixel.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx.experimental import optimization
from torch.nn import functional as F
from torchvision.models import segmentation

from classes import FACTOR_SIZES, NUM_CLASSES
from model import FOLD, Answer, UNet

MEAN, DEVIATION = 0.45, 0.225  # about ImageNet's, to which these networks are used


def double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return two 3x3 convolutions, each with batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class ClassicUNet(nn.Module):
    """The UNet of Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597), padded.

    Args:
        width: Channels of the first stage, which double with each of the four below it.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        w1, w2, w3, w4, w5 = (width * 2**i for i in range(5))
        self.pool = nn.MaxPool2d(2)
        self.down1, self.down2 = double_conv(3, w1), double_conv(w1, w2)
        self.down3, self.down4 = double_conv(w2, w3), double_conv(w3, w4)
        self.bottom = double_conv(w4, w5)
        self.up4, self.merge4 = nn.ConvTranspose2d(w5, w4, 2, stride=2), double_conv(w5, w4)
        self.up3, self.merge3 = nn.ConvTranspose2d(w4, w3, 2, stride=2), double_conv(w4, w3)
        self.up2, self.merge2 = nn.ConvTranspose2d(w3, w2, 2, stride=2), double_conv(w3, w2)
        self.up1, self.merge1 = nn.ConvTranspose2d(w2, w1, 2, stride=2), double_conv(w2, w1)
        self.head = nn.Conv2d(w1, NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 49, H, W) of (B, 3, H, W), H and W multiples of 16."""
        x1 = self.down1(x)  # (B, w, H, W)
        x2 = self.down2(self.pool(x1))  # (B, 2w, H/2, W/2)
        x3 = self.down3(self.pool(x2))  # (B, 4w, H/4, W/4)
        x4 = self.down4(self.pool(x3))  # (B, 8w, H/8, W/8)
        x = self.bottom(self.pool(x4))  # (B, 16w, H/16, W/16)
        x = self.merge4(torch.cat((x4, self.up4(x)), dim=1))  # (B, 8w, H/8, W/8)
        x = self.merge3(torch.cat((x3, self.up3(x)), dim=1))  # (B, 4w, H/4, W/4)
        x = self.merge2(torch.cat((x2, self.up2(x)), dim=1))  # (B, 2w, H/2, W/2)
        x = self.merge1(torch.cat((x1, self.up1(x)), dim=1))  # (B, w, H, W)
        return self.head(x)  # (B, 49, H, W)


class Peer(nn.Module):
    """Any network from frames to 49 logits, used as the project's UNet is.

    Args:
        network: Takes (B, 3, H, W) normalised to about mean 0 and deviation 1.
        multiple: Pixels that its height and width must be a multiple of.

    Attributes:
        layout: The memory format of its input, which decides that of all layers.
    """

    def __init__(self, network: nn.Module, multiple: int = 1):
        super().__init__()
        self.network, self.multiple = network, multiple
        self.layout = torch.channels_last

    def forward(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits (B, 49, H, W) of frames uint8 or float [0, 1], or the loss of a mask."""
        logits = self.answers(frames)
        return logits if mask is None else F.cross_entropy(logits.float(), mask.long())

    def answers(self, frames: Tensor) -> Tensor:
        """Return logits (B, 49, H, W): these networks answer once."""
        height, width = frames.shape[-2:]
        x = frames if frames.is_floating_point() else frames / 255
        x = (x - MEAN) / DEVIATION
        x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")
        logits = self.network(x.contiguous(memory_format=self.layout))
        logits = logits["out"] if isinstance(logits, Mapping) else logits
        return logits[..., :height, :width]

    def frame_losses(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Return the loss of each frame by itself, (B,)."""
        return F.cross_entropy(logits.float(), mask.long(), reduction="none").mean(dim=(1, 2))

    def labels(self, logits: Tensor) -> Tensor:
        """Return labels (B, H, W) uint8."""
        return logits.argmax(dim=1).to(torch.uint8)

    def evidence(self, logits: Tensor) -> Answer:
        """Return the same as `UNet.evidence`.

        A factor has the probability of all classes together that have it.
        """
        classes = F.avg_pool2d(logits[:, 1:].float(), FOLD, ceil_mode=True)  # (B, 48, h, w)
        classes = classes.unflatten(1, FACTOR_SIZES)  # (B, 3, 2, 8, h, w)
        kinds = [classes.logsumexp(others) for others in ((2, 3), (1, 3), (1, 2))]
        objectness = logits[:, 1:].amax(dim=1, keepdim=True) - logits[:, :1]
        return Answer(objectness, torch.cat(kinds, dim=1))

    @torch.inference_mode()
    def predict(self, frames: Tensor) -> Tensor:
        """Return labels (B, H, W) uint8 of frames."""
        return self.labels(self.answers(frames))

    def fuse(self) -> "Peer":
        """Fold the batch normalisation into the convolutions, as `UNet.fuse` does."""
        self.network = optimization.fuse(self.network)
        return self


def classic_unet(width: int = 64) -> Peer:
    """Return the classic UNet of 64..1024 channels."""
    return Peer(ClassicUNet(width), multiple=16)


def smp_unet(encoder: str) -> Peer:
    """Return segmentation-models-pytorch's Unet. Raises ImportError where it is not installed."""
    import segmentation_models_pytorch as smp

    return Peer(smp.Unet(encoder, encoder_weights=None, classes=NUM_CLASSES), multiple=32)


def torchvision_network(name: str) -> Peer:
    """Return one of torchvision.models.segmentation."""
    network = getattr(segmentation, name)
    return Peer(network(weights=None, weights_backbone=None, num_classes=NUM_CLASSES))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ours": UNet,
    "classic": classic_unet,
    "smp-unet-resnet34": partial(smp_unet, "resnet34"),
    "smp-unet-mobilenet_v2": partial(smp_unet, "mobilenet_v2"),
    "lraspp_mobilenet_v3_large": partial(torchvision_network, "lraspp_mobilenet_v3_large"),
    "deeplabv3_mobilenet_v3_large": partial(torchvision_network, "deeplabv3_mobilenet_v3_large"),
}
