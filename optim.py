"""Muon with AdamW, the learning rate over a run, and the average of the weights (EMA)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from devices import Processes, mixed_precision

WARM_UP, DECAY_FROM = 0.02, 0.4  # shares of the run: rise to the full learning rate, start to fall
EMA_DECAY = 0.995  # of the average of the weights, a step
USUAL_BATCH = 16  # frames, for which learning rates are given
MOMENTUM = 0.95  # Jordan et al.'s
WEIGHT_DECAY = 0.02  # of the learning rate, a step
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al.'s: steep at 0, so that STEPS do
STEPS = 5
NOTHING = 1e-8  # of a matrix's norm; its square is far from the smallest float32


def learning_rate_at(progress: float, highest: float) -> float:
    """Return the learning rate at `progress` (0..1) of the run: rise, stay, fall to zero."""
    return highest * min(1.0, (progress + 1e-3) / WARM_UP, (1 - progress) / (1 - DECAY_FROM))


def scaled_rate(learning_rate: float, batch_size: int) -> float:
    """Return the learning rate for a batch, given that for 16 frames: it grows with the root.

    As for AdamW (Malladi et al. 2022, https://arxiv.org/abs/2205.10287), but to twice at most: no
    batch as large as that has been tried here.
    """
    return learning_rate * min(2.0, max(1.0, batch_size / USUAL_BATCH) ** 0.5)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int) -> None:
    """Move the exponential moving average of the weights, which is validated and kept, on."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))  # the first steps are soon forgotten
    pairs = list(zip(ema.state_dict().values(), model.state_dict().values(), strict=True))
    means, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    torch._foreach_lerp_(means, values, 1 - decay)
    if counts := [pair for pair in pairs if not pair[0].is_floating_point()]:
        torch._foreach_copy_(*zip(*counts, strict=True))


@torch.no_grad()
def update_bn(batches: Iterable[Tensor], model: nn.Module, processes: Processes) -> None:
    """Give averaged weights the batch statistics that they have themselves.

    As torch.optim.swa_utils.update_bn. Those that training gathers lag by ten steps and are of
    other weights: after thirty steps from nothing they cost a tenth of the foreground IoU, after
    sixteen all of it (Wu and Johnson 2021, https://arxiv.org/abs/2105.07576).

    Args:
        batches: Crops (B, 3, H, W) as training sees them, this process's share.
        model: The average of `update_ema`; its weights stay.
        processes: Over which the statistics are averaged.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
    model.train()
    for number, crops in enumerate(batches, 1):
        for norm in norms:
            norm.momentum = 1 / number  # the plain mean; for None it would ask the device
        with mixed_precision(processes.device):
            model.answers(crops)
    for norm in norms:
        for statistic in (norm.running_mean, norm.running_var):
            processes.add_up(statistic)
            statistic /= processes.count


class MuonAdamW:
    """Muon for the 3x3 convolutions, AdamW for the rest.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) moves a matrix by its
    orthogonalised momentum; a convolution is a matrix (out, in * 3 * 3), and the step is scaled so
    that AdamW's learning rate fits (Liu et al. 2025, https://arxiv.org/abs/2502.16982). As
    torch.optim.Muon, which takes no convolutions, and computes in bfloat16 even where the hardware
    has none.

    A GPU would take longer to start so many small operations than to do them: there all matrices
    are orthogonalised in one stack, on a CPU those with as many rows, and momentum and decay are
    applied to all weights in one call.

    Args:
        model: What is trained.
        l2_sp: Of every step, this many times the learning rate is the share of the way back to
            where the weights began (L2-SP, Li et al. 2018, https://arxiv.org/abs/1802.01483, apart
            from the gradient as AdamW's decay is): what few examples do not show is not forgotten.
    """

    def __init__(self, model: nn.Module, l2_sp: float = 0.0):
        self.weights, self.l2_sp = list(model.parameters()), l2_sp
        self.start = [weight.detach().clone() for weight in self.weights] if l2_sp else []
        filters = [p for p in model.parameters() if p.ndim == 4 and p.shape[-1] == 3]
        self.filters = [p for p in filters if p.shape[1] > 1]  # one channel makes no matrix
        chosen = {id(p) for p in self.filters}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        self.adamw = AdamW(rest, weight_decay=WEIGHT_DECAY, fused=True)
        self.velocities = [torch.zeros_like(p) for p in self.filters]
        self.stacks = [Stack(group) for group in _groups(self.filters)]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the weights and clear the gradients."""
        if self.start:
            torch._foreach_lerp_(self.weights, self.start, min(1.0, learning_rate * self.l2_sp))
        gradients = [weight.grad for weight in self.filters]
        torch._foreach_lerp_(self.velocities, gradients, 1 - MOMENTUM)
        changes = torch._foreach_lerp(gradients, self.velocities, MOMENTUM)
        torch._foreach_mul_(self.filters, 1 - learning_rate * WEIGHT_DECAY)
        change_of = dict(zip(self.filters, changes, strict=True))
        for stack in self.stacks:
            orthogonal = stack.orthogonalise([change_of[weight] for weight in stack.filters])
            for weight, change in zip(stack.filters, orthogonal, strict=True):
                scale = 0.2 * max(_matrix_shape(weight)) ** 0.5
                weight.add_(change, alpha=-learning_rate * scale)
        for weight in self.filters:
            weight.grad = None
        self.adamw.param_groups[0]["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both optimisers, and where the weights began."""
        return {
            "adamw": self.adamw.state_dict(),
            "velocities": self.velocities,
            "start": self.start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.adamw.load_state_dict(state["adamw"])
        for velocity, saved in zip(self.velocities, state["velocities"], strict=True):
            velocity.copy_(saved)
        device = self.weights[0].device  # a run that began without goes on without
        self.start = [weight.to(device) for weight in state["start"]]


class Stack:
    """Filters that are orthogonalised together, and the memory for it.

    Args:
        filters: (out, in, 3, 3) each. Their matrices (out, in * 9) lie on their longer side;
            smaller ones are filled with zeros, which stay zeros.
    """

    def __init__(self, filters: list[Tensor]):
        self.filters = filters
        device, shapes = filters[0].device, [_matrix_shape(weight) for weight in filters]
        rows, columns = (max(side(shape) for shape in shapes) for side in (min, max))
        self.matrices = torch.zeros(len(filters), rows, columns, device=device)

    def orthogonalise(self, changes: list[Tensor]) -> list[Tensor]:
        """Return the orthogonalised matrices of changes of the filters, in the filters' shapes."""
        torch._foreach_copy_(self._as_filters(self.matrices), changes)
        return self._as_filters(orthogonalise(self.matrices))

    def _as_filters(self, matrices: Tensor) -> list[Tensor]:
        """Return views of the matrices, in the shapes of the filters."""
        views = []
        for weight, matrix in zip(self.filters, matrices, strict=True):
            rows, columns = _matrix_shape(weight)
            matrix = matrix[: min(rows, columns), : max(rows, columns)]
            matrix = matrix if rows <= columns else matrix.T
            views.append(matrix.unflatten(1, weight.shape[1:]))
        return views


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices (N, rows, more columns) near 1.

    By Newton-Schulz steps of order 5: each multiplies x by a + b gram + c gram^2, whose gram is
    x x^T. These factors commute, so that they are gathered in small matrices (N, rows, rows) and
    meet the long ones once. Float32: gram has the squares of the singular values.

    Momentum of a channel that has died fades to numbers so small that a CPU needs a hundred times
    as long for their products (denormal ones): what is below NOTHING is left out there.
    """
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    x = matrices / norms.clamp(min=1e-7)
    x = F.hardshrink(x, NOTHING) if x.device.type == "cpu" else x
    a, b, c = NEWTON_SCHULZ
    gram, product = x @ x.mT, None
    for _ in range(STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        gram = factor @ gram @ factor
    return product @ x


def _matrix_shape(weight: Tensor) -> tuple[int, int]:
    """Return rows and columns of a convolution's weight as a matrix."""
    return len(weight), weight[0].numel()


def _groups(filters: list[Tensor]) -> list[list[Tensor]]:
    """Return the filters that share a stack: all, on a CPU those whose matrices are as high."""
    groups: dict[int, list[Tensor]] = {}
    for weight in filters:
        height = min(_matrix_shape(weight)) if weight.device.type == "cpu" else 0
        groups.setdefault(height, []).append(weight)
    return list(groups.values())
