"""A machine that fails: a full disk, no permission, no shared memory, no home, no memory.

Part of the soak: `pytest -m soak`. Root alone can mount small disks and become another user.
"""

import os
import re
import shutil
import subprocess
from collections import Counter

import pytest
from conftest import run
from soak import differences, go_on, never_touched, tasks

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(os.geteuid() != 0, reason="root alone can mount a small disk"),
]
MEMORY = 1, 5, 10, 20, 35, 50, 75, 100, 150, 200  # MB beyond what the imports take
SHARES = 0, 0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95  # of what a script needs


@pytest.fixture
def disk(tmp_path):
    """Return a function that mounts a disk of so many bytes, or gives it that size."""
    folder, mounted = tmp_path / "disk", []

    def mount(size: int):
        options = f"{'remount,' if mounted else ''}size={max(4096, size)}"
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        mounted.append(size)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("name", ["train", "infer", "render", "preview", "evaluate"])
def test_a_full_disk_costs_nothing(name, driver, shared, tmp_path, disk, record_property):
    task = tasks(shared, epochs=1)[name]
    untouched, wrong, full = never_touched(driver, task, tmp_path / "untouched"), [], 0
    need = sum(-(-p.lstat().st_size // 4096) * 4096 for p in untouched.rglob("*"))
    for share in SHARES:
        folder = tmp_path / "disk" / "x"
        shutil.rmtree(folder, ignore_errors=True)
        disk(int(share * need))
        folder.mkdir()
        status, said = driver(folder, task.script, *task.arguments(folder)), driver.stderr
        where = f"{share:.0%} of {need / 1e6:.1f} MB: exit status {status}: {said[-2000:]}"
        full += status != 0
        if (
            status not in (0, 1, 2)
            or "Traceback" in said
            or (status == 2 and str(folder) not in said)
        ):
            wrong.append(where)
        disk(2**30)
        wrong += [f"{where}{what}" for what in go_on(driver, task, folder, untouched)]
    record_property("full disks", full)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["train", "infer", "render", "preview"])
def test_memory_that_runs_out_costs_nothing(name, driver, shared, tmp_path, record_property):
    """A sentence where Python can still speak; a library that ends the process loses nothing."""
    task = tasks(shared, epochs=1)[name]
    untouched, wrong, ended = never_touched(driver, task, tmp_path / "untouched"), [], Counter()
    for megabytes in MEMORY:
        folder = tmp_path / f"with-{megabytes}"
        folder.mkdir()
        arguments = task.arguments(folder)
        status = driver(folder, task.script, *arguments, memory=megabytes * 2**20)
        where = f"{megabytes} MB: exit status {status}: {driver.stderr[-2000:]}"
        ended["done" if not status else "a sentence" if status in (1, 2) else "crash"] += 1
        if "Traceback" in driver.stderr:
            wrong.append(where)
        wrong += [f"{where}{what}" for what in go_on(driver, task, folder, untouched)]
    print(name, dict(ended))
    record_property("times out of memory", len(MEMORY) - ended["done"])
    assert not wrong, "\n".join(wrong)


# No permission, nothing to share memory through, a home that cannot be written


# Root that owns nothing here and may not override that.
POWERLESS = "setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"


@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv (util-linux) is not there")
@pytest.mark.parametrize("name", ["train", "infer", "render", "preview", "evaluate"])
def test_what_may_not_be_written_costs_nothing(name, driver, shared, tmp_path):
    task = tasks(shared, epochs=1)[name]
    untouched, folder = never_touched(driver, task, tmp_path / "untouched"), tmp_path / "closed"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    arguments = task.arguments(folder)
    result = run(f"{task.script}.py", *arguments, behind=POWERLESS, env=environment)
    said = result.stderr.splitlines()
    assert result.returncode == 2
    assert re.search(f"^error: {folder}.*: Permission denied: ", said[-1])
    assert all("cache" in line for line in said[:-1]), "every epoch decodes the PNGs again"
    os.chown(folder, 0, 0)
    assert not go_on(driver, task, folder, untouched)


def test_a_closed_folder_in_the_midst_of_masks_costs_its_run_and_nothing_else(
    driver, shared, tmp_path
):
    task = tasks(shared)["infer"]
    untouched, folder = (
        never_touched(driver, task, tmp_path / name) for name in ("untouched", "closed")
    )
    (folder / "out/video_1/mask.npy").unlink()
    os.chown(folder / "out/video_1", 65534, 65534)
    result = run("infer.py", *task.arguments(folder), "--resume", behind=POWERLESS)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"error: {folder}/out/video_1/" in result.stderr
    os.chown(folder / "out/video_1", 0, 0)
    assert not go_on(driver, task, folder, untouched)


SHARED_MEMORY = {
    "full": "umount /dev/shm; mount -t tmpfs -o size=8k tmpfs /dev/shm",
    "read-only": "umount /dev/shm; mount -t tmpfs -o ro tmpfs /dev/shm",
    "none": """
        mount -t tmpfs tmpfs {folder}
        for d in null zero random urandom; do
            touch {folder}/$d && mount --bind /dev/$d {folder}/$d || exit 99
        done
        mount --rbind {folder} /dev""",
}


@pytest.mark.parametrize("shm", SHARED_MEMORY)
@pytest.mark.parametrize("name", ["train", "infer", "render"])
def test_no_shared_memory_is_a_line_and_the_same_files(name, shm, driver, shared, tmp_path):
    """Processes that label need none, and say nothing."""
    task = tasks(shared, epochs=1)[name]
    untouched = never_touched(driver, task, tmp_path / "untouched")
    folder, dev = tmp_path / "without", tmp_path / "dev"
    folder.mkdir()
    dev.mkdir()
    mount = SHARED_MEMORY[shm].format(folder=dev)
    prefix = ("unshare", "-m", "sh", "-c", f'{mount} || exit 99; exec "$@"', "sh")
    workers = ("--workers", 2) if name in ("train", "infer") else ()
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    result = run(f"{name}.py", *task.arguments(folder), *workers, behind=prefix, env=environment)
    if result.returncode == 99 or "unshare" in result.stderr:
        pytest.skip(f"/dev/shm cannot be taken away here: {result.stderr.strip()}")
    assert result.returncode == 0, result.stderr
    assert ("/dev/shm" in result.stdout + result.stderr) == (name != "infer")
    assert not differences(folder, untouched)


def test_a_home_that_cannot_be_written_costs_the_cache(driver, shared, tmp_path, disk):
    task = tasks(shared, epochs=1)["train"]
    untouched, folder = never_touched(driver, task, tmp_path / "untouched"), tmp_path / "without"
    folder.mkdir()
    home = disk(4096)
    subprocess.run(["mount", "-o", "remount,ro", home], check=True)
    environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": ""}
    result = run("train.py", *task.arguments(folder), env=environment)
    assert result.returncode == 0, result.stderr
    assert f"cache {home}/.cache/clevr-unet cannot be written (Read-only" in result.stderr
    shutil.rmtree(untouched / "cache")
    assert not differences(folder, untouched)
