"""Training through the real scripts: it learns, goes on after a kill, repeats itself."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.io import write_png

import train
from dataset import class_id
from evaluate import confusion_matrix, summarise
from model import UNet
from render import render_video
from utils import Processes, load_checkpoint

ROOT = Path(__file__).parents[1]
TINY = ["--widths", "8", "16", "24", "--batch-size", "4", "--device", "cpu"]


def run(script: str, *args: object, launcher: tuple = (), **options) -> subprocess.CompletedProcess:
    """Run a script of the project from the folder `cwd` as a user would."""
    command = [sys.executable, *launcher, ROOT / script, *args]
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, **options
    )


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)["model"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def write_videos(path: Path, count: int, frames: int, seed: int = 5) -> None:
    for k in range(count):
        images, masks = render_video([seed, k], objects=(4, 6), num_frames=frames)
        (path / f"video_{k}").mkdir(parents=True)
        for t, image in enumerate(images):
            write_png(image, str(path / f"video_{k}" / f"image_{t}.png"))
        np.save(path / f"video_{k}" / "mask.npy", masks.numpy())


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Four short videos, 32 frames in all."""
    path = tmp_path_factory.mktemp("videos")
    write_videos(path, count=4, frames=8)
    return path


@pytest.fixture(scope="module")
def finished(videos, tmp_path_factory) -> Path:
    """The checkpoints of a run of 6 epochs."""
    out = tmp_path_factory.mktemp("finished")
    result = run("train.py", "--data", videos, "--out", out, "--num-epochs", 6, *TINY)
    assert result.returncode == 0, result.stderr
    return out


