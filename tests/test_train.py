"""Training through the real scripts: it learns, goes on after a kill, repeats itself."""

import csv
import errno
import io
import json
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import ROOT, run, torchrun, write_video
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

import evaluate
import infer
import log
import runs
import train
from augment import augment
from batches import ShardedBatches
from checkpoints import SHIPPED, load_checkpoint, save_checkpoint
from classes import CLASS_NAMES
from dataset import CLEVRDataset, split_videos
from devices import Processes
from files import alone_in
from model import UNet
from optim import update_bn
from page.pictures import draw_labels
from render import render_video
from runs import BEST, LAST, Keeper, Run

HEIGHT, WIDTH = 64, 96
TINY = ["--widths", "8", "16", "24", "--batch-size", "4", "--device", "cpu"]
OWN = {**os.environ, "PYTHONPATH": str(ROOT)}  # environment of scripts that are not the project's


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)["model"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def write_videos(path: Path, count: int, frames: int, seed: int = 5) -> None:
    for k in range(count):
        video = render_video([seed, k], (4, 6), num_frames=frames, height=HEIGHT, width=WIDTH)
        write_video(path / f"video_{k}", *video)


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
    assert checkpoint["frame_size"] == [HEIGHT, WIDTH]
    UNet(**checkpoint["model_config"]).load_state_dict(checkpoint["model"])
    with (finished / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == list("123456")
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    best = load_checkpoint(finished / "Unet_checkpoint_best.pt")
    assert best["weighted_iou"] == max(float(row["weighted_iou"]) for row in rows)
    assert list((finished / "tensorboard").iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def former(finished, tmp_path) -> Path:
    """A finished run, and files beside it that belong to no run."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for name in ("notes.txt", "Unet_checkpoint_mine.pt", "tensorboard/notes.txt"):
        (out / name).write_text("mine")
    return out


@pytest.mark.parametrize("fails", ["refused", "stopped"])
def test_a_second_run_loses_nothing_of_the_first(former, videos, call, monkeypatch, fails):
    """Without --overwrite it does not begin; with it, it may end before its first checkpoint."""
    before = contents(former)
    options = ("--data", videos, "--out", former, "--no-cache", *TINY)
    if fails == "stopped":
        options += ("--overwrite",)
        monkeypatch.setattr(train, "validate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(train, *options)
        found = contents(former)
        assert {name: found[name] for name in before} == before
        return
    status, _, err = call(train, *options)
    assert status == 2
    assert err.startswith(f"error: {former} holds a run")
    assert all(word in err for word in ("--resume", "--out", "--overwrite"))
    assert contents(former) == before
    assert call(train, *options, "--resume", "--overwrite")[0] == 2


def test_a_disk_that_is_full_for_a_second_run_costs_nothing_of_the_first(
    former, videos, call, monkeypatch
):
    """There is room for its log and its weights, but not for its state, which is larger."""
    before, save = contents(former), runs.save_checkpoint

    def full(path, checkpoint):
        if "training" in checkpoint:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, checkpoint)

    monkeypatch.setattr(runs, "save_checkpoint", full)
    options = ("--data", videos, "--out", former, "--no-cache", "--overwrite", *TINY)
    status, _, err = call(train, *options, "--num-epochs", 1)
    assert (status, LAST in err) == (2, True)
    found = contents(former)
    assert {name: found[name] for name in before} == before


def test_options_that_are_not_given_again_are_those_of_the_run(
    finished, videos, tmp_path, call, monkeypatch
):
    """With --init none it learned at 4e-3, without it would go on at 1e-3."""
    out = tmp_path / "out"
    options = ("--data", videos, "--out", out, "--device", "cpu", "--no-cache")
    begun = ("--init", "none", "--batch-size", 4, "--num-epochs", 1, "--widths", 8, 16)
    status, said, _ = call(train, *options, *begun)
    assert (status, "learning rate up to 0.004" in said) == (0, True)
    status, said, _ = call(train, *options, "--widths", 8, 16, "--resume")
    assert (status, "nothing left to do: 1 of 1 epochs are done" in said) == (0, True)
    assert "learning rate up to 0.004" in said
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(out), "--resume"])
    args = train.parse_args()
    assert (args.num_epochs, args.batch_size, args.learning_rate) == (1, 4, 4e-3)


def test_two_runs_into_one_folder_do_not_mix(former, videos, call):
    """The other one holds it, whether or not it has a checkpoint yet."""
    before = contents(former)
    options = ("--data", videos, "--out", former, "--no-cache", *TINY)
    with alone_in(former):
        status, _, err = call(train, *options, "--resume", "--num-epochs", 7)
    assert (status, f"{former}: another run writes into it" in err) == (2, True)
    assert contents(former) == before
    assert call(train, *options, "--resume", "--num-epochs", 7)[0] == 0


@pytest.mark.parametrize("moment", ["unlink", "add", "save"])
def test_a_run_killed_as_it_replaces_another_goes_on_as_if_alone(
    finished, videos, tmp_path, call, monkeypatch, moment
):
    """Once its state is there, what is left of the other goes, at whatever moment it is killed."""
    out, options = tmp_path / "out", ("--data", videos, "--num-epochs", 1, "--no-cache", *TINY)
    shutil.copytree(finished, out)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        owner = {"unlink": Path, "add": log.Log, "save": Run}[moment]
        patch.setattr(owner, moment, killed)
        assert call(train, *options, "--out", out, "--overwrite")[0] == 130
    assert call(train, *options, "--out", out, "--resume")[0] == 0
    assert call(train, *options, "--out", tmp_path / "alone")[0] == 0
    names = [{path.name for path in folder.glob("*.*")} for folder in (out, tmp_path / "alone")]
    assert names[0] == names[1]
    assert figures(out) == figures(tmp_path / "alone")
    for name in names[0] - {"log.csv"}:
        assert same(weights(out / name), weights(tmp_path / "alone" / name))


def test_overwriting_leaves_what_belongs_to_no_run(former, videos, call):
    before = contents(former)
    options = ("--data", videos, "--out", former, "--no-cache", *TINY)
    assert call(train, *options, "--overwrite", "--num-epochs", 1)[0] == 0
    found = contents(former)
    runs = {f"Unet_checkpoint_{name}.pt" for name in ("epoch_1", "last", "best")}
    events = {name for name in found if "tfevents" in name}
    own = {"notes.txt", "Unet_checkpoint_mine.pt", "tensorboard/notes.txt"}
    assert found.keys() == runs | own | events | {"log.csv"}
    assert len(events) == 1
    assert not events & before.keys()
    assert all(found[name] == b"mine" for name in own)
    assert [row["epoch"] for row in csv.DictReader(io.StringIO(found["log.csv"].decode()))] == ["1"]
    assert call(train, *options, "--resume", "--num-epochs", 2)[0] == 0


def test_tensorboard_has_the_classes_that_are_there_and_frames_beside_their_labels(
    finished, videos
):
    """The last epoch's picture, whose truth can be recognised."""
    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    data = CLEVRDataset(split_videos(videos, seed=0)[1])
    ids = np.unique(np.stack([mask for _, mask in data]))
    tags = {f"iou/{CLASS_NAMES[i]}" for i in ids}
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("iou/")} == tags
    picture = events.Images("frames, truth, prediction")[-1]
    assert picture.step == 6
    pixels = np.array(PIL.Image.open(io.BytesIO(picture.encoded_image_string)))
    assert pixels.shape == (3 * HEIGHT, 3 * WIDTH, 3)
    frame, truth = data[len(data) // 2]
    assert np.array_equal(pixels[:HEIGHT, WIDTH : 2 * WIDTH], frame.permute(1, 2, 0))
    assert np.array_equal(pixels[HEIGHT : 2 * HEIGHT, WIDTH : 2 * WIDTH], draw_labels(truth))
    labels = UNet.load(finished / "Unet_checkpoint_epoch_6.pt").predict(frame[None])[0]
    assert (pixels[2 * HEIGHT :, WIDTH : 2 * WIDTH] == draw_labels(labels)).mean() > 0.99


def test_a_run_that_is_done_says_what_to_do_next(finished, videos, tmp_path, call, monkeypatch):
    monkeypatch.setattr(train, "seed_everything", lambda *_, **__: None)  # it is this process's
    out = shutil.copytree(finished, tmp_path / "a copy")
    status, said, _ = call(
        train, "--data", videos, "--out", out, "--num-epochs", 6, "--resume", *TINY
    )
    assert status == 0
    assert "nothing left to do: 6 of 6 epochs are done\nbest weighted IoU: 0." in said
    assert said.splitlines()[-1].endswith(f"--out masks --data {videos}")


def figures(out: Path) -> list[dict[str, str]]:
    """The lines of log.csv but for the speed."""
    with (out / "log.csv").open() as file:
        return [row | {"frames_per_s": ""} for row in csv.DictReader(file)]


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 32), (signal.SIGINT, 48)])
def test_a_signal_stops_after_the_step_and_nothing_is_lost(
    finished, videos, tmp_path, monkeypatch, call, number, step
):
    """Of 6 epochs of 4 passes of 6 steps: in the second pass of the second, and at its end."""
    check = Keeper.check

    def stopping(keeper: Keeper) -> None:
        if keeper.run.step == step:
            os.kill(os.getpid(), number)
        check(keeper)

    command = ["--data", videos, "--out", tmp_path, "--num-epochs", 6, *TINY]
    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "check", stopping)
        status, _, said = call(train, *command)
    assert status == 128 + number
    line = said.splitlines()[-1]
    assert line.startswith(f"stopped after step {step - 24} of epoch 2, all is saved; go on with:")
    assert line.endswith("--resume")
    checkpoint = load_checkpoint(tmp_path / LAST)
    assert (checkpoint["epoch"], checkpoint["data"]) == (1, str(videos))
    assert (
        f"going on after epoch 1 of 6 and step {step - 24}" in call(train, *command, "--resume")[1]
    )
    assert same(weights(finished / LAST), weights(tmp_path / LAST))
    assert figures(finished) == figures(tmp_path)


