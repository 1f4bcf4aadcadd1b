"""The machine: its cores and worker threads."""

import os

import pytest
import torch

import devices


def test_processors_are_those_that_may_be_used(monkeypatch):
    monkeypatch.setattr(devices, "container_limits", lambda name: [])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 4}, raising=False)
    assert devices.usable_cpus() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert devices.usable_cpus() == os.cpu_count()


def test_the_limits_of_a_container_are_heeded(tmp_path, monkeypatch):
    """Of both versions of control groups, and of what a group lies in."""
    monkeypatch.setattr(devices, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert devices.container_limits("cpu.max") == []
    files = {
        "proc/self/cgroup": "5:cpuset:/\n4:memory,pids:/a/b\n0::/c\n",
        "proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    1 kB\n",
        "sys/fs/cgroup/c/memory.max": "max\n",
        "sys/fs/cgroup/memory.max": "700\n",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "500\n",
        "sys/fs/cgroup/c/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/cpu.max": "max 100000\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert devices.container_limits("memory.max") == ["max", "700"]
    assert devices.container_limits("memory.limit_in_bytes") == ["500"]
    cpu = torch.device("cpu")
    assert devices.free_memory(cpu) == 500
    (tmp_path / "sys/fs/cgroup/memory/a/memory.limit_in_bytes").write_text("9223372036854771712")
    assert devices.free_memory(cpu) == 700
    (tmp_path / "sys/fs/cgroup/memory.max").unlink()
    assert devices.free_memory(cpu) == 1024
    assert devices.free_memory(torch.device("mps")) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert devices.usable_cpus() == 2
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,cpuacct:/a\n")
    (tmp_path / "sys/fs/cgroup/cpu").mkdir()
    for name, text in (("quota", "50000"), ("period", "100000")):
        (tmp_path / f"sys/fs/cgroup/cpu/cpu.cfs_{name}_us").write_text(f"{text}\n")
    assert devices.usable_cpus() == 1
    torch.set_num_threads(2)
    try:
        assert devices.usable_threads() == 1
        (tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").write_text("-1")
        assert (devices.usable_cpus(), devices.usable_threads()) == (3, 2)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("device", "threads", "workers"),
    [
        ("cpu", 1, (2, 1)),
        ("cpu", 2, (3, 1)),
        ("cpu", 16, (17, 1)),
        ("cpu", 31, (16, 2)),
        ("cuda", 8, (4, 1)),
        ("mps", 8, (1, 1)),
    ],
)
def test_no_core_is_idle_and_apple_has_one_worker_thread(device, threads, workers):
    assert devices.worker_threads(torch.device(device), threads) == workers


def test_few_wait_their_turn():
    """What is read ahead of its result is bounded, or thousands of videos would fill the memory."""
    taken = []
    results = devices.in_threads(lambda item: item, (taken.append(i) or i for i in range(100)), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(taken) <= 3 + 2 * 2 + 1
    assert list(results) == list(range(3, 100))
