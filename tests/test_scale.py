"""Frames of any size: the masks of the learned size, with edges that are not blocks."""

import copy
import csv
import json
import re

import numpy as np
import pretend
import pytest
import torch
from conftest import ROOT, write_video
from PIL import Image

import infer
from checkpoints import load_checkpoint, save_checkpoint
from labelling import Labeller
from model import UNet
from render import render_video
from scale import AS_THEY_ARE, CUT, SQUEEZED, Scale, fill, learned_size, pack, resize
from utils import UserError

WEIGHTS = ROOT / "weights/clevr_unet.pt"


def enlarged(frames, factor):
    """Return frames in another size, by other means than the program's."""
    size = [round(side * factor) for side in frames.shape[:1:-1]]
    way = Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.BOX
    pictures = [Image.fromarray(f.permute(1, 2, 0).numpy()).resize(size, way) for f in frames]
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)


def back(mask, factor):
    """Return a mask as it is at the centres of the pixels of 160 x 240."""
    rows, columns = (((np.arange(n) + 0.5) * factor).astype(int) for n in (160, 240))
    return mask[:, rows][:, :, columns]


def iou(a, b):
    return ((a > 0) & (b > 0)).sum() / ((a > 0) | (b > 0)).sum()


def label(model, frames, scale=AS_THEY_ARE, tracking=True):
    labeller = Labeller(copy.deepcopy(model), batch_size=4, tracking=tracking, scale=scale)
    return labeller.label([frames])[0].labels


@pytest.fixture(scope="module")
def frames():
    return render_video(9, (4, 6), num_frames=4)[0]


@pytest.fixture(scope="module")
def model():
    return UNet.load(WEIGHTS)


@pytest.fixture(scope="module")
def known(model, frames):
    return label(model, frames)


@pytest.fixture
def run(call):
    """Run infer.py in this process; return its exit status, stdout and stderr."""
    return lambda *arguments: call(infer, "--device", "cpu", "--workers", "0", *arguments)


@pytest.mark.parametrize("factor", [0.75, 1.5, 2, 3])
@pytest.mark.parametrize("tracking", [True, False])
def test_the_mask_of_a_resized_video_is_that_of_the_video(model, frames, known, factor, tracking):
    large = enlarged(frames, factor)
    found = label(model, large, Scale(), tracking)
    assert found.shape == (len(frames), *large.shape[2:])
    assert found.dtype == torch.uint8
    labels = back(found, factor)
    assert iou(labels, known) > (0.93 if factor < 1 else 0.96)
    if tracking:
        assert set(found.unique().tolist()) == set(known.unique().tolist())
        both = (labels > 0) & (known > 0)
        assert (labels == known)[both].double().mean() > 0.99


def test_the_edge_of_a_large_mask_is_no_staircase(model, frames):
    """Edges of a mask that was merely enlarged lie at every third pixel alone."""
    objects = (label(model, enlarged(frames, 3), Scale()) > 0).numpy()
    for axis in (1, 2):
        steps = np.nonzero(np.diff(objects, axis=axis))[axis] % 3
        assert (np.bincount(steps, minlength=3) / len(steps) < 0.7).all()


def test_frames_of_the_learned_width_are_seen_as_they_are(model, frames, known):
    for scale in (Scale(), Scale((100, 238)), Scale((320, 480), factor=1)):
        assert [scale.describe(view) for view in scale.views(160, 240)] == [""]
        assert torch.equal(label(model, frames, scale), known)


def test_sizes_follow_the_width():
    def looked_at(scale, *size):
        (view,) = scale.views(*size)
        return view.size, view.finer

    assert looked_at(Scale(), 320, 480) == ((160, 240), True)
    assert looked_at(Scale(), 240, 360) == ((160, 240), True)
    assert looked_at(Scale(), 120, 180) == ((160, 240), False)
    assert looked_at(Scale(), 720, 1280) == ((135, 240), True)
    assert looked_at(Scale((320, 480)), 160, 240) == ((320, 480), False)
    assert looked_at(Scale(factor=0.75), 160, 240) == ((120, 180), True)
    assert looked_at(AS_THEY_ARE, 320, 480) == ((320, 480), False)
    assert looked_at(Scale(), 1, 2) == ((16, 32), False)


