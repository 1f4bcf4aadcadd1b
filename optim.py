"""Muon with AdamW, the learning rate over a run, and the running mean of the weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from utils import has_bfloat16

WARM_UP, DECAY_FROM = 0.02, 0.4  # shares of the run: rise to the full learning rate, start to fall
AVERAGE_DECAY = 0.995  # of the running mean of the weights, a step
MOMENTUM = 0.95  # Jordan et al.'s
WEIGHT_DECAY = 0.02  # of the learning rate, a step
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al.'s: steep at 0, so that 5 steps do


def learning_rate_at(progress: float, highest: float) -> float:
    """Return the learning rate at `progress` (0..1) of the run: rise, stay, fall to zero."""
    return highest * min(1.0, (progress + 1e-3) / WARM_UP, (1 - progress) / (1 - DECAY_FROM))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """Move the running mean of the weights, which is what is validated and kept, one step on."""
    decay = min(AVERAGE_DECAY, (1 + step) / (10 + step))  # the first steps are soon forgotten
    for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


class MuonAdamW:
    """Muon for the 3x3 convolutions, AdamW for the rest.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) moves a matrix by its
    orthogonalised momentum; a convolution is a matrix (out, in * 3 * 3), and the step is scaled so
    that AdamW's learning rate fits (Liu et al. 2025, https://arxiv.org/abs/2502.16982). As
    torch.optim.Muon, which takes no convolutions, and computes in bfloat16 even where the hardware
    has none: there it takes longer than the network.
    """

    def __init__(self, model: nn.Module):
        filters = [p for p in model.parameters() if p.ndim == 4 and p.shape[-1] == 3]
        self.filters = [p for p in filters if p.shape[1] > 1]  # one channel makes no matrix
        chosen = {id(p) for p in self.filters}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        self.adamw = AdamW(rest, weight_decay=WEIGHT_DECAY)
        self.velocities = [torch.zeros_like(p) for p in self.filters]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the weights and clear the gradients."""
        for weight, velocity in zip(self.filters, self.velocities, strict=True):
            velocity.lerp_(weight.grad, 1 - MOMENTUM)
            change = weight.grad.lerp(velocity, MOMENTUM).flatten(1)  # (out, in * 9)
            scale = 0.2 * max(change.shape) ** 0.5
            weight.mul_(1 - learning_rate * WEIGHT_DECAY)
            change = orthogonalise(change).view_as(weight)
            weight.add_(change.to(weight.dtype), alpha=-learning_rate * scale)
            weight.grad = None
        self.adamw.param_groups[0]["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both optimisers."""
        return {"adamw": self.adamw.state_dict(), "velocities": self.velocities}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.adamw.load_state_dict(state["adamw"])
        for velocity, saved in zip(self.velocities, state["velocities"], strict=True):
            velocity.copy_(saved)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix near 1, by five Newton-Schulz steps of order 5."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide.to(torch.bfloat16) if has_bfloat16(matrix.device) else wide.clone()
    x /= x.norm().clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrix else x.T
