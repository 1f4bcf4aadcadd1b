"""What a camera sees of a scene: pictures by ray tracing in plain PyTorch, and their masks.

Vectors are (M, 3); a pair is a ray and an object that it may hit.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from classes import FRAME_SIZE, NUM_CLASSES
from synthetic.scene import FEWEST, SHRINK, SMALL, Scene, dot, unit

BEVEL = 0.06  # how far from an edge its rounding begins
LAMP_GLINT = np.array([10.0, 3.0, 7.0, 10.0])  # radiance around each lamp in metal
# Flat metal shows the area of a lamp itself, white in metal of any colour. Measured on two real
# videos, on the fill lamp: its radiance, its half width and half height in radians.
LAMP_AREA, LAMP_SIZE = np.array([20.0, 20.0, 20.0, 0.0]), (0.048, 0.035)
AMBIENT, BOUNCE = 0.047, 0.23  # light from everywhere above, and from the ground below
RUBBER, METAL = 1.08, 0.96  # share of light that comes back, relative to the ground
SKY, HAZE, HAZE_WIDTH = 0.022, 0.08, 0.5  # metal sees a dark sky, brighter far ahead (radians)
GLINT_WIDTH, GLOW, GLOW_WIDTH = 0.07, 0.12, 0.45  # radians; a lamp's image and its halo
BLUR = 0.42  # pixels, standard deviation: the real frames were halved from compressed video
NOISE = 0.45  # 8-bit steps, standard deviation
CELL = 4  # pixels: the side of the blocks of rays that are first tested against objects
SAMPLES = 6  # points on a lamp that each ground pixel looks at


class Rays(NamedTuple):
    """M rays."""

    origin: Tensor  # (M, 3)
    direction: Tensor  # (M, 3) of length 1
    frame: Tensor  # (M,)

    def take(self, index: Tensor) -> "Rays":
        """Return the rays at `index`."""
        return Rays(*(of(field, index) for field in self))


def of(table: Tensor, which: Tensor, frame: Tensor | None = None) -> Tensor:
    """Return table[which], or table[frame, which], (M, ...), from 0 on: twice as fast on a CPU."""
    if frame is not None:
        table, which = table.flatten(0, 1), frame * table.shape[1] + which
    return table.index_select(0, which)


def near(
    scene: Scene, rays: Rays, slack: Tensor | float = 0.0, skip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Indices of rays and of objects whose bounding sphere they miss by less than `slack` (M,).

    `skip` (M,) is the object that a ray starts on; being convex it is never met again. -1: none.
    """
    to = of(scene.centre, rays.frame) - rays.origin[:, None]  # (M, N, 3)
    along = dot(to, rays.direction[:, None])
    reach = scene.reach + torch.as_tensor(slack, device=to.device).view(-1, 1)
    hit = (dot(to, to) - along * along < reach * reach) & (along > -reach)
    if skip is not None:
        hit &= torch.arange(len(scene.reach), device=to.device) != skip[:, None]
    return hit.nonzero(as_tuple=True)


def turned(
    scene: Scene, vector: Tensor, frame: Tensor, which: Tensor, back: bool = False
) -> Tensor:
    """Turn world vectors (..., M, 3) into the axes of objects `which` (M,), or back."""
    cos, sin = of(scene.turn, which, frame).unbind(-1)
    sin = sin if back else -sin
    x, y, z = vector.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y, z], -1)


def intersect(scene: Scene, rays: Rays, which: Tensor) -> Tensor:
    """Distance (M,) along each ray to its object `which` (M,), infinite where it misses.

    It is 0 for a ray that starts inside, as from the ground below an object. Every shape is an
    intersection of slabs and a quadric. A ray is inside each of them on one interval, and hits if
    it enters the last before it leaves the first (Kay and Kajiya, 1986).
    """
    to = rays.origin - of(scene.centre, which, rays.frame)
    p, d = turned(scene, torch.stack([to, rays.direction]), rays.frame, which)
    inverse = 1 / torch.where(d.abs() < 1e-9, 1e-9, d)
    extent = of(scene.half, which) * inverse.abs()
    enter, leave = (-p * inverse - extent).unbind(-1), (-p * inverse + extent).unbind(-1)
    (px, py, pz), (dx, dy, dz) = p.unbind(-1), d.unbind(-1)
    ball = of(scene.round, which)
    pz, dz = pz * ball, dz * ball  # an upright cylinder ignores z
    a = (dx * dx + dy * dy + dz * dz).clamp(min=1e-12)
    b = px * dx + py * dy + pz * dz
    c = px * px + py * py + pz * pz - of(scene.radius, which) ** 2
    root = (b * b - a * c).clamp(min=0).sqrt()  # 0 where it misses: an empty interval
    first, last = (-b - root) / a, (root - b) / a
    for k in range(3):
        first, last = torch.maximum(first, enter[k]), torch.minimum(last, leave[k])
    return torch.where((first < last) & (last > 0), first.clamp(min=0), math.inf)


