"""CLEVRER's derender proposals: a JSON file for each video, with the objects of every frame.

    proposal_00007.json   {"video_index": 7, "video_name": "video_00007.mp4", "frames": [
                              {"frame_index": 0, "frame_filename": "video_00007_0.png", "objects": [
                                  {"color": "red", "material": "rubber", "shape": "cube",
                                   "score": 0.99, "mask": {"size": [320, 480], "counts": "..."}}]}]}

A mask is a compressed run length encoding of COCO, as `pycocotools.mask.decode` reads it. CLEVRER's
own files came from a Mask R-CNN; loaders of many projects read this form.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from classes import COLOURS, FRAME_SIZE, MATERIALS, SHAPES, class_id, factors
from decode import MAX_PIXELS, must_be_file
from objects import Objects
from utils import UserError
from videos import Video, read_frames


def _stem(video: Video) -> str:
    path = Path(os.path.abspath(video.path))  # noqa: PTH100 - "." has no name
    return path.stem if video.is_clip else path.name


def _coco() -> Any:
    """Return the module of pycocotools for masks. Raises UserError where it is not installed."""
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError("proposals are packed by pycocotools: pip install pycocotools") from None
    return mask


def video_index(video: Video) -> int:
    """Return the number in a video's name, 7 of video_00007.mp4. Raises UserError for none."""
    numbers = re.findall(r"[0-9]+", _stem(video))
    if not numbers:
        raise UserError(f"{video}: no number in its name, by which a proposal is called: rename it")
    return int(numbers[-1])


def file_name(video: Video) -> str:
    """Return what the file of a video is called."""
    return f"proposal_{video_index(video):05}.json"


def check_names(videos: Iterable[Video]) -> None:
    """Raise UserError for a video without a number in its name, or for two of one number."""
    _coco()
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
    coco, labels = _coco(), objects.labels.numpy()
    numbers = objects.numbers or range(len(labels))
    stem = _stem(video)
    frames = []
    for number, ids in zip(numbers, labels, strict=True):
        present = (1 + np.flatnonzero(np.bincount(ids.ravel(), minlength=2)[1:])).tolist()
        columns = np.ascontiguousarray(ids.T)  # (W, H): planes are in Fortran's order
        planes = columns == np.array(present, np.uint8)[:, None, None]
        planes = planes.view(np.uint8).transpose(2, 1, 0)
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


def has_proposals(video: Video, folder: Path) -> bool:
    """Return whether a video has a file below `folder`, even one that cannot be read."""
    try:
        return os.path.lexists(folder / file_name(video))
    except UserError:  # no number in its name
        return False


def read_masks(
    video: Video,
    folder: Path,
    numbers: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Return the masks of a video, uint8 (T, H, W), as its file has them, by `frame_index`.

    A pixel that two objects claim goes to the one of the higher score.

    Args:
        video: Whose they are.
        folder: Where its file is.
        numbers: Those of the frames; None: all that the file has.
        size: The height and width to bring masks to, by area; None: their own.

    Raises:
        UserError: the file is damaged or has not all frames, or an object is of no class.
    """
    coco, path = _coco(), folder / file_name(video)
    try:
        must_be_file(path)
        frames = json.loads(path.read_bytes())["frames"]
        by_number = {int(f.get("frame_index", i)): f["objects"] for i, f in enumerate(frames)}
        if len(by_number) < len(frames):
            raise UserError("two frames have the same frame_index, replace the file.")
        numbers = sorted(by_number) if numbers is None else numbers
        if missing := [number for number in numbers if number not in by_number]:
            raise UserError(f"has no frame {missing[0]}, replace the file.")
        sizes = {tuple(item["mask"]["size"]) for f in frames for item in f["objects"]}
        if len(sizes) != 1:
            raise UserError("holds no masks, or of several sizes, replace the file.")
        (own,) = sizes
        if len(own) != 2 or not 0 < own[0] * own[1] <= MAX_PIXELS:
            raise UserError(f"masks of size {own} are none of frames, replace the file.")
        masks = [_paint(coco, by_number[number], own, size or own) for number in numbers]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # damaged files raise nearly anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise UserError(f"{path}: no proposals ({reason}), replace the file.") from None
    return torch.stack(masks)


def _paint(
    coco: Any, objects: list[dict[str, Any]], own: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Return the ids (H, W) of a frame's objects, whose masks are of `own` size, in `size`."""
    labels, ids = torch.zeros(own, dtype=torch.uint8), [0]
    for item in sorted(objects, key=lambda item: float(item["score"])):  # the surest comes last
        try:
            ids.append(class_id(item["shape"], item["material"], item["color"]))
        except ValueError:
            what = " ".join(str(item[key])[:30] for key in ("color", "material", "shape"))
            raise UserError(f"a {what} is no object of CLEVR, mend the file.") from None
        # Run lengths that do not fill the frame would leave what memory held before.
        counts = item["mask"]["counts"].encode()
        plane = coco.decode({"size": list(own), "counts": counts})
        if coco.encode(np.asfortranarray(plane))["counts"] != counts:
            raise UserError("run lengths that do not fill their frame, replace the file.")
        labels[torch.from_numpy(plane) > 0] = ids[-1]
    if size == own:
        return labels
    classes = torch.tensor(list(dict.fromkeys(ids)), dtype=torch.uint8)
    areas = (labels == classes[:, None, None]).float()[None]  # (1, classes, H, W)
    return classes[F.interpolate(areas, size, mode="area")[0].argmax(dim=0)]


def load_proposed(video: Video, folder: Path) -> np.ndarray:
    """Return the frames of a video with its proposals as labels, uint8 (T, 4, H, W), to learn from.

    They are brought to FRAME_SIZE, frames and masks by area.

    Raises:
        UserError: a frame or its proposals cannot be read.
    """
    frames, numbers = [], []
    for frame in read_frames(video):
        pixels = F.interpolate(frame.pixels[None].float(), FRAME_SIZE, mode="area")[0]
        frames.append(pixels.round().to(torch.uint8))
        numbers.append(frame.number)
    masks = read_masks(video, folder, numbers, FRAME_SIZE)
    return torch.cat([torch.stack(frames), masks[:, None]], dim=1).numpy()
