"""Figures against torchmetrics, against values by hand, and faults that are named."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import run as run_alone
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

import evaluate
from classes import CLASS_NAMES, class_id

RED, BLUE = class_id("cube", "rubber", "red"), class_id("cube", "rubber", "blue")


def write_video(folder, mask=None, frames=None):
    """Write a video of black frames with the given labels."""
    folder.mkdir(parents=True)
    if mask is not None:
        np.save(folder / "mask.npy", mask)
    for t in range(len(mask) if frames is None else frames):
        Image.new("RGB", (6, 4)).save(folder / f"image_{t}.png")


def write_mask(folder, mask):
    folder.mkdir(parents=True)
    np.save(folder / "mask.npy", mask)


@pytest.fixture
def run(call):
    """Run evaluate.py in this process; return its exit status, stdout and stderr."""
    return lambda *arguments: call(evaluate, *arguments)


@pytest.fixture
def labels():
    return np.random.default_rng(0).integers(0, 49, (3, 4, 6), dtype=np.uint8)


def test_truth_against_itself_and_json(run, tmp_path, labels):
    write_video(tmp_path / "data/a/video_2", labels)
    write_video(tmp_path / "data/a/video_10", labels[:1])  # one frame, which is also its last
    write_video(tmp_path / "data/b/video_3", None, frames=2)  # not labelled: not scored
    status, out, _ = run(
        "--pred", tmp_path / "data", "--data", tmp_path / "data", "--json", tmp_path / "x/s.json"
    )
    assert status == 0
    assert "mIoU             1.0000" in out
    result = json.loads((tmp_path / "x/s.json").read_text())
    assert result["miou"] == result["foreground_iou"] == result["last_frame_miou"] == 1
    assert (result["frames"], result["videos"], result["skipped"]) == (4, 2, 0)
    assert list(result["per_class"]) == list(CLASS_NAMES)
    assert result["shape_accuracy"]["all"] == result["colour_accuracy"]["red"] == 1
    assert result["worst_videos"][0] == {"video": "a/video_2", "miou": 1}
    assert result["command"].startswith("python evaluate.py --pred ")


def test_a_report_is_printed_though_its_json_cannot_be_written(run, tmp_path, labels):
    write_video(tmp_path / "data/video_2", labels)
    (tmp_path / "file").touch()
    options = ("--pred", tmp_path / "data", "--data", tmp_path / "data")
    status, out, err = run(*options, "--json", tmp_path / "file/score.json")
    assert (status, "mIoU             1.0000" in out) == (2, True)
    assert f"{tmp_path}/file" in err


def test_names_that_are_no_text_are_reported(tmp_path, labels):
    name = os.fsdecode(b"video_\xff")
    write_video(tmp_path / name, labels)
    result = run_alone("evaluate.py", "--pred", tmp_path, "--data", tmp_path, errors="replace")
    assert (result.returncode, result.stderr) == (0, "")
    assert "1.0000  video_\\udcff" in result.stdout


def test_masks_of_another_size_than_the_truth_are_a_sentence_with_both_sizes(run, tmp_path, labels):
    write_video(tmp_path / "data/a", labels)
    write_mask(tmp_path / "pred/a", labels)
    np.save(tmp_path / "data/a/mask.npy", labels.swapaxes(1, 2))
    status, out, err = run("--pred", tmp_path / "pred", "--data", tmp_path / "data")
    assert (status, out) == (2, "")
    assert "pred/a/mask.npy is 6 x 4, the true masks in" in err
    assert "data/a are 4 x 6" in err


def test_counts_all_videos_and_last_frames_apart(run, tmp_path, labels):
    good, bad = labels.copy(), labels.copy()
    bad[-1] = 0  # one video has nothing in its last frame
    write_video(tmp_path / "data/video_1", labels)
    write_video(tmp_path / "data/video_2", labels)
    write_mask(tmp_path / "pred/video_1", good.astype(np.int64))
    write_mask(tmp_path / "pred/video_2", bad)
    status, _, _ = run(
        "--pred", tmp_path / "pred", "--data", tmp_path / "data", "--json", tmp_path / "s.json"
    )
    result = json.loads((tmp_path / "s.json").read_text())
    assert status == 0

    def oracle(truth, pred):
        metric = MulticlassJaccardIndex(num_classes=49, average="macro")
        return pytest.approx(metric(*map(torch.from_numpy, (pred, truth))).item(), abs=1e-6)

    assert result["miou"] == oracle(np.stack([labels, labels]), np.stack([good, bad]))
    assert result["last_frame_miou"] == oracle(
        np.stack([labels[-1], labels[-1]]), np.stack([good[-1], bad[-1]])
    )
    worst = result["worst_videos"]
    assert [item["video"] for item in worst] == ["video_2", "video_1"]
    assert worst[0]["miou"] == oracle(labels, bad)


def test_ghosts_and_lost_objects_are_named_with_their_video(run, tmp_path):
    truth = np.zeros((2, 4, 6), np.uint8)
    truth[:, 0] = RED
    pred = np.where(truth == RED, BLUE, truth).astype(np.uint8)
    write_video(tmp_path / "data/video_1", truth)
    write_video(tmp_path / "data/a/video_2", truth)
    write_mask(tmp_path / "pred/video_1", truth)
    write_mask(tmp_path / "pred/a/video_2", pred)
    paths = ("--pred", tmp_path / "pred", "--data", tmp_path / "data")
    status, out, _ = run(*paths, "--json", tmp_path / "s.json")
    assert status == 0
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["ghosts"] == [{"video": "a/video_2", "class": CLASS_NAMES[BLUE]}]
    assert result["lost"] == [{"video": "a/video_2", "class": CLASS_NAMES[RED]}]
    assert result["video_miou"] == pytest.approx((1 + 1 / 3) / 2)
    assert result["pq"] == pytest.approx(2 / (2 + (2 + 2) / 2))  # of 2 + 2 segments, 2 right
    assert result["sq"] == 1
    assert "ghosts: 1" in out
    assert "lost: 1" in out


def test_a_single_video_can_be_scored(run, tmp_path, labels):
    write_video(tmp_path / "video_1", labels)
    write_mask(tmp_path / "pred", labels)
    assert run("--pred", tmp_path / "pred", "--data", tmp_path / "video_1")[0] == 0


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda path, mask: path.unlink(), "1 of 2 labelled videos have no prediction"),
        (lambda path, mask: np.save(path, mask[:-1]), "too short: 2 masks, 3 frames"),
        (lambda path, mask: np.save(path, mask.transpose(0, 2, 1)), "is 4 x 6, the true masks"),
        (lambda path, mask: np.save(path, mask.astype(np.float32)), "float32"),
        (lambda path, mask: np.save(path, mask + np.uint8(1)), "49"),
        (lambda path, mask: np.save(path, mask.astype(np.int8) - 1), "-1"),
        (lambda path, mask: path.write_bytes(path.read_bytes()[:-1]), "unreadable"),
        (lambda path, mask: path.write_bytes(b""), "unreadable"),
        (lambda path, mask: np.save(path, np.array({"not": "a mask"})), "unreadable"),
    ],
)
def test_a_faulty_prediction_is_named(run, tmp_path, labels, break_it, reason):
    for name in ("video_1", "video_2"):
        labels[0, 0, :2] = (0, 48)
        write_video(tmp_path / "data" / name, labels)
        write_mask(tmp_path / "pred" / name, labels)
    path = tmp_path / "pred/video_2/mask.npy"
    break_it(path, labels)
    output = tmp_path / "score.json"
    status, out, err = run(
        "--pred", tmp_path / "pred", "--data", tmp_path / "data", "--json", output
    )
    assert (status, out) == (2, "")
    assert str(path) in err
    assert reason in err
    assert err.count("\n") == 1
    assert not output.exists()


def test_faulty_truth_is_named_and_left_out(run, tmp_path, labels):
    write_video(tmp_path / "data/video_1", labels)
    write_video(tmp_path / "data/video_2", labels, frames=4)
    write_video(tmp_path / "data/video_3", np.full_like(labels, 49))
    arguments = "--pred", tmp_path / "data", "--data", tmp_path / "data", "--json", tmp_path / "s"
    status, _, err = run(*arguments)
    result = json.loads((tmp_path / "s").read_text())
    assert status == 0
    assert (result["videos"], result["skipped"], result["miou"]) == (1, 2, 1)
    assert "video_2" in err
    assert "video_3" in err

    (tmp_path / "data/video_1/mask.npy").unlink()
    assert run(*arguments)[0] == 2  # nothing is left to score


def test_every_third_frame_is_scored_and_a_short_truth_is_not(run, tmp_path):
    """Of 7 frames 0, 3 and 6 are taken; 8 masks have as many third ones, but fit no 7 frames."""
    masks = np.zeros((8, 4, 6), np.uint8)
    masks[np.arange(8), 0, :3] = np.arange(1, 9)[:, None]  # another class in each
    for number, count in ((1, 7), (2, 8)):
        write_video(tmp_path / f"data/video_{number}", masks[:count], frames=7)
        write_mask(tmp_path / f"pred/video_{number}", masks[:7:3])
    arguments = "--pred", tmp_path / "pred", "--data", tmp_path / "data", "--json", tmp_path / "s"
    status, _, err = run(*arguments, "--every", 3)
    result = json.loads((tmp_path / "s").read_text())
    assert status == 0
    assert (result["videos"], result["frames"], result["skipped"]) == (1, 3, 1)
    assert result["miou"] == 1
    assert "video_2" in err
    assert "8 masks" in err
    assert run(*arguments)[0] == 2  # three masks of seven frames


@pytest.mark.parametrize("missing", ["pred", "data"])
def test_a_missing_folder_is_named(run, tmp_path, labels, missing):
    write_video(tmp_path / "there", labels)
    folders = {"pred": tmp_path / "there", "data": tmp_path / "there", missing: tmp_path / "absent"}
    status, _, err = run("--pred", folders["pred"], "--data", folders["data"])
    assert status == 2
    assert str(tmp_path / "absent") in err
