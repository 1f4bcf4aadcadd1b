"""The training augmentation: crops around objects, seen by a camera that varies a little.

Plain functions on whole batches, on whichever device they are. No change can turn one class into
another: no hue is turned, no channel swapped, and nothing is mirrored, because CLEVR's masks sit
half a pixel to the left of the picture, and a mirrored one would sit half a pixel to the right.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from classes import NUM_CLASSES

CROPS_PER_FRAME = 2  # more frames teach more than more crops of each
CROP_SIZE = 96  # pixels: some four objects wide, so that a crop shows neighbours and shadows
EXACT = 0.75  # share of crops whose pixels are the frame's own: as sharp as what is labelled later
STRIDE = 2  # every second pixel each way is enough to choose an object by
SCALE = 0.22  # e^0.22 = 1.25: an object at half or at twice the distance is no harder than that
ASPECT = 0.05  # e^0.05: cameras differ in that less
OFFSET = 0.7  # of half a crop, from its middle to the chosen pixel: the object is always in it
ANYWHERE = 1e-9  # weight of a background pixel, which counts only where there is no object

# What cameras and lamps differ in: more than real videos do, and too little to take one colour for
# another beside the ground (the brown and the yellow of real frames are 28 degrees of hue apart).
SATURATION = (0.5, 1.25)
CONTRAST = (0.8, 1.2)
EXPOSURE = (0.85, 1.15)
BALANCE = (0.93, 1.07)  # of each channel, the ground's as well
BLUR = (-0.3, 0.6)  # share of the mean over 3 x 3 pixels; below 0 it sharpens
NOISE = 0.063  # standard deviation at most, 16 steps of 8 bits; half have a sixteenth of it or less


def augment(
    images: Tensor, masks: Tensor, crops: int = CROPS_PER_FRAME, size: int = CROP_SIZE
) -> tuple[Tensor, Tensor]:
    """Return random crops of frames and of their masks; every second one has another camera.

    Args:
        images: (B, 3, H, W) uint8.
        masks: (B, H, W) uint8 ids.
        crops: How many of each frame.
        size: Their height and width in pixels; at most the frame's.

    Returns:
        (crops * B, 3, size, size) float in [0, 1], and (crops * B, size, size) uint8.
    """
    images, masks = random_object_crops(images, masks, crops, size)
    images[::2] = random_camera(images[::2])  # with two of each frame, one of them stays as it is
    return images, masks


def random_object_crops(
    images: Tensor, masks: Tensor, crops: int, size: int
) -> tuple[Tensor, Tensor]:
    """Cut square crops around random objects out of every frame; arguments as of `augment`.

    Every kind of object in a frame is as likely as any other, however small; it lies anywhere in
    the crop. Most are cut out as they are, the others scaled and stretched at random: images are
    sampled bilinearly, masks by the nearest pixel.
    """
    grid = _crop_grid(masks, crops, min(size, *masks.shape[1:]))
    images = _sample(images, grid, "bilinear") / 255
    return images, _sample(masks[:, None], grid, "nearest")[:, 0].to(masks.dtype)


def _crop_grid(masks: Tensor, crops: int, size: int) -> Tensor:
    """Return where crops look, (B, crops * size, size, 2) in the units of grid_sample."""
    device, (batch, height, width) = masks.device, masks.shape
    half = size / 2

    def uniform(limit: float) -> Tensor:
        return -limit + 2 * limit * torch.rand(batch, crops, 1, device=device)

    ids = masks[:, ::STRIDE, ::STRIDE].flatten(1).long()
    area = ids.new_zeros(batch, NUM_CLASSES).scatter_add_(1, ids, torch.ones_like(ids))
    weight = torch.where(ids > 0, 1 / area.gather(1, ids), ANYWHERE)
    chosen = torch.multinomial(weight, crops, replacement=True)[..., None]
    columns = -(-width // STRIDE)
    x, y = STRIDE * (chosen % columns), STRIDE * (chosen // columns)
    half_x = half * torch.exp(uniform(SCALE))
    half_y = half_x * torch.exp(uniform(ASPECT))
    exact = torch.rand(batch, crops, 1, device=device) < EXACT
    half_x, half_y = (torch.where(exact, half, side) for side in (half_x, half_y))
    x = x + uniform(OFFSET) * half_x
    y = y + uniform(OFFSET) * half_y
    x = torch.maximum(torch.minimum(x, width - half_x), half_x)  # stay inside the frame
    y = torch.maximum(torch.minimum(y, height - half_y), half_y)
    x, y = (torch.where(exact, half + (middle - half).round(), middle) for middle in (x, y))
    line = (torch.arange(size, device=device) + 0.5) / half - 1  # -1..1 over the crop
    x = (x + half_x * line) * 2 / width - 1  # (B, crops, size)
    y = (y + half_y * line) * 2 / height - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, :, None], y[..., None]), dim=-1)
    return grid.flatten(1, 2)


def _sample(planes: Tensor, grid: Tensor, mode: str) -> Tensor:
    """Return the crops (B * crops, C, size, size) of planes (B, C, H, W) at a grid, as floats."""
    sampled = F.grid_sample(planes.float(), grid, mode, padding_mode="border", align_corners=False)
    size = sampled.shape[-1]
    return sampled.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)


def random_camera(images: Tensor) -> Tensor:
    """Vary exposure, contrast, saturation, white balance, sharpness and noise of every image.

    All stay so small that no colour is taken for another.

    Args:
        images: (B, 3, H, W) float in [0, 1].
    """

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        shape = (len(images), channels, 1, 1)
        return low + (high - low) * torch.rand(shape, device=images.device)

    x = torch.lerp(images.mean(dim=1, keepdim=True), images, uniform(*SATURATION))
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    contrast, exposure = uniform(*CONTRAST), uniform(*EXPOSURE)
    balance = uniform(*BALANCE, channels=3)
    x = torch.addcmul(mean * (exposure - contrast) * balance, x, contrast * balance)
    x = torch.lerp(x, _box_blur(x), uniform(*BLUR))
    noise = NOISE * torch.rand((len(images), 1, 1, 1), device=images.device) ** 4
    return x.addcmul_(torch.randn_like(x), noise).clamp_(0, 1)


def _box_blur(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) blurred over 3 x 3 pixels; beyond the edge its pixels repeat.

    Sums of slices take a CPU a quarter of the time of average pooling.
    """
    x = F.pad(images, (1, 1, 1, 1), mode="replicate")
    x = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    return (x[..., :-2] + x[..., 1:-1]).add_(x[..., 2:]).div_(9)
