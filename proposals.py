"""CLEVRER's derender proposals: a JSON file for each video, with the objects of every frame.

    proposal_00007.json   {"video_index": 7, "video_name": "video_00007.mp4", "frames": [
                              {"frame_index": 0, "frame_filename": "video_00007_0.png", "objects": [
                                  {"color": "red", "material": "rubber", "shape": "cube",
                                   "score": 0.99, "mask": {"size": [320, 480], "counts": "..."}}]}]}

A mask is a compressed run length encoding of COCO, as `pycocotools.mask.decode` reads it. CLEVRER's
own files came from a Mask R-CNN; loaders of many projects read this form.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from classes import COLOURS, MATERIALS, SHAPES, factors
from objects import Objects
from utils import UserError
from videos import Video


def video_index(video: Video) -> int:
    """Return the number in a video's name, 7 of video_00007.mp4. Raises UserError for none."""
    numbers = re.findall(r"[0-9]+", video.path.stem if video.is_clip else video.path.name)
    if not numbers:
        raise UserError(f"{video}: no number in its name, by which a proposal is called: rename it")
    return int(numbers[-1])


def file_name(video: Video) -> str:
    """Return what the file of a video is called."""
    return f"proposal_{video_index(video):05}.json"


def check_names(videos: Iterable[Video]) -> None:
    """Raise UserError for a video without a number in its name, or for two of one number.

    So it does where pycocotools is not installed.
    """
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError:
        raise UserError("proposals are packed by pycocotools: pip install pycocotools") from None
    names = defaultdict(list)
    for video in videos:
        names[file_name(video)].append(video)
    for name, found in names.items():
        if len(found) > 1:
            raise UserError(
                f"{found[0]} and {found[1]} would both write {name}: rename one of them"
            )


def encode(video: Video, objects: Objects) -> bytes:
    """Return the content of a video's file; `score` is the confidence of each object's class."""
    from pycocotools import mask as coco

    labels = objects.labels.numpy()
    numbers = objects.numbers or range(len(labels))
    stem = video.path.stem if video.is_clip else video.path.name
    frames = []
    for number, ids in zip(numbers, labels, strict=True):
        present = [int(i) for i in np.unique(ids) if i]
        planes = np.asfortranarray((ids[..., None] == np.array(present, np.uint8)).astype(np.uint8))
        found = []
        for i, runs in zip(present, coco.encode(planes) if present else [], strict=True):
            shape, material, colour = factors(i)
            found.append(
                {
                    "color": COLOURS[colour],
                    "material": MATERIALS[material],
                    "shape": SHAPES[shape],
                    "score": round(objects.confidence.get(i, 1.0), 4),
                    "mask": {"size": runs["size"], "counts": runs["counts"].decode()},
                }
            )
        name = f"{stem}_{number}.png"
        frames.append({"frame_index": number, "frame_filename": name, "objects": found})
    content: dict[str, Any] = {
        "video_index": video_index(video),
        "video_name": video.path.name if video.is_clip else f"{stem}.mp4",
        "frames": frames,
    }
    return f"{json.dumps(content, separators=(',', ':'))}\n".encode()