def first_hit(ray: Tensor, which: Tensor, t: Tensor, rays: Rays) -> tuple[Tensor, Tensor]:
    """Distance (M,) to the nearest hit among pairs (ray, which) that meet at `t`; object or -1."""
    nearest = torch.full_like(rays.origin[:, 0], math.inf).scatter_reduce(0, ray, t, "amin")
    best = t.isfinite() & (t == nearest[ray])
    hit = torch.full_like(rays.frame, -1)
    hit[ray[best]] = which[best]
    return nearest, hit


def surface_normal(scene: Scene, point: Tensor, frame: Tensor, which: Tensor) -> Tensor:
    """Outward normals at points on objects. Upright and upper edges are rounded."""
    p = turned(scene, point - scene.centre[frame, which], frame, which)
    flat = p.sign() * (p.abs() - scene.half[which] + BEVEL).clamp(min=0)
    flat[:, 2].clamp_(min=0)  # real lower edges are as bright as the sides above them
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


def irradiance(
    scene: Scene, point: Tensor, normal: Tensor, frame: Tensor, skip: Tensor, random: Generator
) -> Tensor:
    """Light (M, 3) that reaches points; of each lamp they see all or nothing, by one random ray."""
    total = ambient(point, normal)
    for lamp in range(len(scene.lamp)):
        jitter = torch.randn(point.shape, generator=random, device=point.device)
        source = scene.lamp[lamp] + 0.5 * scene.lamp_radius[lamp] * jitter
        light = lamp_light(scene, lamp, point, normal)
        lit = (light[:, 0] > 0).nonzero()[:, 0]
        rays = Rays(point[lit], unit(source[lit] - point[lit]), frame[lit])
        ray, which = near(scene, rays, skip=skip[lit])
        dark = intersect(scene, rays.take(ray), which).isfinite()
        light[lit[ray[dark]]] = 0
        total = total + light
    return total


def lamp_image(to: Tensor, direction: Tensor, lamp: int) -> Tensor:
    """Radiance (M,) of a lamp that lies towards `to`, seen in `direction`, unit vectors (M, 3)."""
    angle = 2 - 2 * dot(to, direction)  # squared, if small
    level = F.pad(torch.stack([to[:, 1], -to[:, 0]], -1), (0, 1))  # at right angles to it
    across = dot(direction, unit(level)) ** 2
    off = across / LAMP_SIZE[0] ** 2 + (angle - across).clamp(min=0) / LAMP_SIZE[1] ** 2
    area = LAMP_AREA[lamp] * torch.exp(-(off**2))  # an ellipse with a soft edge
    glint = LAMP_GLINT[lamp] * torch.exp(-angle / GLINT_WIDTH**2)
    return area + glint + GLOW * torch.exp(-angle / GLOW_WIDTH**2)


def reflection(
    scene: Scene, rays: Rays, skip: Tensor, random: Generator, bounces: int = 1
) -> Tensor:
    """Radiance (M, 3) along rays that leave metal: lamps in a dark sky, the ground, or objects.

    Metal in metal is metal for so many `bounces`; after them it passes for rubber.
    """
    direction = rays.direction
    seen = SKY + HAZE * torch.exp((direction[:, 1:2] - 1) / HAZE_WIDTH**2).repeat(1, 3)
    for lamp in range(len(scene.lamp)):
        seen += lamp_image(unit(scene.lamp[lamp] - rays.origin), direction, lamp)[:, None]
    ray, which = near(scene, rays, skip=skip)
    t, hit = first_hit(ray, which, intersect(scene, rays.take(ray), which), rays)
    to_ground = torch.where(direction[:, 2] < -1e-3, -rays.origin[:, 2] / direction[:, 2], math.inf)
    point = rays.origin + torch.minimum(t, to_ground).clamp(max=1e4)[:, None] * direction
    m = ((hit < 0) & to_ground.isfinite()).nonzero()[:, 0]
    up = t.new_tensor([0.0, 0.0, 1.0]).expand(len(m), 3)
    seen[m] = irradiance(scene, point[m], up, rays.frame[m], hit[m], random)
    m = (hit >= 0).nonzero()[:, 0]
    seen[m] = shade(scene, rays.take(m), t[m], hit[m], random, bounces - 1)
    return seen


