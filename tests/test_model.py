"""What the network promises: shapes, labels that are the argmax, a loss worked out by hand."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_readme import BLOCKS
from torch._inductor import config as inductor_config

import model as model_module
from checkpoints import SHIPPED, save_checkpoint
from classes import NUM_CLASSES, class_id
from devices import compile_network
from loss import cell_width, middle_ids, one_hot_factors
from model import Answer, UNet, _max_pool
from utils import UserError

CONFIGS = {
    "two stages": {"widths": (8, 12)},
    "three stages": {"widths": (8, 12, 16)},
    "stages alike": {"widths": (8, 8, 8, 8)},
}


def network(name: str = "three stages") -> UNet:
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
    model = network()
    outputs = torch.zeros(1, 14, 1, 3)
    objectness, shape, material, colour = 0, slice(1, 4), slice(4, 6), slice(6, 14)
    outputs[0, objectness, 0] = torch.tensor([2.0, -3.0, 0.5])
    outputs[0, shape, 0, 0] = torch.tensor([1.0, 5.0, 2.0])  # sphere
    outputs[0, material, 0, 0] = torch.tensor([0.0, 0.5])  # rubber
    outputs[0, colour, 0, 0] = torch.tensor([0.0, 0, 0, 0, 3, 0, 0, 1])  # brown
    answer = Answer(outputs[:, :1], outputs[:, 1:])
    twice = Answer(*(part.repeat_interleave(2, 2).repeat_interleave(2, 3) for part in answer))
    twice = twice._replace(attributes=answer.attributes)  # of cells of 2 x 2 pixels
    model.answers = lambda frames: [twice]
    logits = model(torch.zeros(1, 3, 2, 6))[0, :, 1, ::2]
    assert logits[0].tolist() == [0, 0, 0]  # background
    assert logits[class_id("sphere", "rubber", "brown"), 0] == 2.0
    assert logits[class_id("cylinder", "rubber", "brown"), 0] == 2.0 - 3.0
    assert logits[class_id("cube", "metal", "yellow"), 0] == 2.0 - 4.0 - 0.5 - 2.0
    brown = class_id("sphere", "rubber", "brown")
    assert model.labels(model.answers(None))[0, 1].tolist() == [brown, brown, 0, 0, 1, 1]


def test_bytes_and_floats_are_the_same_frame():
    frames = torch.randint(0, 256, (1, 3, 48, 48), dtype=torch.uint8)
    model = network()
    with torch.inference_mode():
        assert torch.equal(model(frames), model(frames / 255))


def test_folding_the_batch_normalisation_changes_no_label():
    frames = torch.rand(2, 3, 64, 96)
    model = network()
    with torch.inference_mode():
        before = model(frames)
        after = model.fuse()(frames)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_a_frame_does_not_depend_on_its_batch():
    model = network()
    frames = torch.rand(5, 3, 48, 64)
    alone = torch.cat([model.predict(frame[None]) for frame in frames])
    assert torch.equal(model.predict(frames), alone)


@pytest.mark.parametrize(
    ("width", "cells", "pixels"), [(10, 3, 4), (10, 5, 2), (7, 7, 1), (9, 2, 8)]
)
def test_cells_are_a_power_of_two_wide(width, cells, pixels):
    assert cell_width(torch.zeros(1, 1, 1, cells), torch.zeros(1, 1, width)) == pixels


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (torch.full((1, 3, 8, 8), 200.0), "floats up to 200: give uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"\(3, 8, 8\), not \(B, 3, H, W\)"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "not"),
    ],
)
def test_frames_that_are_none_are_a_sentence(frames, words):
    with pytest.raises(UserError, match=words):
        network().eval().predict(frames)


@pytest.mark.parametrize("size", [(2, 2), (4, 20), (16, 6)])
def test_the_mean_around_a_cell_is_over_those_in_the_frame(size):
    grey = torch.rand(2, 1, *size)
    cells = F.avg_pool2d(grey, 2)
    expected = F.avg_pool2d(cells, 5, 1, 2, count_include_pad=False)
    torch.testing.assert_close(model_module._local_mean(F.pixel_unshuffle(grey, 2)), expected)


def test_pooling_is_max_pooling():
    x = torch.randn(2, 3, 6, 10).contiguous(memory_format=torch.channels_last)
    assert torch.equal(_max_pool(x, training=False), F.max_pool2d(x, 2))


@pytest.mark.parametrize("training", [True, False])
def test_compiling_changes_nothing(monkeypatch, training):
    """With the tracer of torch.compile, but no code generator, which would take a minute."""
    model = network().train(training)
    frames = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    expected = copy.deepcopy(model).eval().predict(frames)
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call: compile_with(call, backend="eager"))
    compile_network(model, frames)
    assert "answers" in vars(model)
    assert torch.equal(model.eval().predict(frames), expected)


@pytest.mark.parametrize("training", [True, False])
@inductor_config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
def test_without_a_compiler_the_network_stays_as_it_is(capsys, training):
    model = network().train(training)
    frames = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    compile_network(model, frames)
    assert capsys.readouterr().err.splitlines()[-1].startswith("--compile is left out")
    assert len(model.answers(frames)) == 2
    assert "answers" not in vars(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_rebuilds_the_model(name):
    model = network(name)
    twin = UNet(**model.config).eval()
    twin.load_state_dict(model.state_dict())
    frames = torch.rand(1, 3, 32, 32)
    assert torch.equal(model.predict(frames), twin.predict(frames))


def test_loading_is_one_line_and_labelling_another(tmp_path):
    model = network()
    save_checkpoint(
        tmp_path / "net.pt", {"model": model.state_dict(), "model_config": model.config}
    )
    frames = torch.rand(1, 3, 32, 32)
    loaded = UNet.load(tmp_path / "net.pt")
    assert not loaded.training
    labels = loaded.predict(frames)
    assert torch.equal(labels, model.predict(frames))
    labels[labels > 0] = 0  # it is the user's
    assert not labels.any()


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ({"depth": 3}, "depth"),
        ({"widths": [8, 12]}, "do not fit"),
        ({"widths": "wide"}, "do not fit"),
    ],
)
def test_checkpoints_of_other_networks_get_a_sentence(tmp_path, change, needle):
    model = network()
    config = model.config | change
    save_checkpoint(tmp_path / "net.pt", {"model": model.state_dict(), "model_config": config})
    with pytest.raises(UserError, match=needle) as error:
        UNet.load(tmp_path / "net.pt")
    assert str(tmp_path / "net.pt") in str(error.value)


def test_every_weight_learns():
    model = network().train()
    answers = model.answers(torch.rand(2, 3, 64, 64))
    sum(part.square().mean() for answer in answers for part in answer).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


def test_loss_by_hand():
    """One object pixel, one background pixel: four cross entropies worked out with logarithms."""
    mask = torch.tensor([[[class_id("sphere", "rubber", "brown"), 0]]])
    logits = torch.zeros(1, 14, 1, 2)
    logits[0, 0] = torch.tensor([0.0, np.log(3)])  # p(object) = 1/2 and 3/4
    logits[0, 2, 0, 0] = np.log(2)  # p(sphere) = 2 / 4
    logits[0, 5, 0, 0] = np.log(4)  # p(rubber) = 4 / 5
    logits[0, 6, 0, 0] = np.log(9)  # p(brown) = 1 / 16, gray being 9 times as likely
    expected = 2 * (-np.log(1 / 2) - np.log(1 / 4)) / 2 - np.log(2 / 4 * 4 / 5 * 1 / 16)
    cell = logits[:, 1:, :, :1]  # one of 2 x 2 pixels, two of which lie beyond this frame
    loss = network().loss([Answer(logits[:, :1], cell)], mask)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_what_cells_say_is_interpolated_at_the_pixels():
    """Of two cells of 2 x 2 pixels, in the second column: three parts of the left one."""
    mask = torch.zeros(1, 2, 4, dtype=torch.int64)
    mask[0, 0, 1] = class_id("sphere", "rubber", "brown")
    objectness = torch.where(mask > 0, 50.0, -50.0)[:, None]
    attributes = torch.zeros(1, 13, 1, 2)
    attributes[0, 1, 0] = torch.tensor([4.0, -4.0])  # sphere: 0.75 * 4 - 0.25 * 4
    expected = np.log((np.exp(2.0) + 2) / np.exp(2.0)) + np.log(2 * 8)
    loss = network().loss([Answer(objectness, attributes)], mask)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_four_frames_learn_what_objects_are_at_one_pixel_of_each_cell():
    """Nothing is known of one cell; it counts in the frame whose turn its only pixel has."""
    mask = torch.zeros(4, 2, 2, dtype=torch.int64)
    mask[:, 1, 0] = class_id("sphere", "rubber", "brown")
    attributes = torch.zeros(4, 13, 1, 1)
    attributes[2] = 500 * one_hot_factors()[mask[0, 1, 0]][:, None, None]  # known, in one frame
    objectness = torch.where(mask > 0, 50.0, -50.0)[:, None]
    model = network()
    assert model.loss([Answer(objectness, attributes)], mask).item() == pytest.approx(0, abs=1e-6)
    losses = model.frame_losses([Answer(objectness, attributes)], mask)
    assert losses.tolist() == pytest.approx([np.log(48)] * 2 + [0, np.log(48)], abs=1e-6)


def test_pixels_where_two_objects_meet_weigh_four_times_as_much():
    a, b = class_id("sphere", "rubber", "brown"), class_id("cube", "metal", "red")
    mask = torch.tensor([[[a, a, a, a, b, b, b, b]]])
    attributes = 500 * one_hot_factors()[mask[..., ::2]].movedim(-1, 1)  # of cells
    attributes[..., 1:3] = 0  # nothing is known at the two pixels beside the border
    loss = network().loss([Answer(torch.full((1, 1, 1, 8), 50.0), attributes)], mask)
    assert loss.item() == pytest.approx(2 * 4 / (4 * 4 + 4) * np.log(48), rel=1e-6)


def test_loss_of_a_frame_without_objects_is_finite():
    coarse = Answer(torch.zeros(2, 1, 8, 8), torch.zeros(2, 13, 8, 8))
    fine = Answer(torch.zeros(2, 1, 16, 16, requires_grad=True), torch.zeros(2, 13, 8, 8))
    loss = network().loss([coarse, fine], torch.zeros(2, 16, 16, dtype=torch.int64))
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("size", [(42, 50), (40, 40), (96, 96), (33, 31)])
def test_loss_of_frames_of_any_size(size):
    """Coarse stages are compared with the ids at the middle of their cells, within the frame."""
    model = UNet(widths=(4, 8, 12))
    mask = torch.zeros(1, *size, dtype=torch.int64)
    mask[:, 20:] = 30
    answers = model.answers(torch.rand(1, 3, *size))
    assert model.loss(answers, mask).isfinite()
    cells = middle_ids(mask, answers[0].objectness)
    assert cells.shape == (1, -(-size[0] // 4), -(-size[1] // 4))
    assert cells[0, :, 0].tolist() == [0 if 4 * i + 2 < 20 else 30 for i in range(cells.shape[1])]


def test_with_a_mask_forward_is_the_loss_and_frames_have_theirs():
    model = network()
    frames, mask = torch.rand(3, 3, 32, 48), torch.zeros(3, 32, 48, dtype=torch.uint8)
    mask[:, 8:20, 8:20] = 30
    with torch.no_grad():
        loss, each = model(frames, mask), model.frame_losses(model.answers(frames), mask)
        alone = [model(frames[i : i + 1], mask[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(each, torch.stack(alone))
    torch.testing.assert_close(each.mean(), loss)  # as many object pixels in each


@pytest.mark.parametrize("widths", [(8,), (), (8, 0), [8] * 9])
def test_impossible_configurations_are_refused(widths):
    with pytest.raises(ValueError, match="2 to 8 stages"):
        UNet(widths=widths)


NONSENSE = [
    *({"widths": widths} for widths in ("ab", None, 5, [8, "16"], [8.0, 16.0], [-8, 16])),
    *({"widths": widths} for widths in ([10**9] * 2, [30_000] * 2, [10**40, 8], [8] * 10_000)),
    *({"widths": torch.zeros(3)}, {3: 4}, {"depth": 2}),
]


@pytest.mark.parametrize("config", NONSENSE, ids=str)
def test_configurations_of_nonsense_take_no_memory_and_get_a_sentence(config):
    state = UNet(widths=(8, 16)).state_dict()
    with pytest.raises(UserError, match=r"some\.pt do not fit"):
        UNet.from_checkpoint({"model": state, "model_config": config}, "some.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value):
    state = UNet(widths=(8, 16)).state_dict()
    state["encoder.0.0.norm1.running_var"][3] = value
    with pytest.raises(UserError, match=r"some\.pt do not fit .*not finite"):
        UNet.from_checkpoint({"model": state, "model_config": {"widths": [8, 16]}}, "some.pt")


EXPORTED = (2, 3, 160, 240)  # frames of the usual size
OTHERS = ((1, 320, 480), (5, 64, 48))  # batch, height and width of what was not exported


@pytest.fixture(scope="module")
def trained() -> UNet:
    """Return the shipped network, since random logits have no scale to compare them on."""
    return UNet.load(SHIPPED)


def expected(model: UNet, frames: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(frames)


def dynamic() -> dict:
    """Return that batch size is any, and heights and widths are any multiples of 16."""
    batch, height, width = (torch.export.Dim(name, min=1) for name in ("batch", "high", "wide"))
    return {"frames": {0: batch, 2: 16 * height, 3: 16 * width}}


@pytest.mark.parametrize("shape", [EXPORTED, *((b, 3, h, w) for b, h, w in OTHERS)])
def test_onnx_gives_the_same_logits(trained, onnx_session, shape):
    frames = torch.randint(0, 256, shape, dtype=torch.uint8)
    (logits,) = onnx_session.run(None, {"frames": frames.numpy()})
    np.testing.assert_allclose(logits, expected(trained, frames), atol=1e-3)


@pytest.fixture(scope="module")
def onnx_session(trained, tmp_path_factory):
    """Export by the lines of the README, as they stand there."""
    onnxruntime = pytest.importorskip("onnxruntime")
    (lines,) = [block for block in BLOCKS if "torch.onnx.export" in block]
    here = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("onnx"))
    try:
        exec(lines, {"model": trained, "frames": torch.zeros(EXPORTED, dtype=torch.uint8)})
        providers = ["CPUExecutionProvider"]
        return onnxruntime.InferenceSession("clevr_unet.onnx", providers=providers)
    finally:
        os.chdir(here)


def test_exported_programs_give_the_same_logits(trained):
    frames = torch.zeros(EXPORTED, dtype=torch.uint8)
    program = torch.export.export(trained, (frames,), dynamic_shapes=dynamic()).module()
    for batch, height, width in OTHERS:
        frames = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
        torch.testing.assert_close(program(frames), expected(trained, frames))


@pytest.mark.filterwarnings("ignore")  # of being old
def test_a_trace_gives_the_same_logits_for_frames_of_any_size(trained):
    traced = torch.jit.trace(trained, torch.zeros(EXPORTED, dtype=torch.uint8))
    for batch, height, width in (*OTHERS, (3, 150, 230)):
        frames = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
        torch.testing.assert_close(traced(frames), expected(trained, frames))
