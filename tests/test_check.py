"""`benchmark.py --check`: all is well on a CPU and on a pretended GPU, and what is not is named."""

import sys
from pathlib import Path

import pretend
import pytest
import torch
from conftest import write_video

import batches
import benchmark
from bench import check
from checkpoints import SHIPPED
from optim import MuonAdamW
from render import render_video
from utils import Stopped
from videos import find_videos, read_labels, read_video

CPU = torch.device("cpu")


def write_short_videos(folder: Path) -> None:
    """Write two videos of 4 frames."""
    for k in range(2):
        write_video(folder / f"video_{k}", *render_video([check.SEED, k], check.OBJECTS, 4))


@pytest.fixture
def short(monkeypatch):
    """Let a check take seconds."""
    monkeypatch.setattr(check, "render_videos", write_short_videos)
    monkeypatch.setattr(batches, "EPOCH_STEPS", 1)


@pytest.fixture
def case(tmp_path) -> check.Case:
    write_short_videos(tmp_path / "data")
    videos = find_videos(tmp_path / "data")
    frames = [read_video(video) for video in videos]
    masks = [read_labels(video.path) for video in videos]
    return check.Case(CPU, SHIPPED, tmp_path, frames, masks)


@pytest.mark.usefixtures("short")
def test_all_is_well_on_a_cpu(call):
    """Two processes under torchrun included."""
    deterministic = torch.get_deterministic_debug_mode()
    status, printed, _ = call(benchmark, "--check", "--device", "cpu")
    lines = printed.splitlines()
    assert status == 0, printed
    assert lines[0] == "command: python benchmark.py --check --device cpu"
    assert lines[-1] == "all well"
    checks = [line.split(": ") for line in lines[3:-1]]
    assert [name for name, *_ in checks] == list(check.CHECKS)
    unlike = "bfloat16" if not check.devices.has_bfloat16(CPU) else "-"
    assert all(word == "well" for name, word, *_ in checks if unlike not in name)
    assert "weights off by 0.0e+00; two runs" in printed
    assert torch.get_deterministic_debug_mode() == deterministic


PRETENDED = """
import batches, benchmark, test_check, utils
from bench import check
batches.EPOCH_STEPS = 1
check.render_videos = test_check.write_short_videos
utils.run_script(benchmark.main)
"""


def test_all_is_well_on_a_pretended_gpu():
    """It has no other process: torchrun's would not know the device."""
    command = ("--check", "--device", "pretend")
    status, printed, errors = pretend.in_new_process(PRETENDED, *command)
    assert status == 0, printed + errors[-3000:]
    assert "two processes: left out: there is one pretend device\n" in printed
    assert "labels in float32: well: 0 of " in printed
    assert printed.count(": well: ") + printed.count(": left out: ") == len(check.CHECKS)
    assert printed.endswith("\nall well\n")


@pytest.mark.usefixtures("short")
def test_a_check_that_raises_is_named_and_the_others_run(monkeypatch, capsys):
    def fail(case: check.Case) -> check.Finding:
        raise RuntimeError("a long story\n  CUDA error: an illegal memory access")

    checks = {
        "first": fail,
        "second": lambda case: (True, "1 of 1"),
        "third": lambda case: (False, "0 of 1"),
        "fourth": lambda case: (None, "there is one"),
    }
    monkeypatch.setattr(check, "CHECKS", checks)
    assert check.report(CPU, SHIPPED) == 1
    assert capsys.readouterr().out.splitlines() == [
        "first: NOT WELL: RuntimeError: CUDA error: an illegal memory access",
        "second: well: 1 of 1",
        "third: NOT WELL: 0 of 1",
        "fourth: left out: there is one",
        "not well: first, third",
    ]


def test_weights_that_are_not_there_are_a_sentence(call):
    status, _, error = call(benchmark, "--check", "--device", "cpu", "--ckpt", "nothing.pt")
    assert (status, error.count("\n")) == (2, 1)
    assert "no checkpoint at nothing.pt" in error


def test_other_labels_are_not_well(case, monkeypatch):
    """One object pixel in 5,000 is too many for float32, and none too many for bfloat16."""
    labels_of, calls = check.labels_of, []

    def other(*args) -> torch.Tensor:
        labels = labels_of(*args)
        calls.append(args)
        if len(calls) % 2 == 0:  # the device's
            where = labels.reshape(-1).nonzero()[::5000]
            labels = labels.clone()
            labels.view(-1)[where] = 49
        return labels

    monkeypatch.setattr(check, "labels_of", other)
    well, text = check.compare_labels(case, full=True)
    assert not well, text
    monkeypatch.setattr(check.devices, "has_bfloat16", lambda device: True)
    well, text = check.compare_labels(case, full=False)
    assert well, text


@pytest.mark.parametrize("fault", ["one gradient", "all gradients"])
def test_another_step_is_not_well(case, monkeypatch, fault):
    assert check.compare_step(case, full=True)[0]
    step, calls = MuonAdamW.step, []

    def other(self: MuonAdamW, rate: float) -> None:
        calls.append(1)
        if len(calls) == 2:  # the device's
            for weight in self.filters[: 1 if fault == "one gradient" else None]:
                weight.grad.mul_(-1)
        step(self, rate)

    monkeypatch.setattr(MuonAdamW, "step", other)
    well, text = check.compare_step(case, full=True)
    assert not well, text


def test_a_run_that_forgets_its_optimiser_is_not_well(case, monkeypatch):
    monkeypatch.setattr(MuonAdamW, "load_state_dict", lambda self, state: None)
    well, text = check.resume(case)
    assert not well, text
    assert text.endswith("two runs that were not stopped by 0.0e+00")


def test_processes_that_fail_or_hang_are_told_of(monkeypatch):
    error = "import sys; sys.exit('Traceback\\n[rank1]: RuntimeError: NCCL\\nroot: error')"
    with pytest.raises(RuntimeError, match="^RuntimeError: NCCL$"):
        check.run_alone([sys.executable, "-c", error])
    monkeypatch.setattr(check, "PATIENCE", 0.5)
    with pytest.raises(RuntimeError, match="no end after 0.5 seconds"):
        check.run_alone([sys.executable, "-c", "import time; time.sleep(60)"])


@pytest.mark.usefixtures("short")
def test_a_check_that_is_stopped_is_no_fault(monkeypatch, call):
    def stop(case: check.Case) -> check.Finding:
        raise Stopped("stopped, go on with: python benchmark.py --check --resume", 15)

    monkeypatch.setattr(check, "CHECKS", {"first": stop})
    status, printed, errors = call(benchmark, "--check", "--device", "cpu")
    assert (status, errors) == (143, "stopped\n")
    assert "NOT WELL" not in printed
