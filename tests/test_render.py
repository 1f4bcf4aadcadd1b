"""Scenes: repeatable, lifelike where it can be counted, exact where it can be worked out."""

import hashlib
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import render
from dataset import class_id
from utils import run_script


@pytest.fixture(scope="module")
def video():
    torch.set_num_threads(1)
    return render.render_video(3, (8, 8), num_frames=6)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Two videos of the default layout, written by two workers."""
    out = tmp_path_factory.mktemp("rendered")
    render.render_dataset(out, 2, seed=5, objects=(1, 2), workers=2, progress=False)
    return out


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def one_object(shape, turn=0.0):
    """A scene of one frame with one object of the given shape row at (0, 10)."""
    rng = np.random.default_rng(0)
    scene = render.make_scene(rng, (1, 1), 1, 240, "cpu")
    return scene._replace(
        centre=torch.tensor([[[0.0, 10.0, render.HEIGHT[shape]]]], dtype=torch.float32),
        turn=torch.tensor([[[math.cos(turn), math.sin(turn)]]]),
        half=torch.tensor(render.HALF[shape : shape + 1], dtype=torch.float32),
        radius=torch.tensor(render.RADIUS[shape : shape + 1], dtype=torch.float32),
        round=torch.tensor([1.0 if shape == 1 else 0.0]),
        reach=torch.tensor(render.REACH[shape : shape + 1], dtype=torch.float32),
    )


def hit(scene, origin, direction):
    ray = render.Rays(
        torch.tensor([origin], dtype=torch.float32),
        render.unit(torch.tensor([direction], dtype=torch.float32)),
        torch.zeros(1, dtype=torch.long),
    )
    which = torch.zeros(1, dtype=torch.long)
    t = render.intersect(scene, ray, which)
    if not t.isfinite():
        return math.inf, None
    point = ray.origin + t[:, None] * ray.direction
    return t.item(), render.surface_normal(scene, point, ray.frame, which)[0].tolist()


@pytest.mark.parametrize(
    ("shape", "turn", "origin", "direction", "distance", "normal"),
    [
        (1, 0, (0, 0, 0.405), (0, 1, 0), 10 - 0.405, (0, -1, 0)),
        (1, 0, (0, 10, 5), (0, 0, -1), 5 - 0.81, (0, 0, 1)),
        (2, 0, (0, 0, 0.3), (0, 1, 0), 10 - 0.42, (0, -1, 0)),
        (2, 0, (0.1, 10, 5), (0, 0, -1), 5 - 0.79, (0, 0, 1)),
        (0, 0, (0.1, 0, 0.3), (0, 1, 0), 10 - 0.39, (0, -1, 0)),
        (0, 0, (0.1, 10, 5), (0, 0, -1), 5 - 0.78, (0, 0, 1)),
        # A cube turned by 45 degrees: a ray from (0, 0) reaches the face x - y at 0.2 to the side.
        (
            0,
            math.pi / 4,
            (0.2, 0, 0.3),
            (0, 1, 0),
            10 - (0.39 * math.sqrt(2) - 0.2),
            (math.sqrt(0.5), -math.sqrt(0.5), 0),
        ),
    ],
)
def test_ray_hits_where_worked_by_hand(shape, turn, origin, direction, distance, normal):
    t, n = hit(one_object(shape, turn), origin, direction)
    assert t == pytest.approx(distance, abs=1e-4)
    assert n == pytest.approx(normal, abs=1e-4)


@pytest.mark.parametrize("shape", [0, 1, 2])
def test_ray_misses_beside_above_and_behind(shape):
    scene = one_object(shape)
    assert hit(scene, (0.5, 0, 0.3), (0, 1, 0))[0] == math.inf
    assert hit(scene, (0, 0, 0.9), (0, 1, 0))[0] == math.inf
    assert hit(scene, (0, 0, 0.3), (0, -1, 0))[0] == math.inf


def test_cylinder_corner_is_no_cube_corner():
    assert hit(one_object(0), (0.35, 9.65, 5), (0, 0, -1))[0] < math.inf
    assert hit(one_object(2), (0.35, 9.65, 5), (0, 0, -1))[0] == math.inf


def test_same_seed_same_video_other_seed_another(video):
    frames, masks = render.render_video(3, (8, 8), num_frames=6)
    assert torch.equal(frames, video[0])
    assert torch.equal(masks, video[1])
    assert not torch.equal(render.render_video(4, (8, 8), num_frames=6)[0], video[0])


def test_shapes_types_and_ids(video):
    frames, masks = video
    assert frames.shape == (6, 3, 160, 240)
    assert frames.dtype == torch.uint8
    assert masks.shape == (6, 160, 240)
    assert masks.dtype == torch.uint8
    assert 3 <= len(masks.unique()) <= 9
    assert masks.max() <= 48


def test_other_sizes():
    frames, masks = render.render_video(0, (2, 2), num_frames=1, height=80, width=120)
    assert frames.shape == (1, 3, 80, 120)
    assert masks.shape == (1, 80, 120)


@pytest.mark.parametrize(("height", "width"), [(82, 120), (80, 121)])
def test_size_that_is_no_multiple_of_four_is_named(height, width):
    with pytest.raises(ValueError, match=f"height {height} and width {width} must be multiples"):
        render.render_video(0, num_frames=1, height=height, width=width)


def test_masks_agree_with_colours(monkeypatch):
    """Inside its mask a red rubber sphere is red; outside the ground is grey."""
    kinds = [class_id("sphere", "rubber", "red") - 1, class_id("cube", "rubber", "blue") - 1]
    spots = np.array([[[-1.5, 10.0], [1.5, 10.0]]])
    monkeypatch.setattr(render, "simulate", lambda *_: (spots, np.zeros((1, 2)), np.arange(2)))
    real = np.random.default_rng

    class Picks:
        def __init__(self, seed):
            self.rng = real(seed)

        def __getattr__(self, name):
            return getattr(self.rng, name)

        def permutation(self, _):
            return np.array(kinds)

    monkeypatch.setattr(np.random, "default_rng", Picks)
    frames, masks = render.render_video(0, (2, 2), num_frames=1)
    red, blue, ground = (
        frames[0][:, masks[0] == i].float().quantile(0.5, dim=1)
        for i in (kinds[0] + 1, kinds[1] + 1, 0)
    )
    assert red[0] > 2 * red[2]
    assert blue[2] > 1.5 * blue[0]
    assert ground.max() - ground.min() < 12
    rows, columns = (masks[0] == kinds[0] + 1).nonzero(as_tuple=True)
    assert 14 <= columns.max() - columns.min() <= 28
    assert abs((columns.max() - columns.min()) - (rows.max() - rows.min())) <= 4
    assert columns.float().mean() < 120


def test_objects_never_interpenetrate():
    rng = np.random.default_rng(1)
    radii = render.FOOTPRINT[rng.integers(0, 3, 14)]
    position, angle, kept = render.simulate(rng, radii, 22)
    assert position.shape == (22, len(kept), 2)
    assert angle.shape == (22, len(kept))
    distance = np.linalg.norm(position[:, :, None] - position[:, None], axis=-1)
    gap = distance - radii[kept][:, None] - radii[kept] + 9 * np.eye(len(kept))
    assert gap.min() > -1e-3
    assert np.abs(np.diff(position, axis=0)).max() > 0.1, "something should move"


def test_layout_reads_back_and_holds_no_kind_twice(rendered):
    assert sorted(path.name for path in rendered.iterdir()) == ["video_0", "video_1"]
    for folder in rendered.iterdir():
        masks = np.load(folder / "mask.npy")
        assert masks.dtype == np.uint8
        assert masks.shape == (22, 160, 240)
        assert len(list(folder.glob("image_*.png"))) == 22
        for t in range(22):
            with Image.open(folder / f"image_{t}.png") as image:
                assert (image.size, image.mode) == ((240, 160), "RGB")


def test_bytes_do_not_depend_on_workers_and_rendering_resumes(rendered, tmp_path):
    """A killed run leaves a partial folder; the next one replaces it and keeps what is whole."""
    (tmp_path / "video_0").mkdir()
    (tmp_path / "video_0" / "kept").write_text("whole")
    (tmp_path / ".video_1.partial").mkdir()
    (tmp_path / ".video_1.partial" / "image_0.png").write_text("half")
    render.render_dataset(tmp_path, 2, seed=5, objects=(1, 2), workers=1, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["video_0", "video_1"]
    assert [path.name for path in (tmp_path / "video_0").iterdir()] == ["kept"]
    assert digest(tmp_path / "video_1") == digest(rendered / "video_1")


def test_files_reach_the_disk_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    synced, rename, fsync = [], Path.rename, os.fsync

    def watched_fsync(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def watched_rename(folder, target):
        for path in [folder, *folder.iterdir()]:
            assert path.stat().st_ino in synced, f"{path.name} was not flushed"
        return rename(folder, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    frames = torch.zeros((2, 3, 8, 8), dtype=torch.uint8)
    monkeypatch.setattr(render, "render_video", lambda *_, **__: (frames, frames[:, 0]))
    render.write_video(tmp_path, 3, 0, (1, 2), "cpu")
    names = sorted(path.name for path in (tmp_path / "video_3").iterdir())
    assert names == ["image_0.png", "image_1.png", "mask.npy"]


def test_command_line_errors_are_one_sentence(tmp_path, monkeypatch, capsys):
    bad = [
        ("--videos", "0"),
        ("--videos", "1", "--objects", "5", "2"),
        ("--videos", "1", "--objects", "1", "49"),
        ("--videos", "1", "--workers", "0"),
        ("--videos", "1", "--device", "toaster"),
        ("--videos", "one"),
    ]
    for arguments in bad:
        monkeypatch.setattr(sys, "argv", ["render.py", "--out", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as stop:
            run_script(render.main)
        assert stop.value.code == 2
        assert "error: " in capsys.readouterr().err


def test_unwritable_folder_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(
        sys, "argv", ["render.py", "--out", str(tmp_path / "file"), "--videos", "1"]
    )
    with pytest.raises(SystemExit) as stop:
        run_script(render.main)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert str(tmp_path / "file") in message
    assert len(message.strip().splitlines()) == 1
