"""The machine: its cores and worker threads."""

import os

import pytest
import torch

import devices


def test_processors_are_those_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 4}, raising=False)
    assert devices.usable_cpus() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert devices.usable_cpus() == os.cpu_count()


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
