"""Score masks against true masks: mIoU and what the network confuses.

    python evaluate.py --pred masks --data path                    # the report
    python evaluate.py --pred masks --data path --json score.json  # and all of it as JSON
    python evaluate.py --pred masks --data path --picture strip.png  # frames, truth, masks

Every labelled video below --data is compared with the mask.npy at the same relative path below
--pred. All figures come from one integer confusion matrix summed over the data set.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from classes import (
    CLASS_NAMES,
    COLOURS,
    FACTOR_SIZES,
    MATERIALS,
    NUM_CLASSES,
    SHAPES,
    palette,
)
from utils import UserError, atomic_write, run_script
from videos import find_labelled, find_videos, frame_paths, read_frame, read_labels

NUM_WORST = 10  # videos listed at the end of the report


def confusion_matrix(truth: Tensor, pred: Tensor) -> Tensor:
    """Count pixels by true and predicted class.

    Args:
        truth: Ids 0..48, any integer type and shape.
        pred: Ids 0..48, of the same shape and on the same device.

    Returns:
        (49, 49) int64 on that device; rows are truth, columns prediction.
    """
    if truth.shape != pred.shape:
        raise ValueError(f"truth is {tuple(truth.shape)}, prediction {tuple(pred.shape)}")
    pairs = NUM_CLASSES * truth.flatten().int() + pred.flatten().int()  # at most 2400
    counts = torch.zeros(NUM_CLASSES**2, dtype=torch.int64, device=pairs.device)
    counts.index_add_(0, pairs, counts.new_ones(()).expand(len(pairs)))  # bincount waits for a GPU
    return counts.view(NUM_CLASSES, NUM_CLASSES)


def class_iou(confusion: Tensor) -> Tensor:
    """Return intersection over union by class, (49,) float64; NaN where a class never occurs."""
    confusion = confusion.double()
    intersection = confusion.diag()
    return intersection / (confusion.sum(0) + confusion.sum(1) - intersection)


def mean_iou(confusion: Tensor) -> float | None:
    """Return the mean IoU over the classes that occur in truth or prediction; None if none does.

    The background counts as a class, and a class that is only predicted counts as 0: what
    torchmetrics' MulticlassJaccardIndex(num_classes=49, average="macro") returns.
    """
    return _number(class_iou(confusion).nanmean())


def factor_accuracy(confusion: Tensor) -> dict[str, dict[str, float | None]]:
    """Return how often object pixels get the right shape, the right material, the right colour.

    A pixel predicted as background is wrong in all three.

    Returns:
        Keys shape_accuracy, material_accuracy and colour_accuracy; each a dict by name, with
        "all" for all object pixels and None where no true pixel has that name.
    """
    objects = (
        confusion[1:, 1:].double().reshape(FACTOR_SIZES * 2)
    )  # by true, then predicted factors
    total = confusion[1:].double().sum(1).reshape(FACTOR_SIZES)  # true pixels, however predicted
    result = {}
    for axis, (factor, names) in enumerate(
        (("shape", SHAPES), ("material", MATERIALS), ("colour", COLOURS))
    ):
        others = [i for i in range(3) if i != axis]
        right = objects.sum([*others, *(i + 3 for i in others)]).diag()
        pixels = total.sum(others)
        by_name = {name: _number(value) for name, value in zip(names, right / pixels, strict=True)}
        result[f"{factor}_accuracy"] = {"all": _number(right.sum() / pixels.sum()), **by_name}
    return result


def summarise(confusion: Tensor) -> dict[str, Any]:
    """Turn a (49, 49) confusion matrix into plain figures, None where one is undefined.

    Returns:
        miou, foreground_iou (object against background), per_class (IoU by class name), pixels
        (true pixels by class name), shape_accuracy, material_accuracy and colour_accuracy.
    """
    confusion = confusion.cpu()  # one transfer; the rest is cheaper on the CPU
    hit = confusion[1:, 1:].sum().double()
    iou = class_iou(confusion)
    return {
        "miou": mean_iou(confusion),
        "foreground_iou": _number(hit / (confusion.sum() - confusion[0, 0])),
        "per_class": dict(zip(CLASS_NAMES, map(_number, iou), strict=True)),
        "pixels": dict(zip(CLASS_NAMES, confusion.sum(1).tolist(), strict=True)),
        **factor_accuracy(confusion),
    }


def _number(value: Tensor) -> float | None:
    return None if torch.isnan(value) else float(value)


class Tally:
    """What is counted over the videos of a data set."""

    def __init__(self):
        self.confusion = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.int64)
        self.last_frames = torch.zeros_like(self.confusion)
        self.frames = 0
        self.videos: list[tuple[str, float]] = []  # name and mIoU

    def add(self, name: str, truth: Tensor, mask: Tensor) -> None:
        """Count a video's true and predicted ids, (T, H, W) each."""
        last = confusion_matrix(truth[-1], mask[-1])
        own = confusion_matrix(truth[:-1], mask[:-1]) + last
        self.confusion += own
        self.last_frames += last
        self.frames += len(truth)
        self.videos.append((name, mean_iou(own)))

    def figures(self) -> dict[str, Any]:
        """Return all figures, plain and fit for JSON."""
        worst = sorted(self.videos, key=lambda item: item[1])[:NUM_WORST]
        return {
            "frames": self.frames,
            "videos": len(self.videos),
            **summarise(self.confusion),
            "last_frame_miou": mean_iou(self.last_frames),
            "worst_videos": [{"video": name, "miou": miou} for name, miou in worst],
        }


