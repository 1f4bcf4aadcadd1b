"""Figures against torchmetrics and against values by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.detection import PanopticQuality

from classes import CLASS_NAMES, class_id
from metrics import (
    Segments,
    confusion_matrix,
    count_segments,
    frame_confusions,
    ghosts,
    lost,
    mean_iou,
    panoptic_quality,
    summarise,
    weighted_iou,
)

GRAY_METAL_CUBE = class_id("cube", "metal", "gray")
RED_METAL_CUBE = class_id("cube", "metal", "red")
RED_RUBBER_SPHERE = class_id("sphere", "rubber", "red")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), classes=st.lists(st.integers(0, 48), min_size=1))
def test_miou_is_that_of_torchmetrics(seed, classes):
    rng = np.random.default_rng(seed)
    truth, pred = torch.from_numpy(rng.choice(classes, (2, 3, 8, 9)))  # most classes are absent
    pred[torch.from_numpy(rng.random(pred.shape) < 0.5)] = 7  # may be predicted only
    oracle = MulticlassJaccardIndex(num_classes=49, average="macro")(pred, truth)
    ours = mean_iou(confusion_matrix(truth, pred))
    assert ours == pytest.approx(oracle.item(), abs=1e-6)


def test_confusion_matrix_by_hand():
    truth = torch.tensor([[0, 0], [5, 48]], dtype=torch.uint8)
    pred = torch.tensor([[0, 5], [5, 0]], dtype=torch.uint8)
    confusion = confusion_matrix(truth, pred)
    assert confusion.dtype == torch.int64
    assert confusion.nonzero().tolist() == [[0, 0], [0, 5], [5, 5], [48, 0]]
    result = summarise(confusion)
    assert result["miou"] == pytest.approx((1 / 3 + 1 / 2 + 0) / 3)
    assert result["foreground_iou"] == pytest.approx(1 / 3)
    assert result["per_class"]["background"] == pytest.approx(1 / 3)
    assert result["per_class"][CLASS_NAMES[5]] == pytest.approx(1 / 2)
    assert result["per_class"][CLASS_NAMES[48]] == 0
    assert result["per_class"][CLASS_NAMES[6]] is None
    assert result["pixels"]["background"] == 2


def test_accuracy_by_factor_by_hand():
    truth = torch.tensor([GRAY_METAL_CUBE] * 4 + [RED_RUBBER_SPHERE] * 2 + [0] * 3)
    pred = torch.tensor(
        [GRAY_METAL_CUBE, RED_METAL_CUBE, RED_RUBBER_SPHERE, 0]  # of the cube
        + [RED_METAL_CUBE, RED_RUBBER_SPHERE]  # of the sphere
        + [GRAY_METAL_CUBE, 0, 0]  # of the background, which counts in none
    )
    result = summarise(confusion_matrix(truth, pred))
    shape, material, colour = (
        result[f"{factor}_accuracy"] for factor in ("shape", "material", "colour")
    )
    assert shape == {"all": 3 / 6, "cube": 2 / 4, "sphere": 1 / 2, "cylinder": None}
    assert material == {"all": 3 / 6, "metal": 2 / 4, "rubber": 1 / 2}
    assert {name: value for name, value in colour.items() if value is not None} == {
        "all": 3 / 6,
        "gray": 1 / 4,
        "red": 2 / 2,
    }


def test_nothing_to_count_gives_no_figure():
    result = summarise(torch.zeros(49, 49, dtype=torch.int64))
    assert result["miou"] is result["foreground_iou"] is result["shape_accuracy"]["all"] is None


def test_a_stray_pixel_costs_a_class_of_miou_and_a_pixel_of_weighted_iou():
    truth = torch.zeros(10_000, dtype=torch.int64)
    truth[:1000] = GRAY_METAL_CUBE
    pred = truth.clone()
    pred[0] = RED_METAL_CUBE
    confusion = confusion_matrix(truth, pred)
    assert mean_iou(confusion) == pytest.approx((1 + 0.999 + 0) / 3)
    assert weighted_iou(confusion) == pytest.approx(0.999)
    assert weighted_iou(confusion_matrix(truth[1000:], pred[1000:])) is None


def test_weighted_iou_by_hand():
    truth = torch.tensor([GRAY_METAL_CUBE] * 3 + [RED_METAL_CUBE] + [0] * 4)
    pred = torch.tensor(
        [GRAY_METAL_CUBE, GRAY_METAL_CUBE, 0, RED_METAL_CUBE, RED_METAL_CUBE, 0, 0, 0]
    )
    assert weighted_iou(confusion_matrix(truth, pred)) == pytest.approx((3 * 2 / 3 + 1 * 1 / 2) / 4)


def test_segments_ghosts_and_lost_objects_of_two_frames():
    truth = torch.zeros(2, 4, 10, dtype=torch.uint8)
    pred = torch.zeros_like(truth)
    truth[:, 0], pred[:, 0] = 1, 1  # right in both frames
    pred[1, 0, :6] = 2  # but for six pixels: IoU 0.4, and a ghost
    truth[:, 1] = 3  # half of it is found at most: lost
    pred[1, 1, :5] = 3
    confusions = frame_confusions(truth, pred)
    assert confusions.shape == (2, 49, 49)
    segments = count_segments(confusions)
    assert segments == (1, 4, 4, 1.0)
    assert panoptic_quality(segments) == {"pq": 0.25, "sq": 1.0, "rq": 0.25}
    assert ghosts(confusions) == [CLASS_NAMES[2]]
    assert lost(confusions) == [CLASS_NAMES[3]]


def test_segments_add_up_and_none_has_no_quality():
    none = Segments(0, 0, 0, 0.0)
    assert panoptic_quality(none) == {"pq": None, "sq": None, "rq": None}
    assert none + Segments(1, 2, 3, 0.75) == (1, 2, 3, 0.75)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_panoptic_quality_is_that_of_torchmetrics(seed):
    """With one kind of object in each frame, so that its classes are our "object"."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((4, 8, 9), np.int64)
    truth[:, 2:6, 2:7] = 5
    pred = np.where(rng.random(truth.shape) < rng.uniform(0, 0.6), 5 - truth, truth)
    truth, pred = torch.from_numpy(truth), torch.from_numpy(pred)
    ours = panoptic_quality(count_segments(frame_confusions(truth, pred)))
    oracle = PanopticQuality(things={5}, stuffs={0}, return_sq_and_rq=True, return_per_class=True)
    whole = [torch.stack([ids, torch.zeros_like(ids)], dim=-1) for ids in (pred, truth)]
    pq, sq, rq = oracle(*whole)[0].tolist()
    assert (ours["pq"], ours["rq"]) == (pytest.approx(pq, abs=1e-6), pytest.approx(rq, abs=1e-6))
    assert (ours["sq"] or 0.0) == pytest.approx(sq, abs=1e-6)
