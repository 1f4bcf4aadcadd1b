"""Objects are followed: synthetic scenes whose right labels are worked out by hand."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tracks
from classes import CLASS_NAMES, FACTOR_SIZES, factors
from objects import DROP_PIXELS, Objects, follow
from outputs import table
from tracks import gather, occupied

ID = {name: i for i, name in enumerate(CLASS_NAMES)}
RED_CUBE, RED_BALL = ID["red rubber cube"], ID["red rubber sphere"]
BLUE_CUBE, BLUE_BALL = ID["blue metal cube"], ID["blue metal sphere"]


def logits(kind, sure=6.0):
    """Evidence (13,) that speaks for one class by `sure` nats in each factor."""
    hot = [F.one_hot(torch.tensor(f), n) for f, n in zip(factors(kind), FACTOR_SIZES, strict=True)]
    return sure * torch.cat(hot).float()


class Scene:
    """Boxes drawn over an empty video; what is drawn later hides what is there."""

    def __init__(self, frames, height=160, width=240):
        self.objects = torch.zeros(frames, height, width, dtype=torch.bool)
        self.drawn = torch.zeros(frames, height, width, dtype=torch.uint8)  # by which call
        self.evidence = torch.zeros(frames, height, width, 13)

    def box(self, t, x, y, reads, size=20, sure=6.0, name=1):
        """Draw a box whose top left pixel is (x, y), as far as it lies in the frame."""
        rows, columns = slice(max(y, 0), y + size), slice(max(x, 0), max(x + size, 0))
        self.objects[t, rows, columns] = True
        self.drawn[t, rows, columns] = name
        self.evidence[t, rows, columns] = logits(reads, sure)

    def follow(self):
        cells = F.max_pool2d(self.evidence.movedim(-1, 1), 2, ceil_mode=True)
        return follow(self.objects, gather(self.objects, cells), self.objects.shape[2] / 240)

    def classes(self, found, t, name=1):
        """The classes that one object was given in frame t."""
        return set(found.labels[t][self.drawn[t] == name].tolist())


def test_a_class_that_flips_is_set_right():
    scene = Scene(8)
    for t in range(8):
        scene.box(t, 60 + 5 * t, 60, RED_BALL if t in (3, 4) else RED_CUBE)
    found = scene.follow()
    assert (found.labels == RED_CUBE).equal(scene.objects)


def test_part_of_an_object_that_reads_otherwise_is_set_right():
    scene = Scene(6)
    for t in range(6):
        scene.box(t, 60, 60, RED_CUBE)
        if t == 2:
            scene.evidence[t, 60:80, 60:68] = logits(RED_BALL)
    assert (scene.follow().labels == RED_CUBE).equal(scene.objects)


def test_a_brief_object_keeps_its_class():
    scene = Scene(12)
    for t in range(12):
        scene.box(t, 40, 60, RED_CUBE)
    scene.box(5, 150, 60, RED_BALL, size=12, name=2)
    found = scene.follow()
    assert scene.classes(found, 5, name=2) == {RED_BALL}
    assert scene.classes(found, 5) == {RED_CUBE}


@pytest.mark.parametrize(("x", "seen_as"), [(110, RED_CUBE), (95, RED_BALL)])
def test_a_piece_of_an_object_is_believed_less_than_one_seen_whole(x, seen_as):
    """For a moment it is on its way past another, behind it or beside it, and reads otherwise."""
    scene = Scene(12)
    for t in range(12):
        place = 30 if t < 5 else 190 if t > 5 else x
        scene.box(t, place, 60, RED_BALL if t == 5 else RED_CUBE, sure=5.2)
        scene.box(t, 120, 60, BLUE_BALL, size=24, name=2)
    found = scene.follow()
    assert scene.classes(found, 5) == {seen_as}
    assert scene.classes(found, 5, name=2) == {BLUE_BALL}


def test_parts_that_read_alike_are_alike_however_unsure_they_are():
    """The geometric means of what cells say add up to less than 1, by as much as they disagree."""
    twice = np.array([2, 2])
    unsure = np.log(np.full((2, 13), 0.1))
    span = np.repeat([[[60.0, 79.0, 69.5], [60.0, 79.0, 69.5]]], 2, axis=0)
    parts = tracks.Parts(np.arange(2), span, twice * 200.0, twice < 0, unsure, twice[:0])
    assert tracks._Linker(parts).differences(np.array([0]), np.array([1])) == pytest.approx(0)


@pytest.mark.parametrize("first", [1, -1])
def test_an_object_that_the_frame_cuts_gets_the_class_it_has_in_full_view(first):
    scene = Scene(8)
    for i in range(8)[::first]:  # it enters, or it leaves
        t = i if first > 0 else 7 - i
        x = -14 + 8 * i
        scene.box(t, x, 70, BLUE_CUBE if x < -5 else BLUE_BALL)
    found = scene.follow()
    assert found.labels.unique().tolist() == [0, BLUE_BALL]
    rows = table(found)
    assert [row.at_edge for row in rows if row.frame == (0 if first > 0 else 7)] == [True]
    assert {row.object for row in rows} == {1}


def test_the_edge_that_cuts_is_that_of_the_picture_between_bars():
    labels = torch.zeros(1, 20, 30, dtype=torch.uint8)
    labels[0, 5:9, 9:16], labels[0, 14:16, 20:24] = 1, 2
    for bars, at_edge in (((0, 0, 0, 0), [0, 0]), ((9, 0, 0, 0), [1, 0]), ((0, 0, 3, 4), [0, 1])):
        assert [row.at_edge for row in table(Objects(labels, {}, bars=bars))] == at_edge


def test_an_occluded_object_that_reappears_keeps_its_number_and_class():
    scene = Scene(14)
    for t in range(14):
        if not 5 <= t <= 8:
            # On coming back it reads as something else at first.
            scene.box(t, 30 + 8 * t, 60, BLUE_CUBE if t == 9 else BLUE_BALL, name=2)
        scene.box(t, 75, 58, RED_CUBE, size=26)
    found = scene.follow()
    assert found.labels.unique().tolist() == [0, RED_CUBE, BLUE_BALL]
    numbers = {(row.class_id, row.object) for row in table(found)}
    assert len(numbers) == 2


def test_touching_objects_of_one_colour_stay_two():
    scene = Scene(10)
    for t in range(10):
        scene.box(t, 60, 60, RED_CUBE)
        scene.box(t, 98 - 2 * t, 60, RED_BALL, name=2)  # they touch in the last frame
    found = scene.follow()
    for t in range(10):
        assert scene.classes(found, t) == {RED_CUBE}
        assert scene.classes(found, t, name=2) == {RED_BALL}


def test_objects_that_collide_and_part_keep_their_classes():
    scene = Scene(12)
    for t in range(12):
        gap = 20 + 6 * abs(t - 6)
        scene.box(t, 80, 60, BLUE_CUBE)
        scene.box(t, 80 + gap, 64, BLUE_BALL, name=2)
    found = scene.follow()
    for t in range(12):
        assert scene.classes(found, t) == {BLUE_CUBE}
        assert scene.classes(found, t, name=2) == {BLUE_BALL}


def test_an_object_behind_a_narrow_one_is_one_class_in_two_pieces():
    scene = Scene(6)
    for t in range(6):
        scene.box(t, 60, 60, RED_CUBE, size=24)
        scene.objects[t, 40:100, 70:76] = True
        scene.evidence[t, 40:100, 70:76] = logits(BLUE_BALL)
        scene.drawn[t, 40:100, 70:76] = 2
    found = scene.follow()
    assert scene.classes(found, 3) == {RED_CUBE}
    assert scene.classes(found, 3, name=2) == {BLUE_BALL}


def test_no_class_is_twice_in_one_frame():
    scene = Scene(5)
    for t in range(5):
        scene.box(t, 30, 60, RED_CUBE, sure=6)
        scene.box(t, 180, 60, RED_CUBE, sure=3, name=2)
        scene.evidence[t][scene.drawn[t] == 2] += logits(RED_BALL, 2.5)
    found = scene.follow()
    assert scene.classes(found, 2) == {RED_CUBE}
    assert scene.classes(found, 2, name=2) == {RED_BALL}
    rows = table(found)
    assert len({(row.frame, row.class_id) for row in rows}) == len(rows) == 10


@pytest.mark.parametrize("jump", [4, 30, 100])
def test_however_far_an_object_jumps_it_is_itself(jump):
    scene = Scene(6)
    for t in range(6):
        scene.box(t, 10 + jump * t % 200, 40 + jump * t % 90, RED_CUBE)
        scene.box(t, 200, 120, BLUE_BALL, name=2)
    found = scene.follow()
    assert (found.labels == RED_CUBE).equal(scene.drawn == 1)
    assert {row.object for row in table(found) if row.class_id == RED_CUBE} == {1}


@pytest.mark.parametrize("frames", [1, 5])
def test_two_that_are_whole_and_surely_of_one_class_are_two_of_it(frames):
    scene = Scene(frames)
    for t in range(frames):
        scene.box(t, 30, 60, RED_CUBE)
        scene.box(t, 150, 60, RED_CUBE, name=2)
    found = scene.follow()
    assert (found.labels == RED_CUBE).equal(scene.objects)


def test_an_object_of_which_nothing_is_hidden_is_not_a_speck():
    """JPEG leaves specks that stay where they are; part of an object is at something else."""
    scene = Scene(8)
    for t in range(8):
        scene.box(t, 60, 60, RED_CUBE)
        scene.box(t, 130, 20, BLUE_BALL, size=4, name=2)
        scene.box(t, 236, 100, BLUE_CUBE, size=6, name=3)  # comes in
    found = scene.follow()
    for t in range(8):
        assert scene.classes(found, t, name=2) == {0}
        assert scene.classes(found, t, name=3) == {BLUE_CUBE}


def test_confidence_tells_where_a_class_was_guessed():
    scene = Scene(5)
    for t in range(5):
        scene.box(t, 30, 60, RED_CUBE)
        scene.box(t, 150, 60, BLUE_BALL, sure=0.4, name=2)
    found = scene.follow()
    assert found.confidence[RED_CUBE] > 0.95
    (guess,) = found.confidence.keys() - {RED_CUBE}
    assert found.confidence[guess] < 0.6


def test_two_tracks_that_want_one_class_share_out_what_costs_least():
    scene = Scene(4)
    for t in range(4):
        scene.box(t, 30, 60, RED_CUBE, size=24, sure=2)  # larger, but nearly as well a ball
        scene.evidence[t][scene.drawn[t] == 1] += logits(RED_BALL, 1.6)
        scene.box(t, 180, 60, RED_CUBE, name=2)
    found = scene.follow()
    assert scene.classes(found, 1) == {RED_BALL}
    assert scene.classes(found, 1, name=2) == {RED_CUBE}


def test_only_specks_without_a_likely_class_are_dropped():
    scene = Scene(6)
    for t in range(6):
        scene.box(t, 60, 60, RED_CUBE)
        scene.box(t, 130, 20, BLUE_BALL, size=6, sure=0.2, name=2)
        scene.box(t, 180, 0, BLUE_BALL, size=6, name=3)  # the edge hides the rest of it
        scene.box(t, 200, 100, BLUE_CUBE, size=8, sure=0.2, name=4)
    assert 6 * 6 <= DROP_PIXELS < 8 * 8
    found = scene.follow()
    for t in range(6):
        assert scene.classes(found, t, name=2) == {0}
        assert scene.classes(found, t, name=3) == {BLUE_BALL}
        assert 0 not in scene.classes(found, t, name=4)
    assert ((found.labels > 0) == (scene.objects & (scene.drawn != 2))).all()


def test_a_video_of_one_frame():
    scene = Scene(1)
    scene.box(0, 60, 60, RED_CUBE)
    scene.box(0, -5, 100, BLUE_BALL, name=2)
    found = scene.follow()
    assert scene.classes(found, 0) == {RED_CUBE}
    assert scene.classes(found, 0, name=2) == {BLUE_BALL}


@pytest.mark.parametrize("frames", [0, 1, 3])
def test_a_video_without_objects(frames):
    found = Scene(frames).follow()
    assert found.labels.shape == (frames, 160, 240)
    assert not found.labels.any()
    assert table(found) == []


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (7, 240), (320, 480)])
def test_frames_of_any_size(height, width):
    scene = Scene(2, height, width)
    scene.objects[:] = True
    scene.evidence[:] = logits(RED_CUBE)
    assert (scene.follow().labels == RED_CUBE).all()


def test_a_thousand_frames():
    scene = Scene(1000, 48, 64)
    for t in range(1000):
        scene.box(t, t * 7 % 64, 10, RED_CUBE if t % 10 else RED_BALL, size=10)
        scene.box(t, t // 20, 30, BLUE_BALL, size=10, name=2)
    found = scene.follow()
    assert ((found.labels > 0) == scene.objects).all()
    assert all(scene.classes(found, t, name=2) == {BLUE_BALL} for t in range(0, 1000, 50))


def test_noise_falls_into_so_many_parts_at_most(monkeypatch):
    """Its time is that of a scene."""
    counts, cut = [], tracks.cut

    def counted(cells, *others):
        part = cut(cells, *others)
        counts.extend(len(np.unique(part[cells.frame == t])) for t in np.unique(cells.frame))
        return part

    monkeypatch.setattr(tracks, "cut", counted)
    generator = torch.Generator().manual_seed(0)
    objects = torch.rand(20, 160, 240, generator=generator) < 0.2
    evidence = 3 * torch.randn(int(occupied(objects).sum()), 13, generator=generator)
    found = follow(objects, evidence)
    assert not found.labels[~objects].any()
    assert max(counts) == tracks.MOST_PARTS + 1  # that of what is left of a frame
    assert found.labels.equal(follow(objects, evidence).labels)


def test_table_tells_where_each_object_is():
    scene = Scene(2)
    scene.box(0, 60, 70, RED_CUBE, size=10)
    scene.box(1, 64, 70, RED_CUBE, size=10)
    scene.box(1, -4, 100, BLUE_BALL, size=12, name=2)
    rows = table(scene.follow())
    assert [row[:4] for row in rows] == [
        (0, 1, RED_CUBE, "red rubber cube"),
        (1, 1, RED_CUBE, "red rubber cube"),
        (1, 2, BLUE_BALL, "blue metal sphere"),
    ]
    assert rows[0][4:12] == (64.5, 74.5, 60, 70, 69, 79, 100, False)
    assert rows[2][4:12] == (3.5, 105.5, 0, 100, 7, 111, 96, True)
    assert rows[0].confidence > 0.8 > rows[2].confidence > 0  # cut off, seen once


def test_evidence_is_that_of_the_cells_that_hold_an_object():
    objects = torch.zeros(1, 3, 5, dtype=torch.bool)
    objects[0, 0, 1] = objects[0, 2, 4] = True  # in the first cell and, cut off, in the last
    kind = torch.arange(2 * 6.0).view(1, 2, 2, 3)
    assert occupied(objects)[0].tolist() == [[True, False, False], [False, False, True]]
    assert gather(objects, kind).tolist() == [[0, 6], [5, 11]]
