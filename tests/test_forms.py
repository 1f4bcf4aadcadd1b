"""The same world in other forms: squares, bars, pictures without time, finer looks, no holes."""

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy import ndimage
from torch.nn import functional as F

import details
import labelling
from borders import choose, fill_holes, sharpen
from content import Bars, Box, is_flat
from details import cover
from labelling import Labeller
from metrics import at_borders
from render import render_video
from scale import resize
from stills import are_stills
from videos import Frame

WEIGHTS = ROOT / "weights/clevr_unet.pt"


@pytest.fixture(scope="module")
def labeller():
    return Labeller.load(WEIGHTS)


@pytest.fixture(scope="module")
def video():
    """Frames and true masks of objects that touch."""
    return render_video(12, (6, 6), num_frames=4)


@pytest.fixture(scope="module")
def known(labeller, video):
    return labeller.label([video[0]])[0].labels


def agreement(labels, truth):
    """The share of the object pixels of either that are right."""
    either = (labels > 0) | (truth > 0)
    return (labels == truth)[either].double().mean().item()


def box_of(*parts):
    bars = Bars()
    for frames in parts:
        bars.add(frames)
    return bars.box


def ahead(labeller, frames, **options):
    """The objects of a video that is read frame by frame, as clips are."""
    read = lambda: (Frame(pixels, n, None) for n, pixels in enumerate(frames))  # noqa: E731
    return labeller.label_ahead(read, **options)


# Squares


@pytest.mark.parametrize("side", [256, 128])
def test_a_squeezed_video_is_read_as_what_it_was(labeller, video, side):
    frames, truth = video
    (found,) = labeller.label([resize(frames, (side, side))])
    assert "squeezed to a square" in found.remarks[0]
    assert found.labels.shape == (4, side, side)
    expected = F.interpolate(truth[:, None].float(), (side, side), mode="nearest-exact")
    assert agreement(found.labels, expected[:, 0].byte()) > 0.85
    assert set(found.labels.unique().tolist()) <= set(truth.unique().tolist())


def test_a_cut_square_is_read_at_the_scale_of_its_height(labeller):
    frames, truth = (part[..., 40:200] for part in render_video(5, (6, 6), num_frames=4))
    (found,) = labeller.label([frames])
    assert found.remarks == []  # as it is
    assert agreement(found.labels, truth) > 0.85
    (large,) = labeller.label([resize(frames, (320, 320))])
    assert "cut to a square" in large.remarks[0]
    assert set(large.labels.unique().tolist()) == set(found.labels.unique().tolist())


# Bars, and frames that show nothing


@pytest.mark.parametrize("margins", [(0, 0, 40, 40), (13, 0, 0, 0), (30, 21, 9, 2), (0, 0, 0, 8)])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_bars_change_nothing(labeller, video, known, margins, level):
    frames = F.pad(video[0], margins, value=level)
    assert box_of(frames) == Box(*margins)
    (found,) = labeller.label([frames])
    assert torch.equal(found.labels, F.pad(known, margins))
    assert any("bars" in remark for remark in found.remarks)
    assert found.bars == tuple(margins)


def test_noise_up_to_four_levels_is_a_bar_and_more_is_none():
    frames = torch.randint(0, 256, (4, 3, 40, 60), dtype=torch.uint8)
    frames[:, :, :10] = torch.randint(10, 15, (4, 3, 10, 60), dtype=torch.uint8)
    bars = Bars()
    bars.add(frames)
    assert bars.ends == [10, 0, 0, 0]
    frames[2, 1, 4, 17], frames[2, 1, 4, 18] = 9, 14
    bars.add(frames)
    assert bars.ends == [4, 0, 0, 0]


@pytest.mark.parametrize("level", [0, 255])
def test_the_soft_edge_of_a_bar_belongs_to_it(labeller, video, known, level):
    """As where a letterboxed video was made smaller, or compressed."""
    frames = F.pad(video[0], (0, 0, 40, 40), value=level)
    small = resize(frames, (128, 128))
    above = round(40 * 128 / 240)
    box = box_of(small)
    assert 0 <= box.above - above <= 4
    assert 0 <= box.below - above <= 4
    (found,) = labeller.label([small])
    assert set(found.labels.unique().tolist()) <= set(known.unique().tolist())
    blurred = F.avg_pool2d(frames.float(), (7, 1), 1, (3, 0), count_include_pad=False).byte()
    box = box_of(blurred)
    assert min(box.above, box.below) >= 40
    assert max(box.above, box.below) <= 46


def test_what_would_leave_little_of_a_frame_is_no_bar():
    frames = torch.full((3, 3, 60, 90), 90, dtype=torch.uint8)
    frames[:, :, 28:32, 40:50] = 200  # an object before a wall
    assert box_of(frames) == Box()


def test_bars_that_shrink_later_are_those_of_all_frames(labeller, video, known):
    frames = F.pad(video[0], (0, 0, 20, 20))
    frames = torch.cat([torch.zeros_like(frames[:3]), *[frames[:2]] * 12, frames])
    frames[:26, :, 20:30] = 0  # wider at first
    found = ahead(labeller, frames)
    assert torch.equal(found.labels[-4:, 20:180], labeller.label([frames])[0].labels[-4:, 20:180])
    assert not found.labels[:, :20].any()
    assert not found.labels[:3].any()
    assert agreement(found.labels[-4:, 20:180], known) > 0.97