STOP = """
import os, signal, sys, runs, train
number, step, rank = map(int, sys.argv.pop(1).split(","))
check = train.Keeper.check
if number == signal.SIGKILL:
    runs.SAVE_EVERY = 0  # after every step

def stopping(keeper):
    if keeper.run.step == step and keeper.processes.rank == rank:
        os.kill(os.getpid(), number)
    check(keeper)

train.Keeper.check = stopping
train.run_script(train.main)
"""


def test_a_kill_costs_no_more_than_the_time_since_the_last_save(finished, videos, tmp_path, call):
    (tmp_path / "stop.py").write_text(STOP)
    command = ["--data", videos, "--out", tmp_path, "--num-epochs", 6, *TINY]
    arguments = (f"{signal.SIGKILL:d},34,0", *command)
    assert run(tmp_path / "stop.py", *arguments, env=OWN).returncode == -signal.SIGKILL
    assert "going on after epoch 1 of 6 and step 9" in call(train, *command, "--resume")[1]
    for name in ("epoch_6", "best", "last"):
        path = f"Unet_checkpoint_{name}.pt"
        assert (finished / path).read_bytes() == (tmp_path / path).read_bytes(), name
    assert figures(finished) == figures(tmp_path)


def test_processes_stop_after_the_same_step_and_other_numbers_go_on(videos, tmp_path, call):
    """One of three gets the signal in step 26; they ask each other after steps 25 and 30.

    Batches of 7 frames, of which they have 3, 2 and 2; 21 steps are an epoch.
    """
    (tmp_path / "stop.py").write_text(STOP)
    command = ["--data", videos, "--out", tmp_path, *TINY, "--batch-size", 7, "--num-epochs"]
    arguments = (f"{signal.SIGTERM:d},26,2", *command, 2)
    result = run(tmp_path / "stop.py", *arguments, launcher=torchrun(3), env=OWN)
    assert result.returncode != 0
    assert "stopped after step 9 of epoch 2, all is saved" in result.stderr
    state = load_checkpoint(tmp_path / LAST)["training"]
    assert (state["frames"], state["loss"][1]) == (63, 9)
    result = run("train.py", *command, 2, "--resume", launcher=torchrun(2))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "going on after epoch 1 of 2 and step 9" in result.stdout
    status, said, _ = call(train, *command, 3, "--resume")
    assert status == 0
    assert "going on after epoch 2 of 3\n" in said
    assert [row["epoch"] for row in figures(tmp_path)] == ["1", "2", "3"]


