"""What is where in a look-alike CLEVRER scene, and how it moves.

The scene is fitted to outlines, shadows, highlights, and background of six real videos. x points
right, y away from the camera, z up; the ground is z = 0; lengths are in units of 2.5 sphere radii.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from classes import COLOURS, MATERIALS, NUM_KINDS, SHAPES, factors

CAMERA_HEIGHT = 5.34
CAMERA_PITCH = 0.4716  # radians below the horizon
FOCAL_LENGTH = 1.25  # image widths: 45 mm on a 36 mm sensor
NEAREST = 5.9  # y of the ground at the lower edge of the picture

# One row per shape: cube, sphere, cylinder. An extent this large does not limit the shape.
FREE = 1e3
HALF = np.array([[0.39, 0.39, 0.39], [FREE, FREE, FREE], [FREE, FREE, 0.395]])
RADIUS = np.array([FREE, 0.405, 0.42])
CENTRE_HEIGHT = np.array([0.39, 0.405, 0.395])  # of the centre
FOOTPRINT = np.array([0.39 * 2**0.5, 0.405, 0.42])  # radius of the disc that collides
BOUND = np.array([0.39 * 3**0.5, 0.405, math.hypot(0.42, 0.395)])  # radius of a sphere around it
# Real labels come from a detector. It flattens the tops and bottoms of what is round (rows of an
# outline narrower than this share of its widest are background), and draws spheres the smaller the
# larger they look: by this share of what their radius exceeds SMALL times their distance. Measured
# on real video_0 and video_1.
NARROW = np.array([0.0, 0.2, 0.4])
SHRINK, SMALL = 0.07, 0.0267  # SMALL: 8 pixels in a frame 240 wide
# What shows fewer pixels than this in a frame 240 wide has no label: a detector does not see it. In
# the real videos two objects of 11 and 27 pixels are not labelled yet, one of 25 is.
FEWEST = 20

# One row per lamp, fitted to CLEVRER's videos: a key, a fill and a back lamp, named as in CLEVR's
# base scene, and a wide one that stands for the sky: it makes the dark core of real shadows, close
# to the right of what stands there.
LAMP_POSITION = np.array(
    [[-8.2, -4.2, 10.1], [-8.0, 21.0, 5.94], [5.9, 13.0, 13.8], [-48, -12, 108]]
)
LAMP_POWER = np.array([[33.5, 31.6, 26.9], [5.1, 5.3, 7.3], [11.6, 12.1, 11.8], [1540, 1540, 1540]])
LAMP_RADIUS = np.array([0.8, 0.8, 0.8, 24.0])
AIM = (2.0, 12.0, 0.0)  # what the lamps face

# 8-bit values of CLEVR. Blender took them for linear ones, which makes real frames dull.
NOMINAL = {
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "cyan": (41, 208, 208),
    "purple": (129, 38, 192),
    "yellow": (255, 238, 51),
}
AT_BORDER, BEHIND = 0.12, 0.04  # shares of objects that rest where the picture ends, or hidden
UNSEEN = 0.3, 0.65  # share of those at its left end that are so much farther out: a shadow is seen
GRAY_METAL = 0.08  # share of videos that each kind is put into besides: it looks like its shadow
# Near where a flat metal top shows the fill lamp, one begins in a share of the videos with one.
SPOT, SPOT_SPREAD, AT_SPOT = (-3.9, 9.9), 0.45, 0.4
# CLEVR's own stills have objects of two sizes, given relative to CLEVRER's one, a camera that is
# moved about, and lamps low above the scene, one of them on the right: shadows fall to the left,
# too, and are harder. This share of the videos is like them. Positions and energies are those of
# its base scene, seen from its camera; the fourth lamp, the sky, gives less of the light.
CLEVR_LIKE, CLEVR_SIZES = 0.12, (0.87, 1.75)
CLEVR_CUBE = 0.72  # of that: a half edge of 0.7 over the root of 2 there, of 0.39 in CLEVRER
CLEVR_POSITION = np.array([[2.0, 3.1, 4.3], [-6.1, 10.8, 3.0], [1.2, 12.5, 5.8], [-48, -12, 108]])
CLEVR_MOVES = np.array([[1.0], [1.0], [1.0], [0.0]])  # of each axis, either way
CLEVR_POWER = np.array([[9.4], [2.8], [4.7], [1540]])
CLEVR_SKY = 0.15, 0.65  # of that power
STEPS = 12  # of the physics, per frame
DRAG, RESTITUTION = 0.06, 0.8  # share of the speed lost per frame; bounce of a collision


class Scene(NamedTuple):
    """N objects over T frames, L lamps, and a camera."""

    centre: Tensor  # (T, N, 3)
    turn: Tensor  # (T, N, 2) cosine and sine of the angle about z
    half: Tensor  # (N, 3) half extents of the slabs that bound the object
    radius: Tensor  # (N,) of the sphere or upright cylinder that bounds it
    round: Tensor  # (N,) 1 where that is a sphere, 0 where it is a cylinder
    reach: Tensor  # (N,) radius of a sphere around the object
    albedo: Tensor  # (N, 3) linear colour
    metal: Tensor  # (N,) bool
    narrow: Tensor  # (N,) rows of its outline narrower than this share of the widest have no label
    ids: Tensor  # (N,) uint8 class ids
    lamp: Tensor  # (L, 3) positions
    facing: Tensor  # (L, 3) of length 1
    lamp_radius: Tensor  # (L,)
    power: Tensor  # (L, 3) linear colour
    eye: Tensor  # (3,) position of the camera
    axes: Tensor  # (3, 3) its right, up, and forward
    focal: float  # pixels


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over the last axis, of size 3."""
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def unit(a: Tensor) -> Tensor:
    """Scale vectors to length 1."""
    return a / dot(a, a).clamp(min=1e-12).sqrt()[..., None]


