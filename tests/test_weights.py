"""The shipped weights, as a new user meets them: on videos they have never seen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL, ROOT, needs_real, run

from checkpoints import load_checkpoint
from classes import CLASS_NAMES
from render import render_dataset

WEIGHTS = ROOT / "weights" / "clevr_unet.pt"


def score(data: Path, out: Path, *options: str) -> dict:
    """Label `data` with infer.py and return the figures of evaluate.py."""
    label = ["infer.py", "--ckpt", WEIGHTS, "--out", out, "--data", data, "--device", "cpu"]
    evaluate = ["evaluate.py", "--pred", out, "--data", data, "--json", out / "score.json"]
    for command in ([*label, *options], evaluate):
        result = run(*command)
        assert result.returncode == 0, result.stderr
    return json.loads((out / "score.json").read_text())


def test_the_file_is_small_plain_and_speaks_of_no_machine():
    assert WEIGHTS.stat().st_size < 2e6
    checkpoint = load_checkpoint(WEIGHTS)
    assert not {"data", "training"} & checkpoint.keys()
    assert {"seed", "epoch", "miou", "model_config"} <= checkpoint.keys()
    assert all(isinstance(value, torch.Tensor) for value in checkpoint["model"].values())


def test_rendered_videos_that_training_never_saw(tmp_path):
    settings = {"seed": 1234, "objects": (4, 7), "num_frames": 11, "progress": False}
    render_dataset(tmp_path / "data", 3, **settings)
    figures = score(tmp_path / "data", tmp_path / "masks")
    assert figures["frames"] == 33
    assert figures["foreground_iou"] > 0.95
    assert figures["shape_accuracy"]["all"] > 0.95
    assert figures["material_accuracy"]["all"] > 0.95
    assert figures["colour_accuracy"]["all"] > 0.95
    assert figures["miou"] > 0.95


@needs_real
def test_real_videos(tmp_path):
    together = score(REAL, tmp_path / "together")
    alone = score(REAL, tmp_path / "alone", "--no-consistency")
    assert together["miou"] > 0.95
    assert together["ghosts"] == together["lost"] == []
    listed = REAL / "unlabeled_objects.json"
    for video, names in (json.loads(listed.read_text()) if listed.exists() else {}).items():
        mask = np.load(tmp_path / "together/unlabeled" / video / "mask.npy")
        assert {CLASS_NAMES[i] for i in np.unique(mask)} == {"background", *names}, video
    assert together["miou"] > alone["miou"]
    assert together["foreground_iou"] == pytest.approx(alone["foreground_iou"], abs=1e-3)
