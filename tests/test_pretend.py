"""Training and validation on a pretended GPU: the CPU's figures, few launches, no waiting.

Every test has a process of its own, since the device stays for good.
"""

import json

import pretend
import pytest
import torch
from test_train import write_videos

import batches
import train

HEADER = """
import json, os, pathlib, sys, torch
import augment, batches, devices, model, optim, pretend, runs, train, utils
from collections import Counter

CPU, DEVICE = torch.device("cpu"), torch.device("pretend", 0)

def precision(name):
    bf16 = lambda device: name == "bf16"
    devices.has_bfloat16 = model.has_bfloat16 = bf16

def batch():
    torch.manual_seed(3)
    images = torch.randint(0, 256, (4, 3, 160, 240), dtype=torch.uint8)
    masks = torch.zeros(4, 160, 240, dtype=torch.uint8)
    masks[:, 30:60, 40:70], masks[1:3, 90:120, 140:170] = 7, 30  # and a frame without objects:
    masks[3] = 0
    return images, masks

def start(device, **config):
    torch.manual_seed(0)
    network = model.UNet(**config).to(device, memory_format=torch.channels_last)
    return runs.Run.open(network, devices.Processes(device), num_epochs=10**6)

def step(run, device):
    torch.manual_seed(1)
    keeper = runs.Keeper(run, pathlib.Path("nowhere"))
    return train.train_one_epoch(run, run.model, [batch()], keeper)

def validate(run, device, batches=1):
    return train.validate(run.ema, [batch()] * batches, devices.Processes(device))
"""


def on_device(code: str, *arguments: str) -> dict:
    """Run code after HEADER; return what it prints in its last line, as JSON."""
    status, printed, errors = pretend.in_new_process(HEADER + code, *arguments)
    assert status == 0, errors[-3000:]
    return json.loads(printed.splitlines()[-1])


COMPARE = """
precision(sys.argv[1])
utils.seed_everything(0)  # else the gradient of upsampling is another kernel's
found = {}
for device in (CPU, DEVICE):
    run = start(device, widths=[8, 12, 16])
    torch.manual_seed(2)
    crops, masks = augment.augment(*(x.to(device) for x in batch()))
    losses = [step(run, device)["train_loss"] for _ in range(3)]
    figures = validate(run, device)
    state = {name: value.cpu() for name, value in run.ema.state_dict().items()}
    found[device.type] = (crops.cpu(), masks.cpu(), losses, figures, state)
(crops, masks, losses, figures, state), theirs = found["cpu"], found["pretend"]
print(json.dumps({
    "augmented alike": torch.equal(crops, theirs[0]) and torch.equal(masks, theirs[1]),
    "losses": [losses, theirs[2]],
    "val_loss": [figures["val_loss"], theirs[3]["val_loss"]],
    "pixels": [sum(f["pixels"].values()) for f in (figures, theirs[3])],
    "difference": max((state[k] - theirs[4][k]).double().abs().max().item() for k in state),
}))
"""


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-4), ("bf16", 3e-3)])
def test_it_trains_validates_and_augments_as_the_cpu(precision, tolerance):
    """Not bit by bit: its matrices share one stack, its means are pooled; both add up otherwise."""
    found = on_device(COMPARE, precision)
    assert found["augmented alike"]
    assert found["losses"][1] == pytest.approx(found["losses"][0], rel=tolerance)
    assert found["val_loss"][1] == pytest.approx(found["val_loss"][0], rel=tolerance)
    assert found["pixels"] == [4 * 160 * 240] * 2
    assert found["difference"] < tolerance


COUNT = """
precision(sys.argv[1])
utils.seed_everything(0, deterministic=False)  # as train.py off the CPU
run = start(DEVICE)

def count(call, *arguments):
    pretend.reset()
    call(run, DEVICE, *arguments)
    return sum(pretend.counts().kernels.values()), pretend.counts().waits

step(run, DEVICE)
found = {"train": count(step), "one": count(validate), "two": count(validate, 2)}
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("precision", "step", "validation"), [("fp32", 546, 220), ("bf16", 621, 224)]
)
def test_launches_and_waits_are_no_more_than_they_were(precision, step, validation):
    """What waits is the end of an epoch, for its loss, and of validation, for its figures."""
    found = on_device(COUNT, precision)
    assert found["train"][0] <= step
    assert found["train"][1] == {"blocking copy to the CPU": 1}
    assert found["two"][0] - found["one"][0] <= validation, "a batch: casts and fuses are done once"
    assert found["two"][1] == found["one"][1] == {"blocking copy to the CPU": 2}


DEVICE_ITSELF = """
x, y = torch.arange(6.0, device=DEVICE), torch.arange(6.0)
refused = []
for call in (lambda: x + y, lambda: torch.where(x > 2, x, y), lambda: torch.stack([x, y]),
             lambda: torch._foreach_add([x], [y]), lambda: x.add_(y), lambda: y.add_(x)):
    try:
        call()
    except RuntimeError as error:
        refused.append("pretend" in str(error))
