"""Render look-alike CLEVRER videos with exact masks, by ray tracing in plain PyTorch.

    python render.py --out data/demo --videos 2                  # a smoke run: seconds
    python render.py --out data/rendered --videos 60 --seed 1    # killed? the same command goes on
    python render.py --out data/crowded --videos 60 --objects 10 20

Each video is a folder `video_K` with `image_0.png` .. `image_21.png` and `mask.npy`, the layout
that dataset.py reads. Its bytes depend on the seed and K alone, not on the number of workers.

The scene is fitted to outlines, shadows, highlights, and background of six real videos. x points
right, y away from the camera, z up; the ground is z = 0; lengths are in units of 2.5 sphere radii.
"""

import argparse
import math
import os
import shutil
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor
from tqdm import tqdm

from dataset import COLOURS, MATERIALS, SHAPES
from utils import UserError, atomic_write, choose_device, run_script

CAMERA_HEIGHT = 5.34
CAMERA_PITCH = 0.4716  # radians below the horizon
FOCAL_LENGTH = 1.25  # image widths: 45 mm on a 36 mm sensor

# One row per shape: cube, sphere, cylinder. An extent this large does not limit the shape.
FREE = 1e3
HALF = np.array([[0.39, 0.39, 0.39], [FREE, FREE, FREE], [FREE, FREE, 0.395]])
RADIUS = np.array([FREE, 0.405, 0.42])
HEIGHT = np.array([0.39, 0.405, 0.395])  # of the centre
FOOTPRINT = np.array([0.39 * 2**0.5, 0.405, 0.42])  # radius of the disc that collides
REACH = np.array([0.39 * 3**0.5, 0.405, math.hypot(0.42, 0.395)])  # radius of a sphere around it
BEVEL = 0.06  # how far from an edge its rounding begins

# One row per lamp: key, fill, and back lamp of CLEVR, and a wide one that stands for the sky.
LAMP_POSITION = np.array([[-8.2, -4.2, 10.1], [-8.5, 21.0, 6.3], [5.9, 13.0, 13.8], [-6, -1, 60]])
LAMP_POWER = np.array([[36.0, 34, 28.9], [5.5, 5.7, 7.8], [12.5, 13, 12.7], [240, 240, 240]])
LAMP_RADIUS = np.array([0.8, 0.8, 0.8, 25.0])
LAMP_GLINT = np.array([10.0, 3.0, 7.0, 10.0])  # radiance that metal mirrors
AIM = (2.0, 12.0, 0.0)  # what the lamps face
AMBIENT, BOUNCE = 0.07, 0.24  # light from everywhere above, and from the ground below
CONTACT_LEAN = (0.14, 0.0)  # the dark of the ground around an object lies to its right
RUBBER, METAL = 1.08, 0.96  # share of light that comes back, relative to the ground
SKY, HAZE, HAZE_WIDTH = 0.022, 0.08, 0.5  # metal sees a dark sky, brighter far ahead (radians)
GLINT_WIDTH, GLOW, GLOW_WIDTH = 0.07, 0.12, 0.45  # radians; a lamp's image and its halo

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
BLUR = 0.42  # pixels, standard deviation: the real frames were halved from compressed video
NOISE = 0.45  # 8-bit steps, standard deviation
STEPS = 12  # of the physics, per frame
DRAG, RESTITUTION = 0.06, 0.8  # share of the speed lost per frame; bounce of a collision
CELL = 4  # pixels: the side of the blocks of rays that are first tested against objects
SAMPLES = 6  # points on a lamp that each ground pixel looks at


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
    ids: Tensor  # (N,) uint8 class ids
    lamp: Tensor  # (L, 3) positions
    facing: Tensor  # (L, 3) of length 1
    power: Tensor  # (L, 3) linear colour
    contact: float  # share of light that an object takes from the ground that it touches
    lean: Tensor  # (3,) where that shade is centred, relative to the object
    eye: Tensor  # (3,) position of the camera
    axes: Tensor  # (3, 3) its right, up, and forward
    focal: float  # pixels


