"""Scenes: what moves, and that nothing moves through anything."""

import numpy as np

from scene import FOOTPRINT, simulate


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