def shade(
    scene: Scene, rays: Rays, t: Tensor, which: Tensor, random: Generator, bounces: int = 1
) -> Tensor:
    """Linear colour (M, 3) of the objects `which` (M,) that rays meet at distance `t` (M,).

    `bounces`: as of `reflection`, below 0 all metal passes for rubber.
    """
    view, frame = rays.direction, rays.frame
    point = rays.origin + t[:, None] * view
    normal, light = surface_normal(scene, point, frame, which), torch.empty_like(point)
    metal = scene.metal[which] & (bounces >= 0)
    m = (~metal).nonzero()[:, 0]
    light[m] = RUBBER * irradiance(scene, point[m], normal[m], frame[m], which[m], random)
    if bounces < 0:
        return scene.albedo[which] * light
    m = metal.nonzero()[:, 0]
    mirrored = unit(view[m] - 2 * dot(view[m], normal[m])[:, None] * normal[m])
    leaving = Rays(point[m], mirrored, frame[m])
    light[m] = METAL * reflection(scene, leaving, which[m], random, bounces)
    return scene.albedo[which] * light


def lamp_points(scene: Scene, pixels: int, random: Generator) -> Tensor:
    """Points (L, pixels, SAMPLES, 2) spread over each lamp's disc in randomly turned spirals."""
    device = scene.lamp.device
    k = torch.arange(SAMPLES, device=device)
    angle = torch.rand((len(scene.lamp), pixels, 1), generator=random, device=device) * 2 * math.pi
    angle = angle + k * math.pi * (3 - 5**0.5)  # the golden angle, as in a sunflower
    radius = scene.lamp_radius[:, None, None] * ((k + 0.5) / SAMPLES).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def on_lamp(scene: Scene, lamp: int, points: Tensor) -> Tensor:
    """Where in the scene points (..., 2) of a lamp's disc are, (..., 3)."""
    side = unit(torch.linalg.cross(scene.facing[lamp], points.new_tensor([0.0, 0.0, 1.0])))
    top = torch.linalg.cross(side, scene.facing[lamp])
    return scene.lamp[lamp] + points[..., :1] * side + points[..., 1:] * top