def test_checkpoints_are_where_and_what_the_contract_says(finished, videos):
    names = {path.name for path in finished.glob("*.pt")}
    assert names == {f"Unet_checkpoint_{n}.pt" for n in ("epoch_5", "epoch_6", "last", "best")}
    checkpoint = torch.load(finished / "Unet_checkpoint_epoch_5.pt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["data"]) == (5, str(videos))
    UNet(**checkpoint["model_config"]).load_state_dict(checkpoint["model"])
    with (finished / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == list("123456")
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    best = load_checkpoint(finished / "Unet_checkpoint_best.pt")
    assert best["miou"] == max(float(row["miou"]) for row in rows)
    assert list((finished / "tensorboard").iterdir())


def test_same_seed_same_weights_and_killed_or_stopped_runs_end_the_same(finished, videos, tmp_path):
    """Kill -9 after the first epoch, stop after the third, then go on to the end."""
    command = ["--data", videos, "--out", tmp_path, "--num-epochs", 6, "--resume", *TINY]
    process = subprocess.Popen(
        [str(c) for c in (sys.executable, ROOT / "train.py", *command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    last = tmp_path / "Unet_checkpoint_last.pt"
    deadline = time.time() + 120
    while not last.exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    completed = load_checkpoint(last)["epoch"]
    assert 1 <= completed < 6
    result = run("train.py", *command)
    assert result.returncode == 0, result.stderr
    assert f"going on after epoch {completed}" in result.stdout
    for name in ("epoch_6", "best", "last"):
        path = f"Unet_checkpoint_{name}.pt"
        assert same(weights(finished / path), weights(tmp_path / path)), name
    with (finished / "log.csv").open() as a, (tmp_path / "log.csv").open() as b:
        mious = [[row["miou"] for row in csv.DictReader(file)] for file in (a, b)]
    assert mious[0] == mious[1]


def test_another_seed_gives_other_weights(finished, videos, tmp_path):
    command = ["--data", videos, "--out", tmp_path, "--num-epochs", 1, "--seed", 1, *TINY]
    assert run("train.py", *command).returncode == 0
    assert not same(
        weights(finished / "Unet_checkpoint_epoch_5.pt"),
        weights(tmp_path / "Unet_checkpoint_epoch_1.pt"),
    )


def test_init_starts_from_the_given_weights(finished, videos, tmp_path):
    """A vanishing learning rate leaves them as they were."""
    init = finished / "Unet_checkpoint_best.pt"
    command = ["--data", videos, "--out", tmp_path, "--num-epochs", 1, "--learning-rate", 1e-12]
    result = run("train.py", *command, "--batch-size", 4, "--init", init)
    assert result.returncode == 0, result.stderr
    before, after = weights(init), weights(tmp_path / "Unet_checkpoint_epoch_1.pt")
    key = "encoder.0.0.conv1.weight"
    torch.testing.assert_close(after[key], before[key])


def test_overfits_one_video_through_all_scripts(tmp_path):
    """Render, train, infer, evaluate: mIoU above 0.95 on what was learned by heart."""
    result = run("render.py", "--out", tmp_path / "one", "--videos", 1, "--seed", 3)
    assert result.returncode == 0, result.stderr
    (tmp_path / "data").mkdir()
    for part in ("train", "val"):
        (tmp_path / "data" / part).symlink_to(tmp_path / "one")
    train_command = ["--data", "data", "--num-epochs", 40, "--batch-size", 4]
    result = run("train.py", *train_command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    checkpoint = tmp_path / "checkpoints" / "Unet_checkpoint_epoch_40.pt"
    result = run("infer.py", "--ckpt", checkpoint, "--out", "masks", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    result = run(
        "evaluate.py", "--pred", "masks", "--data", "data", "--json", "s.json", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "s.json").read_text())["miou"] > 0.95


def test_a_tenth_is_set_aside_by_whole_videos(tmp_path):
    for i in range(20):
        video = tmp_path / f"video_{i}"
        video.mkdir()
        (video / "image_0.png").touch()
        if i < 19:
            (video / "mask.npy").touch()
    training, validation = train.split_videos(tmp_path, seed=0)
    assert (len(training), len(validation)) == (18, 1)
    assert not set(training) & set(validation)
    assert train.split_videos(tmp_path, seed=0) == (training, validation)
    assert any(train.split_videos(tmp_path, seed=s)[1] != validation for s in range(1, 5))


def test_train_and_val_folders_are_taken_as_they_are(tmp_path):
    for part in ("train", "val", "unlabeled"):
        video = tmp_path / part / "video_1"
        video.mkdir(parents=True)
        (video / "image_0.png").touch()
        (video / "mask.npy").touch()
    training, validation = train.split_videos(tmp_path, seed=0)
    assert training == [tmp_path / "train" / "video_1"]
    assert validation == [tmp_path / "val" / "video_1"]


def test_loss_by_hand():
    """One object pixel, one background pixel: four cross entropies worked out with logarithms."""
    mask = torch.tensor([[[class_id("sphere", "rubber", "brown"), 0]]])
    logits = torch.zeros(1, 14, 1, 2)
    logits[0, 0] = torch.tensor([0.0, np.log(3)])  # p(object) = 1/2 and 3/4
    logits[0, 2, 0, 0] = np.log(2)  # p(sphere) = 2 / 4
    logits[0, 5, 0, 0] = np.log(4)  # p(rubber) = 4 / 5
    logits[0, 6, 0, 0] = np.log(9)  # p(brown) = 1 / 16, gray being 9 times as likely
    expected = 2 * (-np.log(1 / 2) - np.log(1 / 4)) / 2 - np.log(2 / 4 * 4 / 5 * 1 / 16)
    stage = logits[:, :1], logits[:, 1:]
    assert train.loss_function([stage], mask).item() == pytest.approx(expected, rel=1e-6)


def test_loss_of_a_frame_without_objects_is_finite():
    coarse = torch.zeros(2, 1, 8, 8), torch.zeros(2, 13, 8, 8)
    fine = torch.zeros(2, 1, 16, 16, requires_grad=True), torch.zeros(2, 13, 8, 8)
    stages = [coarse, fine]
    loss = train.loss_function(stages, torch.zeros(2, 16, 16, dtype=torch.int64))
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("size", [(42, 50), (40, 40), (96, 96), (33, 31)])
def test_loss_of_frames_of_any_size(size):
    """Coarse stages are compared with the ids at the middle of their cells, within the frame."""
    model = UNet(widths=(4, 8, 12))
    mask = torch.zeros(1, *size, dtype=torch.int64)
    mask[:, 20:] = 30
    stages = model(torch.rand(1, 3, *size), stages=True)
    assert train.loss_function(stages, mask).isfinite()
    cells = train.subsample(mask, stages[0][0])
    assert cells.shape == (1, -(-size[0] // 4), -(-size[1] // 4))
    assert cells[0, :, 0].tolist() == [0 if 4 * i + 2 < 20 else 30 for i in range(cells.shape[1])]


def test_plain_logits_get_plain_cross_entropy():
    logits, mask = torch.randn(2, 49, 8, 8), torch.randint(0, 49, (2, 8, 8))
    torch.testing.assert_close(train.loss_function([logits], mask), F.cross_entropy(logits, mask))


def test_muon_is_torch_s(monkeypatch):
    """Three steps on a convolution equal those of torch.optim.Muon on the same weights, flat."""
    monkeypatch.setattr(train, "has_bfloat16", lambda device: True)  # as torch.optim.Muon computes
    torch.manual_seed(0)
    for shape in ((6, 8), (40, 4)):  # wide and tall matrices
        layer = torch.nn.Conv2d(shape[1], shape[0], 3, bias=False)
        flat = torch.nn.Parameter(layer.weight.detach().flatten(1).clone())
        ours = train.MuonAdamW(torch.nn.Sequential(layer, torch.nn.Linear(2, 2)))
        settings = {"weight_decay": 0.02, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
        theirs = torch.optim.Muon([flat], lr=0.01, **settings)
        for _ in range(3):
            layer.weight.grad = torch.randn_like(layer.weight)
            flat.grad = layer.weight.grad.flatten(1)
            ours.step(0.01)
            theirs.step()
        torch.testing.assert_close(layer.weight.flatten(1), flat, rtol=0.02, atol=5e-4)


def test_orthogonalised_matrices_have_singular_values_near_one(monkeypatch):
    monkeypatch.setattr(train, "has_bfloat16", lambda device: False)
    for shape in ((8, 72), (64, 18)):
        values = torch.linalg.svdvals(train.orthogonalise(torch.randn(*shape)))
        assert values.min() > 0.6
        assert values.max() < 1.3


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_every_frame_exactly_once(count):
    shares = []
    for rank in range(count):
        processes = Processes(torch.device("cpu"))
        processes.rank, processes.count = rank, count
        shares.append(list(train.ShardedBatches(10, 4, processes, shuffle=False)))
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(10))


VALIDATE = """
import json, sys, torch, train
from utils import Processes, load_model
processes = Processes(torch.device("cpu"))
data = train.CLEVRDataset(sys.argv[2])
batches = train.ShardedBatches(len(data), 6, processes, shuffle=False)
loader = train.DataLoader(data, batch_sampler=batches, collate_fn=data.collate)
model, _ = load_model(train.UNet, sys.argv[1])
figures = train.validate(model, loader, processes.device, processes)
if processes.first:
    print(json.dumps(figures))
"""


def test_two_processes_validate_to_the_last_count_like_one(finished, videos, tmp_path):
    """32 frames in batches of 6: the last batch has 2 frames; nothing counts twice or is lost."""
    script = tmp_path / "validate.py"
    script.write_text(VALIDATE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    figures = []
    for launcher in ((), torchrun):
        arguments = (finished / "Unet_checkpoint_best.pt", videos)
        result = run(script, *arguments, launcher=launcher, env=environment)
        assert result.returncode == 0, result.stderr[-3000:]
        figures.append(json.loads(result.stdout.splitlines()[-1]))
    one, two = figures
    assert two.pop("val_loss") == pytest.approx(one.pop("val_loss"), rel=1e-5)
    assert one == two
    assert sum(one["pixels"].values()) == 32 * 160 * 240


def test_two_processes_train_and_one_goes_on(videos, tmp_path):
    """What two processes leave, one can resume."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = ["--data", videos, "--out", tmp_path, *TINY]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = run("train.py", *command, "--num-epochs", 1, launcher=torchrun, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    result = run("train.py", *command, "--num-epochs", 2, "--resume")
    assert result.returncode == 0, result.stderr
    with (tmp_path / "log.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--data", "empty"], "empty"),
        (["--num-epochs", "0"], "num-epochs"),
        (["--device", "tpu9"], "tpu9"),
        (["--data", "single"], "two"),
        (["--data", "pair", "--init", "absent.pt"], "absent.pt"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, needle, tmp_path):
    (tmp_path / "empty").mkdir()
    write_videos(tmp_path / "single", count=1, frames=1)
    write_videos(tmp_path / "pair", count=2, frames=1)
    result = run("train.py", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert needle in result.stderr
    assert "Traceback" not in result.stderr


def test_summary_of_validation_is_evaluate_s():
    truth, pred = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2])
    assert summarise(confusion_matrix(truth, pred))["miou"] == pytest.approx((1 + 0.5 + 0.5) / 3)
