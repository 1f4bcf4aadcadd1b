"""The split, the batches of several processes, and how many read ahead."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_video

import batches
from batches import ShardedBatches
from dataset import split_data, split_videos
from devices import Processes
from utils import UserError


def test_a_tenth_is_set_aside_by_whole_videos(tmp_path):
    for i in range(31):
        video = tmp_path / f"video_{i}"
        video.mkdir()
        (video / "image_0.png").touch()
        if i < 30:
            (video / "mask.npy").touch()
    training, validation = split_videos(tmp_path, seed=0)
    assert (len(training), len(validation)) == (27, 3)
    assert not set(training) & set(validation)
    assert split_videos(tmp_path, seed=0) == (training, validation)
    assert any(split_videos(tmp_path, seed=s)[1] != validation for s in range(1, 5))


@pytest.mark.parametrize("seed", range(4))
def test_videos_with_faults_and_of_odd_sizes_neither_teach_nor_validate(tmp_path, seed):
    """Whichever is chosen, there is one to learn from and one to validate on, of one size."""
    for number, size in enumerate([(6, 8), (6, 8), (6, 10), (6, 8)]):
        make_video(tmp_path / f"video_{number}", size=size)
    np.save(tmp_path / "video_3/mask.npy", np.zeros((1, 6, 8), np.uint8))  # too short
    training, validation, _ = split_data(tmp_path, seed, cache=False)
    names = sorted(video.path.name for part in (training, validation) for video in part.videos)
    assert names == ["video_0", "video_1"]
    for part in (training, validation):
        assert len(part) == 3
        assert {mask.shape for _, mask in part} == {(6, 8)}
        assert {path.name for path in part.skipped} == {"video_2", "video_3"}


def test_folders_of_two_sizes_are_refused_and_videos_in_both_are_named(tmp_path, caplog):
    for part, size in (("train", (6, 8)), ("val", (6, 10))):
        for number in range(1 + (part == "train")):
            make_video(tmp_path / part / f"video_{number}", size=size)
    with pytest.raises(UserError, match="val: no labelled video without fault, of the size"):
        split_data(tmp_path, 0, cache=False)
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "val").mkdir()
    (tmp_path / "val/again").symlink_to(tmp_path / "train/video_1")
    training, validation, _ = split_data(tmp_path, 0, cache=False)
    assert (len(training.videos), len(validation.videos)) == (2, 1)
    assert "1 validation video, such as" in caplog.text


def test_train_and_val_folders_are_taken_as_they_are(tmp_path):
    for part in ("train", "val", "unlabeled"):
        video = tmp_path / part / "video_1"
        video.mkdir(parents=True)
        (video / "image_0.png").touch()
        (video / "mask.npy").touch()
    training, validation = split_videos(tmp_path, seed=0)
    assert [v.path for v in training] == [tmp_path / "train" / "video_1"]
    assert [v.path for v in validation] == [tmp_path / "val" / "video_1"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_every_frame_exactly_once(count):
    shares = []
    for rank in range(count):
        processes = Processes(torch.device("cpu"))
        processes.rank, processes.count = rank, count
        shares.append(list(ShardedBatches(10, 4, processes, shuffle=False)))
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(10))


def test_a_seed_may_be_a_date():
    shuffled = ShardedBatches(9, 3, Processes(torch.device("cpu")), True, seed=20261127093000)
    assert sorted(sum(shuffled, [])) == list(range(9))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_no_process_gets_an_empty_batch(count):
    """11 frames in batches of 10: the last has one frame, and one process that reads it."""
    for rank in range(count):
        processes = Processes(torch.device("cpu"))
        processes.rank, processes.count = rank, count
        batches = ShardedBatches(11, 10, processes, shuffle=False)
        assert all(batches)
        assert len(list(batches)) == len(batches) == (2 if rank == 0 else 1)


def test_passes_differ_in_order_and_a_stop_in_the_second_goes_on():
    """20 frames in batches of 6, three times over: the two left out of a pass are others each."""
    processes = Processes(torch.device("cpu"))
    several = ShardedBatches(20, 6, processes, shuffle=True, seed=1, passes=3)
    once = ShardedBatches(20, 6, processes, shuffle=True, seed=1)
    several.set_epoch(2)
    once.set_epoch(2)
    found = list(several)
    assert len(found) == len(several) == 9
    assert found[:3] == list(once)
    passes = [sum(found[i : i + 3], []) for i in (0, 3, 6)]
    assert all(len(set(order)) == 18 for order in passes)
    assert len({tuple(order) for order in passes}) == 3
    for done in (2, 3, 5, 9):
        several.set_epoch(2, skip=done)
        assert list(several) == found[done:]


def test_processes_share_the_batches_of_every_pass():
    shares = []
    for rank in range(2):
        processes = Processes(torch.device("cpu"))
        processes.rank, processes.count = rank, 2
        shares.append(list(ShardedBatches(9, 4, processes, shuffle=True, passes=3)))
    assert len(shares[0]) == len(shares[1]) == 6
    for one, other in zip(*shares, strict=True):
        assert len(one) == len(other) == 2
        assert not set(one) & set(other)


@pytest.mark.parametrize("empty", ["train", "val"])
def test_an_empty_part_of_a_split_is_named(tmp_path, empty):
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        if part != empty:
            make_video(tmp_path / part / "video_1")
    with pytest.raises(UserError, match=str(tmp_path / empty)):
        split_videos(tmp_path, seed=0)


def test_readers_are_bounded_by_cores_and_shared_memory(monkeypatch, capsys):
    processes = Processes(torch.device("cpu"))
    assert batches.choose_workers(None, 10**6, processes) == 0
    processes.device, processes.count, processes.local_count = torch.device("meta"), 2, 2
    monkeypatch.setattr(batches, "usable_cpus", lambda: 8)
    monkeypatch.setattr(batches.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**8))
    assert batches.choose_workers(None, 10**6, processes) == 3
    assert not capsys.readouterr().out
    fit = batches.choose_workers(16, 10**7, processes)  # 10 MB ahead twice, half for each process
    assert fit == 5
    assert "enough for 5 workers, not 16" in capsys.readouterr().out
    monkeypatch.setattr(batches, "why_alone", lambda: "/dev/shm: Read-only file system")
    assert batches.choose_workers(16, 10**7, processes) == 0
    assert "no workers, each process reads for itself" in capsys.readouterr().out