def test_a_frame_that_shows_nothing_is_background(labeller, video):
    frames = torch.cat([video[0], torch.full((2, 3, 160, 240), 9, dtype=torch.uint8), video[0]])
    assert is_flat(frames).tolist() == [False] * 4 + [True] * 2 + [False] * 4
    (found,) = labeller.label([frames])
    assert not found.labels[4:6].any()
    assert found.labels[:4].any()
    assert not labeller.label([frames[4:6]])[0].labels.any()
    assert not ahead(labeller, frames[4:6]).labels.any()


@pytest.mark.parametrize("form", ["square", "bars", "large"])
def test_a_video_has_the_same_labels_however_it_is_read(labeller, video, form):
    size = {"square": (128, 128), "bars": (160, 240), "large": (216, 324)}[form]
    frames = resize(video[0], size)
    frames = F.pad(frames, (0, 0, 12, 12)) if form == "bars" else frames
    (expected,) = labeller.label([frames])
    assert torch.equal(ahead(labeller, frames).labels, expected.labels)
    for batch_size in (1, 3):
        other = Labeller.load(WEIGHTS, batch_size=batch_size)
        assert torch.equal(other.label([frames])[0].labels, expected.labels)
    other = torch.randint(0, 256, frames.shape, dtype=torch.uint8)
    assert torch.equal(labeller.label([other, frames])[1].labels, expected.labels)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (33, 17), (16, 160), (47, 300)])
@pytest.mark.parametrize("tracking", [True, False])
def test_frames_of_odd_sizes_are_labelled(size, tracking):
    labeller = Labeller.load(WEIGHTS, tracking=tracking)
    frames = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    assert labeller.label([frames])[0].labels.shape == (2, *size)
    assert ahead(labeller, frames).labels.shape == (2, *size)


# Pictures without time


def test_pictures_of_different_scenes_are_each_labelled_alone(labeller):
    frames = torch.cat([render_video(seed, (4, 6), num_frames=1)[0] for seed in range(5)])
    (found,) = labeller.label([frames])
    assert found.stills
    alone = [labeller.label([picture[None]])[0] for picture in frames]
    assert torch.equal(found.labels, torch.cat([picture.labels for picture in alone]))
    least = min(p.confidence[k] for p in alone for k in p.confidence if k in found.confidence)
    assert min(found.confidence.values()) == pytest.approx(least, abs=1e-6)


@pytest.mark.parametrize(
    ("ground", "kinds", "stills"), [(0, 0, 0), (9, 0, 0), (0, 1, 0), (9, 1, 1)]
)
def test_only_where_neither_kinds_nor_ground_agree(ground, kinds, stills):
    """Three kinds are in each of six frames; of `kinds` that change one stays."""
    objects, evidence = torch.zeros(6, 40, 80, dtype=torch.bool), []
    for t in range(6):
        for n in range(3):
            objects[t, 10:18, 8 + 24 * n : 16 + 24 * n] = True
    for t in range(6):
        kind = [0, 1 + 2 * t * kinds % 7, 2 + 2 * t * kinds % 7]
        logits = torch.full((3, 13), -9.0)
        logits[:, 0] = logits[:, 3] = 9.0
        logits[torch.arange(3), 5 + torch.tensor(kind) % 8] = 9.0
        evidence += [logits.repeat_interleave(4, 0).repeat(4, 1)]  # 4 x 4 cells of each
    levels = torch.arange(6)[:, None, None] * ground * torch.ones(5, 10)
    assert are_stills(levels.half(), objects, torch.cat(evidence)) == bool(stills)


# Second looks


@pytest.mark.parametrize(("scale", "aside"), [(1, 1), (2, 0), (2, 1)])
def test_windows_hold_all_cells_and_lie_in_the_picture(scale, aside):
    rng = np.random.default_rng(scale)
    for _ in range(60):
        size = tuple(rng.integers(8, 200, 2).tolist())
        most = 3, (size[0] + 1) // 2, (size[1] + 1) // 2
        cells = np.unique(np.stack([rng.integers(0, n, 40) for n in most]), axis=1)
        held = np.zeros((3, scale * size[0], scale * size[1]), bool)
        for windows in cover(cells, scale, size, aside):
            inside = (windows.top > 0) & (windows.top < windows.picture[0] - windows.sides[0])
            assert (windows.top[inside] % 2 == aside).all()
            assert list(windows.frame) == sorted(windows.frame)
            for (n, y, x), (rows, columns) in zip(windows.corners(), windows.inner(), strict=True):
                assert 0 <= y <= windows.picture[0] - windows.sides[0]
                assert 0 <= x <= windows.picture[1] - windows.sides[1]
                held[n, y:, x:][rows, columns] = True
        pixels = held[cells[0], 2 * scale * cells[1], 2 * scale * cells[2]]
        assert pixels.all()


