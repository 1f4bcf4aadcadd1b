"""A machine that fails: a full disk, no permission, no shared memory, no home, no memory.

Part of the soak: `pytest -m soak`. Root alone can mount small disks and become another user.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT
from crashes import Driver
from soak import differences, tasks, write_data

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(os.geteuid() != 0, reason="root alone can mount a small disk"),
]
MEMORY = 1, 5, 10, 20, 35, 50, 75, 100, 150, 200  # MB beyond what the imports take
SHARES = 0, 0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95  # of what a script needs


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    driver = Driver(tmp_path_factory.mktemp("driver"))
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, driver):
    """Data, masks of it, and a folder of runs that were never touched."""
    folder = tmp_path_factory.mktemp("shared")
    write_data(folder / "data")
    commands = tasks(folder, epochs=1)
    assert driver(folder / "untouched", "infer", *commands["infer"].arguments(folder)) == 0
    (folder / "out").rename(folder / "masks")
    return folder


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
    untouched, wrong, full = tmp_path / "untouched", [], 0
    untouched.mkdir()
    assert driver(untouched, task.script, *task.arguments(untouched)) == 0, driver.stderr
    need = sum(-(-p.lstat().st_size // 4096) * 4096 for p in untouched.rglob("*"))
    for share in SHARES:
        folder = tmp_path / "disk" / "x"
        shutil.rmtree(folder, ignore_errors=True)
        disk(int(share * need))
        folder.mkdir()
        arguments = task.arguments(folder)
        status, said = driver(folder, task.script, *arguments), driver.stderr
        where = f"{share:.0%} of {need / 1e6:.1f} MB: exit status {status}: {said[-2000:]}"
        full += status != 0
        if (
            status not in (0, 1, 2)
            or "Traceback" in said
            or (status == 2 and str(folder) not in said)
        ):
            wrong.append(where)
        disk(2**30)
        status = driver(folder, task.script, *arguments, *task.go_on)
        if status:
            wrong.append(f"{where}then exit status {status}: {driver.stderr[-500:]}")
        wrong += [f"{where}{what}" for what in differences(folder, untouched)]
    record_property("full disks", full)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["train", "infer", "render", "preview"])
def test_memory_that_runs_out_costs_nothing(name, driver, shared, tmp_path, record_property):
    """A sentence where Python can still speak; a library that ends the process loses nothing."""
    task = tasks(shared, epochs=1)[name]
    untouched, wrong, ended = tmp_path / "untouched", [], Counter()
    untouched.mkdir()
    assert driver(untouched, task.script, *task.arguments(untouched)) == 0, driver.stderr
    for megabytes in MEMORY:
        folder = tmp_path / f"with-{megabytes}"
        folder.mkdir()
        arguments = task.arguments(folder)
        status = driver(folder, task.script, *arguments, memory=megabytes * 2**20)
        where = f"{megabytes} MB: exit status {status}: {driver.stderr[-2000:]}"
        ended["done" if not status else "a sentence" if status in (1, 2) else "crash"] += 1
        if "Traceback" in driver.stderr:
            wrong.append(where)
        status = driver(folder, task.script, *arguments, *task.go_on)
        if status:
            wrong.append(f"{where}then exit status {status}: {driver.stderr[-500:]}")
        wrong += [f"{where}{what}" for what in differences(folder, untouched)]
    print(name, dict(ended))
    record_property("times out of memory", len(MEMORY) - ended["done"])
    assert not wrong, "\n".join(wrong)


# No permission, nothing to share memory through, a home that cannot be written


def under(prefix: tuple, script: str, *arguments: object, **environment: str):
    """Run a script behind another program."""
    command = [*prefix, sys.executable, ROOT / script, *arguments]
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# Root that owns nothing here and may not override that.
POWERLESS = "setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"


@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv (util-linux) is not there")
@pytest.mark.parametrize("name", ["train", "infer", "render", "preview", "evaluate"])
def test_what_may_not_be_written_costs_nothing(name, driver, shared, tmp_path):
    task = tasks(shared, epochs=1)[name]
    untouched, folder = tmp_path / "untouched", tmp_path / "closed"
    for place in (untouched, folder):
        place.mkdir()
    assert driver(untouched, task.script, *task.arguments(untouched)) == 0, driver.stderr
    os.chown(folder, 65534, 65534)
    cache = {"XDG_CACHE_HOME": str(folder / "cache")}
    result = under(POWERLESS, f"{task.script}.py", *task.arguments(folder), **cache)
    said = result.stderr.splitlines()
    assert result.returncode == 2
    assert re.search(f"^error: {folder}.*: Permission denied: ", said[-1])
    assert all("cache" in line for line in said[:-1]), "every epoch decodes the PNGs again"
    os.chown(folder, 0, 0)
    assert driver(folder, task.script, *task.arguments(folder), *task.go_on) == 0, driver.stderr
    assert not differences(folder, untouched)


def test_a_closed_folder_in_the_midst_of_masks_costs_its_run_and_nothing_else(
    driver, shared, tmp_path
):
    task = tasks(shared)["infer"]
    untouched, folder = tmp_path / "untouched", tmp_path / "closed"
    for place in (untouched, folder):
        assert driver(place, "infer", *task.arguments(place)) == 0, driver.stderr
    (folder / "out/video_1/mask.npy").unlink()
    os.chown(folder / "out/video_1", 65534, 65534)
    result = under(POWERLESS, "infer.py", *task.arguments(folder), "--resume")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"error: {folder}/out/video_1/" in result.stderr
    os.chown(folder / "out/video_1", 0, 0)
    assert driver(folder, "infer", *task.arguments(folder), "--resume") == 0, driver.stderr
    assert not differences(folder, untouched)


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
    task = tasks(shared, epochs=1)[name]
    untouched, folder, dev = (tmp_path / part for part in ("untouched", "without", "dev"))
    for place in (untouched, folder, dev):
        place.mkdir()
    assert driver(untouched, task.script, *task.arguments(untouched)) == 0, driver.stderr
    mount = SHARED_MEMORY[shm].format(folder=dev)
    prefix = ("unshare", "-m", "sh", "-c", f'{mount} || exit 99; exec "$@"', "sh")
    workers = ("--workers", 2) if name in ("train", "infer") else ()
    environment = {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    result = under(prefix, f"{name}.py", *task.arguments(folder), *workers, **environment)
    if result.returncode == 99 or "unshare" in result.stderr:
        pytest.skip(f"/dev/shm cannot be taken away here: {result.stderr.strip()}")
    assert result.returncode == 0, result.stderr
    assert "/dev/shm" in result.stdout + result.stderr
    assert not differences(folder, untouched)


def test_a_home_that_cannot_be_written_costs_the_cache(driver, shared, tmp_path, disk):
    task = tasks(shared, epochs=1)["train"]
    untouched, folder = tmp_path / "untouched", tmp_path / "without"
    for place in (untouched, folder):
        place.mkdir()
    assert driver(untouched, "train", *task.arguments(untouched)) == 0, driver.stderr
    home = disk(4096)
    subprocess.run(["mount", "-o", "remount,ro", home], check=True)
    environment = {"HOME": str(home), "XDG_CACHE_HOME": "", "OMP_NUM_THREADS": "1"}
    result = under((), "train.py", *task.arguments(folder), **environment)
    assert result.returncode == 0, result.stderr
    assert f"cache {home}/.cache/clevr-unet cannot be written (Read-only" in result.stderr
    shutil.rmtree(untouched / "cache")
    assert not differences(folder, untouched)
