"""What a user of CLEVRDataset would miss: labels, order, plain loaders, a cache to trust."""

import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import stat
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import REAL, make_video, needs_real
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import v2

import dataset
import videos
from dataset import CLEVRDataset
from model import UNet
from utils import UserError
from videos import list_video

CLEAN = multiprocessing.get_context("forkserver")  # a fork of a process without threads
SIZE = (6, 8)  # height, width, of make_video
pytestmark = pytest.mark.usefixtures("own_cache")


def everything(data_set):
    """Return all frames and masks, stacked."""
    return next(iter(DataLoader(data_set, batch_size=len(data_set))))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_frame_ten_comes_after_frame_two_with_its_own_mask(tmp_path):
    video = make_video(tmp_path / "video_1", frames=12)
    assert [path.name for path in list_video(video).frames] == [f"image_{t}.png" for t in range(12)]
    frames, masks = everything(CLEVRDataset(tmp_path))
    truth = np.load(video / "mask.npy")
    for t in range(12):
        pixels = np.asarray(PIL.Image.open(video / f"image_{t}.png"))
        assert np.array_equal(frames[t].permute(1, 2, 0).numpy(), pixels)
        assert np.array_equal(masks[t].numpy(), truth[t])


# Items and batches


def test_items_are_jointly_transformable_and_typed(data):
    seen = []

    def flip(image, mask):
        seen.append((type(image), type(mask)))
        return image.flip(-1), mask.flip(-1)

    data_set = CLEVRDataset(data, transform=flip)
    image, mask = CLEVRDataset(data)[4]
    assert image.dtype == mask.dtype == torch.uint8
    assert image.shape == (3, *SIZE)
    assert mask.shape == SIZE
    assert same(data_set[4], (image.flip(-1), mask.flip(-1)))
    assert seen == [(tv_tensors.Image, tv_tensors.Mask)]


@pytest.mark.parametrize("cache", [True, False])
def test_batch_equals_items_and_index_tells_where_they_come_from(data, cache):
    data_set = CLEVRDataset(data, cache=cache)
    assert len(data_set) == 9
    assert [video.path.name for video in data_set.videos] == ["video0", "video_2", "video_10"]
    order = [8, 0, 5, 5, 3]
    items = [data_set[i] for i in order]
    batch = next(iter(DataLoader(data_set, batch_sampler=[order])))
    assert same(batch, [torch.stack(part) for part in zip(*items, strict=True)])
    assert [type(part) for part in batch] == [torch.Tensor, torch.Tensor]
    for i, (video, t) in enumerate(data_set.index):
        truth = np.load(data_set.videos[video].path / "mask.npy")[t]
        assert np.array_equal(data_set[i][1].numpy(), truth)
    with pytest.raises(IndexError):
        data_set[9]


def test_changing_an_item_leaves_the_data_as_it_was(data):
    data_set = CLEVRDataset(data)
    before = everything(data_set)
    for image, mask in (data_set[0], next(iter(DataLoader(data_set)))):
        image.zero_()
        mask.zero_()
    assert same(everything(data_set), before)


