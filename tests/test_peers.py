"""The networks that benchmark.py compares with: the classic UNet is the paper's, and all fit in."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench import peers
from classes import NUM_CLASSES
from optim import MuonAdamW

PEERS = [name for name in peers.NETWORKS if name != "ours"]


def network(name):
    """Return a peer of its own size, but the classic UNet, which is slow, narrow."""
    if name.startswith("smp"):
        pytest.importorskip("segmentation_models_pytorch", reason="requirements-dev.txt has it")
    torch.manual_seed(0)
    return peers.classic_unet(width=8) if name == "classic" else peers.NETWORKS[name]()


def batch(height=40, width=56):
    """Return two random frames and masks with an object each."""
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    masks[:, 8:24, 8:32] = 29
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8), masks


def test_the_classic_unet_has_the_parameters_of_the_papers():
    """By hand: 3x3 filters without bias, two numbers of each normalisation; 2x2 ups; the head."""
    widths = [64, 128, 256, 512, 1024]
    pairs = list(zip([3, *widths], widths, strict=False))  # in and out, on the way down
    pairs += [(2 * w, w) for w in widths[-2::-1]]  # a map and its skip, on the way up
    by_hand = sum(9 * a * b + 2 * b + 9 * b * b + 2 * b for a, b in pairs)
    by_hand += sum(4 * 2 * w * w + w for w in widths[:-1]) + 64 * NUM_CLASSES + NUM_CLASSES
    model = peers.NETWORKS["classic"]()
    assert sum(p.numel() for p in model.parameters()) == by_hand == 31_040_753


def test_the_classic_unet_reads_every_skip():
    model = peers.ClassicUNet(width=4)
    made, read = {}, {}
    for n in (1, 2, 3, 4):
        down, merge = getattr(model, f"down{n}"), getattr(model, f"merge{n}")
        down.register_forward_hook(lambda _, __, x, n=n: made.update({n: x.clone()}))
        merge.register_forward_pre_hook(lambda _, x, n=n: read.update({n: x[0]}))
    logits = model(torch.rand(2, 3, 32, 48))
    assert logits.shape == (2, NUM_CLASSES, 32, 48)
    for n, skip in made.items():
        assert skip.shape == (2, 4 * 2 ** (n - 1), 32 // 2 ** (n - 1), 48 // 2 ** (n - 1))
        assert torch.equal(read[n][:, : skip.shape[1]], skip)
    logits.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters()), "a layer that nothing reads"


@pytest.mark.parametrize("size", [(16, 32), (33, 50), (7, 5)])
def test_the_classic_unet_repeats_the_border_of_frames_of_other_sizes(size):
    model = network("classic").eval()
    height, width = size
    frames = torch.rand(2, 3, height, width)
    padded = F.pad(frames, (0, -width % 16, 0, -height % 16), mode="replicate")
    with torch.no_grad():
        logits, whole = model(frames), model(padded)
    assert logits.shape == (2, NUM_CLASSES, height, width)
    assert whole.shape[-2] % 16 == whole.shape[-1] % 16 == 0
    assert torch.allclose(logits, whole[..., :height, :width], atol=1e-5)


@pytest.mark.parametrize("name", PEERS)
def test_peers_label_train_and_fuse_as_a_unet_does(name):
    model, (frames, masks) = network(name), batch()
    before = copy.deepcopy(model.state_dict())
    loss = model(frames, masks)
    assert loss.shape == ()
    loss.backward()
    MuonAdamW(model).step(1e-3)
    after = model.state_dict()
    assert all(not torch.equal(after[key], before[key]) for key, _ in model.named_parameters())
    model.eval()
    with torch.no_grad():
        logits = model(frames)
        assert logits.shape == (2, NUM_CLASSES, 40, 56)
        assert torch.equal(model(frames / 255), logits), "bytes and floats are the same frames"
        labels, fused = model.predict(frames), model.fuse()(frames)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), logits.argmax(dim=1))
    assert torch.allclose(fused, logits, rtol=1e-3, atol=1e-3 * logits.abs().max().item())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


@pytest.mark.parametrize("name", PEERS)
def test_the_loss_is_a_cross_entropy_in_float32(name):
    model, (frames, masks) = network(name).eval(), batch()
    with torch.no_grad():
        logits, ids = model(frames), masks.long()
        by_hand = [F.cross_entropy(logits[i : i + 1], ids[i : i + 1]) for i in range(len(frames))]
        loss, each = model(frames, masks), model.frame_losses(model.answers(frames), masks)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(frames, masks).dtype == torch.float32
    assert torch.allclose(each, torch.stack(by_hand), rtol=1e-4)
    assert torch.allclose(loss, torch.stack(by_hand).mean(), rtol=1e-4)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_peer_lays_out_its_input(layout):
    model, seen = network("classic").eval(), []
    model.layout = layout
    model.network.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model.predict(batch()[0])
    assert seen[0].is_contiguous(memory_format=layout)


def test_what_a_peer_says_of_an_object_by_hand():
    """Three red and one cyan metal cube, and a cell of background, of 2 x 2 pixels each."""
    logits = torch.full((1, 49, 2, 4), -50.0)
    logits[0, 0] = 0.0
    red, cyan = 1 + 1, 1 + 5  # metal cubes
    logits[0, red, :, :2], logits[0, cyan, :, :2] = 8.0, 4.0
    things, kinds = peers.Peer(torch.nn.Identity()).evidence(logits)
    assert things.tolist() == [[[[8.0, 8.0, -50.0, -50.0]] * 2]]
    assert kinds.shape == (1, 13, 1, 2)
    shape, material, colour = kinds[0, :, 0, 0].split((3, 2, 8))
    assert (shape.argmax(), material.argmax(), colour.argmax()) == (0, 0, 1)
    assert colour[1] - colour[5] == pytest.approx(4.0)
    both = torch.tensor([8.0, 4.0]).logsumexp(0)  # either way it is a cube, and metal
    assert shape[0] == pytest.approx(both.item())
    assert material[0] == pytest.approx(both.item())