pretend.reset()
(x + 1) * torch.tensor(2.0)  # a scalar may be the CPU's, as on CUDA
free = dict(pretend.counts().waits)
x.sum().item(), x.tolist(), x.nonzero(), x[x > 2], x.cpu(), x[torch.tensor([1, 2])]
x[x > 2] = x.new_ones(3)
waits = dict(pretend.counts().waits)
expected = x.cpu()
late = x.to("cpu", non_blocking=True)
early = late.clone()
torch.accelerator.current_stream().synchronize()
pretend.reset()
torch._foreach_add_([x + 0 for _ in range(65)], 1.0)
print(json.dumps({
    "refused": refused, "free": free, "waits": waits,
    "early": early.eq(expected).any().item(), "late": late.eq(expected).all().item(),
    "launches": pretend.counts().kernels["_foreach_add_"],
}))
"""


def test_the_device_refuses_counts_and_is_late():
    found = on_device(DEVICE_ITSELF)
    assert found["refused"] == [True] * 6
    assert found["free"] == {}
    assert found["waits"] == {
        "item": 1,
        "nonzero": 2,
        "boolean indexing": 1,
        "blocking copy to the CPU": 2,
        "blocking copy to the device": 1,
    }
    assert not found["early"]
    assert found["late"]
    assert found["launches"] == 1


FORGET = """
fault = sys.argv[1]
run = start(DEVICE, widths=[8, 12])
if fault == "batch":
    batch = lambda images=torch.zeros(4, 3, 160, 240, dtype=torch.uint8): (images, images[:, 0])
    torch.Tensor.to = lambda x, *args, to=torch.Tensor.to, **options: (
        x if x.dtype == torch.uint8 else to(x, *args, **options))
elif fault == "table":
    run.model.one_hot = run.model.one_hot.cpu()
elif fault == "weight":
    run.model.heads.cpu()
elif fault == "velocity":
    run.optimizer.velocities[0] = run.optimizer.velocities[0].cpu()
try:
    step(run, DEVICE)
except RuntimeError as error:  # where PyTorch looks itself, the words are its own
    print(json.dumps({"error": str(error)}))
"""


@pytest.mark.parametrize("fault", ["batch", "table", "weight", "velocity"])
def test_what_was_forgotten_on_the_cpu_is_found(fault):
    assert on_device(FORGET, fault)["error"]


SCRIPT = """
batches.EPOCH_STEPS = 1
sys.argv[0] = "train.py"
utils.run_script(train.main)
"""


def test_a_run_of_the_script_leaves_checkpoints_that_any_machine_loads(tmp_path, monkeypatch, call):
    """And goes on from its own, in a later epoch, and from a CPU's."""
    write_videos(tmp_path / "videos", count=3, frames=4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batches, "EPOCH_STEPS", 1)
    command = ["--data", "videos", "--batch-size", 4, "--widths", 8, 12, "--workers", 0, "--resume"]
    for epochs, device in ((1, "pretend:0"), (2, "cpu"), (3, "pretend:0")):
        arguments = (*command, "--num-epochs", epochs)
        if device == "cpu":
            status, printed, errors = call(train, *arguments, "--device", device)
        else:
            status, printed, errors = pretend.in_new_process(HEADER + SCRIPT, *arguments)
        assert status == 0, errors[-3000:]
        assert f"device: {device} " in printed
        file = tmp_path / "checkpoints" / "Unet_checkpoint_last.pt"
        checkpoint = torch.load(file, weights_only=True)  # no map_location
        tensors = [*checkpoint["model"].values(), *checkpoint["training"]["model"].values()]
        tensors += checkpoint["training"]["optimizer"]["velocities"]
        assert {tensor.device.type for tensor in tensors} == {"cpu"}
        assert checkpoint["epoch"] == epochs


RANK = "os.environ |= dict(WORLD_SIZE='2', RANK='1', LOCAL_RANK='1')"


def test_processes_beyond_the_gpus_of_a_machine_get_a_sentence():
    status, _, errors = pretend.in_new_process(HEADER + RANK + SCRIPT, "--data", "nowhere")
    assert status == 2
    assert "--nproc-per-node=1" in errors
    assert "Traceback" not in errors