@pytest.mark.parametrize("dtype", ["int64", "uint16", ">i4", "int8"])
def test_masks_of_other_integer_types_and_layouts_are_read(data, dtype):
    before = everything(CLEVRDataset(data, cache=False))
    for video in sorted(data.iterdir()):
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
            )
        )

    expected = batches(data_set, 0)
    assert [len(frames) for frames, _ in expected] == [4, 4, 1]
    others = [batches(data_set, 2, "forkserver"), batches(data_set, 1, "spawn")]
    others.append(batches(CLEVRDataset(data, cache=False), 2, "forkserver"))
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
    assert [v.path for v in data_set.videos] == videos
    assert [data_set[i].shape for i in (0, 10, 11, 12, 13)] == (
        [(3, *SIZE)] * 2 + [(3, 5, 9)] * 2 + [(3, *SIZE)]
    )
    batch = next(iter(DataLoader(data_set, batch_sampler=[[0, 5]])))
    assert batch.shape == (2, 3, *SIZE)
    assert data_set.video(1).shape == (2, 3, 5, 9)
    assert [v.path for v in CLEVRDataset(tmp_path).videos] == videos[2:]
    (videos[0] / "image_3.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"video_1.image_3\.png"):
        CLEVRDataset(tmp_path, labelled=False)[3]


# The cache


def cached_files():
    return sorted(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.npy"))


def test_cached_equals_uncached_and_is_used(data, monkeypatch):
    plain = everything(CLEVRDataset(data, cache=False))
    assert not cached_files()
    assert same(everything(CLEVRDataset(data)), plain)
    assert len(cached_files()) == 3
    monkeypatch.setattr(videos, "read_frame", None)  # from here on no PNG can be decoded
    assert same(everything(CLEVRDataset(data)), plain)
    part = CLEVRDataset([data / "video_10", data / "video0"])  # a split shares the cache
    assert [video.path.name for video in part.videos] == ["video_10", "video0"]
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


def build(path, cache, barrier, kill):
    """Build the cache; exit with 0 if what is then read is right, or be killed half-way."""
    os.environ["XDG_CACHE_HOME"] = cache  # not the one of when the server was started
    torch.set_num_threads(1)
    fsync, calls = os.fsync, itertools.count()

    def die_in_the_second_file(descriptor):
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)  # threads write, and sync folders too
        if is_file and next(calls) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    if kill:
        os.fsync = die_in_the_second_file
    if barrier:
        barrier.wait()
    right = same(everything(CLEVRDataset(path)), everything(CLEVRDataset(path, cache=False)))
    os._exit(0 if right else 1)


def start_build(path, barrier=None, kill=False):
    """Start a process that builds the cache."""
    arguments = (path, os.environ["XDG_CACHE_HOME"], barrier, kill)
    process = CLEAN.Process(target=build, args=arguments)
    process.start()
    return process


def test_processes_may_build_the_cache_at_once(tmp_path):
    for i in range(30):
        make_video(tmp_path / "data" / f"video_{i}", seed=i)
    barrier = CLEAN.Barrier(3)
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
    left = list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.tmp"))
    assert left, "it was killed in the middle"
    assert len(cached_files()) < 3
    assert same(everything(CLEVRDataset(data)), everything(CLEVRDataset(data, cache=False)))
    assert len(cached_files()) == 3
    assert not any(part.exists() for part in left)


def test_a_cache_that_cannot_be_written_warns_once_and_goes_on(data, tmp_path, caplog):
    (tmp_path / "file").touch()
    data_set = CLEVRDataset(data, cache=tmp_path / "file")
    assert len(caplog.messages) == 1
    assert "cannot be written" in caplog.text
    assert same(everything(data_set), everything(CLEVRDataset(data, cache=False)))


def test_a_full_disk_warns_once_and_leaves_no_leftovers(data, monkeypatch, caplog):
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
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.tmp"))
    assert same(everything(CLEVRDataset(data)), plain)


def test_a_list_names_what_is_no_labelled_video(data, tmp_path):
    bare = make_video(tmp_path / "bare", labelled=False)
    data_set = CLEVRDataset([data / "video0", bare, tmp_path / "nowhere"])
    assert [v.path for v in data_set.videos] == [data / "video0"]
    assert "no mask.npy" in data_set.skipped[bare]
    assert "cannot be read" in data_set.skipped[tmp_path / "nowhere"]


def test_nothing_usable_is_an_error_and_not_an_empty_data_set(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        CLEVRDataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no video"):
        CLEVRDataset(tmp_path)
    make_video(tmp_path / "video_1", labelled=False)
    with pytest.raises(UserError, match=r"mask\.npy"):
        CLEVRDataset(tmp_path)
    with pytest.raises(UserError, match="an empty list"):
        CLEVRDataset([])


# As everyone writes it


@pytest.mark.filterwarnings("ignore:.*fork")  # the loader's own choice on Linux before Python 3.14
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sampler", [SequentialSampler, RandomSampler])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_plain_loader_with_the_default_collate(data, labelled, sampler, workers):
    data_set = CLEVRDataset(data, labelled=labelled)
    loader = DataLoader(data_set, batch_size=4, sampler=sampler(data_set), num_workers=workers)
    batches = list(loader)
    frames = torch.cat([batch[0] for batch in batches] if labelled else batches)
    assert frames.shape == (9, 3, *SIZE)
    if labelled:
        masks = torch.cat([batch[1] for batch in batches])
        assert masks.shape == (9, *SIZE)
    if sampler is SequentialSampler:
        expected = [data_set[i][0] if labelled else data_set[i] for i in range(9)]
        assert torch.equal(frames, torch.stack(expected))


def test_joint_transforms_of_torchvision_reach_image_and_mask(data):
    flip = v2.Compose([v2.RandomHorizontalFlip(p=1), v2.ToDtype(torch.float32, scale=True)])
    images, masks = everything(CLEVRDataset(data, transform=flip))
    plain_images, plain_masks = everything(CLEVRDataset(data))
    assert torch.equal(masks, plain_masks.flip(-1))
    torch.testing.assert_close(images, plain_images.flip(-1) / 255)
    alone = next(iter(DataLoader(CLEVRDataset(data, transform=flip, labelled=False), batch_size=9)))
    assert torch.equal(alone, images)


class OfImagesAlone(nn.Module):
    def forward(self, image):
        return image


def one_of_albumentations():
    """Return what is called as Albumentations' transforms are, which nobody needs to install."""
    return type("Compose", (), {"__module__": "albumentations.core", "__call__": lambda *_: None})()


@pytest.mark.parametrize(
    "transform", [lambda image: image, OfImagesAlone(), v1.ToTensor(), one_of_albumentations()]
)
def test_a_transform_of_images_alone_is_named_before_training(data, transform):
    with pytest.raises(UserError, match="image, mask"):
        CLEVRDataset(data, transform=transform)


def test_transforms_that_are_right_are_taken(data):
    def darker(image):
        return image // 2

    @functools.wraps(darker)
    def both(image, mask, share=1):
        return darker(image), mask

    class Whole:
        def change(self, *parts):
            return parts

    for transform in (
        both,
        functools.partial(both, share=2),
        Whole().change,
        v2.Compose([v2.Identity()]),
        lambda image, mask: (image, mask, 1),
    ):
        assert len(CLEVRDataset(data, transform=transform)[0]) >= 2


def test_a_transform_that_loses_the_mask_is_named(data):
    with pytest.raises(UserError, match=r"returns both.*not Image"):
        CLEVRDataset(data, transform=lambda image, mask: image)[0]


def test_a_transform_of_images_is_right_where_there_are_no_labels(data):
    data_set = CLEVRDataset(data, transform=lambda image: 255 - image, labelled=False)
    assert (255 - data_set[0]).equal(CLEVRDataset(data, labelled=False)[0])
    with pytest.raises(UserError, match="an image alone"):
        CLEVRDataset(data, transform=lambda image, mask: (image, mask), labelled=False)


def test_a_slice_is_a_sentence(data):
    for index in (slice(0, 3), [0, 1]):
        with pytest.raises(UserError, match=r"Subset\(dataset, range"):
            CLEVRDataset(data)[index]


def test_gray_videos_are_named(tmp_path, capsys):
    make_video(tmp_path / "video_0", frames=2, size=(32, 48))
    make_video(tmp_path / "video_1", frames=2, size=(32, 48))
    gray = PIL.Image.new("L", (48, 32), 120)
    for t in range(2):
        gray.save(tmp_path / f"video_1/image_{t}.png")
    assert dataset.print_report(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(k for k, line in enumerate(lines) if line.startswith("gray, so that"))
    assert lines[at].endswith(": 1 video")
    assert lines[at + 1] == f"  {tmp_path / 'video_1'}"
    assert not any("video_0" in line for line in lines)


def test_the_loop_of_the_documentation_learns(tmp_path):
    """Dataset, loader with a sampler, network, loss, optimiser: as SEED.md tells it."""
    torch.manual_seed(0)
    make_video(tmp_path / "video_0", frames=4, size=(16, 24))
    data = CLEVRDataset(tmp_path)
    loader = DataLoader(data, batch_size=22, sampler=SequentialSampler(data))
    model, loss_function = UNet(widths=(16, 16)), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        for images, masks in loader:
            loss = loss_function(model(images), masks.long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@needs_real
def test_real_videos_are_the_same_from_the_cache_and_without():
    data_set = CLEVRDataset(REAL)
    assert len(data_set) > 0
    assert same(everything(data_set), everything(CLEVRDataset(REAL, cache=False)))
    objects = (everything(data_set)[1] > 0).float().mean().item()
    assert 0.01 < objects < 0.15, "some 5 % of a frame is objects"
