"""Scenes: what moves, and that nothing moves through anything."""

import numpy as np

from scene import FOOTPRINT, place, simulate


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