def score(pred: Path, data: Path) -> dict[str, Any]:
    """Compare every labelled video below `data` with its prediction below `pred`.

    Videos with faulty labels are named on stderr and left out.

    Raises:
        UserError: a prediction is missing or faulty, or there is nothing to score.
    """
    tally, missing, skipped = Tally(), [], 0
    for video in find_videos(data):
        try:
            truth = read_labels(video, frames=len(frame_paths(video)))
        except UserError as error:
            print(f"skipped: {error}", file=sys.stderr)
            skipped += 1
            continue
        if truth is None:
            continue
        name = video.relative_to(data)  # "." if `data` is itself a video
        mask = read_labels(pred / name, len(truth), truth.shape[1:])
        if mask is None:
            missing.append(pred / name / "mask.npy")
        else:
            tally.add(name.as_posix(), truth, mask)
    if missing:
        raise UserError(
            f"{len(missing)} of {len(tally.videos) + len(missing)} labelled videos have no "
            f"prediction, the first is {missing[0]}: run infer.py on them or give their folder as "
            "--pred"
        )
    if not tally.videos:
        raise UserError(f"{data} holds no labelled video to score ({skipped} skipped)")
    return {"skipped": skipped, **tally.figures()}


def report(result: dict[str, Any]) -> str:
    """Lay out the dict that `score` returns for reading."""
    lines = ["class                      IoU   true pixels"]
    for name, iou in result["per_class"].items():
        if iou is not None:
            lines.append(f"{name:<24}{_figure(iou)}  {result['pixels'][name]:>12,}")
    absent = sum(iou is None for iou in result["per_class"].values())
    lines += [f"({absent} further classes occur in neither truth nor prediction)"] * bool(absent)
    lines += ["", "accuracy on object pixels"]
    for factor in ("shape", "material", "colour"):
        by_name = result[f"{factor}_accuracy"].items()
        lines.append(f"{factor:<9}" + "  ".join(f"{n} {_figure(v).strip()}" for n, v in by_name))
    lines += ["", "worst videos"]
    lines += [f"{_figure(item['miou'])}  {item['video']}" for item in result["worst_videos"]]
    skipped = f", {result['skipped']} skipped for faulty labels" if result["skipped"] else ""
    lines += [
        "",
        f"videos           {result['videos']} ({result['frames']} frames{skipped})",
        f"mIoU             {_figure(result['miou']).strip()}",
        f"foreground IoU   {_figure(result['foreground_iou']).strip()}",
        f"last frame mIoU  {_figure(result['last_frame_miou']).strip()}",
    ]
    return "\n".join(lines)


def draw_labels(labels: Tensor) -> np.ndarray:
    """Paint ids (H, W) as uint8 (H, W, 3): an object's own colour, another shade for each kind."""
    return palette()[labels.numpy()]


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


def _figure(value: float | None) -> str:
    return "     -" if value is None else f"{value:6.4f}"


def main() -> None:
    """Score the predictions, print the report and write the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pred", type=Path, required=True, help="folder that infer.py wrote")
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled videos")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--picture", type=Path, help="also draw frames, truth and masks as a PNG")
    args = parser.parse_args()

    for path in (args.pred, args.data):
        if not path.is_dir():
            raise UserError(f"{path} is not a folder")
    result = score(args.pred, args.data)
    result["command"] = shlex.join(["python", *sys.argv])
    if args.json:
        text = json.dumps(result, indent=1, allow_nan=False)
        with atomic_write(args.json) as file:
            file.write(f"{text}\n".encode())
    if args.picture:
        with atomic_write(args.picture) as file:
            Image.fromarray(draw_strip(args.pred, args.data)).save(file, "PNG")
    print(report(result))


if __name__ == "__main__":
    run_script(main)
