"""Drawn masks: colours that differ, outlines, sheets and strips, against Pillow and by hand."""

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import make_video, write_video

from classes import class_id
from page import pictures
from utils import UserError

SQUARE = np.zeros((1, 5, 5), np.uint8)
SQUARE[0, 1:4, 1:4] = 15  # purple rubber cube


def test_each_class_has_a_paint_of_its_own():
    palette = pictures.palette()
    assert (palette.shape, palette.dtype) == ((49, 3), np.uint8)
    assert len(np.unique(palette, axis=0)) == 49
    by_hand = np.array([70, 110, 255]) * (1 - 0.11 * 2)  # blue, the third of six kinds
    assert palette[class_id("sphere", "metal", "blue")].tolist() == by_hand.astype(int).tolist()


def test_outline_is_the_outermost_pixels_of_each_object():
    beside = SQUARE.copy()
    beside[0, 1:4, 4] = 9  # another object, which the frame cuts off
    marks = pictures.outlined(beside)
    assert marks[0, 2].tolist() == [0, 63, 15, 63, 57]
    assert marks[0, 1].tolist() == [0, 63, 63, 63, 57]
    whole = np.full((1, 4, 4), 3, np.uint8)
    assert (pictures.outlined(whole) == 3).all()  # the frame's edge is no outline


def test_masks_over_frames_are_tinted_within_and_opaque_at_the_outline():
    frames = np.full((1, 5, 5, 3), 100, np.uint8)
    drawn = pictures.draw_over(frames, SQUARE)
    paint = np.array([190, 80, 240])  # purple
    assert drawn[0, 0, 0].tolist() == [100, 100, 100]
    assert drawn[0, 1, 1].tolist() == paint.tolist()
    np.testing.assert_allclose(drawn[0, 2, 2], 70 + 0.3 * paint, atol=0.51)


@pytest.mark.parametrize(("count", "size"), [(1, (5, 5)), (5, (16, 32)), (22, (20, 30))])
def test_every_frame_is_found_again_in_its_tile(count, size):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (count, *size, 3), np.uint8)
    sheet = pictures.sheet(frames)
    high, wide = pictures.tile_size(*size)
    columns = pictures.columns_for(count)
    assert high % 16 == wide % 16 == 0
    assert sheet.shape[1] == columns * wide
    for t, frame in enumerate(frames):
        y, x = t // columns * high, t % columns * wide
        assert (sheet[y : y + size[0], x : x + size[1]] == frame).all()


def test_a_mask_sheet_laid_over_frames_is_what_draw_over_draws(tmp_path):
    pictures.mask_sheet(SQUARE).save(tmp_path / "masks.png")
    frame = PIL.Image.new("RGBA", (16, 16), (100, 100, 100, 255))
    with PIL.Image.open(tmp_path / "masks.png") as sheet:
        laid = PIL.Image.alpha_composite(frame, sheet.convert("RGBA")).convert("RGB")
    drawn = pictures.draw_over(np.full((1, 5, 5, 3), 100, np.uint8), SQUARE)[0]
    np.testing.assert_allclose(np.asarray(laid)[:5, :5].astype(int), drawn.astype(int), atol=1)


def test_differences_are_told_apart():
    truth = np.array([[[0, 0, 3, 3]]])
    labels = np.array([[[0, 5, 0, 5]]])
    assert pictures.differences(truth, labels).tolist() == [[[0, 2, 1, 3]]]
    assert list(pictures.FAULTS) == ["missed", "too much", "another class"]


def test_large_frames_are_reduced_and_small_ones_are_not():
    frames = np.zeros((2, 4, 8, 3), np.uint8)
    frames[:, :, 4:] = 200
    labels = np.zeros((2, 4, 8), np.uint8)
    labels[:, 2:] = 5
    small, ids = pictures.reduced(frames, [labels], 4)
    assert small[0, :, :, 0].tolist() == [[0, 0, 200, 200]] * 2
    assert ids[1].tolist() == [[0] * 4, [5] * 4]
    assert pictures.reduced(frames, [labels], 8)[0] is frames


def test_strip_of_labelled_videos_has_frames_truth_and_masks(tmp_path):
    frames = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 6, 8)
    truth = torch.full((3, 6, 8), 2, dtype=torch.uint8)
    for i in range(6):
        write_video(tmp_path / f"data/video_{i}", frames + 10 * i, truth)
        folder = tmp_path / f"masks/video_{i}"
        folder.mkdir(parents=True)
        np.save(folder / "mask.npy", np.full((3, 6, 8), 9, np.uint8))
    make_video(tmp_path / "data/video_9", labelled=False)
    (strip,) = pictures.draw_strip(tmp_path / "masks", [tmp_path / "data"])
    gutter = pictures.GUTTER
    assert strip.shape == (18, 32 + 3 * gutter, 3)
    assert (strip[:, 8 : 8 + gutter] == 255).all()
    assert strip[0, :: 8 + gutter, 0].tolist() == [
        1,
        11,
        31,
        41,
    ]  # the middle frames of videos 0, 1, 3, 4
    assert strip[6, 0].tolist() == pictures.palette()[2].tolist()
    assert strip[12, 0].tolist() == pictures.palette()[9].tolist()


def test_moving_strip_is_as_long_as_the_shortest_video(tmp_path):
    for i, count in enumerate((4, 3)):
        make_video(tmp_path / f"data/video_{i}", frames=count, labelled=False)
        make_video(tmp_path / f"masks/video_{i}", frames=count)
    strip = pictures.draw_strip(tmp_path / "masks", [tmp_path / "data"], moving=True)
    assert strip.shape == (3, 12, 16 + pictures.GUTTER, 3)
    assert (strip[:, :6] != strip[:, 6:]).any()


def test_a_moving_strip_names_the_largest_objects_above_them():
    labels = np.zeros((2, 60, 120), np.uint8)
    labels[0, 30:50, 50:70] = 5  # the second frame shows no object
    frames = np.full((2, 60, 120, 3), 100, np.uint8)
    named = pictures.write_names(frames, labels)
    rows, columns = (named[0] != 100).any(-1).nonzero()
    assert 15 < rows.min() < rows.max() < 30
    assert abs(columns.mean() - 60) < 6
    assert (named[1] == 100).all()
    assert (frames == 100).all()


def test_names_of_neighbours_do_not_meet():
    labels = np.zeros((1, 60, 240), np.uint8)
    labels[0, 30:45, 100:115], labels[0, 30:44, 120:135] = 5, 6
    frames = np.full((1, 60, 240, 3), 100, np.uint8)
    rows = (pictures.write_names(frames, labels)[0] != 100).any((-1, 1)).nonzero()[0]
    assert rows.min() > 10
    assert (rows > 46).any(), "the second stands below"
    assert not ((rows > 31) & (rows < 44)).any()
    narrow = np.full((1, 60, 30, 3), 100, np.uint8)
    assert (pictures.write_names(narrow, labels[:, :, 100:130]) == 100).all(), "no room"


def test_strip_without_masks_or_of_two_sizes_is_refused(tmp_path):
    make_video(tmp_path / "data/video_0")
    with pytest.raises(UserError, match=r"run infer\.py"):
        pictures.draw_strip(tmp_path / "masks", [tmp_path / "data"])
    make_video(tmp_path / "data/video_1", size=(8, 6))
    with pytest.raises(UserError, match="different sizes"):
        pictures.draw_strip(tmp_path / "data", [tmp_path / "data"])
