"""Render look-alike CLEVRER videos and their masks, by ray tracing in plain PyTorch.

    python render.py --out data/two --videos 2                   # a smoke run: seconds
    python render.py --out data/rendered --videos 60 --seed 1    # killed? the same command goes on
    python render.py --out data/crowded --videos 60 --objects 10 20
    python render.py --out data/sparse --videos 60 --frames 3 --every 5  # of 11, three

Each video is a folder `video_K` with `image_0.png` .. `image_21.png` and `mask.npy`, the layout
that dataset.py reads. With `--every 5` its `image_1.png` is the sixth frame of the motion. Its
bytes depend on K and the settings beside it in `render.json` alone, not on the number of workers; a
folder takes videos of one set of settings.
"""

import argparse
import json
import secrets
import shutil
import sys
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from tqdm import tqdm

from classes import FRAME_SIZE, NUM_KINDS
from devices import (
    choose_device,
    end_processes,
    follow_parent,
    start_process,
    usable_cpus,
    why_alone,
    without_ctrl_c,
)
from files import atomic_write, write_json
from synthetic.raytrace import CELL, develop, lamp_points, render_frames
from synthetic.scene import make_scene
from utils import UserError, at_least, counted, keep_freed_memory, make_parser, run_script

RENDERER = 7  # raised when a seed no longer gives the same bytes
NUM_FRAMES, (HEIGHT, WIDTH) = 22, FRAME_SIZE  # of the videos that others have
SETTINGS = "render.json"  # beside the videos: what made them
# Where no data is given: few frames of each video to learn from, since a network learns more from
# other objects than from the same ones a moment later.
DEMO_DATA, DEMO_OBJECTS = Path("data/demo"), (4, 10)
DEMO_PARTS = {"val": (1000, 28, 11, 1), "train": (1001, 1120, 3, 5)}  # seed, videos, frames, every
KILLED = (
    "a process that renders was killed, perhaps for lack of memory: the same command goes on; "
    "if it happens again, give render.py fewer --workers"
)
TICK = 0.2  # seconds after which what is done is counted
REMEDY = "rename that folder (train.py --data trains on it still), or give render.py another --out"


@torch.no_grad()
def render_video(
    seed: int | list[int],
    objects: tuple[int, int] = (2, 8),
    num_frames: int = NUM_FRAMES,
    device: str = "cpu",
    height: int = HEIGHT,
    width: int = WIDTH,
    every: int = 1,
) -> tuple[Tensor, Tensor]:
    """Render one video of objects[0] to objects[1] objects, every so many-th frame of it.

    Returns frames uint8 (num_frames, 3, height, width) and masks uint8 (num_frames, height, width)
    of class ids. Raises ValueError for a height or width that is no multiple of 4.
    """
    if height % CELL or width % CELL:
        raise ValueError(f"height {height} and width {width} must be multiples of {CELL} pixels")
    rng = np.random.default_rng(seed)
    times = torch.arange(0, num_frames * every, every, device=device)
    scene = make_scene(rng, objects, int(times[-1]) + 1, width, device)
    random = Generator(device).manual_seed(int(rng.integers(2**62)))
    points = lamp_points(scene, height * width, random)
    chunk = 4 if torch.device(device).type == "cpu" else num_frames  # a processor's cache is small
    parts = [
        render_frames(scene, frames, height, width, points, random) for frames in times.split(chunk)
    ]
    pictures, masks = (torch.cat(part) for part in zip(*parts, strict=True))
    return develop(pictures, rng, random), masks


def write_video(
    out: Path,
    number: int,
    seed: int,
    objects: tuple[int, int],
    device: str,
    num_frames: int = NUM_FRAMES,
    every: int = 1,
) -> None:
    """Render into out/video_<number>, a folder that appears whole or not at all."""
    torch.set_num_threads(1)  # the bytes must not depend on it, and workers use all cores
    frames, masks = render_video([seed, number], objects, num_frames, device, every=every)
    video = out / f"video_{number}"
    partial = out / f".video_{number}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir()
        for t, frame in enumerate(frames.permute(0, 2, 3, 1).cpu().numpy()):
            with atomic_write(partial / f"image_{t}.png") as file:
                Image.fromarray(frame).save(file, "PNG", compress_level=3)
        with atomic_write(partial / "mask.npy") as file:
            np.save(file, masks.cpu().numpy())
        partial.rename(video)
    except OSError as error:
        if not video.exists():  # else another run rendered it meanwhile, and swept ours away
            raise OSError(error.errno, error.strerror, str(video)) from error
    sweep(out, f"video_{number}")


