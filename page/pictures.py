"""Drawn masks: ids as colours, over frames or beside them; one home for all that is drawn.

Pictures are numpy arrays, uint8, (height, width, 3) or with a leading axis of frames.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from classes import BACKGROUND_PAINT, CLASS_NAMES, NUM_CLASSES, NUM_KINDS, PAINT, palette
from utils import UserError
from videos import Video, find_in_all, has_mask, read_labels, read_truth, read_video

BLOCK = 16  # pixels, of JPEG with its colours at half the resolution
STRIP, GUTTER = 4, 4  # videos of a strip at most, and white pixels between them
NAMED, LETTERS, SEEN = 2, 10, 120  # objects of a video, height and fewest pixels of one, in a strip
TINT = 0.3  # opacity of a mask over its frame; its outline is opaque
FAULTS = {  # how a mask can differ from the truth, and how that is painted
    "missed": (255, 60, 60),  # an object's pixel that is taken for background
    "too much": (60, 160, 255),  # the background's, taken for an object's
    "another class": (255, 200, 0),  # an object's, taken for another object's
}


def object_paint() -> np.ndarray:
    """Return the colour in which each class is drawn over frames, uint8 (49, 3), its own colour."""
    return np.array([BACKGROUND_PAINT, *PAINT * (NUM_KINDS // len(PAINT))], np.uint8)


def draw_labels(labels: Tensor) -> np.ndarray:
    """Paint ids (H, W) as uint8 (H, W, 3): an object's own colour, another shade for each kind."""
    return palette()[labels.numpy()]


def draw_columns(frames: Tensor, *masks: Tensor) -> np.ndarray:
    """Return a picture uint8 ((1 + M) * H, N * W, 3): frames side by side, M masks of each below.

    Args:
        frames: (N, 3, H, W) uint8.
        masks: Ids, (N, H, W) each.
    """
    rows = [frames.permute(0, 2, 3, 1).numpy(), *map(draw_labels, masks)]
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows])


def outlined(labels: np.ndarray) -> np.ndarray:
    """Return labels (T, H, W) in which the outermost pixels of each object are 48 higher."""
    padded = np.pad(labels, ((0, 0), (1, 1), (1, 1)), mode="edge")
    inner = np.ones(labels.shape, bool)
    for beside in (padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2]):
        inner &= beside == labels
    inner &= padded[:, 1:-1, 2:] == labels
    return np.where((labels > 0) & ~inner, labels + NUM_KINDS, labels).astype(np.uint8)


