"""The arithmetic of the benchmark by hand, its peers, and a whole run that is tiny."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.io import write_png

import benchmark
import train
from dataset import NUM_CLASSES
from model import UNet
from render import render_video

CPU = torch.device("cpu")
PEERS = [name for name in benchmark.NETWORKS if name not in benchmark.UNETS]


def network(name):
    if name.startswith("smp"):
        pytest.importorskip("segmentation_models_pytorch", reason="requirements-dev.txt has it")
    torch.manual_seed(0)
    return benchmark.NETWORKS[name]()


def test_ratio_is_that_of_the_medians():
    assert benchmark.ratio([8.0, 90.0, 10.0], [5.0, 4.0, 0.1]) == 10.0 / 4.0
    assert benchmark.ratio([1.0, 2.0], [3.0]) == 0.5


def test_rates_by_hand():
    times = {"end to end": [4.0, 2.0, 2.0], "alone": [0.5, 0.1, 0.9]}
    first, alone = benchmark.rates(times, {"end to end": 100, "alone": 40})
    assert (first["frames_per_s"], first["end_to_end_over"]) == (50, 1)
    assert (alone["frames_per_s"], alone["end_to_end_over"]) == (80, pytest.approx(50 / 80))


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
    assert benchmark.multiply_adds(model, torch.zeros(1, 3, 10, 12)) == by_hand


def test_turns_alternate():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = benchmark.take_turns(calls, {"a": 1, "b": 2}, 3, CPU)
    assert "".join(order) == "abbabbabb"
    assert [len(times[name]) for name in "ab"] == [3, 3]


@pytest.mark.parametrize("name", PEERS)
def test_peers_label_train_and_fuse_as_a_unet_does(name):
    model = network(name)
    frames = torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8)
    masks = torch.zeros(2, 40, 56, dtype=torch.int64)
    (logits,) = model(frames, stages=True)
    assert logits.shape == (2, NUM_CLASSES, 40, 56)
    optimizer = train.MuonAdamW(model, 1e-3)
    train.loss_function([logits], masks).backward()
    optimizer.step(1e-3)
    model.eval()
    with torch.no_grad():
        logits = model(frames)
        assert torch.equal(model(frames / 255), logits), "bytes and floats are the same frames"
        labels, fused = model.predict(frames), model.fuse()(frames)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), logits.argmax(dim=1))
    assert torch.allclose(fused, logits, rtol=1e-3, atol=1e-3 * logits.abs().max().item())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


def test_a_peer_that_is_not_installed_is_left_out_in_a_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    assert benchmark.installed(["ours", "smp-unet-resnet34"]) == ["ours"]
    assert capsys.readouterr().out.startswith("smp-unet-resnet34 is left out")


def test_constants_are_the_defaults_of_the_scripts(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    args = train.parse_args()
    assert args.batch_size == benchmark.TRAIN_BATCH
    assert args.learning_rate == benchmark.LEARNING_RATE
    monkeypatch.setattr(sys, "argv", ["infer.py", "--ckpt", "a", "--out", "b"])
    assert benchmark.infer.parse_args().batch_size == benchmark.INFER_BATCH


def test_a_tiny_run_writes_every_part(tmp_path, monkeypatch, capsys):
    data, file = tmp_path / "data", tmp_path / "benchmark.json"
    for k in range(2):
        frames, masks = render_video([1, k], num_frames=3, height=64, width=96)
        folder = data / f"video_{k}"
        folder.mkdir(parents=True)
        for t, frame in enumerate(frames):
            write_png(frame, str(folder / f"image_{t}.png"))
        np.save(folder / "mask.npy", masks.numpy())
    tiny = {"ours": lambda: UNet(widths=(4, 8)), "classic": lambda: UNet(widths=(8, 8))}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(benchmark, "NETWORKS", tiny)
    monkeypatch.setattr(benchmark, "SIZE", (16, 24))
    monkeypatch.setattr(benchmark, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(benchmark, "SCRIPT_SECONDS", 0.0)
    monkeypatch.setattr(benchmark.infer, "default_workers", lambda device: 0)
    options = ["--data", data, "--json", file, "--repeats", 2, "--minutes", 0.02, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, options)])
    try:
        benchmark.main()
    finally:
        torch.use_deterministic_algorithms(False)  # as they were before train.py's recipe
    result = json.loads(file.read_text())
    assert set(result) == {"header", "batch_size", "networks", "scripts", "quality"}
    assert [row["network"] for row in result["quality"]] == list(tiny)
    assert all(row["steps"] > 0 and 0 <= row["miou"] <= 1 for row in result["quality"])
    for row in result["networks"]:
        assert len(row["infer_batch_s"]) == len(row["train_batch_s"]) == 2
        if row["network"] == "ours":
            assert row["infer_over_ours"] == row["train_over_ours"] == 1
    scripts = {row["what"]: row["end_to_end_over"] for row in result["scripts"]}
    assert scripts["infer.py"] == scripts["train.py"] == 1
    printed = capsys.readouterr().out
    for part in ("networks", "scripts", "quality"):
        assert f"| {' | '.join(benchmark.TABLES[part])} |" in printed


def test_memory_is_that_of_a_process_of_its_own():
    torch.zeros(2**27)  # half a GB that the other process never held
    here = benchmark.peak_memory(CPU)
    there = benchmark.in_new_process(benchmark.peak_memory, CPU)
    assert 2**26 < there < here