# Physics: discs on the ground, in units per frame.


def place(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw where an object begins, (2,), and its velocity, (2,).

    It is in view, or moves into view, or rests where the picture ends: beyond that it may be
    unseen, but for its shadow.
    """
    y, angle, fate = rng.uniform(7.0, 17.5), rng.uniform(0, 2 * np.pi), rng.random()
    point = np.array([rng.uniform(-0.4, 0.4) * y, y])
    heading = np.array([np.cos(angle), np.sin(angle)])
    if fate < AT_BORDER:  # rests where the picture ends: at its sides, or at its lower edge
        outside = rng.uniform(-0.5, 0.25)  # so far out that a sliver of 0.15 is in view
        depth = math.cos(CAMERA_PITCH) * y + math.sin(CAMERA_PITCH) * (CAMERA_HEIGHT - 0.4)
        side = rng.choice([-1, 1])
        if side < 0 and rng.random() < UNSEEN[0]:
            outside += UNSEEN[1]
        x = side * (depth / (2 * FOCAL_LENGTH) + outside)
        below = NEAREST - rng.uniform(-0.5, 1.1)  # a top is seen when the rest is below the edge
        at_side = rng.random() < 0.5
        return np.array([x, y] if at_side else [below * rng.uniform(-0.4, 0.4), below]), np.zeros(2)
    if fate < 0.6:  # rests until something hits it
        return point, np.zeros(2)
    if fate < 0.72:  # slides from the start
        return point, heading * rng.uniform(0.1, 0.6)
    while abs(point[0]) < 0.42 * point[1] + 1.6 and 4.6 < point[1] < 29:  # still in view
        point = point - 0.5 * heading
    return point - heading * rng.uniform(0, 5), heading * rng.uniform(0.5, 1.2)


def collide(
    rng: np.random.Generator, x: np.ndarray, v: np.ndarray, spin: np.ndarray, radii: np.ndarray
) -> None:
    """Push overlapping discs apart and exchange momentum along their normal, in place."""
    for _ in range(100):  # one push can cause another
        distance = np.linalg.norm(x[:, None] - x, axis=-1)
        pairs = np.argwhere(np.triu(distance < radii[:, None] + radii, 1))
        if len(pairs) == 0:
            return
        for i, j in pairs:
            gap = np.linalg.norm(x[j] - x[i])
            normal = (x[j] - x[i]) / gap
            push = 0.5 * (radii[i] + radii[j] + 1e-4 - gap) * normal
            x[i], x[j] = x[i] - push, x[j] + push
            approach = max(0.0, (v[i] - v[j]) @ normal)
            impulse = 0.5 * (1 + RESTITUTION) * approach * normal
            v[i], v[j] = v[i] - impulse, v[j] + impulse
            spin[[i, j]] += rng.normal(0, 0.4, 2) * approach  # off-centre hits turn objects


def simulate(
    rng: np.random.Generator, radii: np.ndarray, num_frames: int, at_spot: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slide, spin, and collide discs of the given radii; with `at_spot` the first begins near SPOT.

    Returns positions (num_frames, N, 2), angles (num_frames, N) in radians, and the indices (N,) of
    the discs that found a place: a crowd too dense loses some.
    """
    start = {}  # position and velocity by index of the disc
    for i, radius in enumerate(radii):
        for _ in range(300):
            point, velocity = place(rng)
            if at_spot and i == 0:  # half of them rest there
                point = rng.normal(SPOT, SPOT_SPREAD)
                velocity = rng.normal(0, 0.25, 2) * (rng.random() < 0.5)
            resting = [p for p, speed in start.values() if not speed.any()]
            if resting and rng.random() < BEHIND:  # seen from the camera, above (0, 0)
                other = resting[rng.integers(len(resting))]
                point = other * (1 + rng.uniform(0.8, 1.6) / np.linalg.norm(other))
                point, velocity = point + [rng.normal(0, 0.35), 0], np.zeros(2)
            gaps = [math.dist(point, p) - radius - radii[k] for k, (p, _) in start.items()]
            if min(gaps, default=1) > 0.05:
                start[i] = point, velocity
                break
    kept = np.array(list(start))
    x, v = (np.array(column) for column in zip(*start.values(), strict=True))
    angle = rng.uniform(0, 2 * np.pi, len(kept))
    spin = rng.normal(0, 0.15, len(kept)) * (v != 0).any(1)
    friction = rng.uniform(0.02, 0.05)
    positions, angles = [], []
    for _ in range(num_frames):
        positions.append(x)
        angles.append(angle)
        for _ in range(STEPS):
            speed = np.linalg.norm(v, axis=1, keepdims=True).clip(1e-9)
            v = v * (1 - (friction / speed + DRAG) / STEPS).clip(0)
            spin = spin * (1 - DRAG / STEPS)
            x, angle = x + v / STEPS, angle + spin / STEPS
            collide(rng, x, v, spin, radii[kept])
    return np.array(positions), np.array(angles), kept


def draw_lamps(
    rng: np.random.Generator, brightness: np.ndarray, like_clevr: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the lamps of CLEVRER's videos, or those of CLEVR's stills.

    `brightness` (4, 3) is the logarithm of what each channel of each lamp has more than usual.
    Returns positions (4, 3), powers (4, 3) and radii (4,).
    """
    gain = np.exp(brightness)
    if not like_clevr:
        position = LAMP_POSITION + rng.normal(0, 0.35, LAMP_POSITION.shape)
        return position, LAMP_POWER * gain, LAMP_RADIUS
    position = CLEVR_POSITION + CLEVR_MOVES * rng.uniform(-1, 1, CLEVR_POSITION.shape)
    power = CLEVR_POWER * gain * [[1], [1], [1], [rng.uniform(*CLEVR_SKY)]]
    return position, power, LAMP_RADIUS * [*rng.uniform(0.3, 1.0, 3), 1]


def make_scene(
    rng: np.random.Generator, objects: tuple[int, int], num_frames: int, width: int, device: str
) -> Scene:
    """Draw a scene like those of CLEVRER, which share camera and lamps, or one like CLEVR's stills.

    Even those like CLEVRER's vary a little more than the real ones.
    """

    def tensor(values: np.ndarray) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.float32), device=device)

    ids = 1 + rng.permutation(NUM_KINDS)  # so that no two objects are of one kind
    _, material, colour = factors(ids)
    gray_metal = (material == MATERIALS.index("metal")) & (colour == COLOURS.index("gray"))
    first = gray_metal & (rng.random(len(ids)) < GRAY_METAL)
    ids = np.concatenate([ids[first], ids[~first]])
    ids = ids[: rng.integers(objects[0], objects[1] + 1)]
    shape, material, _ = factors(ids)
    flat = (material == MATERIALS.index("metal")) & (shape != SHAPES.index("sphere"))
    like_clevr = rng.random() < CLEVR_LIKE
    at_spot = bool(flat.any()) and not like_clevr and rng.random() < AT_SPOT
    if at_spot:  # the first of them goes first
        ids = np.roll(ids, -flat.argmax())
    size = np.ones(len(ids))
    if like_clevr:
        is_cube = shape == SHAPES.index("cube")
        size = rng.choice(CLEVR_SIZES, len(ids)) * np.where(is_cube, CLEVR_CUBE, 1)
    xy, angle, kept = simulate(rng, FOOTPRINT[factors(ids)[0]] * size, num_frames, at_spot)
    ids, size = ids[kept], size[kept]
    shape, material, colour = factors(ids)
    z = np.broadcast_to(CENTRE_HEIGHT[shape] * size, angle.shape)
    spread = 3 if like_clevr else 1  # of the camera
    pitch, roll = CAMERA_PITCH + spread * rng.normal(0, 0.008), rng.normal(0, 0.006)
    up, right = np.array([0, math.sin(pitch), math.cos(pitch)]), np.array([1.0, 0, 0])
    forward = np.array([0, math.cos(pitch), -math.sin(pitch)])
    c, s = math.cos(roll), math.sin(roll)
    brightness = rng.normal(0, 0.07, (4, 1)) + rng.normal(0, 0.02, (4, 3))
    nominal = np.array([NOMINAL[COLOURS[c]] for c in colour]) / 255
    paint = rng.normal(0, 0.05, nominal.shape) + rng.normal(0, 0.06, (len(ids), 1))
    lamp, power, radius = map(tensor, draw_lamps(rng, brightness, like_clevr))
    return Scene(
        centre=tensor(np.dstack([xy, z])),
        turn=tensor(np.dstack([np.cos(angle), np.sin(angle)])),
        half=tensor(HALF[shape] * size[:, None]),
        radius=tensor(RADIUS[shape] * size),
        round=tensor(shape == SHAPES.index("sphere")),
        reach=tensor(BOUND[shape] * size),
        albedo=tensor(nominal * np.exp(paint)),
        metal=tensor(material == MATERIALS.index("metal")) > 0,
        narrow=tensor(NARROW[shape]),
        ids=torch.tensor(ids, dtype=torch.uint8, device=device),
        lamp=lamp,
        facing=unit(tensor(AIM) - lamp),
        lamp_radius=radius,
        power=power,
        eye=tensor(np.array([0, 0, CAMERA_HEIGHT]) + spread * rng.normal(0, 0.12, 3)),
        axes=tensor([right * c + up * s, up * c - right * s, forward]),
        focal=FOCAL_LENGTH * width * math.exp(spread * rng.normal(0, 0.02)),
    )