ALONE = """
import os, signal, sys, train, utils
train.Keeper.check = lambda keeper: (
    end() if keeper.run.step == 147 and keeper.processes.rank == 1 else None
)

def end():
    if HOW == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise utils.UserError("something is wrong with process 1: mend it")

train.run_script(train.main)
"""


@pytest.mark.parametrize(("how", "count"), [("killed", 3), ("fails", 2)])
def test_processes_that_one_leaves_alone_end_with_a_sentence(
    finished, videos, tmp_path, how, count
):
    """In the epoch after those that one process trained; what that saved stays whole."""
    (tmp_path / "alone.py").write_text(ALONE.replace("HOW", repr(how)))
    shutil.copytree(finished, tmp_path / "out")
    command = ["--data", videos, "--out", tmp_path / "out", "--num-epochs", 7, "--resume", *TINY]
    result = run(tmp_path / "alone.py", *command, launcher=torchrun(count), env=OWN, timeout=60)
    assert result.returncode == 1
    assert "going on after epoch 6 of 7\n" in result.stdout
    assert "another process of this run has ended" in result.stderr
    assert ("something is wrong with process 1" in result.stderr) == (how == "fails")
    assert "[rank" not in result.stderr, "a traceback of one of them"
    assert load_checkpoint(tmp_path / "out" / LAST)["epoch"] == 6


