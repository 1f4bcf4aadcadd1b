"""The loss of a run, how long it will take, and what is said at its end."""

import os
import shlex
import sys
import threading
from pathlib import Path

import pytest
import torch

from batches import load_data, videos_of
from checkpoints import save_checkpoint
from classes import CLASS_NAMES
from devices import Processes
from log import FIELDS, Log, Pace, in_words
from model import UNet
from runs import BEST, LAST, MeanLoss, Run, last_words
from utils import UserError
from validation import is_blind


def test_a_loss_that_is_not_finite_ends_the_run_with_a_sentence():
    loss = MeanLoss()
    for value in (1.0, float("nan")):
        loss.add(torch.tensor(value))
    with pytest.raises(UserError, match="lower --learning-rate"):
        loss.look()


def test_a_loss_that_is_not_finite_names_what_was_just_seen(data):
    processes = Processes(torch.device("cpu"))
    loader, _ = load_data(data, 4, 0, False, 0, processes)
    loader.batch_sampler.epoch = 3
    seen = [
        {str(loader.dataset.videos[loader.dataset.index[i][0]]) for i in batch}
        for batch in loader.batch_sampler
    ]
    assert videos_of(loader, (-1, 0)) == sorted(seen[0])
    assert videos_of(loader, (0, 7)) == sorted(seen[0] | seen[7])
    loss = MeanLoss(videos=lambda ago: [f"video_{ago}_{i}" for i in range(18)])
    for value in (1.0, float("inf"), 1.0, 1.0):
        loss.add(torch.tensor(value))
    with pytest.raises(UserError, match=r"video_2_0, .*, video_2_15 and 2 more$"):
        loss.look()


def test_weights_that_are_not_finite_do_not_replace_those_that_are(tmp_path):
    """A step of which the loss was still a number can end in none."""
    run = Run.start(UNet(widths=(8, 16)))
    figures = {"miou": 0.5, "weighted_iou": 0.5}
    run.save(tmp_path, figures, 1, 4)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        next(run.model.parameters())[0] = float("nan")
    for save in (lambda: run.save_last(tmp_path, 4), lambda: run.save(tmp_path, figures, 0, 4)):
        with pytest.raises(UserError, match="lower --learning-rate"):
            save()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_mean_loss_does_not_depend_on_when_it_is_looked_at():
    values, often, once = torch.rand(100), MeanLoss(), MeanLoss()
    for i, value in enumerate(values):
        often.add(value)
        once.add(value)
        if i % 7 == 0:
            often.look()
    assert often.mean() == once.mean() == pytest.approx(values.mean().item(), rel=1e-6)
    once.begin()
    assert (once.total, once.steps) == (0.0, 0)


