"""What a user of dataset.py would miss: labels, order, faults named, a cache to trust."""

import io
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.tv_tensors import Image, Mask

import dataset
from dataset import (
    CLEVRDataset,
    DataError,
    RandomCamera,
    RandomObjectCrops,
    augmentation,
    class_id,
    find_videos,
    frame_paths,
    inspect_video,
)

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "real"
FORK = multiprocessing.get_context("fork")
SIZE = (6, 8)  # height, width


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def make_video(folder, frames=3, size=SIZE, labelled=True, seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for t in range(frames):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"image_{t}.png")
    if labelled:
        np.save(folder / "mask.npy", rng.integers(0, 49, (frames, *size), dtype=np.uint8))
    return folder


@pytest.fixture
def data(tmp_path):
    for i, name in enumerate(("video_10", "video_2", "video0")):
        make_video(tmp_path / "data" / name, seed=i)
    return tmp_path / "data"


def everything(data_set):
    return data_set.__getitems__(range(len(data_set)))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run_cli(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dataset.py", str(path)])
    status = dataset.main()
    return status, *capsys.readouterr()


# Names, ids and order


def test_class_ids_worked_out_by_hand():
    assert len(dataset.CLASS_NAMES) == dataset.NUM_CLASSES == 49
    assert dataset.CLASS_NAMES[0] == "background"
    by_hand = {1: "gray metal cube", 12: "green rubber cube", 17: "gray metal sphere"}
    by_hand |= {21: "brown metal sphere", 29: "brown rubber sphere", 48: "yellow rubber cylinder"}
    for i, name in by_hand.items():
        colour, material, shape = name.split()
        assert dataset.CLASS_NAMES[i] == name
        assert class_id(shape, material, colour) == i
    with pytest.raises(ValueError, match="not in"):
        class_id("cube", "metal", "pink")


def test_videos_come_in_natural_order_at_any_depth(tmp_path):
    names = ["video0", "video2", "video10", "video_7", "video_00007", "video_10", "z/deep/video_3"]
    for name in names:
        make_video(tmp_path / name, frames=1)
    make_video(tmp_path / ".hidden" / "video_1", frames=1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "z" / "deep" / "round").symlink_to(tmp_path)  # a circle of links
    found = [str(video.relative_to(tmp_path)) for video in find_videos(tmp_path)]
    assert found[:3] == ["video0", "video2", "video10"]
    assert set(found[3:5]) == {"video_7", "video_00007"}
    assert found[5:] == ["video_10", "z/deep/video_3"]


def test_links_to_videos_are_followed(tmp_path):
    make_video(tmp_path / "elsewhere" / "video_1", frames=1)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(tmp_path / "elsewhere")
    assert find_videos(tmp_path / "data") == [tmp_path / "data" / "train" / "video_1"]
    assert find_videos(tmp_path / "elsewhere" / "video_1") == [tmp_path / "elsewhere" / "video_1"]


def test_frame_ten_comes_after_frame_two_with_its_own_mask(tmp_path):
    video = make_video(tmp_path / "video_1", frames=12)
    assert [path.name for path in frame_paths(video)] == [f"image_{t}.png" for t in range(12)]
    frames, masks = everything(CLEVRDataset(tmp_path))
    truth = np.load(video / "mask.npy")
    for t in range(12):
        pixels = np.asarray(PIL.Image.open(video / f"image_{t}.png"))
        assert np.array_equal(frames[t].permute(1, 2, 0).numpy(), pixels)
        assert np.array_equal(masks[t].numpy(), truth[t])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_pixels_equal_pillows(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).convert(mode).save(tmp_path / "image_0.png")
    frame = dataset.read_frame(tmp_path / "image_0.png")
    expected = np.asarray(PIL.Image.open(tmp_path / "image_0.png").convert("RGB"))
    assert np.array_equal(frame.permute(1, 2, 0).numpy(), expected)


# Items and batches


def test_items_are_jointly_transformable_and_typed(data):
    data_set = CLEVRDataset(data, transform=lambda image, mask: (image.flip(-1), mask.flip(-1)))
    image, mask = CLEVRDataset(data)[4]
    assert isinstance(image, tv_tensors.Image)
    assert isinstance(mask, tv_tensors.Mask)
    assert image.dtype == mask.dtype == torch.uint8
    assert image.shape == (3, *SIZE)
    assert mask.shape == SIZE
    assert same(data_set[4], (image.flip(-1), mask.flip(-1)))
    assert same(data_set.__getitems__([4])[0], image.flip(-1)[None])


@pytest.mark.parametrize("cache", [True, False])
def test_batch_equals_items_and_index_tells_where_they_come_from(data, cache):
    data_set = CLEVRDataset(data, cache=cache)
    assert len(data_set) == 9
    assert [video.name for video in data_set.videos] == ["video0", "video_2", "video_10"]
    order = [8, 0, 5, 5, 3]
    items = [data_set[i] for i in order]
    assert same(
        data_set.__getitems__(order), [torch.stack(part) for part in zip(*items, strict=True)]
    )
    for i, (video, t) in enumerate(data_set.index):
        truth = np.load(data_set.videos[video] / "mask.npy")[t]
        assert np.array_equal(data_set[i][1].numpy(), truth)
    with pytest.raises(IndexError):
        data_set[9]


def test_changing_an_item_leaves_the_data_as_it_was(data):
    data_set = CLEVRDataset(data)
    before = everything(data_set)
    for image, mask in (data_set[0], data_set.__getitems__([0])):
        image.zero_()
        mask.zero_()
    assert same(everything(data_set), before)


@pytest.mark.parametrize("dtype", ["int64", "uint16", ">i4", "int8"])
def test_masks_of_other_integer_types_and_layouts_are_read(data, dtype):
    before = everything(CLEVRDataset(data, cache=False))
    for video in find_videos(data):
        mask = np.load(video / "mask.npy")
        np.save(video / "mask.npy", np.asfortranarray(mask.astype(dtype)))
    for cache in (True, False):
        after = everything(CLEVRDataset(data, cache=cache))
        assert same(after, before)
        assert after[1].dtype == torch.uint8


def test_loader_with_workers_gives_the_same(data):
    data_set = CLEVRDataset(data)
    everything(data_set)  # opens the cache, which must not travel to the workers

    def batches(data_set, workers, context=None):
        return list(
            DataLoader(
                data_set,
                batch_size=4,
                num_workers=workers,
                multiprocessing_context=context,
                collate_fn=CLEVRDataset.collate,
            )
        )

    expected = batches(data_set, 0)
    assert [len(frames) for frames, _ in expected] == [4, 4, 1]
    others = [batches(data_set, 2, "fork"), batches(data_set, 1, "spawn")]
    others.append(batches(CLEVRDataset(data, cache=False), 2, "fork"))
    for other in others:
        assert all(same(a, b) for a, b in zip(expected, other, strict=True))


def test_pickle_carries_no_pixels(tmp_path):
    make_video(tmp_path / "video_0", size=(200, 300))
    data_set = CLEVRDataset(tmp_path)
    frames = everything(data_set)
    pickled = pickle.dumps(data_set)
    assert len(pickled) < 10_000
    assert same(everything(pickle.loads(pickled)), frames)


def test_many_videos_hold_no_file_descriptors(data):
    data_set = CLEVRDataset(data)
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else None
    if before is None:
        pytest.skip("counts descriptors in /proc")
    everything(data_set)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_unlabelled_videos_of_any_length_and_size(tmp_path):
    videos = [make_video(tmp_path / "video_1", frames=11, labelled=False)]
    videos.append(make_video(tmp_path / "video_2", frames=2, size=(5, 9), labelled=False))
    videos.append(make_video(tmp_path / "video_3", frames=1))
    data_set = CLEVRDataset(tmp_path, labelled=False)
    assert data_set.videos == videos
    assert [data_set[i].shape for i in (0, 10, 11, 12, 13)] == (
        [(3, *SIZE)] * 2 + [(3, 5, 9)] * 2 + [(3, *SIZE)]
    )
    assert data_set.__getitems__([0, 5]).shape == (2, 3, *SIZE)
    assert CLEVRDataset(tmp_path).videos == videos[2:]
    (videos[0] / "image_3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"video_1.image_3\.png"):
        CLEVRDataset(tmp_path, labelled=False)[3]


# The cache


def cached_files():
    return sorted(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.npy"))


def test_cached_equals_uncached_and_is_used(data, monkeypatch):
    plain = everything(CLEVRDataset(data, cache=False))
    assert not cached_files()
    assert same(everything(CLEVRDataset(data)), plain)
    assert len(cached_files()) == 3
    monkeypatch.setattr(dataset, "read_frame", None)  # from here on no PNG can be decoded
    assert same(everything(CLEVRDataset(data)), plain)
    part = CLEVRDataset([data / "video_10", data / "video0"])  # a split shares the cache
    assert [video.name for video in part.videos] == ["video_10", "video0"]
    assert same(everything(part), [torch.cat([x[6:], x[:3]]) for x in plain])


def test_any_change_in_the_data_is_noticed(data):
    video = data / "video_2"

    def add_a_frame():
        PIL.Image.new("RGB", SIZE[::-1]).save(video / "image_3.png")
        np.save(video / "mask.npy", np.ones((4, *SIZE), np.uint8))

    def relabel():  # same size on disk, and the times are set back
        times = (video / "mask.npy").stat()
        np.save(video / "mask.npy", np.full((4, *SIZE), 7, np.uint8))
        os.utime(video / "mask.npy", ns=(times.st_atime_ns, times.st_mtime_ns))

    def repaint():
        PIL.Image.new("RGB", SIZE[::-1], (1, 2, 3)).save(video / "image_0.png")

    def remove_a_frame():
        (video / "image_3.png").unlink()
        np.save(video / "mask.npy", np.ones((3, *SIZE), np.uint8))

    before = everything(CLEVRDataset(data))
    for change in (add_a_frame, relabel, repaint, remove_a_frame):
        change()
        after = everything(CLEVRDataset(data))
        assert same(after, everything(CLEVRDataset(data, cache=False))), change
        assert len(after[0]) != len(before[0]) or not same(after, before), change
        assert len(cached_files()) == 3, "what was replaced is deleted"
        before = after
    (video / "mask.npy").unlink()
    assert len(CLEVRDataset(data)) == 6


def test_an_open_data_set_outlives_its_cache(data):
    data_set, unread = CLEVRDataset(data), CLEVRDataset(data)
    before = everything(data_set)
    for file in cached_files():
        file.unlink()
    assert same(everything(data_set), before)
    assert same(everything(unread), before)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"garbage", None])
def test_a_damaged_cache_file_is_made_anew(data, content):
    before = everything(CLEVRDataset(data))
    for file in cached_files():
        file.write_bytes(file.read_bytes()[:-1] if content is None else content)
    assert same(everything(CLEVRDataset(data)), before)


def start_build(path, barrier=None, kill=False):
    """Fork a process that builds the cache; it exits with 0 if what it then reads is right."""

    def build():
        torch.set_num_threads(1)
        fsync, calls = os.fsync, itertools.count()

        def die_in_the_second_file(descriptor):
            if next(calls):
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        if kill:
            os.fsync = die_in_the_second_file
        if barrier:
            barrier.wait()
        right = same(everything(CLEVRDataset(path)), everything(CLEVRDataset(path, cache=False)))
        os._exit(0 if right else 1)

    process = FORK.Process(target=build)
    process.start()
    return process


def test_processes_may_build_the_cache_at_once(tmp_path):
    for i in range(30):
        make_video(tmp_path / "data" / f"video_{i}", seed=i)
    barrier = FORK.Barrier(3)
    builders = [start_build(tmp_path / "data", barrier) for _ in range(3)]
    for builder in builders:
        builder.join(timeout=60)
    assert [builder.exitcode for builder in builders] == [0, 0, 0]
    assert len(cached_files()) == 30
    plain = everything(CLEVRDataset(tmp_path / "data", cache=False))
    assert same(everything(CLEVRDataset(tmp_path / "data")), plain)


def test_killed_while_building_leaves_nothing_that_is_trusted(data):
    builder = start_build(data, kill=True)
    builder.join(timeout=60)
    assert builder.exitcode == -signal.SIGKILL
    left = list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.part"))
    assert left, "it was killed in the middle"
    assert len(cached_files()) < 3
    for part in left:  # an hour later
        os.utime(part, (0, 0))
    assert same(everything(CLEVRDataset(data)), everything(CLEVRDataset(data, cache=False)))
    assert len(cached_files()) == 3
    assert not any(part.exists() for part in left)


def test_a_cache_that_cannot_be_written_warns_once_and_goes_on(data, tmp_path, caplog):
    (tmp_path / "file").touch()
    data_set = CLEVRDataset(data, cache=tmp_path / "file")
    assert len(caplog.messages) == 1
    assert "cannot be written" in caplog.text
    assert same(everything(data_set), everything(CLEVRDataset(data, cache=False)))


def test_a_full_disk_warns_once_and_leaves_no_scraps(data, monkeypatch, caplog):
    save, calls = np.save, itertools.count()

    def full(stream, block):
        if next(calls):
            stream.write(b"half of it")
            raise OSError(28, "No space left on device")
        save(stream, block)

    plain = everything(CLEVRDataset(data, cache=False))
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        assert same(everything(CLEVRDataset(data)), plain)
    assert len(caplog.messages) == 1
    assert "No space left on device" in caplog.text
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.part"))
    assert same(everything(CLEVRDataset(data)), plain)


# Faults


def no_frame(video):
    (video / "image_1.png").unlink()


def twice(video):
    (video / "image_01.png").write_bytes((video / "image_1.png").read_bytes())


def damaged_png(video):
    data = (video / "image_1.png").read_bytes()
    (video / "image_1.png").write_bytes(data[: len(data) // 2])


def flipped_bit(video):  # in the pixels: torchvision itself would end the process
    data = bytearray((video / "image_1.png").read_bytes())
    data[len(data) // 2] ^= 1
    (video / "image_1.png").write_bytes(data)


def transparent_palette(video):
    picture = PIL.Image.open(video / "image_1.png").convert("P")
    picture.save(video / "image_1.png", transparency=bytes([0, 128]))


def empty_png(video):
    (video / "image_1.png").write_bytes(b"")


def dangling_link(video):
    (video / "image_1.png").unlink()
    (video / "image_1.png").symlink_to(video / "nowhere")


def sixteen_bits(video):
    PIL.Image.fromarray(np.zeros(SIZE, np.uint16)).save(video / "image_1.png")


def odd_frame(video):
    PIL.Image.new("RGB", (5, 5)).save(video / "image_1.png")


def odd_video(video):
    for path in frame_paths(video):
        PIL.Image.new("RGB", (5, 4)).save(path)
    np.save(video / "mask.npy", np.zeros((3, 4, 5), np.uint8))


def short_mask(video):
    np.save(video / "mask.npy", np.load(video / "mask.npy")[:2])


def long_mask(video):
    np.save(video / "mask.npy", np.zeros((4, *SIZE), np.uint8))


def small_mask(video):
    np.save(video / "mask.npy", np.zeros((3, 5, 5), np.uint8))


def flat_mask(video):
    np.save(video / "mask.npy", np.zeros(SIZE, np.uint8))


def high_id(video):
    mask = np.load(video / "mask.npy")
    mask[1, 2, 3] = 49
    np.save(video / "mask.npy", mask)


def negative_id(video):
    np.save(video / "mask.npy", np.full((3, *SIZE), -1))


def wraps_to_0(video):
    np.save(video / "mask.npy", np.full((3, *SIZE), 256))


def float_mask(video):
    np.save(video / "mask.npy", np.ones((3, *SIZE)))


def bool_mask(video):
    np.save(video / "mask.npy", np.ones((3, *SIZE), bool))


def pickled_mask(video):
    np.save(video / "mask.npy", np.full((3, *SIZE), None), allow_pickle=True)


def zipped_mask(video):
    np.savez(video / "mask.npz", mask=np.zeros((3, *SIZE), np.uint8))
    (video / "mask.npz").rename(video / "mask.npy")


def truncated_mask(video):
    (video / "mask.npy").write_bytes((video / "mask.npy").read_bytes()[:-1])


FAULTS = {
    no_frame: "missing frame: image_1.png",
    twice: "same number",
    damaged_png: "image_1.png: unreadable",
    flipped_bit: "image_1.png: unreadable",
    transparent_palette: "image_1.png: not plain 8-bit RGB",
    empty_png: "image_1.png: unreadable",
    dangling_link: "image_1.png: unreadable",
    sixteen_bits: "image_1.png: not plain 8-bit RGB",
    odd_frame: "frames of different sizes: 8 x 6, 5 x 5",
    odd_video: "frames are 5 x 4, those of most labelled videos 8 x 6",
    short_mask: "too short: 2 masks, 3 frames",
    long_mask: "too long: 4 masks, 3 frames",
    small_mask: "mask.npy is 5 x 5, frames are 8 x 6",
    flat_mask: "mask.npy: holds uint8 (6, 8)",
    high_id: "ids outside 0..48: 49",
    negative_id: "ids outside 0..48: -1",
    wraps_to_0: "ids outside 0..48: 256",
    float_mask: "mask.npy: holds float64",
    bool_mask: "mask.npy: holds bool",
    pickled_mask: "mask.npy: unreadable",
    zipped_mask: "mask.npy: unreadable",
    truncated_mask: "mask.npy: unreadable",
}


@pytest.mark.parametrize("damage", FAULTS, ids=lambda damage: damage.__name__)
def test_each_fault_is_named_and_the_video_left_out(data, damage, monkeypatch, capsys, caplog):
    CLEVRDataset(data)  # the cache from before must not hide the fault
    damage(data / "video_2")
    status, out, err = run_cli(data, monkeypatch, capsys)
    assert status == 1
    assert [line for line in out.splitlines() if "video_2" in line and FAULTS[damage] in line], out
    assert "videos with faults: 1" in out
    assert not err
    for cache in (True, False):
        caplog.clear()
        data_set = CLEVRDataset(data, cache=cache)
        assert [video.name for video in data_set.videos] == ["video0", "video_10"]
        assert list(data_set.skipped) == [data / "video_2"]
        assert FAULTS[damage] in data_set.skipped[data / "video_2"]
        assert len(caplog.messages) == 1
        assert str(data / "video_2") in caplog.messages[0]
        assert len(everything(data_set)[0]) == 6


def test_a_repaired_video_comes_back(data):
    mask = np.load(data / "video_2" / "mask.npy")
    short_mask(data / "video_2")
    assert len(CLEVRDataset(data)) == 6
    np.save(data / "video_2" / "mask.npy", mask)
    assert len(CLEVRDataset(data)) == 9


def test_all_faults_of_a_video_are_named(data):
    no_frame(data / "video_2")
    high_id(data / "video_2")
    (data / "video_2" / "image_2.png").write_bytes(b"?")
    text = " ".join(inspect_video(data / "video_2").faults)
    assert "image_1.png" in text
    assert "image_2.png" in text
    assert "49" in text


def test_a_large_number_is_no_endless_list_of_gaps(tmp_path):
    video = make_video(tmp_path / "video_1", frames=2)
    (video / "image_1.png").rename(video / f"image_{10**40}.png")
    assert "image_1.png, image_2.png, image_3.png, ..." in inspect_video(video).faults[0]


def test_a_list_names_what_is_no_labelled_video(data, tmp_path):
    bare = make_video(tmp_path / "bare", labelled=False)
    data_set = CLEVRDataset([data / "video0", bare, tmp_path / "nowhere"])
    assert data_set.videos == [data / "video0"]
    assert "no mask.npy" in data_set.skipped[bare]
    assert "cannot be read" in data_set.skipped[tmp_path / "nowhere"]


def test_nothing_usable_is_an_error_and_not_an_empty_data_set(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        CLEVRDataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no video"):
        CLEVRDataset(tmp_path)
    make_video(tmp_path / "video_1", labelled=False)
    with pytest.raises(DataError, match=r"mask\.npy"):
        CLEVRDataset(tmp_path)
    with pytest.raises(DataError):
        CLEVRDataset([])


# The report


def test_report_on_good_data(data, monkeypatch, capsys):
    make_video(data / "more" / "video_1", frames=11, size=(5, 9), labelled=False)
    for video in ("video0", "video_2", "video_10"):
        np.save(data / video / "mask.npy", np.zeros((3, *SIZE), np.uint8))
    np.save(data / "video_2" / "mask.npy", np.full((3, *SIZE), 21, np.int32))
    status, out, err = run_cli(data, monkeypatch, capsys)
    assert status == 0
    assert not err
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert f"{data}: 4 videos, 20 frames" in lines
    assert f"{data}: 3 x 3 frames, 8 x 6, labelled" in lines
    assert f"{data / 'more'}: 1 x 11 frames, 9 x 5, without mask.npy" in lines
    assert "0 background 2" in lines
    assert "21 brown metal sphere 1" in lines
    assert "videos with faults: 0" in lines


def test_report_from_the_command_line(data):
    damaged_png(data / "video0")
    (data / os.fsdecode(b"video_\xff")).mkdir()  # no text in any encoding
    (data / os.fsdecode(b"video_\xff") / "image_0.png").touch()
    command = [sys.executable, "dataset.py", str(data)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "videos with faults: 2" in run.stdout
    assert not run.stderr


def test_report_without_videos(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        status, out, err = run_cli(path, monkeypatch, capsys)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert str(path) in err


def damaged(good):
    """Bytes that are noise, or a good file with bytes changed, cut or added."""
    changes = st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), max_size=4)

    def change(edits, end, more):
        content = bytearray(good)
        for position, value in edits:
            content[position] = value
        return bytes(content[:end] + more)

    ends = st.one_of(st.just(len(good)), st.integers(0, len(good)))
    return st.one_of(
        st.binary(max_size=200), st.builds(change, changes, ends, st.binary(max_size=5))
    )


def good_files():
    png, npy = io.BytesIO(), io.BytesIO()
    PIL.Image.new("RGB", SIZE[::-1], (10, 20, 30)).save(png, "png")
    np.save(npy, np.zeros((1, *SIZE), np.uint8))
    return png.getvalue(), npy.getvalue()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(png=damaged(good_files()[0]), npy=damaged(good_files()[1]))
@pytest.mark.filterwarnings("ignore")
def test_no_bytes_make_a_traceback_or_a_wrong_label(tmp_path, png, npy):
    video = tmp_path / "video_0"
    video.mkdir(exist_ok=True)
    (video / "image_0.png").write_bytes(png)
    (video / "mask.npy").write_bytes(npy)
    faults = inspect_video(video).faults
    try:
        _, mask = CLEVRDataset(tmp_path, cache=False)[0]
        assert not faults
        assert mask.max() < 49
    except DataError:
        assert faults


# Real videos, where there are any


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real videos in {REAL}")
def test_real_videos(monkeypatch, capsys):
    status, out, _ = run_cli(REAL, monkeypatch, capsys)
    assert status == 0
    assert "6 videos, 132 frames" in out
    data_set = CLEVRDataset(REAL)
    assert len(data_set) == 66
    assert same(everything(data_set), everything(CLEVRDataset(REAL, cache=False)))
    objects = [(mask > 0).float().mean().item() for _, mask in (data_set[i] for i in range(66))]
    assert 0.01 < np.mean(objects) < 0.15, "some 5 % of a frame is objects"


def test_augmentation_moves_image_and_mask_together():
    """The picture shows its own ids: wherever a crop's picture is flat, it must show the crop's."""
    torch.manual_seed(0)
    mask = torch.randint(0, 2, (3, 10, 15), dtype=torch.uint8) * 40
    mask = mask.repeat_interleave(16, 1).repeat_interleave(16, 2)
    image = mask[:, None].expand(-1, 3, -1, -1).contiguous()
    crops, ids = RandomObjectCrops(crops=5, size=64)(Image(image), Mask(mask))
    assert isinstance(crops, Image)
    assert isinstance(ids, Mask)
    assert (crops.shape, ids.shape, ids.dtype) == ((15, 3, 64, 64), (15, 64, 64), torch.uint8)
    shown = crops[:, 0] * 255
    flat = (shown - shown.round()).abs() < 1e-3
    assert flat.float().mean() > 0.5
    assert torch.equal(shown.round()[flat], ids[flat].float())


def test_every_crop_has_an_object_where_the_frame_has_one():
    torch.manual_seed(0)
    mask = torch.zeros(4, 160, 240, dtype=torch.uint8)
    mask[:, 100:110, 5:15] = 7  # small, and near the border
    _, ids = augmentation(crops=8)(Image(torch.zeros(4, 3, 160, 240)), Mask(mask))
    assert (ids == 7).flatten(1).any(dim=1).all()
    assert ids.unique().tolist() == [0, 7]


def test_a_frame_without_objects_and_one_smaller_than_a_crop_can_be_augmented():
    crops, ids = augmentation(crops=2)(
        Image(torch.zeros(1, 3, 40, 60, dtype=torch.uint8)),
        Mask(torch.zeros(1, 40, 60, dtype=torch.uint8)),
    )
    assert crops.shape == (2, 3, 40, 40)
    assert not ids.any()


def test_augmentation_never_turns_one_colour_into_another():
    """Hues, 28 degrees apart at the least, turn by less than half of that; gray stays gray."""
    torch.manual_seed(0)
    seen = {  # medians over rubber objects in real frames, red, green, blue
        "gray": (89, 88, 85),
        "blue": (58, 77, 124),
        "green": (50, 91, 39),
        "brown": (105, 79, 46),
        "cyan": (58, 123, 121),
        "yellow": (134, 129, 61),
    }

    def hue_and_saturation(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        red, green, blue = rgb.unbind(-1)
        angle = torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue)
        return angle.rad2deg(), (rgb.amax(-1) - rgb.amin(-1)) / rgb.amax(-1)

    for name, rgb in seen.items():
        colour = torch.tensor(rgb) / 255
        picture = colour.view(1, 3, 1, 1).expand(500, 3, 24, 24)
        varied, _ = RandomCamera()(Image(picture), Mask(torch.ones(500, 24, 24)))
        hue, saturation = hue_and_saturation(varied.mean(dim=(2, 3)))
        before, saturated = hue_and_saturation(colour)
        if name == "gray":
            assert saturation.max() < 0.15
        else:
            turned = (hue - before + 180) % 360 - 180
            assert turned.abs().max() < 14, name
            assert saturation.min() > 0.25, name
            assert saturation.min() > 0.5 * saturated, name
