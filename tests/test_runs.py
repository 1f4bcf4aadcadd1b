"""The loss of a run: looked at now and then, the same whenever that was."""

import pytest
import torch

from runs import MeanLoss
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
