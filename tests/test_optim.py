"""Muon against torch's own, and the orthogonal matrices that it is made of."""

import copy

import pytest
import torch

import optim
from devices import Processes
from model import UNet


def test_muon_is_torch_s():
    """Three steps on a convolution equal those of torch.optim.Muon on the same weights, flat.

    It computes in bfloat16, of which the tolerance is.
    """
    torch.manual_seed(0)
    for shape in ((6, 8), (40, 4)):  # wide and tall matrices
        layer = torch.nn.Conv2d(shape[1], shape[0], 3, bias=False)
        flat = torch.nn.Parameter(layer.weight.detach().flatten(1).clone())
        ours = optim.MuonAdamW(torch.nn.Sequential(layer, torch.nn.Linear(2, 2)))
        settings = {"weight_decay": 0.02, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
        theirs = torch.optim.Muon([flat], lr=0.01, **settings)
        for _ in range(3):
            layer.weight.grad = torch.randn_like(layer.weight)
            flat.grad = layer.weight.grad.flatten(1)
            ours.step(0.01)
            theirs.step()
        torch.testing.assert_close(layer.weight.flatten(1), flat, rtol=0.02, atol=5e-4)


def test_orthogonalised_matrices_have_singular_values_near_one():
    for shape in ((3, 8, 72), (1, 18, 64)):
        values = torch.linalg.svdvals(optim.orthogonalise(torch.randn(*shape)))
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_small_singular_values_are_as_the_steps_one_by_one_make_them():
    """A matrix of singular values 1 to 1e-5, as gradients have; the steps in float64."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 96))[0] for n in (96, 864))
    matrix = (left * torch.logspace(0, -5, 96)) @ right.mT
    x = matrix.double() / torch.linalg.vector_norm(matrix.double())
    a, b, c = optim.NEWTON_SCHULZ
    for _ in range(optim.STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    torch.testing.assert_close(optim.orthogonalise(matrix[None])[0].double(), x, rtol=0, atol=1e-4)


def test_what_momentum_has_faded_to_is_left_out():
    """Channels that have died have gradients of 0: products of what is left of them are slow."""
    torch.manual_seed(0)
    matrix = torch.randn(1, 8, 72)
    matrix[:, 5:] *= 1e-25
    found, alive = optim.orthogonalise(matrix), optim.orthogonalise(matrix[:, :5])
    assert not found[:, 5:].any()
    torch.testing.assert_close(found[:, :5], alive)


def test_filters_that_share_a_stack_move_as_each_alone():
    """4 x 45 and 4 x 27; 27 x 27 and, lying on its side, 30 x 27: zeros fill the shorter ones."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(i, o, 3) for i, o in ((5, 4), (3, 27), (3, 4), (3, 30))]
    twins = copy.deepcopy(layers)
    together = optim.MuonAdamW(torch.nn.Sequential(*layers))
    alone = [optim.MuonAdamW(layer) for layer in twins]
    assert [len(stack.filters) for stack in together.stacks] == [2, 2]
    for _ in range(2):
        for layer, twin in zip(layers, twins, strict=True):
            for weight, other in zip(layer.parameters(), twin.parameters(), strict=True):
                weight.grad = torch.randn_like(weight)
                other.grad = weight.grad.clone()
        for optimizer in (together, *alone):
            optimizer.step(0.01)
    for layer, twin in zip(layers, twins, strict=True):
        torch.testing.assert_close(layer.weight, twin.weight, rtol=1e-5, atol=1e-6)


def test_weights_are_pulled_to_where_they_began_also_after_going_on():
    """Without a gradient a step at rate 0.01 and an L2-SP of 30 goes back 0.3 of the way."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(2, 2))
    optimizer = optim.MuonAdamW(model, l2_sp=30)
    state = copy.deepcopy(optimizer.state_dict())
    start = [weight.detach().clone() for weight in model.parameters()]

    def off(step: optim.MuonAdamW) -> list[float]:
        for weight, before in zip(model.parameters(), start, strict=True):
            weight.data.copy_(before + 1)
            weight.grad = torch.zeros_like(weight)
        step.step(0.01)
        pairs = zip(model.parameters(), start, strict=True)
        return [(weight - before).mean().item() for weight, before in pairs]

    assert off(optimizer) == pytest.approx([0.7] * 4, abs=1e-3)
    for weight in model.parameters():
        weight.data.zero_()
    resumed = optim.MuonAdamW(model, l2_sp=30)
    resumed.load_state_dict(state)
    assert off(resumed) == pytest.approx([0.7] * 4, abs=1e-3)


def test_statistics_are_those_of_what_is_shown():
    torch.manual_seed(0)
    model = UNet([4, 6])
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.fill_(7.0)
    weights = [weight.clone() for weight in model.parameters()]
    seen: list[torch.Tensor] = []
    hook = model.encoder[0][0].conv1.register_forward_hook(lambda *parts: seen.append(parts[2]))
    batches = [torch.rand(3, 3, 16, 16) for _ in range(2)]
    device = torch.device("cpu")
    optim.update_bn(batches, model, Processes(device))
    hook.remove()
    norm = model.encoder[0][0].norm1
    expected = torch.stack([x.float().mean(dim=(0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean, expected, rtol=1e-2, atol=1e-3)
    assert all(map(torch.equal, weights, model.parameters()))


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    rates = [optim.learning_rate_at(progress, 4e-3) for progress in (0, 0.01, 0.2, 0.7, 1)]
    assert rates == pytest.approx([2e-4, 2.2e-3, 4e-3, 2e-3, 0])


def test_the_learning_rate_grows_with_large_batches_to_twice():
    rates = [optim.scaled_rate(4e-3, batch_size) for batch_size in (4, 16, 36, 1024)]
    assert rates == pytest.approx([4e-3, 4e-3, 6e-3, 8e-3])


def test_the_mean_of_the_weights_is_young_at_first_and_counts_are_copied():
    model, ema = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
    model.weight.data.fill_(2.0)
    model.num_batches_tracked += 7
    optim.update_ema(ema, model, step=0)  # decay 1 / 10
    assert ema.weight.item() == pytest.approx(0.1 * 1 + 0.9 * 2)
    assert ema.num_batches_tracked == 7
    optim.update_ema(ema, model, step=10**6)  # decay 0.995
    assert ema.weight.item() == pytest.approx(0.995 * 1.9 + 0.005 * 2)