def test_processes_that_find_other_checkpoints_refuse(finished, videos, tmp_path):
    """As on two machines that share no --out."""
    script = "import os, sys, train\nsys.argv[2] += os.environ['RANK']\n"
    (tmp_path / "apart.py").write_text(script + "train.run_script(train.main)\n")
    (tmp_path / "out0").symlink_to(finished)
    arguments = ("--out", tmp_path / "out", "--data", videos, "--num-epochs", 7, "--resume", *TINY)
    result = run(tmp_path / "apart.py", *arguments, launcher=torchrun(2), env=OWN)
    assert result.returncode != 0
    assert (
        "go on after other steps (144, 0): give an --out that all machines share" in result.stderr
    )


def test_the_same_seed_gives_the_same_weights_and_another_one_others(videos, tmp_path, call):
    command = ["--data", videos, "--num-epochs", 1, *TINY]
    for name, seed in (("0", 0), ("1", 1), (".", 1)):
        assert call(train, *command, "--out", tmp_path / name, "--seed", seed)[0] == 0
    zero, one, again = (
        weights(tmp_path / name / "Unet_checkpoint_epoch_1.pt") for name in ("0", "1", ".")
    )
    assert same(one, again)
    assert not same(zero, one)
    command += ["--out", tmp_path, "--seed", 1]
    before = (tmp_path / "Unet_checkpoint_last.pt").read_bytes()
    status, _, err = call(train, *command[:-2], "--resume")
    assert status == 2
    assert "was begun with --seed 1: give that" in err
    assert (tmp_path / "Unet_checkpoint_last.pt").read_bytes() == before


def test_a_run_goes_on_only_with_what_it_was_validated_on(finished, videos, tmp_path, call):
    """Of other videos it may have learned from those that validate."""
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(finished, run)
    shutil.copytree(videos, data, symlinks=True)
    command = ("--out", run, "--num-epochs", 5, "--resume", *TINY)
    status, said, _ = call(train, "--data", data, *command)  # renamed, but the same
    assert status == 0
    assert "nothing left to do" in said
    for video in list(data.rglob("video_*")):
        shutil.copytree(video, video.with_name(f"{video.name}0"))
    before = (run / "Unet_checkpoint_last.pt").read_bytes()
    status, _, err = call(train, "--data", data, *command)
    assert status == 2
    assert "Unet_checkpoint_last.pt was validated on other videos than --data now sets aside" in err
    assert (run / "Unet_checkpoint_last.pt").read_bytes() == before


def test_a_run_without_its_last_state_is_not_begun_anew_over_it(finished, videos, tmp_path, call):
    shutil.copy(finished / "Unet_checkpoint_epoch_5.pt", tmp_path)
    status, _, err = call(train, "--data", videos, "--out", tmp_path, "--resume", *TINY)
    assert status == 2
    assert "Unet_checkpoint_epoch_5.pt of a run, but no Unet_checkpoint_last.pt" in err
    assert [path.name for path in tmp_path.iterdir()] == ["Unet_checkpoint_epoch_5.pt"]