def may_shade(scene: Scene, lamp: int, point: Tensor, frame: Tensor, which: Tensor) -> Tensor:
    """Whether objects `which` (M,) may hide some of a lamp from points (M, 3)."""
    to_lamp, to = scene.lamp[lamp] - point, of(scene.centre, which, frame) - point
    far, apart = dot(to_lamp, to_lamp).sqrt(), dot(to, to)
    along, reach = dot(to, to_lamp) / far, of(scene.reach, which)
    # At the object a ray to a point of the lamp's disc is so far from that to its middle, at most.
    reach = reach + scene.lamp_radius[lamp] / far * (apart.sqrt() + reach)
    return (apart - along * along < reach * reach) & (along > -reach)


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
        penumbra = 1.2 * scene.lamp_radius[lamp] / dot(to, to).sqrt()  # below an object
        slack = size + penumbra
        origin, to = middle.repeat(len(frames), 1), unit(to).repeat(len(frames), 1)
        rays = Rays(origin, to, frames.repeat_interleave(len(cells)))
        block, which = near(scene, rays, slack.repeat(len(frames)))
        slot, which = (w.repeat_interleave(CELL * CELL) for w in (block // len(cells), which))
        pixel = cells[block % len(cells)].flatten()
        some = may_shade(scene, lamp, ground[pixel], frames[slot], which).nonzero()[:, 0]
        slot, which, pixel = slot[some], which[some], pixel[some]
        target = on_lamp(scene, lamp, of(points[lamp], pixel))  # (pairs, SAMPLES, 3)
        start = of(ground, pixel.repeat_interleave(SAMPLES))
        frame, which = (w.repeat_interleave(SAMPLES) for w in (frames[slot], which))
        rays = Rays(start, unit(target.view(-1, 3) - start), frame)
        blocked = intersect(scene, rays, which).isfinite()
        index = (slot * len(ground) + pixel)[:, None] * SAMPLES
        index = (index + torch.arange(SAMPLES, device=ground.device)).flatten()
        seen = torch.ones((len(frames), len(ground), SAMPLES), device=ground.device)
        seen.view(-1)[index[blocked]] = 0
        total += seen.mean(-1)[..., None] * lamp_light(scene, lamp, ground, up)
    return total


def in_label(
    scene: Scene,
    rays: Rays,
    row: Tensor,
    size: tuple[int, int],
    hit: Tensor,
    ray: Tensor,
    which: Tensor,
) -> Tensor:
    """Whether rays (M,) meet an object where its label shows it, see `scene.NARROW`.

    `row` (M,) counts the rows of all frames, of which there are size[0] with size[1] rows each;
    `hit` (M,) is the object that a ray meets first, or -1; `ray` and `which` are all pairs that
    meet, so that an outline is that of the whole object, whatever hides it.
    """
    # How wide each object's outline is in each row, and whether that is wide enough for a label.
    n = len(scene.narrow)
    width = torch.bincount(row[ray] * n + which, minlength=math.prod(size) * n).view(*size, n)
    wide = width >= scene.narrow * width.amax(1, keepdim=True)
    return (hit >= 0) & wide.view(-1, n)[row, hit] & ~on_rim(scene, rays, hit)


def on_rim(scene: Scene, rays: Rays, hit: Tensor) -> Tensor:
    """Whether rays (M,) pass a sphere's centre too far away for its label, see `scene.SHRINK`."""
    to = scene.centre[rays.frame, hit] - rays.origin
    along, radius = dot(to, rays.direction), scene.radius[hit]
    radius = radius - SHRINK * (radius - SMALL * along).clamp(min=0)
    return (scene.round[hit] > 0) & (dot(to, to) - along * along > radius * radius)


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

    # The ground behind every pixel, in blocks of CELL x CELL pixels, lit and shadowed.
    pixel = torch.arange(height * width, device=device)
    cells = pixel.view(height // CELL, CELL, width // CELL, CELL).transpose(1, 2)
    cells = cells.reshape(-1, CELL * CELL)
    view = look(pixel // width + 0.5, pixel % width + 0.5)
    ground = scene.eye - view * (scene.eye[2] / view[:, 2:])
    picture = ground_light(scene, ground, cells, frames, points)

    # The blocks that an object may touch, found by the ray through their middle.
    middle = unit(view[cells].mean(1)).repeat(len(frames), 1)
    rays = Rays(scene.eye.expand_as(middle), middle, frames.repeat_interleave(len(cells)))
    block, which = near(scene, rays, slack=30 * 0.71 * CELL / scene.focal)  # seen 30 units away
    blocks, pair = block.unique(return_inverse=True)

    # Their pixels are seen through 2 x 2 rays each; which object does each ray meet first?
    slot, pixel = blocks // len(cells), cells[blocks % len(cells)]
    per_block, sub = 4 * CELL * CELL, torch.arange(4, device=device)
    row = (2 * (pixel // width)[..., None] + sub // 2).flatten()  # in half pixels
    column = (2 * (pixel % width)[..., None] + sub % 2).flatten()
    view = look(0.5 * row + 0.25, 0.5 * column + 0.25)
    rays = Rays(scene.eye.expand_as(view), view, frames[slot].repeat_interleave(per_block))
    pair = (pair[:, None] * per_block + torch.arange(per_block, device=device)).flatten()
    which = which.repeat_interleave(per_block)
    met = intersect(scene, rays.take(pair), which)
    t, hit = first_hit(pair, which, met, rays)

    # A pixel is the mean of its rays: objects, and the ground for the share that meets none.
    m = (hit >= 0).nonzero()[:, 0]
    colour = torch.zeros_like(view)
    colour[m] = shade(scene, rays.take(m), t[m], hit[m], random).clamp(max=1)  # glints are no blots
    bare = (hit < 0).view(-1, CELL * CELL, 4).float().mean(-1)[..., None]
    at = slot[:, None], pixel
    picture[at] = picture[at] * bare + colour.view(-1, CELL * CELL, 4, 3).mean(2)

    # Real masks sit half a pixel up and left of the picture and are a little too large: a mask
    # pixel shows the nearest of the four half pixels around the lower right corner of its pixel.
    at = slot.repeat_interleave(per_block), row, column
    line, size, some = at[0] * 2 * height + row, (len(frames), 2 * height), met.isfinite()
    shown = in_label(scene, rays, line, size, hit, pair[some], which[some])
    closeness = torch.zeros((len(frames), 2 * height + 1, 2 * width + 1), device=device)
    ids = torch.zeros_like(closeness, dtype=torch.uint8)
    closeness[at], ids[at] = torch.where(shown, 1 / t, 0), torch.where(shown, scene.ids[hit], 0)
    _, index = F.max_pool2d(closeness[:, None, 1:, 1:], 2, return_indices=True)
    masks = ids[:, 1:, 1:].flatten(1).gather(1, index.flatten(1)).view(-1, height, width)
    return picture.view(-1, height, width, 3), without_slivers(masks)


def without_slivers(masks: Tensor) -> Tensor:
    """Return masks (T, H, W) uint8 in which what shows fewer than FEWEST pixels is background.

    Each frame is looked at alone. In frames of another width FEWEST grows with its square.
    """
    ids = masks.flatten(1).long()
    area = torch.zeros(len(ids), NUM_CLASSES, device=ids.device)
    area = area.scatter_add_(1, ids, torch.ones_like(ids, dtype=area.dtype)).gather(1, ids)
    fewest = FEWEST * (masks.shape[2] / FRAME_SIZE[1]) ** 2
    return masks * (area >= fewest).view_as(masks)


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
