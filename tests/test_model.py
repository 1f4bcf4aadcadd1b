"""What the network promises: shapes, labels that are the argmax, and the classic configuration."""

import copy

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config

from dataset import NUM_CLASSES, class_id
from model import CLASSIC, UNet, at_pixels, cell_width
from utils import compile_network, load_model

SMALL = {"widths": (8, 12, 16)}
CONFIGS = {
    "default": SMALL,
    "full resolution stem": {**SMALL, "stem_stride": 1},
    "coarse stem": {**SMALL, "stem_stride": 4},
    "blocks everywhere": {**SMALL, "blocks": (2, 1, 1), "light": False},
    "classic": {**CLASSIC, "widths": (4, 8, 16)},
    "factored classic": {**CLASSIC, "widths": (4, 8, 16), "factored": True},
    "residual, 49 channels": {**SMALL, "factored": False},
}


def network(name: str) -> UNet:
    torch.manual_seed(0)
    model = UNet(**CONFIGS[name])
    model.train()
    for _ in range(50):  # the batch statistics of an untrained network say nothing
        model(torch.rand(4, 3, 32, 32))
    for head in model.heads:
        torch.nn.init.normal_(head.weight)
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(160, 240), (37, 53), (16, 16), (5, 90)])
def test_logits_have_the_height_and_width_of_the_frame(name, size):
    frames = torch.rand(2, 3, *size)
    with torch.inference_mode():
        logits = network(name)(frames)
    assert logits.shape == (2, NUM_CLASSES, *size)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", CONFIGS)
def test_predict_is_the_argmax_over_the_logits(name):
    model = network(name)
    frames = torch.rand(3, 3, 64, 96)
    with torch.inference_mode():
        expected = model(frames).argmax(dim=1)
    labels = model.predict(frames)
    assert labels.dtype == torch.uint8
    assert len(labels.unique()) > 2, "one label everywhere would prove nothing"
    assert torch.equal(labels.long(), expected)


def test_factored_logits_by_hand():
    model = network("default")
    outputs = torch.zeros(1, 14, 1, 3)
    thing, shape, material, colour = 0, slice(1, 4), slice(4, 6), slice(6, 14)
    outputs[0, thing, 0] = torch.tensor([2.0, -3.0, 0.5])
    outputs[0, shape, 0, 0] = torch.tensor([1.0, 5.0, 2.0])  # sphere
    outputs[0, material, 0, 0] = torch.tensor([0.0, 0.5])  # rubber
    outputs[0, colour, 0, 0] = torch.tensor([0.0, 0, 0, 0, 3, 0, 0, 1])  # brown
    model.stem_stride = 1
    stage = outputs[:, :1], outputs[:, 1:]
    model._decode = lambda frames: [stage]
    logits = model(torch.zeros(1, 3, 1, 3))[0, :, 0]
    assert logits[0].tolist() == [0, 0, 0]  # background
    assert logits[class_id("sphere", "rubber", "brown"), 0] == 2.0
    assert logits[class_id("cylinder", "rubber", "brown"), 0] == 2.0 - 3.0
    assert logits[class_id("cube", "metal", "yellow"), 0] == 2.0 - 4.0 - 0.5 - 2.0
    assert model.labels(stage)[0, 0].tolist() == [class_id("sphere", "rubber", "brown"), 0, 1]


def test_bytes_and_floats_are_the_same_frame():
    frames = torch.randint(0, 256, (1, 3, 48, 48), dtype=torch.uint8)
    model = network("default")
    with torch.inference_mode():
        assert torch.equal(model(frames), model(frames / 255))


def test_folding_the_batch_normalisation_changes_no_label():
    frames = torch.rand(2, 3, 64, 96)
    model = network("default")
    with torch.inference_mode():
        before = model(frames)
        after = model.fuse()(frames)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_a_frame_does_not_depend_on_its_batch():
    model = network("default")
    frames = torch.rand(5, 3, 48, 64)
    alone = torch.cat([model.predict(frame[None]) for frame in frames])
    assert torch.equal(model.predict(frames), alone)


def test_the_classic_network_is_ronneberger_s():
    parameters = sum(p.numel() for p in UNet(**CLASSIC).parameters())
    assert parameters == pytest.approx(31.0e6, rel=0.01)


def test_cells_at_pixels_by_hand():
    cells = torch.arange(12.0).view(1, 2, 2, 3)  # two channels of 2 x 3 cells of 4 x 4 pixels
    where = torch.zeros(1, 7, 10, dtype=torch.bool)
    where[0, 0, 3] = where[0, 3, 4] = where[0, 6, 9] = True
    assert cell_width(cells, where) == 4
    assert at_pixels(cells, where).tolist() == [[0, 6], [1, 7], [5, 11]]


@pytest.mark.parametrize("training", [True, False])
def test_compiling_changes_nothing(monkeypatch, training):
    """With the tracer of torch.compile, but no code generator, which would take a minute."""
    model = network("default").train(training)
    frames = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    expected = copy.deepcopy(model).eval().predict(frames)
    compile_with = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_with(self, backend="eager"))
    compile_network(model, frames)
    assert model._compiled_call_impl is not None
    assert torch.equal(model.eval().predict(frames), expected)


@pytest.mark.parametrize("training", [True, False])
@inductor_config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
def test_without_a_compiler_the_network_stays_as_it_is(capsys, training):
    model = network("default").train(training)
    frames = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    compile_network(model, frames)
    assert capsys.readouterr().err.splitlines()[-1].startswith("--compile is left out")
    assert len(model(frames, stages=True)) == 2
    assert model._compiled_call_impl is None


@pytest.mark.parametrize("name", CONFIGS)
def test_config_rebuilds_the_model(name):
    model = network(name)
    twin = UNet(**model.config).eval()
    twin.load_state_dict(model.state_dict())
    frames = torch.rand(1, 3, 32, 32)
    assert torch.equal(model.predict(frames), twin.predict(frames))


def test_checkpoints_of_before_light_networks_load(tmp_path):
    model = UNet(**SMALL, light=False).eval()
    config = {name: value for name, value in model.config.items() if name != "light"}
    torch.save({"format": 1, "model": model.state_dict(), "model_config": config}, tmp_path / "old")
    loaded, _ = load_model(UNet, tmp_path / "old")
    frames = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded.eval().predict(frames), model.predict(frames))


def test_every_weight_learns():
    model = network("default").train()
    stages = model(torch.rand(2, 3, 64, 64), stages=True)
    sum(part.square().mean() for stage in stages for part in stage).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


def test_impossible_configurations_are_refused():
    with pytest.raises(ValueError, match="49"):
        UNet(num_classes=10)
    with pytest.raises(ValueError, match="widths"):
        UNet(widths=(8, 16), blocks=(1, 2, 3))
