"""The augmentation: image and mask move together, no colour becomes another."""

import pytest
import torch

from augment import _box_blur, augment, random_camera, random_object_crops


def test_augmentation_moves_image_and_mask_together():
    """The picture shows its own ids: wherever a crop's picture is flat, it must show the crop's."""
    torch.manual_seed(0)
    mask = torch.randint(0, 2, (3, 10, 15), dtype=torch.uint8) * 40
    mask = mask.repeat_interleave(16, 1).repeat_interleave(16, 2)
    image = mask[:, None].expand(-1, 3, -1, -1).contiguous()
    crops, ids = random_object_crops(image, mask, crops=5, size=64)
    assert (crops.shape, ids.shape, ids.dtype) == ((15, 3, 64, 64), (15, 64, 64), torch.uint8)
    shown = crops[:, 0] * 255
    flat = (shown - shown.round()).abs() < 1e-3
    assert flat.float().mean() > 0.5
    assert torch.equal(shown.round()[flat], ids[flat].float())


def test_most_crops_are_pieces_of_the_frame_and_every_second_one_has_its_camera():
    torch.manual_seed(0)
    images = torch.randint(1, 256, (2, 3, 41, 60), dtype=torch.uint8)
    masks = torch.randint(0, 49, (2, 41, 60), dtype=torch.uint8)
    crops, ids = augment(images, masks, crops=64, size=17)
    pieces = images.unfold(2, 17, 1).unfold(3, 17, 1).movedim(1, 3)  # (2, 25, 44, 3, 17, 17)
    pieces = {p.numpy().tobytes(): masks[n, y : y + 17, x : x + 17]
              for n, rows in enumerate(pieces) for y, row in enumerate(rows)
              for x, p in enumerate(row)}  # fmt: skip
    found = 0
    for crop, mask in zip(crops[1::2], ids[1::2], strict=True):
        piece = pieces.get((255 * crop).round().byte().numpy().tobytes())
        found += piece is not None
        assert piece is None or torch.equal(piece, mask)
    assert 0.6 * 64 < found < 0.9 * 64
    changed = [(255 * crop).round().byte().numpy().tobytes() not in pieces for crop in crops[::2]]
    assert all(changed)


def test_every_crop_has_an_object_where_the_frame_has_one():
    torch.manual_seed(0)
    mask = torch.zeros(4, 160, 240, dtype=torch.uint8)
    mask[:, 100:110, 5:15] = 7  # small, and near the border
    _, ids = augment(torch.zeros(4, 3, 160, 240), mask, crops=8)
    assert (ids == 7).flatten(1).any(dim=1).all()
    assert ids.unique().tolist() == [0, 7]


def test_a_frame_without_objects_and_one_smaller_than_a_crop_can_be_augmented():
    images = torch.zeros(1, 3, 40, 60, dtype=torch.uint8)
    crops, ids = augment(images, torch.zeros(1, 40, 60, dtype=torch.uint8), crops=2)
    assert crops.shape == (2, 3, 40, 40)
    assert not ids.any()


def test_augmentation_never_turns_one_colour_into_another():
    """Beside the ground, hues 28 degrees apart turn by less than half of that; gray stays gray."""
    torch.manual_seed(0)
    seen = {  # medians over rubber objects in real frames, red, green, blue
        "gray": (89, 88, 85),
        "blue": (58, 77, 124),
        "green": (50, 91, 39),
        "brown": (105, 79, 46),
        "cyan": (58, 123, 121),
        "yellow": (134, 129, 61),
    }

    def hue_and_saturation(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        red, green, blue = rgb.unbind(-1)
        angle = torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue)
        return angle.rad2deg(), (rgb.amax(-1) - rgb.amin(-1)) / rgb.amax(-1)

    for name, rgb in seen.items():
        colour = torch.tensor(rgb) / 255
        picture = colour.view(1, 3, 1, 1).repeat(500, 1, 24, 48)
        picture[..., 24:] = 130 / 255  # the ground, which shows how a picture is tinted
        seen_as = random_camera(picture)
        ground = seen_as[..., 28:].mean(dim=(2, 3))
        white = ground / ground.mean(dim=1, keepdim=True)
        hue, saturation = hue_and_saturation(seen_as[..., :20].mean(dim=(2, 3)) / white)
        before, saturated = hue_and_saturation(colour)
        if name == "gray":
            assert saturation.max() < 0.1
            assert (white.amax(1) - white.amin(1)).max() > 0.1, "pictures are tinted"
        else:
            turned = (hue - before + 180) % 360 - 180
            assert turned.abs().max() < 14, name
            shown = hue_and_saturation(seen_as[..., :20].mean(dim=(2, 3)))[0]
            assert ((shown - before + 180) % 360 - 180).abs().max() < 28, name
            assert saturation.min() > 0.15, name
            assert saturation.min() > 0.4 * saturated, name


def test_blur_is_the_mean_over_nine_pixels():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 6, 9)
    blurred = _box_blur(images)
    mean = torch.nn.functional.avg_pool2d(images, 3, stride=1)
    torch.testing.assert_close(blurred[..., 1:-1, 1:-1], mean)
    (a, b), (c, d) = images[0, 0, :2, :2].tolist()
    assert blurred[0, 0, 0, 0].item() == pytest.approx((4 * a + 2 * b + 2 * c + d) / 9)
