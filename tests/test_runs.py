"""The loss of a run, its state, its log, and how long it will take."""

import os
import signal
import threading

import pytest
import torch

from checkpoints import save_checkpoint
from devices import Processes
from log import FIELDS, Log, MeanLoss
from model import UNet
from runs import LAST, Keeper, Run, options_of
from utils import Stopped, UserError

ALONE = Processes(torch.device("cpu"))


def test_a_loss_that_is_not_finite_ends_the_run_with_a_sentence():
    loss = MeanLoss()
    for value in (1.0, float("nan"), 1.0):
        loss.add(torch.tensor(value))
    with pytest.raises(UserError, match="lower --learning-rate"):
        loss.look()


def test_weights_that_are_not_finite_do_not_replace_those_that_are(tmp_path):
    """A step of which the loss was still a number can end in none."""
    run = Run.open(UNet(widths=(8, 16)), ALONE)
    figures = {"miou": 0.5, "weighted_iou": 0.5}
    run.save(tmp_path, figures, 1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        next(run.model.parameters())[0] = float("nan")
    for save in (lambda: run.save_last(tmp_path), lambda: run.save(tmp_path, figures, 0)):
        with pytest.raises(UserError, match="lower --learning-rate"):
            save()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_goes_on_with_the_options_it_began_with(tmp_path):
    begun = {"num_epochs": 7, "batch_size": 5, "learning_rate": 0.25}
    run = Run.open(UNet(widths=(8, 16)), ALONE, epoch_steps=3, l2_sp=1.5, **begun)
    run.save_last(tmp_path)
    assert options_of(tmp_path / LAST) == begun
    assert options_of(tmp_path / "none.pt") == {}
    run = Run.open(UNet(widths=(8, 16)), ALONE, epoch_steps=3, resume=tmp_path / LAST, **begun)
    assert run.optimizer.l2_sp == 1.5, "though nothing said that it began with trained weights"


def test_a_worker_that_a_ctrl_c_ends_costs_no_step(tmp_path):
    """One that has just been started does not leave it to the training process yet."""
    run = Run.open(UNet(widths=(8, 16)), ALONE, epoch_steps=3, num_epochs=1)
    run.step = run.done = 2
    died = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    with pytest.raises(RuntimeError, match="DataLoader"), Keeper(run, tmp_path):
        raise died
    assert not (tmp_path / LAST).exists(), "of itself, for lack of memory"
    keeper = Keeper(run, tmp_path)
    keeper.signal = signal.SIGINT
    with pytest.raises(Stopped, match="step 2 of epoch 1, all is saved") as stop, keeper:
        raise died
    assert stop.value.status == 130
    assert (tmp_path / LAST).is_file()


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
    run = Run.open(UNet(widths=(8, 16)), ALONE)
    run.save_last(tmp_path)
    checkpoint = torch.load(tmp_path / LAST, weights_only=True)
    if isinstance(key, tuple):
        checkpoint[key[0]][key[1]] = value
    else:
        checkpoint[key] = value
    del checkpoint["digest"]
    save_checkpoint(tmp_path / LAST, checkpoint)
    with pytest.raises(UserError, match=rf"{LAST} holds no state to go on from"):
        run.restore(tmp_path / LAST)


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
    Run.open(UNet(widths=(4, 8)), ALONE).save_last(tmp_path)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(UNet, "load_state_dict", fail)
    with pytest.raises(type(error)):
        UNet.load(tmp_path / LAST)
    with pytest.raises(type(error)):
        Run.open(UNet(widths=(4, 8)), ALONE).restore(tmp_path / LAST)


def test_what_is_left_is_at_the_pace_so_far(monkeypatch):
    """600 steps, of which a former process did 100: of this one's, 50 took 100 s."""
    run = Run.open(UNet(widths=(4, 8)), ALONE, epoch_steps=60, num_epochs=10)
    assert run.time_left() == "", "nothing is known"
    run.step, run.since = 150, (1000.0, 100)
    monkeypatch.setattr("time.monotonic", lambda: 1100.0)
    assert run.time_left() == "15:00 left"
    run.step = 600
    assert run.time_left() == ""
