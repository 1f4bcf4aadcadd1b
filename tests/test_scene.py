"""Scenes: what moves, and that nothing moves through anything."""

import numpy as np
import pytest
import torch

from classes import CLASS_NAMES
from synthetic.scene import FOOTPRINT, SPOT, SPOT_SPREAD, make_scene, place, simulate


def test_objects_never_interpenetrate():
    rng = np.random.default_rng(1)
    radii = FOOTPRINT[rng.integers(0, 3, 14)]
    position, angle, kept = simulate(rng, radii, 22)
    assert position.shape == (22, len(kept), 2)
    assert angle.shape == (22, len(kept))
    distance = np.linalg.norm(position[:, :, None] - position[:, None], axis=-1)
    gap = distance - radii[kept][:, None] - radii[kept] + 9 * np.eye(len(kept))
    assert gap.min() > -1e-3
    assert np.abs(np.diff(position, axis=0)).max() > 0.1, "something should move"


def test_some_objects_rest_where_the_picture_ends():
    """A camera 5.34 above the ground sees 0.4 of the depth to each side, and none before 5.95."""
    rng = np.random.default_rng(0)
    drawn = [place(rng) for _ in range(1000)]
    x, y = np.array([point for point, velocity in drawn if not velocity.any()]).T
    side = 0.4 * (np.cos(0.4716) * y + np.sin(0.4716) * (5.34 - 0.4))
    cut = {
        "left": (x + side < 0.4) & (x + side > -0.4),
        "right": (x - side < 0.4) & (x - side > -0.4),
        "below": (y - 5.95 < 0.4) & (y - 5.95 > -0.4),
    }
    for where, objects in cut.items():
        assert 0.005 < objects.mean() < 0.1, where


def test_gray_metal_is_seen_more_often_than_other_kinds_and_no_kind_twice():
    """A kind is in 6 of 48 draws of 3 to 9 objects, one of gray metal in 8 % of videos besides."""
    count = np.zeros(49)
    for seed in range(200):
        ids = make_scene(np.random.default_rng(seed), (3, 9), 1, 240, "cpu").ids.numpy()
        assert len(set(ids)) == len(ids)
        count[ids] += 1
    gray_metal = [i for i, name in enumerate(CLASS_NAMES) if name.startswith("gray metal")]
    assert len(gray_metal) == 3
    assert 1.2 < count[gray_metal].mean() / np.delete(count, [0, *gray_metal]).mean() < 3


def test_in_some_videos_metal_begins_where_it_shows_a_lamp_and_in_some_sizes_differ():
    spotted, sized = [], []
    for seed in range(150):
        scene = make_scene(np.random.default_rng(seed), (3, 9), 1, 240, "cpu")
        at = np.linalg.norm(scene.centre[0, :, :2].numpy() - SPOT, axis=1) < 4 * SPOT_SPREAD
        flat = scene.metal.numpy() & (scene.round.numpy() == 0)
        spotted.append((at & flat).any())
        sized.append(scene.reach.max() > 1)  # of CLEVRER's the largest is 0.68
        height = scene.half[:, 2].minimum(
            scene.radius
        )  # of the centre of what stands on the ground
        is_ball = scene.round > 0
        assert scene.centre[0, is_ball, 2].equal(scene.radius[is_ball])
        assert scene.centre[0, ~is_ball, 2].equal(height[~is_ball])
    assert 0.25 < np.mean(spotted) < 0.6
    assert 0.04 < np.mean(sized) < 0.25


def test_objects_of_scenes_like_clevr_have_its_two_sizes(monkeypatch):
    """CLEVR's render_images.py: radii 0.7 and 0.35, of a cube's half edge over the root of 2."""
    monkeypatch.setattr("synthetic.scene.CLEVR_LIKE", 1.0)
    found = [make_scene(np.random.default_rng(s), (9, 9), 1, 240, "cpu") for s in range(4)]
    shapes = np.concatenate([(s.ids - 1) // 16 for s in found])
    heights = torch.cat([s.centre[0, :, 2] for s in found]).numpy()  # what rests on the ground
    cubes, spheres = (np.unique(heights[shapes == shape].round(2)) for shape in (0, 1))
    assert cubes == pytest.approx([0.35 / 2**0.5, 0.7 / 2**0.5], abs=0.01)
    assert spheres == pytest.approx([0.35, 0.7], abs=0.01)


def test_shadows_of_scenes_like_clevr_fall_to_the_left_too():
    """Their first lamp is low and on the right, that of the other scenes is on the left."""
    right = []
    for seed in range(100):
        scene = make_scene(np.random.default_rng(seed), (3, 9), 1, 240, "cpu")
        if scene.lamp[0, 0] > 0:
            right.append(scene)
            assert scene.lamp[0, 2] < 6
            assert scene.power[3].max() < 1540  # less light from the sky: harder shadows
            assert scene.lamp_radius[:3].max() <= 0.8
        else:
            assert scene.lamp_radius[:3].tolist() == pytest.approx([0.8, 0.8, 0.8])
    assert 5 < len(right) < 30