@pytest.mark.parametrize("size", [(256, 256), (240, 250), (64, 61)])
def test_squares_are_looked_at_in_two_ways(size):
    squeezed, cut = Scale().views(*size)
    assert (squeezed.size, squeezed.reading) == ((160, 240), SQUEEZED)
    assert (cut.size, cut.reading) == ((160, round(160 * size[1] / size[0])), CUT)
    assert [len(scale.views(*size)) for scale in (AS_THEY_ARE, Scale((128, 128)))] == [1, 1]


def test_pixels_have_the_class_of_the_nearest_object_and_what_was_dropped_stays_so():
    labels = torch.tensor([[0, 0, 7, 0, 0, 0, 0, 0, 29, 0]], dtype=torch.uint8)
    objects = torch.tensor([[0, 1, 1, 0, 0, 0, 0, 0, 1, 0]]).bool()
    outlines = torch.ones(1, 2, 20, dtype=torch.bool)
    outlines[:, :, 14] = False
    expected = [0] * 4 + [7] * 6 + [0] * 2 + [29] * 2 + [0] + [29] * 5
    found = fill(labels[None], objects[None], pack(outlines), (2, 20))
    assert found.tolist() == [[expected, expected]]


def test_a_network_that_is_wrong_about_large_objects_does_not_lose_them(monkeypatch, frames, known):
    """What is seen finer only moves edges."""
    blind = Labeller(UNet.load(WEIGHTS), batch_size=4, scale=Scale())
    sure, windows = UNet.answers, []

    def answers(model, frames):
        found = sure(model, frames)
        if frames.shape[-1] == 240:
            return found
        windows.append(frames.shape)
        return [answer._replace(objectness=answer.objectness - 99) for answer in found]

    monkeypatch.setattr(UNet, "answers", answers)
    labels = blind.label([enlarged(frames, 2)])[0].labels
    assert windows
    assert iou(back(labels, 2), known) > 0.6
    assert set(labels.unique().tolist()) == set(known.unique().tolist())


def test_resizing_keeps_the_mean(frames):
    assert (resize(frames, (80, 100)).float().mean() - frames.float().mean()).abs() < 0.1