def draw_over(frames: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Tint and outline objects in frames (T, H, W, 3) by their labels (T, H, W)."""
    marks = outlined(labels)
    paint = np.concatenate([object_paint(), object_paint()[1:]])
    opacity = np.array([0] + [TINT] * NUM_KINDS + [1] * NUM_KINDS, np.float32)[marks][..., None]
    return np.round(frames * (1 - opacity) + paint[marks] * opacity).astype(np.uint8)


def differences(truth: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return how labels differ from the truth: 0 where not, else which of FAULTS, from 1."""
    kinds = [truth == labels, labels == 0, truth == 0]
    return np.select(kinds, [0, 1, 2], 3).astype(np.uint8)


def columns_for(frames: int) -> int:
    """Return how many frames stand side by side in a sheet, so that it is about as wide as high."""
    return math.ceil(math.sqrt(frames))


def sheet(frames: np.ndarray) -> np.ndarray:
    """Lay frames (T, H, W, ...) out as one picture, row by row, each in a tile of `tile_size`."""
    count, height, width = frames.shape[:3]
    columns = columns_for(count)
    rows = -(-count // columns)
    high, wide = tile_size(height, width)
    beyond = [(0, 0)] * (frames.ndim - 3)
    frames = np.pad(frames, [(0, 0), (0, high - height), (0, wide - width), *beyond], mode="edge")
    frames = np.pad(frames, [(0, rows * columns - count), (0, 0), (0, 0), *beyond])
    tiles = frames.reshape(rows, columns, *frames.shape[1:]).swapaxes(1, 2)
    return tiles.reshape(rows * high, columns * wide, *frames.shape[3:])


def tile_size(height: int, width: int) -> tuple[int, int]:
    """Return height and width of a frame's tile, in whole blocks of JPEG, which bleed within."""
    return -(-height // BLOCK) * BLOCK, -(-width // BLOCK) * BLOCK


def mask_sheet(labels: np.ndarray) -> Image.Image:
    """Return labels (T, H, W) as a sheet to lay over one of frames: tints and outlines."""
    paint = np.concatenate([object_paint(), object_paint()[1:]])
    opacity = [0] + [round(255 * TINT)] * NUM_KINDS + [255] * NUM_KINDS
    return _transparent(sheet(outlined(labels)), paint, opacity)


def difference_sheet(truth: np.ndarray, labels: np.ndarray) -> Image.Image:
    """Return a sheet of the `differences`, to lay over one of frames."""
    paint = np.array([BACKGROUND_PAINT, *FAULTS.values()], np.uint8)
    return _transparent(sheet(differences(truth, labels)), paint, [0] + [220] * len(FAULTS))


def _transparent(indices: np.ndarray, paint: np.ndarray, opacity: list[int]) -> Image.Image:
    picture = Image.fromarray(indices, "P")
    picture.putpalette(paint.astype(np.uint8).tobytes())
    picture.info["transparency"] = bytes(opacity)
    return picture


def reduced(frames: np.ndarray, labels: list[np.ndarray], width: int) -> list[np.ndarray]:
    """Return frames (T, H, W, 3) and each of `labels` (T, H, W) no wider than `width` pixels."""
    _, high, wide, _ = frames.shape
    if wide <= width:
        return [frames, *labels]
    size = (width, max(1, round(high * width / wide)))
    small = np.stack([np.asarray(Image.fromarray(f).resize(size, Image.BOX)) for f in frames])
    rows, columns = (
        (np.arange(n) + 0.5) * of / n for n, of in zip(size[::-1], (high, wide), strict=True)
    )
    picked = [ids[:, rows.astype(int)][:, :, columns.astype(int)] for ids in labels]
    return [small, *picked]


def with_masks(videos: Sequence[Video], masks: Path, data: Sequence[Path]) -> list[Video]:
    """Return those of the videos in `data` that have masks below `masks`.

    Raises:
        UserError: none has.
    """
    chosen = [video for video in videos if has_mask(masks / video.target)]
    if not chosen:
        where = ", ".join(map(str, data))
        raise UserError(f"{masks}: holds no masks of the videos in {where}, run infer.py on them")
    return chosen


def draw_strip(
    masks: Path, data: Sequence[Path], moving: bool = False, every: int = 1
) -> np.ndarray:
    """Draw videos that lie evenly apart in the list side by side, each above its masks.

    Args:
        masks: The folder that infer.py wrote.
        data: Folders of videos, of one size.
        moving: Whether to draw all frames, each above itself with the objects tinted and outlined;
            else the middle one, above the true masks where `data` has any and the predicted.
        every: As of `find_videos`.

    Returns:
        uint8 (T, rows * H, videos * W, 3) and GUTTER white columns between two videos, T the
        length of the shortest, or 1. A moving one names a few objects.

    Raises:
        UserError: there is no such video with masks, or one has a fault.
    """
    videos = with_masks(find_in_all(data, every), masks, data)
    labelled = [video for video in videos if video.labelled]
    videos = labelled if labelled and not moving else videos
    number = min(STRIP, len(videos))
    shown = [videos[i * len(videos) // number] for i in range(number)]
    strip = []
    for video in shown:
        frames = read_video(video).permute(0, 2, 3, 1).numpy()
        shape = len(frames), frames.shape[1:3]
        mask = read_labels(masks / video.target, *shape).numpy()
        if moving:
            rows = [frames, write_names(draw_over(frames, mask), mask)]
        else:
            t = slice(len(frames) // 2, len(frames) // 2 + 1)
            truth = [read_truth(video, shape[1]).numpy()] if labelled else []
            rows = [frames[t], *(palette()[ids[t]] for ids in (*truth, mask))]
        strip.append(np.concatenate(rows, axis=1))
    if len({column.shape[1:] for column in strip}) > 1:
        where = ", ".join(map(str, data))
        raise UserError(f"{where}: videos of different sizes cannot stand side by side in a strip")
    length = min(map(len, strip))
    gutter = np.full((length, len(strip[0][0]), GUTTER, 3), 255, np.uint8)
    parts = [part for column in strip for part in (gutter, column[:length])]
    return np.concatenate(parts[1:], axis=2)


def _meet(at: tuple[float, float], other: tuple[float, float], width: float) -> bool:
    """Return whether two names do that stand at (middle, lower end), as wide as `width`."""
    return abs(at[0] - other[0]) < width + LETTERS and abs(at[1] - other[1]) < LETTERS + 4


def write_names(frames: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return frames with the names of the NAMED objects that have most pixels in all of them.

    A name stands above its object, or below it if it would meet another one.

    Args:
        frames: uint8 (T, H, W, 3).
        labels: uint8 (T, H, W), ids.
    """
    counts = np.bincount(labels.ravel(), minlength=NUM_CLASSES)[1:]
    ids = [i + 1 for i in np.argsort(-counts, kind="stable")[:NAMED] if counts[i]]
    font, named = ImageFont.load_default(LETTERS), []
    for frame, mask in zip(frames, labels, strict=True):
        picture = Image.fromarray(frame)
        brush = ImageDraw.Draw(picture)
        taken: list[tuple[float, float]] = []  # middle and lower end of the names so far
        for i in ids:
            rows, columns = (mask == i).nonzero()
            if len(rows) < SEEN:
                continue
            half = brush.textlength(CLASS_NAMES[i], font) / 2 + 1
            middle = np.clip(columns.mean(), half, max(half, picture.width - half))
            places = [
                (middle, max(rows.min() - 2, LETTERS + 1)),
                (middle, rows.max() + LETTERS + 4),
            ]
            free = [at for at in places if not any(_meet(at, other, 2 * half) for other in taken)]
            if not free or 2 * half > picture.width:
                continue
            at = free[0]
            taken.append(at)
            ink = {"fill": "white", "stroke_width": 1, "stroke_fill": "black"}
            brush.text(at, CLASS_NAMES[i], font=font, anchor="mb", **ink)
        named.append(np.asarray(picture))
    return np.stack(named)
