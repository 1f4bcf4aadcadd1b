"""The arithmetic of the benchmark by hand, and a whole run that is tiny."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_video
from torch import nn

import benchmark
from bench import peers, speed
from model import UNet
from render import render_video
from utils import UserError
from videos import find_videos

CPU = torch.device("cpu")
TINY = {"ours": lambda: UNet(widths=(4, 8)), "classic": lambda: peers.classic_unet(width=4)}


@pytest.fixture
def tiny(monkeypatch):
    """Let there be two small networks, small frames and turns of one call."""
    for name in list(peers.NETWORKS):
        monkeypatch.delitem(peers.NETWORKS, name)
    for name, build in TINY.items():
        monkeypatch.setitem(peers.NETWORKS, name, build)
    monkeypatch.setattr(speed, "FRAME_SIZE", (16, 24))
    monkeypatch.setattr(speed, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(speed, "SCRIPT_SECONDS", 0.0)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Return a folder of two rendered videos of 3 frames."""
    for k in range(2):
        write_video(tmp_path / f"data/video_{k}", *render_video([1, k], (2, 8), 3, "cpu", 64, 96))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "data"


def test_ratio_is_that_of_the_medians():
    assert speed.ratio([8.0, 90.0, 10.0], [5.0, 4.0, 0.1]) == 10.0 / 4.0
    assert speed.ratio([1.0, 2.0], [3.0]) == 0.5


def test_rates_by_hand():
    times = {"end to end": [4.0, 2.0, 2.0], "alone": [0.5, 0.1, 0.9]}
    first, alone = speed.rates(times, {"end to end": 100, "alone": 40})
    assert (first["frames_per_s"], first["end_to_end_over"]) == (50, 1)
    assert (alone["frames_per_s"], alone["end_to_end_over"]) == (80, pytest.approx(50 / 80))


