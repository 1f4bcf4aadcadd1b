"""The loss of a run, how long it will take, and what is said at its end."""

import shlex
import sys
from pathlib import Path

import pytest
import torch

from checkpoints import save_checkpoint
from log import Pace, in_words
from runs import BEST, LAST, MeanLoss, last_words
from utils import UserError


def test_a_loss_that_is_not_finite_ends_the_run_with_a_sentence():
    loss = MeanLoss()
    for value in (1.0, float("nan")):
        loss.add(torch.tensor(value))
    with pytest.raises(UserError, match="lower --learning-rate"):
        loss.look()


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