def test_the_script_says_what_it_does_to_which_frames(run, tmp_path, frames, known, model):
    write_video(tmp_path / "data/a", enlarged(frames, 2))
    write_video(tmp_path / "data/b", enlarged(frames, 2)[:2])
    write_video(tmp_path / "data/c", frames)
    arguments = ("--ckpt", WEIGHTS, "--data", tmp_path / "data", "--batch-size", 4, "--out")
    status, out, err = run(*arguments, tmp_path / "out", "--objects")
    assert (status, err) == (0, "")
    line = "frames of 480 x 320 are brought to 240 x 160, the scale that the network learned"
    assert re.findall("^frames of.*are brought", out, re.MULTILINE) == [line[: line.index(" to ")]]
    assert line in out
    assert "--scale 1" in out
    assert np.array_equal(np.load(tmp_path / "out/c/mask.npy"), known)
    large = np.load(tmp_path / "out/a/mask.npy")
    assert large.shape == (4, 320, 480)
    with (tmp_path / "out/a/objects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(np.unique(mask[mask > 0])) for mask in large)
    for row in rows:  # in pixels of the frame on the disk
        y, x = np.nonzero(large[int(row["frame"])] == int(row["class_id"]))
        assert [int(row[key]) for key in ("pixels", "right", "bottom")] == [
            len(x),
            *map(max, (x, y)),
        ]
        assert float(row["x"]) == pytest.approx(x.mean(), abs=0.0051)

    status, out, err = run(*arguments, tmp_path / "as", "--scale", 1)
    assert (status, err) == (0, "")
    assert "brought" not in out
    expected = label(model, enlarged(frames, 2))
    assert np.array_equal(np.load(tmp_path / "as/a/mask.npy"), expected)

    out = run(*arguments, tmp_path / "own", "--scale", 0.75)[1]
    assert "frames of 480 x 320 are brought to 360 x 240, as --scale 0.75 says" in out
    assert "frames of 240 x 160 are brought to 180 x 120, as --scale 0.75 says" in out


def test_the_checkpoint_says_what_size_it_learned(run, tmp_path, frames):
    checkpoint = load_checkpoint(WEIGHTS)
    assert learned_size(checkpoint, WEIGHTS) == (160, 240)
    save_checkpoint(tmp_path / "net.pt", checkpoint | {"frame_size": [320, 480]})
    write_video(tmp_path / "data/a", frames)
    arguments = ("--ckpt", tmp_path / "net.pt", "--data", tmp_path / "data", "--out")
    assert "frames of 240 x 160 are brought to 480 x 320" in run(*arguments, tmp_path / "out")[1]
    save_checkpoint(tmp_path / "net.pt", checkpoint | {"frame_size": [320]})
    status, _, err = run(*arguments, tmp_path / "out")
    assert status == 2
    assert "net.pt: frame_size is [320]" in err
    for size in (None, 160, "aa", [0, 240], [160.0, 240], [10**9, 10**9]):
        with pytest.raises(UserError, match="frame_size"):
            learned_size({"frame_size": size}, "net.pt")


def test_frames_that_would_be_enlarged_beyond_memory_are_refused():
    assert Scale((160, 240)).views(64, 4)[0].size == (1024, 64)
    with pytest.raises(UserError, match="frames of 500 x 8000 would be 8000 x 128000"):
        Scale((5000, 6000), 16.0).views(8000, 500)
    assert Scale(factor=1.0).views(8000, 8000)[0].size == (8000, 8000)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "100", "large"])
def test_a_scale_that_is_none_is_refused(run, tmp_path, value):
    status, _, err = run("--ckpt", WEIGHTS, "--out", tmp_path / "out", f"--scale={value}")
    assert status == 2
    assert f"--scale: give a number from 0.0625 to 16 (1: frames as they are), not '{value}'" in err


PRETEND = """
import sys, json, torch
import devices, model, pretend, scale
from labelling import Labeller
from scale import Scale
from videos import find_videos, read_video
devices.has_bfloat16 = model.has_bfloat16 = lambda device: False
frames = read_video(find_videos(sys.argv[2])[0])
labels = []
for where in ("cpu", "pretend"):
    labeller = Labeller(model.UNet.load(sys.argv[1]), where, scale=Scale())
    pretend.reset()
    labels.append(labeller.label([frames])[0].labels)
# Frames are resized as bytes on the CPU and as floats elsewhere, which round differently.
assert labels[0].any() and (labels[0] == labels[1]).float().mean() > 0.999
kernels, waits, copies = pretend.counts()
# Many pixels are resized in parts, which changes nothing.
on_device = frames.to("pretend")
whole = scale.resize(on_device, (80, 100)).cpu()
scale.AT_ONCE = 1
assert torch.equal(scale.resize(on_device, (80, 100)).cpu(), whole)
print(json.dumps([sum(kernels.values()), waits, copies]))
"""


def test_scaling_on_a_pretended_gpu_waits_for_each_look_once(tmp_path, frames):
    write_video(tmp_path / "video_0", enlarged(frames, 2))
    status, printed, errors = pretend.in_new_process(PRETEND, WEIGHTS, tmp_path)
    assert status == 0, errors[-3000:]
    kernels, waits, copies = json.loads(printed.splitlines()[-1])
    assert kernels <= 260
    assert waits == {"synchronize": 2}
    assert copies["non-blocking copy to the device"] == 1
    assert copies.keys() == {"non-blocking copy to the device", "non-blocking copy to the CPU"}