def test_borders_are_drawn_by_the_pixel(labeller, monkeypatch):
    """By the true masks of videos whose objects touch; and the edges stay where they are."""
    right, edge = {}, {}
    for finer in (False, True):
        monkeypatch.setattr(details, "SOLID", details.SOLID if finer else 99)  # never looks
        for seed in (4, 27, 33, 44):
            frames, truth = render_video(seed, (8, 9), num_frames=3)
            (found,) = labeller.label([frames])
            beside = at_borders(truth)
            right.setdefault(finer, []).append((found.labels == truth)[beside])
            edge.setdefault(finer, []).append(found.labels > 0)
        monkeypatch.undo()
    before, after = (torch.cat(right[finer]).double().mean() for finer in (False, True))
    assert after > before + 0.045
    assert after > 0.84
    assert torch.equal(torch.cat(edge[False]), torch.cat(edge[True]))


def test_borders_of_large_frames_are_drawn_by_the_pixel(labeller, monkeypatch):
    """Better than without the finer look aside; where objects end is left as it is."""
    videos = [render_video(seed, (8, 9), 2, height=320, width=480) for seed in (4, 27, 44)]
    truth = torch.cat([masks for _, masks in videos])
    after = torch.cat([labeller.label([frames])[0].labels for frames, _ in videos])

    def without(*arguments):
        seen = details.look_again(*arguments)
        return seen._replace(evidence=seen.evidence[:, :13])

    monkeypatch.setattr(labelling, "look_again", without)
    before = torch.cat([labeller.label([frames])[0].labels for frames, _ in videos])
    beside = at_borders(truth)
    right = [(labels == truth)[beside].double().mean() for labels in (before, after)]
    assert right[1] > right[0] + 0.01
    assert torch.equal(before > 0, after > 0)


def test_a_border_moves_to_where_evidence_changes():
    """Two objects side by side; the first look's cells end at column 8, the second says 9."""
    objects = torch.zeros(1, 12, 20, dtype=torch.bool)
    objects[:, 2:10, 2:18] = True
    kinds = torch.zeros(1, 12, 20, dtype=torch.uint8)
    kinds[:, 2:10, 2:8], kinds[:, 2:10, 8:18] = 5, 7

    def logits(right):
        return torch.where(right[:, None], torch.tensor(8.0), torch.tensor(-8.0)).repeat(1, 13)

    columns = torch.arange(10).expand(6, 10)[None]
    cells = F.max_pool2d(objects.float(), 2)[0].bool()
    first = torch.zeros(int(cells.sum()), 13)
    first[:, 0] = torch.where(columns[0][cells] >= 4, 8.0, -8.0)
    where = torch.nonzero(objects.flatten())[:, 0]
    second = torch.zeros(len(where), 13)
    second[:, 0] = torch.where(where % 20 >= 9, 8.0, -8.0)
    known = details.Details(None, where, 3 * second)
    found = sharpen(kinds.clone(), kinds, objects, first, known)
    assert found[0, 5].tolist() == [0] * 2 + [5] * 7 + [7] * 9 + [0] * 2
    nothing = details.Details(None, where[:0], second[:0])
    assert torch.equal(sharpen(kinds.clone(), kinds, objects, first, nothing), kinds)


def test_a_pixel_goes_to_the_object_that_it_is_like():
    """The means in frame 0 are 0, 5.5 and 0; a third object stays, and one beside an unknown."""
    looks = np.array([[0], [10], [1], [0], [3]], np.float32)
    labels = np.array([5, 7, 7, 9, 5], np.uint8)
    pair = np.array([[5, 5, 5, 5, 5], [7, 7, 7, 7, 6]], np.uint8)
    chosen = choose(looks, np.array([0, 0, 0, 0, 1]), labels, np.ones(5, bool), pair)
    assert chosen.tolist() == [5, 7, 5, 9, 5]


def test_holes_are_those_that_a_flood_from_the_edge_does_not_reach():
    rng = np.random.default_rng(0)
    for n in range(300):
        shape = rng.integers(1, 12, 3) % (4, 12, 12) + (0, 1, 1)
        share = [0.35, 0.45, 0.2] if n % 2 else [0.4, 0.6, 0.0]
        labels = rng.choice([0, 1, 2], shape, p=share).astype(np.uint8)
        expected = labels.copy()
        for t in range(shape[0]):
            regions, count = ndimage.label(np.pad(labels[t] == 0, 1, constant_values=True))
            for k in range(1, count + 1):
                region = (regions == k)[1:-1, 1:-1]
                around = labels[t][ndimage.binary_dilation(region) & ~region]
                if k != regions[0, 0] and len(set(around.tolist())) == 1:
                    expected[t][region] = around[0]
        assert np.array_equal(fill_holes(torch.from_numpy(labels)).numpy(), expected)


def test_border_accuracy_by_hand():
    truth = torch.tensor([[[1, 1, 2, 2], [1, 1, 0, 2], [0, 3, 3, 0]]], dtype=torch.uint8)
    expected = [[[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0]]]
    assert at_borders(truth).int().tolist() == expected