def test_init_starts_from_the_given_weights(finished, videos, tmp_path, call):
    """A vanishing learning rate leaves them as they were."""
    init = finished / "Unet_checkpoint_best.pt"
    command = ["--data", videos, "--out", tmp_path, "--num-epochs", 1, "--learning-rate", 1e-12]
    assert call(train, *command, "--batch-size", 4, "--device", "cpu", "--init", init)[0] == 0
    before, after = weights(init), weights(tmp_path / "Unet_checkpoint_epoch_1.pt")
    key = "encoder.0.0.conv1.weight"
    torch.testing.assert_close(after[key], before[key])


@pytest.mark.parametrize(
    ("arguments", "starts_from", "rate", "epochs"),
    [
        (["--data", "d"], train.SHIPPED, 1e-3, 8),
        (["--data", "d", "--init", "none"], None, 4e-3, 8),
        (["--data", "d", "--init", "other.pt"], Path("other.pt"), 1e-3, 30),
        (["--data", "d", "--widths", "8", "16"], None, 4e-3, 8),
        ([], None, 4e-3, 6),
        (["--init", "other.pt", "--learning-rate", "0.5"], Path("other.pt"), 0.5, 30),
    ],
)
def test_what_training_starts_from(arguments, starts_from, rate, epochs, monkeypatch):
    read, alone = [], Processes(torch.device("cpu"))
    monkeypatch.setattr(train.UNet, "load", lambda file: read.append(file) or UNet([8, 16]))
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    args = train.parse_args()
    _, file = train.build_model(args.init, args.data, args.widths, alone)
    assert (file, args.num_epochs) == (starts_from, epochs)
    assert read == [starts_from] * bool(starts_from), "it is read once"
    assert (args.learning_rate or train.RATES[bool(file)]) == rate


def test_the_highest_rate_grows_with_the_batch(videos, tmp_path, call, monkeypatch):
    """With its root, from 16 frames on; 64 have twice the rate, and that is the most."""
    rates = []
    monkeypatch.setattr(train, "train_epochs", lambda run, *_: rates.append(run.highest_rate))
    options = ("--data", videos, "--out", tmp_path, "--no-cache", "--device", "cpu")
    for batch in (4, 24, 64, 500):
        more = ("--batch-size", batch, "--init", "none", "--widths", 8, 16)
        assert call(train, *options, *more)[0] == 0
    assert rates == pytest.approx([4e-3, 4e-3 * 1.5**0.5, 8e-3, 8e-3])


def test_weights_that_may_know_what_validates_are_named(finished, videos, capsys):
    facts = {name: load_checkpoint(finished / BEST)[name] for name in ("data", "held_out")}
    facts["frame_size"], alone = [HEIGHT, WIDTH], Processes(torch.device("cpu"))
    assert train.validates_first(finished / BEST, facts, alone)
    assert not capsys.readouterr().err
    assert train.validates_first(finished / BEST, facts | {"held_out": "others"}, alone)
    assert "may know those that validate now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "first"), [((160, 240), True), ((180, 242), True), ((320, 480), False)]
)
def test_weights_are_validated_first_at_the_scale_that_they_learned(size, first):
    """infer.py brings frames to the width that they learned, whatever the height."""
    facts, alone = {"data": "d", "held_out": "h", "frame_size": list(size)}, torch.device("cpu")
    assert train.validates_first(SHIPPED, facts, Processes(alone)) == first


@pytest.mark.parametrize("first", [True, False])
def test_scripts_without_their_weights_start_from_nothing_and_say_so_once(
    first, monkeypatch, capsys
):
    monkeypatch.setattr(train, "SHIPPED", Path("gone.pt"))
    processes = Processes(torch.device("cpu"))
    processes.rank = 0 if first else 1
    model, file = train.build_model(None, Path("d"), None, processes)
    assert (model.config, file) == (UNet().config, None)
    said = "the shipped weights are left out: no checkpoint at gone.pt"
    assert (said in capsys.readouterr().err) == first