@pytest.mark.usefixtures("tiny")
def test_videos_are_copied_where_links_are_not_allowed(data, tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise OSError("a required privilege is not held")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    dataset = speed.linked_videos(find_videos(data), tmp_path / "copies", 3)
    assert [len(video.names) for video in dataset.videos] == [3, 3, 3]


def test_multiply_adds_by_hand():
    """3x3 from 3 to 8 channels at 10 x 12; 2x2 of stride 2 to 4; a matrix of 4 x 5."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 4, 2, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    by_hand = 9 * 3 * 8 * 10 * 12 + 4 * 8 * 4 * 5 * 6 + 4 * 5
    assert speed.multiply_adds(model, torch.zeros(1, 3, 10, 12)) == by_hand


def test_multiply_adds_of_the_classic_unet():
    """By hand, a frame of 160 x 240: pairs of convolutions, each stage's ups, the head."""
    widths = [64, 128, 256, 512, 1024]
    pixels = [160 * 240 // 4**i for i in range(5)]
    by_hand = 64 * 49 * pixels[0]
    for n, before, width in zip(pixels, [3, *widths], widths, strict=False):
        by_hand += 9 * (before + width) * width * n
    for n, width in zip(pixels, widths[:-1], strict=False):
        by_hand += 2 * width * width * n + 9 * (2 * width + width) * width * n
    model = peers.NETWORKS["classic"]()
    assert speed.multiply_adds(model, torch.zeros(1, 3, 160, 240)) == by_hand == 28_341_043_200


def test_turns_alternate():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = speed.take_turns(calls, {"a": 1, "b": 2}, 3, CPU)
    assert "".join(order) == "abbabbabb"
    assert [len(times[name]) for name in "ab"] == [3, 3]


def test_a_peer_that_is_not_installed_is_left_out_in_a_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    assert benchmark.installed(["ours", "smp-unet-resnet34"]) == ["ours"]
    assert capsys.readouterr().out.startswith("smp-unet-resnet34 is left out")


@pytest.mark.usefixtures("tiny")
def test_peers_are_tried_in_both_memory_formats(monkeypatch):
    tried, call = [], speed.network_call

    def note(name, training, precision, layout, *batch):
        tried.append((name, training, layout))
        return call(name, training, precision, layout, *batch)

    monkeypatch.setattr(speed, "network_call", note)
    rows = speed.measure_networks(list(TINY), 1, 1, CPU)
    for training in (False, True):
        assert ("classic", training, "contiguous") in tried
        assert ("classic", training, "channels_last") in tried
        assert ("ours", training, "channels_last") in tried
        assert ("ours", training, "contiguous") not in tried, "it lays out its input itself"
    for row in rows:
        assert {row["infer_layout"], row["train_layout"]} <= set(speed.LAYOUTS)


@pytest.mark.usefixtures("tiny")
def test_a_call_trains_or_labels_in_the_layout_it_is_told(monkeypatch):
    """By the parameters that it changes and by what the layers of the network see."""
    built = []
    monkeypatch.setitem(
        peers.NETWORKS, "classic", lambda: built.append(TINY["classic"]()) or built[-1]
    )
    batch = speed.synthetic_batch(2, CPU)
    assert batch[1].bool().float().mean() == pytest.approx(0.06, abs=0.03)
    for training in (False, True):
        for layout, form in speed.LAYOUTS.items():
            call = speed.network_call("classic", training, "fp32", layout, *batch)
            model, seen = built[-1], []
            model.network.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
            before = [p.detach().clone() for p in model.parameters()]
            call()
            moved = [
                not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)
            ]
            assert all(moved) if training else not any(moved)
            assert seen[0].is_contiguous(memory_format=form)


@pytest.mark.usefixtures("tiny")
def test_a_tiny_run_writes_every_part(data, tmp_path, call):
    file = tmp_path / "benchmark.json"
    options = ["--json", file, "--repeats", 2, "--minutes", 0.02, "--device", "cpu"]
    status, printed, err = call(benchmark, "--data", data, *options)
    assert status == 0, err
    result = json.loads(file.read_text())
    assert set(result) == {"header", "batch_size", "networks", "scripts", "quality"}
    assert [row["network"] for row in result["quality"]] == list(TINY)
    assert all(row["steps"] > 0 and 0 <= row["miou"] <= 1 for row in result["quality"])
    assert all(0 <= row["tracked_video_miou"] <= 1 for row in result["quality"])
    assert all(row["curve"][-1][0] >= 0.02 for row in result["quality"]), "looked at the end"
    for row in result["networks"]:
        assert len(row["infer_batch_s"]) == len(row["train_batch_s"]) == 2
        if row["network"] == "ours":
            assert row["infer_over_ours"] == row["train_over_ours"] == 1
    scripts = {row["what"]: row for row in result["scripts"]}
    assert scripts["infer.py"]["end_to_end_over"] == scripts["train.py"]["end_to_end_over"] == 1
    over = scripts["infer.py"]["frames_per_s"] / scripts["its network alone"]["frames_per_s"]
    assert scripts["its network alone"]["end_to_end_over"] == pytest.approx(over)
    assert len(scripts["decoding alone"]["seconds_a_frame"]) == 2
    for part in ("networks", "scripts", "quality"):
        assert f"| {' | '.join(benchmark.TABLES[part])} |" in printed


def test_memory_is_that_of_a_process_of_its_own():
    torch.zeros(2**27)  # half a GB that the other process never held
    here = benchmark.peak_memory(CPU)
    there = benchmark.in_new_process(benchmark.peak_memory, CPU)
    assert 2**26 < there < here


def fail() -> None:
    raise SystemExit("what was wrong")


def test_failures_of_the_process_that_measures_are_told():
    with pytest.raises(RuntimeError, match="what was wrong"):
        benchmark.in_new_process(fail)
    with pytest.raises(UserError, match=r"\(_exit\) was killed, .* --batch-size"):
        benchmark.in_new_process(os._exit, 1)


def test_memory_where_there_is_no_proc(monkeypatch):
    """macOS counts in bytes, Windows not at all, and a GPU may not."""
    resource = pytest.importorskip("resource")

    def missing(path: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    linux = benchmark.peak_memory(CPU)
    assert linux == 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(sys, "platform", "darwin")
    assert benchmark.peak_memory(CPU) == pytest.approx(linux / 1024, rel=0.1)
    monkeypatch.setattr(benchmark, "resource", None)
    assert benchmark.peak_memory(CPU) is None

    def refuse(device: torch.device) -> int:
        raise RuntimeError("not counted")

    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", refuse)
    assert benchmark.peak_memory(torch.device("mps")) is None
    row = {"what": "ours", "peak_bytes": None}
    assert benchmark.table([row], benchmark.TABLES["memory"]).endswith("| ours | - | - |")