class Rays(NamedTuple):
    """M rays."""

    origin: Tensor  # (M, 3)
    direction: Tensor  # (M, 3) of length 1
    frame: Tensor  # (M,)

    def take(self, index: Tensor) -> "Rays":
        """Return the rays at `index`."""
        return Rays(*(field[index] for field in self))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over the last axis, of size 3."""
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def unit(a: Tensor) -> Tensor:
    """Scale vectors to length 1."""
    return a / dot(a, a).clamp(min=1e-12).sqrt()[..., None]


# Physics: discs on the ground, in units per frame.


def place(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a position (2,) in view, or out of view with a velocity (2,) that leads into view."""
    y, angle, fate = rng.uniform(7.0, 17.5), rng.uniform(0, 2 * np.pi), rng.random()
    point = np.array([rng.uniform(-0.4, 0.4) * y, y])
    heading = np.array([np.cos(angle), np.sin(angle)])
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
    rng: np.random.Generator, radii: np.ndarray, num_frames: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slide, spin, and collide discs of the given radii.

    Returns positions (num_frames, N, 2), angles (num_frames, N) in radians, and the indices (N,) of
    the discs that found a place: a crowd too dense loses some.
    """
    start = {}  # position and velocity by index of the disc
    for i, radius in enumerate(radii):
        for _ in range(300):
            point, velocity = place(rng)
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


def make_scene(
    rng: np.random.Generator, objects: tuple[int, int], num_frames: int, width: int, device: str
) -> Scene:
    """Draw a scene. It varies a little more than the real ones, which share camera and lamps."""

    def tensor(values: np.ndarray) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.float32), device=device)

    kinds = rng.permutation(48)[: rng.integers(objects[0], objects[1] + 1)]  # no kind occurs twice
    xy, angle, kept = simulate(rng, FOOTPRINT[kinds // 16], num_frames)
    kinds = kinds[kept]
    shape, material, colour = kinds // 16, kinds // 8 % 2, kinds % 8  # see dataset.CLASS_NAMES
    z = np.broadcast_to(HEIGHT[shape], angle.shape)
    pitch, roll = CAMERA_PITCH + rng.normal(0, 0.008), rng.normal(0, 0.006)
    up, right = np.array([0, math.sin(pitch), math.cos(pitch)]), np.array([1.0, 0, 0])
    forward = np.array([0, math.cos(pitch), -math.sin(pitch)])
    c, s = math.cos(roll), math.sin(roll)
    brightness = rng.normal(0, 0.07, (4, 1)) + rng.normal(0, 0.02, (4, 3))
    nominal = np.array([NOMINAL[COLOURS[c]] for c in colour]) / 255
    albedo = nominal * np.exp(rng.normal(0, 0.05, nominal.shape))
    lamp = tensor(LAMP_POSITION + rng.normal(0, 0.35, LAMP_POSITION.shape))
    return Scene(
        centre=tensor(np.dstack([xy, z])),
        turn=tensor(np.dstack([np.cos(angle), np.sin(angle)])),
        half=tensor(HALF[shape]),
        radius=tensor(RADIUS[shape]),
        round=tensor(shape == SHAPES.index("sphere")),
        reach=tensor(REACH[shape]),
        albedo=tensor(albedo),
        metal=tensor(material == MATERIALS.index("metal")) > 0,
        ids=torch.tensor(kinds + 1, dtype=torch.uint8, device=device),
        lamp=lamp,
        facing=unit(tensor(AIM) - lamp),
        power=tensor(LAMP_POWER * np.exp(brightness)),
        contact=rng.uniform(0.4, 1.0),
        lean=tensor(np.append(rng.normal(CONTACT_LEAN, 0.08), 0)),
        eye=tensor(np.array([0, 0, CAMERA_HEIGHT]) + rng.normal(0, 0.12, 3)),
        axes=tensor([right * c + up * s, up * c - right * s, forward]),
        focal=FOCAL_LENGTH * width * math.exp(rng.normal(0, 0.02)),
    )


# Ray tracing. Vectors are (M, 3); a pair is a ray and an object that it may hit.


def near(
    scene: Scene, rays: Rays, slack: Tensor | float = 0.0, skip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Indices of rays and of objects whose bounding sphere they miss by less than `slack` (M,).

    `skip` (M,) is the object that a ray starts on; being convex it is never met again. -1: none.
    """
    to = scene.centre[rays.frame] - rays.origin[:, None]  # (M, N, 3)
    along = dot(to, rays.direction[:, None])
    reach = scene.reach + torch.as_tensor(slack, device=to.device).view(-1, 1)
    hit = (dot(to, to) - along * along < reach * reach) & (along > -reach)
    if skip is not None:
        hit &= torch.arange(len(scene.reach), device=to.device) != skip[:, None]
    return hit.nonzero(as_tuple=True)


