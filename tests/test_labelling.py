"""The engine of infer.py: which videos come together, what a device is asked for, who labels."""

import json
import os
from itertools import chain
from pathlib import Path

import pretend
import pytest
import torch
from conftest import ROOT, make_video, write_video

import devices
import labelling
import pipeline
from devices import Processes, mixed_precision
from labelling import Labeller
from model import UNet
from pipeline import choose_labellers, fill_batches
from render import render_video
from utils import UserError
from videos import Video, find_videos

PRETEND = """
import sys, json, torch
import devices, model, pretend
from labelling import Labeller
from videos import find_videos, read_video
frames = read_video(find_videos(sys.argv[2])[0])
labels = []
for precision in (False, True):
    devices.has_bfloat16 = model.has_bfloat16 = lambda device: precision
    for where in ("cpu", "pretend"):
        labeller = Labeller(model.UNet.load(sys.argv[1]), where)
        pretend.reset()
        labels.append(labeller.label([frames])[0].labels)
    objects, differ = (labels[-1] > 0).sum(), (labels[-2] != labels[-1]).sum()
    assert objects and differ <= precision * 1e-4 * objects  # in bfloat16 one pixel in 10,000
kernels, waits, copies = pretend.counts()
print(json.dumps([sum(kernels.values()), waits, copies]))
"""


def test_a_video_on_a_pretended_gpu_waits_for_each_look_once(tmp_path):
    """The CPU's labels, in few launches; no copy that blocks and no nonzero on the device."""
    frames, _ = render_video(9, (4, 6), num_frames=8)
    write_video(tmp_path / "video_0", frames)
    paths = (ROOT / "weights/clevr_unet.pt", tmp_path)
    status, printed, errors = pretend.in_new_process(PRETEND, *paths)
    assert status == 0, errors[-3000:]
    kernels, waits, copies = json.loads(printed.splitlines()[-1])
    assert kernels <= 100
    assert waits == {"synchronize": 1}, "no two objects touch, nothing is looked at again"
    assert copies == {"non-blocking copy to the device": 1, "non-blocking copy to the CPU": 3}


def test_the_network_is_compiled_for_the_threads_of_a_worker_thread(monkeypatch):
    seen = []
    compile_network = lambda *_: seen.append(torch.get_num_threads())  # noqa: E731
    monkeypatch.setattr(labelling, "compile_network", compile_network)
    torch.set_num_threads(4)
    try:
        Labeller(UNet(widths=(8, 16))).compile()
        assert (seen, torch.get_num_threads()) == ([1], 4)
    finally:
        torch.set_num_threads(1)


def test_without_tracking_labels_are_those_of_predict(tmp_path):
    """Bit for bit, in the precision that the network computes in."""
    frames, _ = render_video(5, (4, 6), num_frames=5)
    labeller = Labeller.load(ROOT / "weights/clevr_unet.pt", tracking=False)
    with mixed_precision(frames.device):
        expected = labeller.model.predict(frames)
    assert torch.equal(labeller.label([frames])[0].labels, expected)


@pytest.mark.parametrize("bar", [0, 32])
def test_labels_may_be_changed(bar):
    frames, _ = render_video(5, (4, 6), num_frames=2)
    frames[..., :bar] = 0
    labels = Labeller.load(ROOT / "weights/clevr_unet.pt").label([frames])[0].labels
    assert labels.any()
    labels[labels > 0] = 0
    assert not labels.any()


BLACK = torch.zeros(2, 3, 32, 48, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("videos", "sentence"),
    [
        ([BLACK.float()], r"a video is torch\.float32, not torch\.uint8: give bytes, 0 to 255"),
        ([BLACK[:, :1]], r"is \(2, 1, 32, 48\), not \(T, 3, H, W\)"),
        ([BLACK[0]], r"is \(3, 32, 48\), .* give one frame as frame\[None\]"),
        ([BLACK[:0]], r"is \(0, 3, 32, 48\), not"),
        ([BLACK[:, :, :0]], r"is \(2, 3, 0, 48\), not"),
        ([BLACK, BLACK[..., :32]], "have frames of one size"),
        (BLACK, r"no list of tensors: give label\(\[frames\]\)"),
        ([BLACK.numpy()], r"of an array torch\.from_numpy"),
        ([BLACK.to("meta")], r"is on meta: give video\.cpu\(\)"),
    ],
    ids=["floats", "gray", "frame", "none", "flat", "sizes", "tensor", "array", "device"],
)
def test_what_is_no_video_is_refused(videos, sentence):
    with pytest.raises(UserError, match=sentence):
        Labeller(UNet(widths=(8, 16))).label(videos)


def test_numbers_are_those_of_each_frame():
    with pytest.raises(UserError, match="one for each frame of each video"):
        Labeller(UNet(widths=(8, 16))).label([BLACK, BLACK[:1]], [range(1), range(2)])


def test_short_videos_fill_a_batch_and_none_is_torn():
    lengths = [3, 5, 2, 22, 30, 1, 10, 11]
    groups = list(fill_batches(lengths, 11))
    assert list(chain(*groups)) == list(range(8))
    assert groups == [[0, 1, 2], [3], [4], [5, 6], [7]]
    assert list(fill_batches([], 11)) == []


def test_processes_that_label_are_those_that_the_machine_has_room_for(tmp_path, monkeypatch):
    """8 cores and 13 GB, a GPU with 5 GB; alone, and as one of two on this machine."""
    processes = Processes(torch.device("cpu"))
    (video,) = find_videos(make_video(tmp_path / "video_0", frames=4, labelled=False))
    clips = [Video(tmp_path / "clip.mp4", Path("clip"))] * 79
    many = [video] * 2500
    monkeypatch.setattr(pipeline, "usable_cpus", lambda: 8)
    free = {"cpu": 13 * 2**30, "meta": 5 * 2**30, "mps": 0}
    monkeypatch.setattr(pipeline, "free_memory", lambda device: free[device.type])
    assert choose_labellers(None, many[1:], processes) == 0, "9,996 frames"
    assert choose_labellers(None, many, processes) == 6, "2 GB each"
    assert choose_labellers(None, clips, processes) == 6
    assert choose_labellers(None, clips[1:], processes) == 0, "9,984 frames"
    assert [choose_labellers(n, many, processes) for n in (0, 1, 99)] == [0, 1, 99]
    (long,) = find_videos(make_video(tmp_path / "video_1", frames=1250, size=(2, 2)))
    assert choose_labellers(None, [long] * 8, processes) == 2, "four videos for each"
    assert choose_labellers(None, [long] * 8 + [video] * 4, processes) == 3
    processes.device = torch.device("meta")
    assert choose_labellers(None, many, processes) == 2, "2 GB of the GPU"
    processes.device = torch.device("mps")
    assert choose_labellers(None, many, processes) == 0
    processes.device, processes.local_count = torch.device("cpu"), 2
    assert choose_labellers(None, many, processes) == 3
    free["cpu"] = 2**50
    assert choose_labellers(None, many, processes) == 4, "cores"
    processes.local_count = 8
    assert choose_labellers(None, many, processes) == 0, "one core, which needs no other process"


def test_free_memory_is_below_what_the_machine_has():
    free = devices.free_memory(torch.device("cpu"))
    assert 2**28 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
