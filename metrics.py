"""How well pixels and objects are labelled: every figure that the scripts report.

Nearly all come from integer confusion matrices, (49, 49) of a data set or (T, 49, 49) of the frames
of a video, whose rows are true classes and columns predicted ones: counts, which can be added up
over frames, videos and processes. `at_borders` says where two classes meet, for `border_accuracy`
and for the loss.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from classes import CLASS_NAMES, COLOURS, FACTOR_SIZES, MATERIALS, NUM_CLASSES, SHAPES

MATCHED = 0.5  # IoU above which a predicted and a true segment are one (Kirillov et al. 2019)


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
    return plain(class_iou(confusion).nanmean())


def factor_accuracy(confusion: Tensor) -> dict[str, dict[str, float | None]]:
    """Return how often object pixels get the right shape, the right material, the right colour.

    A pixel predicted as background is wrong in all three.

    Returns:
        Keys shape_accuracy, material_accuracy and colour_accuracy; each a dict by name, with
        "all" for all object pixels and None where no true pixel has that name.
    """
    # By true, then by predicted factors; and true pixels, however predicted.
    objects = confusion[1:, 1:].double().reshape(FACTOR_SIZES * 2)
    total = confusion[1:].double().sum(1).reshape(FACTOR_SIZES)
    result = {}
    for axis, (factor, names) in enumerate(
        (("shape", SHAPES), ("material", MATERIALS), ("colour", COLOURS))
    ):
        others = [i for i in range(3) if i != axis]
        right = objects.sum([*others, *(i + 3 for i in others)]).diag()
        pixels = total.sum(others)
        by_name = {name: plain(value) for name, value in zip(names, right / pixels, strict=True)}
        result[f"{factor}_accuracy"] = {"all": plain(right.sum() / pixels.sum()), **by_name}
    return result


def weighted_iou(confusion: Tensor) -> float | None:
    """Return the mean IoU over the kinds of object, each weighted by its true pixels.

    The frequency weighted IoU of Long et al. 2015 (https://arxiv.org/abs/1411.4038), without the
    background. A stray pixel of a class that is not there costs what one pixel is worth; in
    `mean_iou` it costs as much as a whole class. None where there is no object.
    """
    pixels = confusion[1:].sum(1).double()
    iou = class_iou(confusion)[1:].nan_to_num()
    return plain((iou * pixels).sum() / pixels.sum())


def summarise(confusion: Tensor) -> dict[str, Any]:
    """Turn a (49, 49) confusion matrix into plain figures, None where one is undefined.

    Returns:
        miou, weighted_iou, foreground_iou (object against background), per_class (IoU by class
        name), pixels (true pixels by class name), shape_accuracy, material_accuracy and
        colour_accuracy.
    """
    confusion = confusion.cpu()  # one transfer; the rest is cheaper on the CPU
    hit = confusion[1:, 1:].sum().double()
    iou = class_iou(confusion)
    return {
        "miou": mean_iou(confusion),
        "weighted_iou": weighted_iou(confusion),
        "foreground_iou": plain(hit / (confusion.sum() - confusion[0, 0])),
        "per_class": dict(zip(CLASS_NAMES, map(plain, iou), strict=True)),
        "pixels": dict(zip(CLASS_NAMES, confusion.sum(1).tolist(), strict=True)),
        **factor_accuracy(confusion),
    }


def plain(value: Tensor) -> float | None:
    """Return a number that JSON can hold: None for NaN."""
    return None if torch.isnan(value) else float(value)


class Segments(NamedTuple):
    """Counts of panoptic quality; a segment is a class, not background, in one frame."""

    matched: int
    predicted: int
    true: int
    iou: float  # sum over the matched

    def __add__(self, other: "Segments") -> "Segments":
        return Segments(*(a + b for a, b in zip(self, other, strict=True)))


def frame_confusions(truth: Tensor, pred: Tensor) -> Tensor:
    """Return the `confusion_matrix` of each frame of a video, (T, 49, 49)."""
    return torch.stack([confusion_matrix(t, p) for t, p in zip(truth, pred, strict=True)])


def count_segments(confusions: Tensor) -> Segments:
    """Match the segments of a video: those of one class in one frame whose IoU is above 0.5."""
    hit = confusions.diagonal(dim1=1, dim2=2)[:, 1:]  # (T, 48)
    true, predicted = confusions.sum(2)[:, 1:], confusions.sum(1)[:, 1:]
    iou = hit / (true + predicted - hit).clamp(min=1)
    matched = iou > MATCHED
    count = int(matched.sum()), int((predicted > 0).sum()), int((true > 0).sum())
    return Segments(*count, float(iou[matched].double().sum()))


def panoptic_quality(segments: Segments) -> dict[str, float | None]:
    """Return pq = sq * rq, sq (mean IoU of matched segments) and rq (F1 of the matching).

    As Kirillov et al. 2019 (https://arxiv.org/abs/1801.00868), but all segments are of one kind,
    "object", where they take the mean over classes. None where it is 0 / 0.
    """
    matched, predicted, true, iou = segments
    found = (predicted + true) / 2
    return {
        "pq": iou / found if found else None,
        "sq": iou / matched if matched else None,
        "rq": matched / found if found else None,
    }


def at_borders(labels: Tensor) -> Tensor:
    """Return which pixels of (T, H, W) ids lie beside one of another class, background apart.

    (T, H, W) bool: where two objects meet, one pixel on each side, up, down, left and right. Two
    objects of one class have no border.
    """
    found = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
    for axis in (1, 2):
        length = labels.shape[axis] - 1
        here, next_one = (labels.narrow(axis, start, length) for start in (0, 1))
        meet = (here != next_one) & (here > 0) & (next_one > 0)
        for start in (0, 1):
            found.narrow(axis, start, length).logical_or_(meet)
    return found


def dilated(mask: Tensor) -> Tensor:
    """Return where a mask (T, H, W), bool, or one of its eight neighbours is true."""
    mask = F.pad(mask, (1, 1, 1, 1))
    mask = mask[:, :-2] | mask[:, 1:-1] | mask[:, 2:]
    return mask[..., :-2] | mask[..., 1:-1] | mask[..., 2:]


def ghosts(confusions: Tensor) -> list[str]:
    """Return the classes that are predicted in a video but have no true pixel there, by name."""
    total = confusions.sum(0)
    there = (total.sum(0) > 0) & (total.sum(1) == 0)
    return [CLASS_NAMES[i] for i in there[1:].nonzero()[:, 0] + 1]


def lost(confusions: Tensor) -> list[str]:
    """Return the true classes of a video of which no frame gets more than half right, by name."""
    hit = confusions.diagonal(dim1=1, dim2=2)
    true = confusions.sum(2)
    found = (2 * hit > true).any(0)
    return [CLASS_NAMES[i] for i in (true.any(0) & ~found)[1:].nonzero()[:, 0] + 1]


def video_figures(confusions: Tensor) -> dict[str, Any]:
    """Return miou, ghosts and lost of one video by its `frame_confusions`."""
    return {
        "miou": mean_iou(confusions.sum(0)),
        "ghosts": ghosts(confusions),
        "lost": lost(confusions),
    }