def turned(
    scene: Scene, vector: Tensor, frame: Tensor, which: Tensor, back: bool = False
) -> Tensor:
    """Turn world vectors into the axes of objects `which` (M,), or back."""
    cos, sin = scene.turn[frame, which].unbind(-1)
    sin = sin if back else -sin
    x, y, z = vector.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y, z], -1)


def intersect(scene: Scene, rays: Rays, which: Tensor) -> Tensor:
    """Distance (M,) along each ray to its object `which` (M,), infinite where it misses.

    It is 0 for a ray that starts inside, as from the ground below an object. Every shape is an
    intersection of slabs and a quadric. A ray is inside each of them on one interval, and hits if
    it enters the last before it leaves the first (Kay and Kajiya, 1986).
    """
    p = turned(scene, rays.origin - scene.centre[rays.frame, which], rays.frame, which)
    d = turned(scene, rays.direction, rays.frame, which)
    inverse = 1 / torch.where(d.abs() < 1e-9, 1e-9, d)
    extent = scene.half[which] * inverse.abs()
    enter, leave = (-p * inverse - extent).unbind(-1), (-p * inverse + extent).unbind(-1)
    (px, py, pz), (dx, dy, dz) = p.unbind(-1), d.unbind(-1)
    pz, dz = pz * scene.round[which], dz * scene.round[which]  # an upright cylinder ignores z
    a = (dx * dx + dy * dy + dz * dz).clamp(min=1e-12)
    b = px * dx + py * dy + pz * dz
    c = px * px + py * py + pz * pz - scene.radius[which] ** 2
    root = (b * b - a * c).clamp(min=0).sqrt()  # 0 where it misses: an empty interval
    first, last = (-b - root) / a, (root - b) / a
    for k in range(3):
        first, last = torch.maximum(first, enter[k]), torch.minimum(last, leave[k])
    return torch.where((first < last) & (last > 0), first.clamp(min=0), math.inf)