class Hand:
    """A clock that is moved by hand."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def pass_epoch(pace: Pace, steps: int, step: float, rest: float) -> None:
    for _ in range(steps):
        pace.clock.now += step
        pace.stepped()
    pace.clock.now += rest
    pace.ended()


def test_what_is_left_counts_validation_and_saving():
    """Epochs of 60 steps of 1 s and 30 s of the rest."""
    pace = Pace(Hand())
    assert pace.left(600, 10) == "", "nothing is known"
    pace.clock.now += 1
    pace.stepped()
    assert pace.left(599, 10) == "over 10 min left", "of steps alone"
    pass_epoch(pace, 59, 1, 30)
    assert pace.left(540, 9) == "14 min left"
    assert pace.left(0, 0) == ""


@pytest.mark.parametrize("steps", [1, 59])
def test_what_is_left_after_going_on_within_an_epoch_is_no_nonsense(steps):
    """Whether one step of it was left or all but one."""
    pace = Pace(Hand())
    pass_epoch(pace, steps, 1, 30)
    assert pace.left(60 * 8, 8) == "12 min left"


def test_after_going_on_in_validation_nothing_is_said_before_a_step():
    pace = Pace(Hand())
    pass_epoch(pace, 0, 1, 30)
    assert pace.left(60, 1) == ""
    pass_epoch(pace, 60, 1, 30)
    assert pace.left(60, 1) == "90 s left"


def test_times_are_in_words():
    times = {
        99: "99 s",
        100: "2 min",
        3599: "1 h 0 min",
        11_100: "3 h 5 min",
        200_000: "2 days 8 h",
    }
    assert {seconds: in_words(seconds) for seconds in times} == times


def test_the_last_words_name_the_best_epoch_and_a_command_to_type(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py"])
    out, data = tmp_path / "my runs", Path("my videos")
    network = {"model": {"w": torch.ones(1)}, "model_config": {}}
    save_checkpoint(out / BEST, network | {"epoch": 3, "weighted_iou": 0.8125})
    said = last_words(out, data).splitlines()
    assert said[0] == f"best weighted IoU: 0.812, after epoch 3, in {out / BEST}"
    assert shlex.split(said[1])[-3:] == ["tensorboard", "--logdir", str(out / "tensorboard")]
    typed = shlex.split(said[-1].partition(": ")[2])
    assert typed[:2] == ["python", "somewhere/infer.py"]
    assert typed[2:] == ["--ckpt", str(out / BEST), "--out", "masks", "--data", "my videos"]
    (out / BEST).unlink()
    assert last_words(out, data).startswith(f"weights of the last epoch, in {out / LAST}\n")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace(b"\n1,", b"\nx,"),
        lambda text: text.replace(b"epoch", b"Epoch"),
        lambda text: text.replace(b"0.5", b"\xff"),
        lambda text: b"",
    ],
)
def test_a_log_that_is_damaged_is_named_and_left_as_it_is(tmp_path, damage):
    text = b"epoch,train_loss,val_loss,miou,foreground_iou,lr,frames_per_s,weighted_iou\n"
    text = damage(text + b"1,0.5,0.5,0.5,0.5,0.5,0.5,0.5\n")
    (tmp_path / "log.csv").write_bytes(text)
    if text:
        with pytest.raises(UserError, match=r"log\.csv is damaged"):
            Log(tmp_path, 1)
        assert (tmp_path / "log.csv").read_bytes() == text
    else:
        Log(tmp_path, 1)  # nothing in it that could be lost


NONSENSE = [
    *(("epoch", value) for value in ("3", -1, 1.5, None, True)),
    *(("weighted_iou", value) for value in ("best", [])),
    *(("training", value) for value in ({}, [], "x")),
    *((("training", "frames"), value) for value in ("3", -4)),
    *((("training", "loss"), value) for value in (3, [1.0], ["x", 1])),
    *((("training", "optimizer"), value) for value in ({}, {"adamw": {}, "velocities": []})),
    (("training", "model"), {}),
]


@pytest.mark.parametrize(("key", "value"), NONSENSE)
def test_a_state_of_nonsense_is_one_sentence(tmp_path, key, value):
    run = Run.start(UNet(widths=(8, 16)))
    run.save_last(tmp_path, 4)
    checkpoint = torch.load(tmp_path / LAST, weights_only=True)
    if isinstance(key, tuple):
        checkpoint[key[0]][key[1]] = value
    else:
        checkpoint[key] = value
    del checkpoint["digest"]
    save_checkpoint(tmp_path / LAST, checkpoint)
    with pytest.raises(UserError, match=rf"{LAST} holds no state to go on from"):
        run.resume(tmp_path / LAST, 4)


def test_a_network_that_sees_nothing_is_told_of_once_and_not_too_early():
    figures = {"foreground_iou": 0.0, "pixels": {"background": 9, CLASS_NAMES[3]: 1}}
    told = [step for step in range(20, 400, 20) if is_blind(figures, step, 20, 400)]
    assert told == [100]
    assert [step for step in (20, 40, 60) if is_blind(figures, step, 20, 60)] == [60]
    assert not is_blind(figures | {"foreground_iou": 0.01}, 100, 20, 400)
    figures["pixels"][CLASS_NAMES[3]] = 0
    assert not is_blind(figures, 100, 20, 400)


FIGURES = dict.fromkeys(FIELDS, 0.5) | {"epoch": 1, "per_class": {}, "pixels": {}}
FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["log.csv", "tensorboard"])
def test_a_disk_that_is_full_is_told_of_by_the_file_that_is_written(tmp_path, name, monkeypatch):
    def fail(*_):
        raise FULL

    log = Log(tmp_path, 0)
    monkeypatch.setattr(*((os, "fsync") if name == "log.csv" else (log.board, "flush")), fail)
    with pytest.raises(OSError, match="No space left on device") as error:
        log.add(FIGURES)
    assert error.value.filename == str(tmp_path / name)


def test_tensorboards_thread_leaves_it_to_the_main_one_to_speak(tmp_path, capsys):
    Log(tmp_path, 0)

    def fail(error):
        raise error

    for error in (FULL, ValueError("a bug")):
        thread = threading.Thread(target=fail, args=(error,))
        thread.start()
        thread.join()
    err = capsys.readouterr().err
    assert err.count("Traceback") == 1
    assert "a bug" in err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce] can't allocate memory")])
def test_weights_are_not_to_blame_where_memory_runs_out(tmp_path, error, monkeypatch):
    Run.start(UNet(widths=(4, 8))).save_last(tmp_path, 4)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(UNet, "load_state_dict", fail)
    with pytest.raises(type(error)):
        UNet.load(tmp_path / LAST)
    with pytest.raises(type(error)):
        Run.start(UNet(widths=(4, 8))).resume(tmp_path / LAST, 4)
