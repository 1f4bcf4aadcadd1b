"""Ray tracing: where a ray meets an object, worked out by hand."""

import math

import numpy as np
import pytest
import torch

from synthetic.raytrace import (
    Rays,
    in_label,
    intersect,
    lamp_image,
    lamp_points,
    render_frames,
    surface_normal,
)
from synthetic.scene import BOUND, CENTRE_HEIGHT, HALF, NARROW, RADIUS, make_scene, unit


def one_object(shape, turn=0.0):
    """A scene of one frame with one object of the given shape row at (0, 10)."""
    rng = np.random.default_rng(0)
    scene = make_scene(rng, (1, 1), 1, 240, "cpu")
    return scene._replace(
        centre=torch.tensor([[[0.0, 10.0, CENTRE_HEIGHT[shape]]]], dtype=torch.float32),
        turn=torch.tensor([[[math.cos(turn), math.sin(turn)]]]),
        half=torch.tensor(HALF[shape : shape + 1], dtype=torch.float32),
        radius=torch.tensor(RADIUS[shape : shape + 1], dtype=torch.float32),
        narrow=torch.tensor(NARROW[shape : shape + 1], dtype=torch.float32),
        round=torch.tensor([1.0 if shape == 1 else 0.0]),
        reach=torch.tensor(BOUND[shape : shape + 1], dtype=torch.float32),
    )


def hit(scene, origin, direction):
    ray = Rays(
        torch.tensor([origin], dtype=torch.float32),
        unit(torch.tensor([direction], dtype=torch.float32)),
        torch.zeros(1, dtype=torch.long),
    )
    which = torch.zeros(1, dtype=torch.long)
    t = intersect(scene, ray, which)
    if not t.isfinite():
        return math.inf, None
    point = ray.origin + t[:, None] * ray.direction
    return t.item(), surface_normal(scene, point, ray.frame, which)[0].tolist()


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


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        # The front of a cube, 9.61 away, reaches 300 * 0.39 / 9.61 = 12.17 pixels to each side of
        # (80, 120): 67.83 to 92.17 down. A mask pixel r looks at r + 0.75 and at r + 1.25.
        (0, (67, 91), (107, 131)),
        # A label of a sphere 10 away has a radius of 0.395, 11.87 pixels; see below.
        (1, (67, 91), (107, 131)),
        # A cylinder at the height of the eye is a rectangle, 0.395 / 9.58 * 300 = 12.37 high.
        (2, (67, 91), (107, 131)),
    ],
)
def test_mask_of_an_object_straight_ahead_worked_by_hand(shape, rows, columns):
    scene = one_object(shape)._replace(
        eye=torch.tensor([0.0, 0.0, float(CENTRE_HEIGHT[shape])]),
        axes=torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]]),
        focal=300.0,
    )
    random = torch.Generator().manual_seed(0)
    points = lamp_points(scene, 160 * 240, random)
    _, masks = render_frames(scene, torch.arange(1), 160, 240, points, random)
    where = masks[0].nonzero()
    assert (*where.amin(0).tolist(), *where.amax(0).tolist()) == (
        *(rows[0], columns[0]),
        *(rows[1], columns[1]),
    )


def test_label_leaves_out_rows_narrower_than_a_share_of_the_widest():
    """Of a cylinder's outline, 10 rays wide, rows below 0.4 of that; of a cube's, none."""
    row = torch.tensor([0] * 10 + [1] * 3 + [2] * 4)
    ray = torch.arange(len(row))
    start = torch.tensor([[0.0, 0.0, 0.4]]).expand(len(row), 3)
    ahead = torch.tensor([[0.0, 1.0, 0.0]]).expand(len(row), 3)
    rays = Rays(start, ahead, torch.zeros_like(ray))
    for shape, narrow_row in ((2, False), (0, True)):
        hit = torch.zeros_like(ray)
        shown = in_label(one_object(shape), rays, row, (1, 3), hit, ray, hit)
        assert shown.tolist() == [True] * 10 + [narrow_row] * 3 + [True] * 4


@pytest.mark.parametrize(
    ("distance", "radius"),
    [(10, 0.405 - 0.07 * (0.405 - 0.0267 * 10)), (16, 0.405)],  # 16 away it looks small
)
def test_label_of_a_sphere_is_smaller_the_closer_it_is(distance, radius):
    for offset, expected in ((radius - 0.001, True), (radius + 0.001, False)):
        start = torch.tensor([[offset, 10.0 - distance, float(CENTRE_HEIGHT[1])]])
        rays = Rays(start, torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([0]))
        one = torch.tensor([0])
        shown = in_label(one_object(1), rays, one, (1, 1), one, one, one)
        assert shown.tolist() == [expected]


def test_a_lamp_in_metal_is_an_ellipse_in_a_halo():
    """20 at its middle, soft edges at 0.048 radians aside and 0.035 up; worked out by hand."""
    fill, to = 1, unit(torch.tensor([[0.0, 1.0, 0.0]]))
    for off, area in (((0, 0), 20.0), ((0.048, 0), 20 / math.e), ((0, 0.035), 20 / math.e)):
        direction = unit(torch.tensor([[off[0], 1.0, off[1]]]))
        angle = off[0] ** 2 + off[1] ** 2
        halo = 3 * math.exp(-angle / 0.07**2) + 0.12 * math.exp(-angle / 0.45**2)
        assert float(lamp_image(to, direction, fill)) == pytest.approx(area + halo, rel=0.01)
    above = torch.tensor([[0.0, 0.0, 1.0]])
    assert lamp_image(above, above, fill).isfinite()
