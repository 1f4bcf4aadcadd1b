"""Drawn masks: ids as colours, and frames beside them."""

from pathlib import Path

import numpy as np
from torch import Tensor

from classes import FACTOR_SIZES, NUM_CLASSES, factors
from videos import find_labelled, frame_paths, read_frame, read_labels

PAINT = (  # red, green, blue of COLOURS in drawn masks: brighter than the objects themselves
    *((150, 150, 150), (235, 60, 60), (70, 110, 255), (60, 200, 60)),
    *((190, 120, 60), (60, 230, 230), (190, 80, 240), (255, 235, 60)),
)
BACKGROUND_PAINT = (40, 40, 40)
SHADE = 0.11  # how much darker each further kind of object of one colour is painted


def palette() -> np.ndarray:
    """Return the colour in which each class is drawn, uint8 (49, 3), no two alike."""
    ids = np.arange(1, NUM_CLASSES)
    shape, material, colour = factors(ids)
    kind = shape * FACTOR_SIZES[1] + material  # 0..5, metal cube to rubber cylinder
    paint = np.array(PAINT, dtype=np.float32)[colour] * (1 - np.float32(SHADE) * kind[:, None])
    return np.concatenate([[BACKGROUND_PAINT], paint]).astype(np.uint8)


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


def draw_strip(pred: Path, data: Path, columns: int = 4) -> np.ndarray:
    """Return a picture uint8 (3 * H, columns * W, 3): frames over true masks over predictions.

    Shows the middle frame of labelled videos that lie evenly apart in the list.
    """
    videos = find_labelled(data)
    columns = min(columns, len(videos))
    strip = []
    for i in range(columns):
        video = videos[i * len(videos) // columns]
        paths = frame_paths(video)
        t = len(paths) // 2
        frame = read_frame(paths[t]).permute(1, 2, 0).numpy()
        masks = (read_labels(video), read_labels(pred / video.relative_to(data)))
        strip.append(np.concatenate([frame, *(draw_labels(mask[t]) for mask in masks)]))
    return np.concatenate(strip, axis=1)