def sweep(out: Path, video: str = "*") -> None:
    """Delete what killed runs, and slower ones, have made of videos that are there."""
    for leftover in out.glob(f".{video}.*partial"):
        if (out / leftover.name.split(".")[1]).exists():
            shutil.rmtree(leftover, ignore_errors=True)


def render_share(jobs: list[tuple], sender: Connection) -> None:
    """Render videos, each by the arguments of `write_video`, in a process of its own."""
    follow_parent()
    keep_freed_memory()  # a sixth of the time
    try:
        for job in jobs:
            write_video(*job)
    except Exception as error:
        sender.send(error)
        sys.exit(1)


def render_in_processes(jobs: list[tuple], workers: int, bar: tqdm) -> None:
    """Render videos in so many processes, each every so many-th of them.

    There is nothing between the processes but a pipe for what failed: whatever ends this one, the
    others can be ended at any moment, since a video is whole or not there.

    Args:
        jobs: Arguments of `write_video`.
        workers: Processes.
        bar: Counts the videos.

    Raises:
        UserError: a process was killed. What else failed in one is raised as it is.
    """
    shares = [jobs[n::workers] for n in range(workers)]
    running: dict[BaseProcess, Connection] = {}
    try:
        with without_ctrl_c():  # which they never get: this process ends them
            for share in shares:
                process, receiver = start_process(render_share, share, daemon=True)
                running[process] = receiver
        rest = [share[::-1] for share in shares]
        while running:
            wait([process.sentinel for process in running], TICK)
            for share in rest:
                while share and (share[-1][0] / f"video_{share[-1][1]}").exists():
                    share.pop()
                    bar.update()
            for process in [process for process in running if process.exitcode is not None]:
                receiver = running.pop(process)
                if process.exitcode:
                    raise failure(receiver)
    finally:
        end_processes(list(running))


def failure(receiver: Connection) -> Exception:
    """Return what a process said that has failed."""
    try:
        return receiver.recv()
    except EOFError:  # it could say nothing
        return UserError(KILLED)