def first_hit(scene: Scene, rays: Rays, ray: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (M,) to the nearest hit among the pairs (ray, which), and the object or -1."""
    t = intersect(scene, rays.take(ray), which)
    nearest = torch.full_like(rays.origin[:, 0], math.inf).scatter_reduce(0, ray, t, "amin")
    best = t.isfinite() & (t == nearest[ray])
    hit = torch.full_like(rays.frame, -1)
    hit[ray[best]] = which[best]
    return nearest, hit


def surface_normal(scene: Scene, point: Tensor, frame: Tensor, which: Tensor) -> Tensor:
    """Outward normals at points on objects. Edges of cubes and cylinders are rounded."""
    p = turned(scene, point - scene.centre[frame, which], frame, which)
    flat = p.sign() * (p.abs() - scene.half[which] + BEVEL).clamp(min=0)
    ring = torch.linalg.vector_norm(p[:, :2], dim=-1).clamp(min=1e-6)
    side = p[:, :2] * ((ring - scene.radius[which] + BEVEL).clamp(min=0) / ring)[:, None]
    normal = torch.where(scene.round[which][:, None] > 0, p, flat + F.pad(side, (0, 1)))
    return turned(scene, unit(normal), frame, which, back=True)


def lamp_light(scene: Scene, lamp: int, point: Tensor, normal: Tensor) -> Tensor:
    """Light (M, 3) from a lamp in plain view: cosines at both ends, inverse square."""
    to = scene.lamp[lamp] - point
    cosines = dot(to, normal).clamp(min=0) * (-dot(to, scene.facing[lamp])).clamp(min=0)
    return (cosines / dot(to, to) ** 2)[..., None] * scene.power[lamp]


def ambient(point: Tensor, normal: Tensor) -> Tensor:
    """Light (M, 3) from the sky above and, where the surface faces down, from the ground.

    What faces down close to the ground sees it dark, in the object's own shade.
    """
    up = 0.5 + 0.5 * normal[..., 2:].expand_as(normal)
    lit = 1 - (-normal[..., 2:]).clamp(min=0) * (1 - point[..., 2:] / 0.4).clamp(0, 1)
    return AMBIENT * up + BOUNCE * lit * (1 - up)


def contact_shade(scene: Scene, ground: Tensor, frames: Tensor) -> Tensor:
    """Share of light (len(frames), pixels, 1) that objects standing nearby leave to the ground.

    A sphere of radius r that touches the ground hides (r / D) ** 3 of the sky, weighted by the
    cosine, from a point at distance D of its centre (https://iquilezles.org/articles/sphereao).
    """
    share = torch.ones((len(frames), len(ground)), device=ground.device)
    for centre in (scene.centre[frames] + scene.lean).unbind(1):  # (len(frames), 3)
        to = centre[:, None] - ground
        share *= 1 - scene.contact * (centre[:, 2:] / dot(to, to).sqrt()) ** 3
    return share[..., None]


def irradiance(
    scene: Scene, point: Tensor, normal: Tensor, frame: Tensor, skip: Tensor, random: Generator
) -> Tensor:
    """Light (M, 3) that reaches points; of each lamp they see all or nothing, by one random ray."""
    total = ambient(point, normal)
    for lamp in range(len(scene.lamp)):
        jitter = torch.randn(point.shape, generator=random, device=point.device)
        source = scene.lamp[lamp] + 0.5 * LAMP_RADIUS[lamp] * jitter
        light = lamp_light(scene, lamp, point, normal)
        lit = (light[:, 0] > 0).nonzero()[:, 0]
        rays = Rays(point[lit], unit(source[lit] - point[lit]), frame[lit])
        ray, which = near(scene, rays, skip=skip[lit])
        dark = intersect(scene, rays.take(ray), which).isfinite()
        light[lit[ray[dark]]] = 0
        total = total + light
    return total


def reflection(scene: Scene, rays: Rays, skip: Tensor, random: Generator) -> Tensor:
    """Radiance (M, 3) along rays that leave metal: lamps in a dark sky, the ground, or objects."""
    direction = rays.direction
    seen = SKY + HAZE * torch.exp((direction[:, 1:2] - 1) / HAZE_WIDTH**2).repeat(1, 3)
    for lamp in range(len(scene.lamp)):
        angle = 2 - 2 * dot(unit(scene.lamp[lamp] - rays.origin), direction)  # squared, if small
        image = LAMP_GLINT[lamp] * torch.exp(-angle / GLINT_WIDTH**2)
        seen += (image + GLOW * torch.exp(-angle / GLOW_WIDTH**2))[:, None]
    t, hit = first_hit(scene, rays, *near(scene, rays, skip=skip))
    to_ground = torch.where(direction[:, 2] < -1e-3, -rays.origin[:, 2] / direction[:, 2], math.inf)
    point = rays.origin + torch.minimum(t, to_ground).clamp(max=1e4)[:, None] * direction
    m = ((hit < 0) & to_ground.isfinite()).nonzero()[:, 0]
    up = t.new_tensor([0.0, 0.0, 1.0]).expand(len(m), 3)
    seen[m] = irradiance(scene, point[m], up, rays.frame[m], hit[m], random)
    m = (hit >= 0).nonzero()[:, 0]
    normal = surface_normal(scene, point[m], rays.frame[m], hit[m])
    light = irradiance(scene, point[m], normal, rays.frame[m], hit[m], random)
    seen[m] = scene.albedo[hit[m]] * light  # metal in metal passes for rubber
    return seen


def shade(scene: Scene, rays: Rays, t: Tensor, which: Tensor, random: Generator) -> Tensor:
    """Linear colour (M, 3) of the objects `which` (M,) that rays meet at distance `t` (M,)."""
    view, frame = rays.direction, rays.frame
    point = rays.origin + t[:, None] * view
    normal, light = surface_normal(scene, point, frame, which), torch.empty_like(point)
    metal = scene.metal[which]
    m = (~metal).nonzero()[:, 0]
    light[m] = RUBBER * irradiance(scene, point[m], normal[m], frame[m], which[m], random)
    m = metal.nonzero()[:, 0]
    mirrored = unit(view[m] - 2 * dot(view[m], normal[m])[:, None] * normal[m])
    light[m] = METAL * reflection(scene, Rays(point[m], mirrored, frame[m]), which[m], random)
    return scene.albedo[which] * light


def lamp_points(scene: Scene, pixels: int, random: Generator) -> Tensor:
    """Points (L, pixels, SAMPLES, 3) spread over each lamp's disc in randomly turned spirals."""
    device = scene.lamp.device
    k = torch.arange(SAMPLES, device=device)
    angle = torch.rand((len(scene.lamp), pixels, 1), generator=random, device=device) * 2 * math.pi
    angle = angle + k * math.pi * (3 - 5**0.5)  # the golden angle, as in a sunflower
    side = unit(torch.linalg.cross(scene.facing, angle.new_tensor([[0.0, 0.0, 1.0]])))
    top = torch.linalg.cross(side, scene.facing)
    radius = angle.new_tensor(LAMP_RADIUS)[:, None, None]
    u, v = (radius * ((k + 0.5) / SAMPLES).sqrt() * f(angle) for f in (torch.cos, torch.sin))
    side, top, lamp = (w[:, None, None] for w in (side, top, scene.lamp))
    return lamp + u[..., None] * side + v[..., None] * top


def ground_light(
    scene: Scene, ground: Tensor, cells: Tensor, frames: Tensor, points: Tensor
) -> Tensor:
    """Light (len(frames), pixels, 3) on the ground, with soft shadows.

    `ground` (pixels, 3) holds the ground point behind each pixel, `cells` (C, CELL * CELL) the
    pixels of each block, `points` what `lamp_points` returns.
    """
    up = ground.new_tensor([0.0, 0.0, 1.0]).expand_as(ground)
    total = ambient(ground, up).repeat(len(frames), 1, 1)
    middle = ground[cells].mean(1)
    size = torch.linalg.vector_norm(ground[cells] - middle[:, None], dim=-1).amax(1)
    for lamp in range(len(scene.lamp)):
        to = scene.lamp[lamp] - middle
        slack = size + 1.2 * LAMP_RADIUS[lamp] / dot(to, to).sqrt()  # penumbra below an object
        origin, to = middle.repeat(len(frames), 1), unit(to).repeat(len(frames), 1)
        rays = Rays(origin, to, frames.repeat_interleave(len(cells)))
        block, which = near(scene, rays, slack.repeat(len(frames)))
        slot, pixel = block // len(cells), cells[block % len(cells)]  # (pairs, CELL * CELL)
        target = points[lamp, pixel]  # (pairs, CELL * CELL, SAMPLES, 3)
        start = ground[pixel][:, :, None].expand_as(target).reshape(-1, 3)
        frame, which = (w.repeat_interleave(CELL * CELL * SAMPLES) for w in (frames[slot], which))
        rays = Rays(start, unit(target.view(-1, 3) - start), frame)
        blocked = intersect(scene, rays, which).isfinite()
        index = (slot[:, None] * len(ground) + pixel)[..., None] * SAMPLES
        index = (index + torch.arange(SAMPLES, device=ground.device)).flatten()
        seen = torch.ones((len(frames), len(ground), SAMPLES), device=ground.device)
        seen.view(-1)[index[blocked]] = 0
        total += seen.mean(-1)[..., None] * lamp_light(scene, lamp, ground, up)
    return total * contact_shade(scene, ground, frames)


def render_frames(
    scene: Scene, frames: Tensor, height: int, width: int, points: Tensor, random: Generator
) -> tuple[Tensor, Tensor]:
    """Linear pictures (len(frames), H, W, 3) and masks (len(frames), H, W) of the given frames."""
    device = scene.eye.device

    def look(row: Tensor, column: Tensor) -> Tensor:
        """Directions through picture points, in pixels from the upper left corner."""
        right, up, forward = scene.axes
        u, v = (column - width / 2) / scene.focal, (row - height / 2) / scene.focal
        return unit(forward + u[..., None] * right - v[..., None] * up)

    pixel = torch.arange(height * width, device=device)
    cells = pixel.view(height // CELL, CELL, width // CELL, CELL).transpose(1, 2)
    cells = cells.reshape(-1, CELL * CELL)
    view = look(pixel // width + 0.5, pixel % width + 0.5)
    ground = scene.eye - view * (scene.eye[2] / view[:, 2:])
    picture = ground_light(scene, ground, cells, frames, points)

    # Blocks of pixels that an object may touch are seen through 2 x 2 rays per pixel.
    middle = unit(view[cells].mean(1)).repeat(len(frames), 1)
    rays = Rays(scene.eye.expand_as(middle), middle, frames.repeat_interleave(len(cells)))
    block, which = near(scene, rays, slack=30 * 0.71 * CELL / scene.focal)  # seen 30 units away
    blocks, pair = block.unique(return_inverse=True)
    slot, pixel = blocks // len(cells), cells[blocks % len(cells)]
    per_block, sub = 4 * CELL * CELL, torch.arange(4, device=device)
    row = (2 * (pixel // width)[..., None] + sub // 2).flatten()  # in half pixels
    column = (2 * (pixel % width)[..., None] + sub % 2).flatten()
    view = look(0.5 * row + 0.25, 0.5 * column + 0.25)
    rays = Rays(scene.eye.expand_as(view), view, frames[slot].repeat_interleave(per_block))
    pair = (pair[:, None] * per_block + torch.arange(per_block, device=device)).flatten()
    t, hit = first_hit(scene, rays, pair, which.repeat_interleave(per_block))
    m = (hit >= 0).nonzero()[:, 0]
    colour = torch.zeros_like(view)
    colour[m] = shade(scene, rays.take(m), t[m], hit[m], random)
    bare = (hit < 0).view(-1, CELL * CELL, 4).float().mean(-1)[..., None]
    at = slot[:, None], pixel
    picture[at] = picture[at] * bare + colour.view(-1, CELL * CELL, 4, 3).mean(2)

    # Real masks sit half a pixel up and left of the picture and are a little too large: a mask
    # pixel shows the nearest of the four half pixels around the lower right corner of its pixel.
    at = slot.repeat_interleave(per_block), row, column
    closeness = torch.zeros((len(frames), 2 * height + 1, 2 * width + 1), device=device)
    ids = torch.zeros_like(closeness, dtype=torch.uint8)
    closeness[at], ids[at] = 1 / t, torch.where(hit < 0, 0, scene.ids[hit])
    _, index = F.max_pool2d(closeness[:, None, 1:, 1:], 2, return_indices=True)
    masks = ids[:, 1:, 1:].flatten(1).gather(1, index.flatten(1))
    return picture.view(-1, height, width, 3), masks.view(-1, height, width)


def gaussian_blur(pictures: Tensor, sigma: float) -> Tensor:
    """Blur (..., H, W) with a standard deviation in pixels, below 1."""
    weights = np.exp(-0.5 * (np.arange(-2, 3) / sigma) ** 2)
    height, width = pictures.shape[-2:]
    x = F.pad(pictures, (2, 2, 2, 2), mode="replicate")
    taps = list(enumerate((weights / weights.sum()).tolist()))
    x = sum(weight * x[..., k : k + width] for k, weight in taps)
    return sum(weight * x[..., k : k + height, :] for k, weight in taps)


def develop(picture: Tensor, rng: np.random.Generator, random: Generator) -> Tensor:
    """Turn linear pictures (T, H, W, 3) into soft, noisy 8-bit frames (T, 3, H, W)."""
    device = picture.device
    gain = np.exp(rng.normal(0, 0.05) + rng.normal(0, 0.015, 3))  # exposure and white balance
    picture = picture * torch.tensor(gain, device=device)
    linear = picture.clamp(1e-6, 1).permute(0, 3, 1, 2).float()
    srgb = torch.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    luma = (srgb * torch.tensor([0.299, 0.587, 0.114], device=device).view(3, 1, 1)).sum(1, True)
    sigma = BLUR * rng.uniform(0.8, 1.3)
    chroma = gaussian_blur(srgb - luma, 1.6 * sigma) * rng.uniform(0.88, 1.1)
    frames = 255 * (gaussian_blur(luma, sigma) + chroma)
    noise = torch.randn((len(frames) + 1, 1, *luma.shape[2:]), generator=random, device=device)
    frames = frames + NOISE * rng.uniform(0.5, 1.5) * (noise[:1] + 0.6 * noise[1:])  # mostly still
    return frames.round().clamp(0, 255).byte()


@torch.no_grad()
def render_video(
    seed: int | list[int],
    objects: tuple[int, int] = (2, 8),
    num_frames: int = 22,
    device: str = "cpu",
    height: int = 160,
    width: int = 240,
) -> tuple[Tensor, Tensor]:
    """Render one video of objects[0] to objects[1] objects.

    Returns frames uint8 (num_frames, 3, height, width) and masks uint8 (num_frames, height, width)
    of class ids. Raises ValueError for a height or width that is no multiple of 4.
    """
    if height % CELL or width % CELL:
        raise ValueError(f"height {height} and width {width} must be multiples of {CELL} pixels")
    rng = np.random.default_rng(seed)
    scene = make_scene(rng, objects, num_frames, width, device)
    random = Generator(device).manual_seed(int(rng.integers(2**62)))
    points = lamp_points(scene, height * width, random)
    chunk = 4 if torch.device(device).type == "cpu" else num_frames  # a processor's cache is small
    parts = [
        render_frames(scene, frames, height, width, points, random)
        for frames in torch.arange(num_frames, device=device).split(chunk)
    ]
    pictures, masks = (torch.cat(part) for part in zip(*parts, strict=True))
    return develop(pictures, rng, random), masks


def write_video(out: Path, number: int, seed: int, objects: tuple[int, int], device: str) -> None:
    """Render into out/video_<number>, a folder that appears whole or not at all."""
    torch.set_num_threads(1)  # the bytes must not depend on it, and workers use all cores
    frames, masks = render_video([seed, number], objects, device=device)
    partial = out / f".video_{number}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for t, frame in enumerate(frames.permute(0, 2, 3, 1).cpu().numpy()):
        with atomic_write(partial / f"image_{t}.png") as file:
            Image.fromarray(frame).save(file, "PNG", compress_level=3)
    with atomic_write(partial / "mask.npy") as file:
        np.save(file, masks.cpu().numpy())
    partial.rename(out / f"video_{number}")


def follow_parent() -> None:
    """End this worker when its parent is gone, even by kill -9."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def render_dataset(
    out: Path,
    num_videos: int,
    seed: int = 0,
    objects: tuple[int, int] = (2, 8),
    workers: int | None = None,
    device: str = "cpu",
    progress: bool = True,
    start: int = 0,
) -> None:
    """Render videos start .. start + num_videos - 1 into `out`, leaving those that are there.

    Uses one process per core unless `workers` says otherwise. Raises OSError where `out` cannot be
    written.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    todo = [k for k in range(start, start + num_videos) if not (out / f"video_{k}").exists()]
    workers = max(1, min(workers or os.cpu_count() or 1, len(todo)))
    bar = tqdm(total=num_videos, initial=num_videos - len(todo), unit="video", disable=not progress)
    with bar, ProcessPoolExecutor(workers, get_context("spawn"), follow_parent) as pool:
        jobs = [pool.submit(write_video, out, k, seed, objects, device) for k in todo]
        try:
            for job in as_completed(jobs):
                job.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def parse_args() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the video_K folders")
    add("--videos", type=int, required=True, help="how many, of 22 frames each")
    add("--start", type=int, default=0, help="number of the first (default %(default)s)")
    add("--seed", type=int, default=0, help="same seed, same bytes (default %(default)s)")
    add("--objects", type=int, nargs=2, default=(2, 8), metavar=("MIN", "MAX"), help="per video")
    add("--workers", type=int, help="processes (default: one per core)")
    add("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    args = parser.parse_args()
    if args.videos < 1 or args.start < 0 or args.seed < 0:
        parser.error("--videos must be at least 1, and --start and --seed at least 0")
    if not 1 <= args.objects[0] <= args.objects[1] <= 48:
        parser.error("--objects needs 1 <= MIN <= MAX <= 48, the number of kinds of objects")
    if args.workers is not None and args.workers < 1:
        parser.error("--workers must be at least 1")
    return args


def main() -> None:
    """Render what the command line asks for."""
    args = parse_args()
    choose_device(args.device)  # an unusable one is an error here, not in every worker
    objects, start = tuple(args.objects), args.start
    try:
        render_dataset(
            args.out, args.videos, args.seed, objects, args.workers, args.device, start=start
        )
    except OSError as error:
        raise UserError(f"cannot write to {args.out}: {error.strerror or error}") from None


if __name__ == "__main__":
    run_script(main)
