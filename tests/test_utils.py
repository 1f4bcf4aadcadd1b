"""Exit statuses, and life without git."""

import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import utils
from utils import Stopped, UserError, run_script

OF_A_WORKER = (  # as torch says it
    "Caught UserError in DataLoader worker process 0.\n"
    'Original Traceback (most recent call last):\n  File "x.py", line 1\n'
    "utils.UserError: a.png: unreadable, replace it: or delete it\n"
)


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        (None, 0, ""),
        (1, 1, ""),
        (UserError("a.png: unreadable,\n replace it"), 2, "error: a.png: unreadable, replace it\n"),
        (UserError(OF_A_WORKER), 2, "error: a.png: unreadable, replace it: or delete it\n"),
        (PermissionError(13, "Permission denied", "a.npy"), 2, "error: a.npy: Permission denied: "),
        (
            OSError(28, "No space left on device", "a.npy"),
            2,
            "a.npy: No space left on device: ma",
        ),
        (MemoryError(), 2, "error: memory ran out (MemoryError): give a smaller --batch-size"),
        (RuntimeError("[enforce fail] can't allocate memory: 9 bytes"), 2, "error: memory ran out"),
        (RuntimeError("std::bad_alloc"), 2, "error: memory ran out (std::bad_alloc): give"),
        (RuntimeError("DataLoader worker (pid 9) is killed by signal"), 2, "fewer --workers"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
        (Stopped("stopped, all is saved", 15), 143, "stopped, all is saved\n"),
        (Stopped("", 2), 130, ""),
    ],
)
def test_a_script_ends_with_its_status_and_one_sentence(capsys, outcome, status, said):
    def main():
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == status
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("outcome", "left"), [(None, 1), (Stopped("", 15), 1), (UserError("a"), 0), (ValueError(), 0)]
)
def test_only_who_succeeds_takes_leave_of_the_other_processes(monkeypatch, outcome, left):
    """A process that fails must not wait for others, who wait for it elsewhere."""
    leaves = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: leaves.append(1))

    def main():
        if outcome:
            raise outcome

    with pytest.raises((SystemExit, ValueError)):
        run_script(main)
    assert len(leaves) == left


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 // 0)


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_goes_away_ends_a_script_quietly(lines):
    """Whether the pipe breaks while the script prints, or at its last flush."""
    code = f"from utils import run_script; run_script(lambda: print('line\\n' * {lines}))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


def test_without_git_the_log_still_begins(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    header = utils.log_header(torch.device("cpu"))
    assert f"clevr-unet {utils.VERSION}, commit none" in header
    assert f"torch {torch.__version__}" in header


LAUNCHER = """
import os, subprocess, sys
os.environ |= {"TORCHELASTIC_RUN_ID": "none"}
code = "import time, torch, devices; devices.Processes(torch.device('cpu')); print('up'); "
code += "time.sleep(60)"
subprocess.run([sys.executable, "-u", "-c", code], start_new_session=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="others have no such signal")
def test_processes_do_not_outlive_a_launcher_that_is_killed():
    """They would go on writing beside the run that goes on in their place."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout.readline() == "up\n"
    launcher.kill()
    begun = time.monotonic()
    assert launcher.stdout.read() == ""  # until the process, which holds the pipe, is gone
    assert time.monotonic() - begun < 50
    launcher.wait()


def test_the_version_and_the_licence_are_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text()
    facts = dict(re.findall(r"^([a-z-]+): \"?([^\"\n]+)", citation, flags=re.MULTILINE))
    number, date = re.search(
        r"^## \[(.+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE
    ).groups()
    assert facts["version"] == number == utils.VERSION
    assert facts["date-released"] == date
    assert (ROOT / "LICENSE").read_text().startswith(f"{facts['license']} License\n")