def read_settings(out: Path) -> dict[str, Any]:
    """Return what made the videos in `out`. Raises UserError if their settings are damaged."""
    try:
        made_with = json.loads((out / SETTINGS).read_bytes())
    except (ValueError, RecursionError):
        made_with = None
    if not isinstance(made_with, dict):
        raise UserError(
            f"{out / SETTINGS} is damaged, so nothing says what made the videos beside it: {REMEDY}"
        )
    return made_with


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Record in `out` what makes its videos; UserError if anything else made those in it.

    Runs with the same settings may claim a folder together.
    """
    has_videos = any(out.glob("video_*"))  # seen first, because another run writes them last
    if not (out / SETTINGS).exists():
        if has_videos:
            raise UserError(
                f"{out} holds videos but no {SETTINGS} that says what made them: {REMEDY}"
            )
        write_json(out / SETTINGS, settings)
    made_with = {"every": 1} | read_settings(out)  # which older versions do not write
    if made_with != settings:
        changes = [
            f"{key} {_spell(made_with.get(key))}, not {_spell(settings.get(key))}"
            for key in settings | made_with
            if made_with.get(key) != settings.get(key)
        ]
        raise UserError(
            f"{out} is for videos rendered with other settings ({'; '.join(changes)}): "
            f"{REMEDY} or the same settings"
        )


def _spell(value: Any) -> str:
    return " to ".join(map(str, value)) if isinstance(value, list) else str(value)


def default_workers() -> int:
    """Return how many processes render: one per core that this process may use, at most 32."""
    return min(usable_cpus(), 32)


def render_dataset(
    out: Path,
    num_videos: int,
    seed: int = 0,
    objects: tuple[int, int] = (2, 8),
    workers: int | None = None,
    device: str = "cpu",
    progress: bool = True,
    start: int = 0,
    num_frames: int = NUM_FRAMES,
    every: int = 1,
) -> None:
    """Render videos start .. start + num_videos - 1 into `out`, leaving those that are there.

    Runs `default_workers()` processes unless `workers` says otherwise. Raises UserError where `out`
    holds videos that other settings made, OSError where it cannot be written.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "renderer": RENDERER,
        "seed": seed,
        "objects": list(objects),
        "frames": num_frames,
        "every": every,
        "height": HEIGHT,
        "width": WIDTH,
        "device": torch.device(device).type,
    }
    claim(out, settings)
    sweep(out)
    todo = [k for k in range(start, start + num_videos) if not (out / f"video_{k}").exists()]
    jobs = [(out, k, seed, objects, device, num_frames, every) for k in todo]
    workers = min(workers or default_workers(), len(todo))
    disable = None if progress else True  # None: where stderr is no terminal, such as a log file
    bar = tqdm(total=num_videos, initial=num_videos - len(todo), unit="video", disable=disable)
    with bar:
        if why := why_alone() if todo else "":
            print(f"one process renders ({why})", file=sys.stderr)
            threads = torch.get_num_threads()
            for job in jobs:
                write_video(*job)
                bar.update()
            torch.set_num_threads(threads)
        else:
            render_in_processes(jobs, workers, bar)


def render_demo() -> None:
    """Render what is missing of the videos that train.py and benchmark.py use by default.

    Raises:
        UserError: there are other videos, from which nobody would learn.
    """
    if any(DEMO_DATA.glob("video_*")):
        raise UserError(
            f"{DEMO_DATA} holds other videos, such as older versions rendered: rename that folder "
            "(train.py --data trains on it still)"
        )
    for part, (seed, videos, frames, every) in DEMO_PARTS.items():
        folder = DEMO_DATA / part
        render_dataset(folder, videos, seed, DEMO_OBJECTS, num_frames=frames, every=every)


def parse_args() -> argparse.Namespace:
    """Read and check the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--out", type=Path, required=True, help="folder for the video_K folders")
    add("--videos", type=at_least(1), required=True, help="how many")
    add("--start", type=at_least(0), default=0, help="K of the first (default: %(default)s)")
    add = parser.add_argument_group("scenes").add_argument
    add(
        "--frames",
        type=at_least(1),
        default=NUM_FRAMES,
        help=f"of each video, {WIDTH} x {HEIGHT} pixels each (default: %(default)s)",
    )
    add(
        "--every",
        type=at_least(1),
        default=1,
        help="5: render every fifth frame of what happens (default: all)",
    )
    add(
        "--objects",
        type=int,
        nargs=2,
        default=(2, 8),
        metavar=("MIN", "MAX"),
        help="in each scene; some may be out of view, hidden or too small (default: 2 8)",
    )
    add("--seed", type=at_least(0), default=0, help="same seed, same bytes (default: %(default)s)")
    add = parser.add_argument_group("machine").add_argument
    add("--workers", type=at_least(1), help="processes (default: one per usable core, to 32)")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    args = parser.parse_args()
    if not 1 <= args.objects[0] <= args.objects[1] <= NUM_KINDS:
        parser.error(f"--objects needs 1 <= MIN <= MAX <= {NUM_KINDS}, the number of their kinds")
    return args


def main() -> None:
    """Render what the command line asks for."""
    args = parse_args()
    choose_device(args.device)  # an unusable one is an error here, not in every worker
    render_dataset(
        args.out,
        args.videos,
        args.seed,
        tuple(args.objects),
        args.workers,
        args.device,
        start=args.start,
        num_frames=args.frames,
        every=args.every,
    )
    print(f"{counted(args.videos, 'video')} -> {args.out}")


if __name__ == "__main__":
    run_script(main)