def test_few_videos_start_from_the_shipped_weights_in_several_passes(videos, tmp_path, call):
    command = ["--data", videos, "--out", tmp_path, "--num-epochs", 1, "--batch-size", 16]
    status, said, _ = call(train, *command, "--learning-rate", 1e-12, "--device", "cpu")
    assert status == 0
    assert "an epoch takes 20 passes over these few frames, 20 steps" in said
    assert f"starting from the weights of {train.SHIPPED}" in said
    before, after = weights(train.SHIPPED), weights(tmp_path / LAST)
    key = "encoder.1.0.conv2.weight"
    torch.testing.assert_close(after[key], before[key].float())


def test_thirty_steps_from_nothing_validate_like_their_own_weights(videos):
    """Of the average as of the weights of the last step with their own statistics."""
    torch.manual_seed(0)
    processes = Processes(torch.device("cpu"))
    data = CLEVRDataset(videos)
    batches = ShardedBatches(len(data), 8, processes, shuffle=True, passes=8)
    loader = DataLoader(data, batch_sampler=batches)
    current = Run.open(UNet([8, 16, 24]), processes, num_epochs=30, learning_rate=4e-3)
    batches.set_epoch(0, skip=2)  # of 32
    train.train_one_epoch(current, current.model, loader, Keeper(current, videos))
    losses = []
    for network in (current.ema, current.model):
        batches.set_epoch(0, skip=22)
        crops = (augment(images, masks)[0] for images, masks in loader)
        update_bn(crops, network, processes)
        losses.append(train.validate(network, loader, processes)["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_overfits_one_video_through_all_scripts(tmp_path, monkeypatch, call):
    """Render, train, infer, evaluate: mIoU above 0.95 on what was learned by heart."""
    options = ("--videos", 1, "--seed", 3, "--frames", 4)
    result = run("render.py", "--out", tmp_path / "one", *options)
    assert result.returncode == 0, result.stderr
    (tmp_path / "data").mkdir()
    for part in ("train", "val"):
        (tmp_path / "data" / part).symlink_to(tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    options = ("--init", "none", "--num-epochs", 6, "--batch-size", 2)
    assert call(train, "--data", "data", *options)[0] == 0
    checkpoint = tmp_path / "checkpoints" / "Unet_checkpoint_epoch_6.pt"
    assert call(infer, "--ckpt", checkpoint, "--out", "masks")[0] == 0
    assert call(evaluate, "--pred", "masks", "--data", "data", "--json", "s.json")[0] == 0
    assert json.loads((tmp_path / "s.json").read_text())["miou"] > 0.95


VALIDATE = """
import json, os, pathlib, sys, test_train, utils

def main():
    figures = test_train.validate(*sys.argv[1:])
    pathlib.Path(__file__).with_name(os.environ["RANK"] + ".json").write_text(json.dumps(figures))

utils.run_script(main)
"""


def validate(checkpoint: Path, videos: Path) -> dict:
    """Return the figures of train.validate by all processes, in batches of 31 frames."""
    data, processes = CLEVRDataset(videos), Processes(torch.device("cpu"))
    batches = ShardedBatches(len(data), 31, processes, shuffle=False)
    loader = DataLoader(data, batch_sampler=batches)
    return train.validate(UNet.load(checkpoint), loader, processes)


def test_processes_validate_to_the_last_count_like_one(finished, videos, tmp_path):
    """32 frames in batches of 31: of the last, one frame, only the first process has a share."""
    arguments = (finished / "Unet_checkpoint_best.pt", videos)
    (tmp_path / "validate.py").write_text(VALIDATE)
    environment = {**OWN, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    result = run(tmp_path / "validate.py", *arguments, launcher=torchrun(5), env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    one = validate(*arguments)
    assert sum(one["pixels"].values()) == 32 * HEIGHT * WIDTH
    val_loss = pytest.approx(one.pop("val_loss"), rel=1e-5)
    for rank in range(5):
        figures = json.loads((tmp_path / f"{rank}.json").read_text())
        assert figures.pop("val_loss") == val_loss
        assert figures == one


def test_a_kill_while_the_log_is_rewritten_loses_no_line(tmp_path, monkeypatch):
    fields = dict.fromkeys(log.FIELDS, 0.5) | {"per_class": {}}
    lines = log.Log(tmp_path, completed=0)
    for epoch in (1, 2, 3):
        lines.add(fields | {"epoch": epoch})
    before = (tmp_path / "log.csv").read_text()

    def die(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die)
        with pytest.raises(KeyboardInterrupt):
            log.Log(tmp_path, completed=2)
    assert (tmp_path / "log.csv").read_text() == before
    with (tmp_path / "log.csv").open("a") as file:
        file.write("1")  # and what a killed run may leave of a line
    log.Log(tmp_path, completed=2).add(fields | {"epoch": 3})
    assert (tmp_path / "log.csv").read_text() == before


def test_a_line_of_the_log_is_on_the_disk_before_the_checkpoint_that_never_redoes_it(
    tmp_path, monkeypatch
):
    lines, flushed = log.Log(tmp_path, completed=0), []

    def note(descriptor):
        flushed.append((tmp_path / "log.csv").read_text())

    monkeypatch.setattr(os, "fsync", note)
    lines.add(dict.fromkeys(log.FIELDS, 0.5) | {"per_class": {}, "epoch": 1})
    assert flushed == [(tmp_path / "log.csv").read_text()]
    assert len(flushed[0].splitlines()) == 2


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
def test_bad_input_is_one_sentence_and_status_2(arguments, needle, tmp_path, monkeypatch, call):
    (tmp_path / "empty").mkdir()
    write_videos(tmp_path / "single", count=1, frames=1)
    write_videos(tmp_path / "pair", count=2, frames=1)
    monkeypatch.chdir(tmp_path)
    status, _, error = call(train, *arguments)
    assert status == 2
    assert needle in error
    assert "Traceback" not in error


def test_videos_without_an_object_can_be_validated_on(videos, tmp_path, call):
    """Figures that are not defined there are left out, not a traceback after the first epoch."""
    shutil.copytree(videos, tmp_path / "data/train")
    empty = tmp_path / "data/val/video_0"
    shutil.copytree(videos / "video_0", empty)
    np.save(empty / "mask.npy", np.zeros_like(np.load(empty / "mask.npy")))
    arguments = ("--data", tmp_path / "data", "--num-epochs", 2, *TINY)
    out = tmp_path / "out"
    for command in (arguments[:3] + (1, *TINY), (*arguments, "--resume")):
        status, said, err = call(train, *command, "--out", out)
        assert (status, "Traceback" in err) == (0, False), err
        assert "weighted IoU 0.000" in said
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [(row["epoch"], row["weighted_iou"]) for row in rows] == [("1", ""), ("2", "")]


def test_the_last_words_name_the_best_epoch_and_a_command_to_type(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py"])
    out, data = tmp_path / "my runs", Path("my videos")
    network = {"model": {"w": torch.ones(1)}, "model_config": {}}
    save_checkpoint(out / BEST, network | {"epoch": 3, "weighted_iou": 0.8125})
    said = runs.last_words(out, data).splitlines()
    assert said[0] == f"best weighted IoU: 0.812, after epoch 3, in {out / BEST}"
    assert shlex.split(said[1])[-3:] == ["tensorboard", "--logdir", str(out / "tensorboard")]
    typed = shlex.split(said[-1].partition(": ")[2])
    assert typed[:2] == ["python", "somewhere/infer.py"]
    assert typed[2:] == ["--ckpt", str(out / BEST), "--out", "masks", "--data", "my videos"]
    (out / BEST).unlink()
    assert runs.last_words(out, data).startswith(f"weights of the last epoch, in {out / LAST}\n")


@pytest.fixture(scope="module")
def of_this_size(tmp_path_factory) -> Path:
    """Return the shipped weights, as if they had learned from frames of the size of the videos."""
    path = tmp_path_factory.mktemp("began") / "weights.pt"
    save_checkpoint(path, load_checkpoint(SHIPPED) | {"frame_size": [HEIGHT, WIDTH]})
    return path


def test_what_a_run_begins_with_is_epoch_0_and_may_be_the_best(
    of_this_size, videos, tmp_path, call
):
    """A rate so high that training ruins the weights: those it began with are kept as the best."""
    began = of_this_size
    options = ("--data", videos, "--init", began, "--out", tmp_path, "--num-epochs", 1)
    status, said, err = call(train, *options, "--batch-size", 8, "--learning-rate", 3)
    assert (status, "Traceback" in err) == (0, False), err
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert rows[0]["train_loss"] == rows[0]["lr"] == ""
    assert float(rows[0]["weighted_iou"]) > float(rows[1]["weighted_iou"])
    assert "epoch 0, as it begins: validation loss" in said
    assert "nothing was better than what it began with" in said
    best, first = load_checkpoint(tmp_path / BEST), load_checkpoint(began)
    assert best["epoch"] == 0
    assert all(
        best["model"][name].equal(x.to(best["model"][name])) for name, x in first["model"].items()
    )
    assert not (tmp_path / "Unet_checkpoint_epoch_0.pt").exists()


def test_a_stop_before_the_first_step_loses_nothing_and_says_how_to_begin(
    of_this_size, former, videos, call, monkeypatch
):
    def stop(model, loader, processes, keeper):
        os.kill(os.getpid(), signal.SIGINT)
        keeper.check_validation()

    before = contents(former)
    options = ("--data", videos, "--init", of_this_size, "--out", former, "--overwrite")
    monkeypatch.setattr(train, "validate", stop)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    status, _, err = call(train, *options)
    assert status == 130
    assert "stopped before the first step; begin with: " in err
    assert "--overwrite" in err
    found = contents(former)
    assert {name: found[name] for name in before} == before


def test_weights_that_read_another_size_are_not_validated_as_they_are(videos, tmp_path, call):
    """infer.py brings frames to the size that they learned; validation does not."""
    options = ("--data", videos, "--init", SHIPPED, "--out", tmp_path, "--num-epochs", 1)
    status, said, err = call(train, *options, "--batch-size", 8)
    assert (status, "Traceback" in err) == (0, False), err
    assert "these weights read frames of 240 x 160 pixels" in said
    assert [row["epoch"] for row in csv.DictReader((tmp_path / "log.csv").open())] == ["1"]


def test_the_last_words_say_where_a_run_began(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    network = {"model": {"w": torch.ones(1)}, "model_config": {}}
    save_checkpoint(tmp_path / BEST, network | {"epoch": 2, "weighted_iou": 0.9641})
    rows = log.Log(tmp_path, completed=-1)
    for epoch, iou in ((0, 0.9612), (1, 0.9617), (2, 0.9641)):
        rows.add(dict.fromkeys(log.FIELDS, iou) | {"per_class": {}, "epoch": epoch})
    said = runs.last_words(tmp_path, Path("path"))
    assert said.startswith("best weighted IoU: 0.964, after epoch 2 (began at 0.961), in ")
    log.Log(tmp_path, completed=0)  # stopped within its first epoch and resumed
    assert [row["epoch"] for row in csv.DictReader((tmp_path / "log.csv").open())] == ["0"]


def test_a_network_that_sees_nothing_is_told_of_once_and_not_too_early():
    figures = {"foreground_iou": 0.0, "pixels": {"background": 9, CLASS_NAMES[3]: 1}}
    warned = [step for step in range(20, 400, 20) if train.blind_warning(figures, step, 20, 400)]
    assert warned == [100]
    assert [step for step in (20, 40, 60) if train.blind_warning(figures, step, 20, 60)] == [60]
    assert not train.blind_warning(figures | {"foreground_iou": 0.01}, 100, 20, 400)
    figures["pixels"][CLASS_NAMES[3]] = 0
    assert not train.blind_warning(figures, 100, 20, 400)


@pytest.mark.parametrize(
    ("options", "frames", "epochs"),
    [
        ([], 8, 6),
        (["--data", "videos"], 16, 8),
        (["--data", "videos", "--init", "none"], 16, 8),
        (["--data", "videos", "--init", "file.pt"], 16, 30),
        (["--batch-size", "5", "--num-epochs", "2"], 5, 2),
    ],
)
def test_how_much_is_learned_where_nothing_is_said(options, frames, epochs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    args = train.parse_args()
    assert (args.batch_size, args.num_epochs) == (frames, epochs)
