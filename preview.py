"""Look at videos and their masks: one folder that any browser opens from disk.

    python preview.py --masks masks --data path --out preview  # then open preview/index.html
    python preview.py --masks masks --data path --strip clip.webp  # a moving picture
    python preview.py --masks masks --data path --strip strip.png   # frames, truth, masks

Shows every video below --data that has a mask.npy at the same relative path below --masks: it
plays, with the objects tinted and outlined, their names and trails; with their doubt where infer.py
wrote --objects, and figures and the true masks where the video is labelled. What a former run has
made and what is still true is kept, so a run that was killed goes on where it stopped.

    preview/index.html, *.js              the page
    preview/videos.js                     what the page knows of every video at once
    preview/train/video_0/video.js        its objects, frame by frame; written last
    preview/train/video_0/frames.jpg      all frames, in rows; masks.png, truth.png, differs.png
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from classes import CLASS_NAMES
from devices import in_threads
from files import atomic_write, delete_leftovers, digest, file_state
from metrics import class_iou, count_segments, frame_confusions, panoptic_quality, video_figures
from objects import Objects
from outputs import TABLE, read_confidence, table
from page.pictures import (
    FAULTS,
    columns_for,
    difference_sheet,
    draw_strip,
    mask_sheet,
    object_paint,
    reduced,
    sheet,
    tile_size,
    with_masks,
)
from utils import UserError, at_least, counted, make_parser, run_script
from videos import MASKS, Video, find_in_all, read_labels, read_truth, read_video

PAGE = Path(__file__).parent / "page"  # the files that a browser opens
FORMAT = 1  # of the files for a video: those of another are made again
PICTURES = ("frames.jpg", "masks.png", "truth.png", "differs.png")  # the last two if labelled
QUALITY = 88  # of the JPEG: about 3 KB for a frame of 240 x 160
FRAME_TIME = 125  # milliseconds, of a moving strip


def preview_video(name: str, video: Video, masks: Path, out: Path, width: int) -> dict[str, Any]:
    """Write the pictures and video.js of one video; return what video.js holds.

    Args:
        name: By which the page knows it.
        video: The frames, and maybe true masks.
        masks: The folder of its mask.npy, and maybe objects.csv.
        out: The folder to write to. What is there and was made of the same files is kept.
        width: Pixels of a frame in the preview, at most.

    Raises:
        UserError: a frame or the mask cannot be read or they do not fit; what is wrong with the
            true masks or the table alone is in the result's `faults`.
    """
    source = fingerprint(name, video, masks, width)
    known = read_description(out / "video.js")
    if known and known.get("source") == source and has_pictures(out, known):
        return known
    delete_leftovers(out)
    frames = read_video(video).permute(0, 2, 3, 1).numpy()
    shape = frames.shape[:3]
    labels = read_labels(masks, shape[0], shape[1:])
    faults: list[str] = []
    truth, confidence = None, {}
    try:
        truth = read_truth(video, shape[1:])
    except UserError as error:
        faults.append(str(error))
    try:
        confidence = read_confidence(masks)
    except UserError as error:
        faults.append(str(error))
    drawn = [ids.numpy() for ids in (labels, truth) if ids is not None]
    small, *drawn = reduced(frames, drawn, width)
    description = {
        "source": source,
        "faults": faults,
        "frames": len(small),
        "size": [small.shape[2], small.shape[1]],
        "tile": list(tile_size(*small.shape[1:3])[::-1]),
        "columns": columns_for(len(small)),
        "objects": describe_objects(labels, truth, confidence, small.shape[2] / shape[2]),
        "figures": None if truth is None else describe_errors(truth, labels),
    }
    pictures = [Image.fromarray(sheet(small)), *map(mask_sheet, drawn)]
    if truth is not None:
        pictures.append(difference_sheet(drawn[1], drawn[0]))
    for picture, drawing in zip(PICTURES, pictures, strict=False):
        save_picture(out / picture, drawing)
    write_script(out / "video.js", "arrived(", [name, description], ");")
    return description


def has_pictures(out: Path, description: dict[str, Any]) -> bool:
    """Return whether all pictures of a described video are in its folder."""
    names = PICTURES if description.get("figures") else PICTURES[:2]
    return all((out / name).is_file() for name in names)


def fingerprint(name: str, video: Video, masks: Path, width: int) -> str:
    """Return a digest of what a preview is made of: names, sizes and times of files, options."""
    folders = (video.path, masks)
    others = [*(folder / name for folder in folders for name in MASKS), masks / TABLE]
    states = [*video.state(), *map(file_state, others)]
    return digest(repr([FORMAT, QUALITY, name, width, states]).encode())


def describe_objects(
    labels: Tensor, truth: Tensor | None, confidence: dict[int, float], scale: float
) -> list[dict[str, Any]]:
    """Return of each object its class id, doubt, IoU (None where not known), and trail.

    The trail has, of each frame in which it is seen, its number and, times `scale`, the x and y of
    the object's centre and the y of its top, in pixels from the frame's upper left corner.
    """
    iou = None if truth is None else class_iou(frame_confusions(truth, labels).sum(0)).tolist()
    objects: dict[int, dict[str, Any]] = {}
    for row in table(Objects(labels, confidence)):
        kind, sure = row.class_id, confidence.get(row.class_id)
        if kind not in objects:
            objects[kind] = {
                "id": kind,
                "doubt": None if sure is None else round(1 - sure, 4),
                "iou": None if iou is None else round(iou[kind], 4),
                "trail": [],
            }
        where = (row.x + 0.5, row.y + 0.5, row.top)
        objects[kind]["trail"].append([row.frame, *(round(at * scale, 1) for at in where)])
    return list(objects.values())


def describe_errors(truth: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return evaluate.py's figures for one video: miou, sq, ghosts and lost."""
    confusions = frame_confusions(truth, labels)
    return video_figures(confusions) | {"sq": panoptic_quality(count_segments(confusions))["sq"]}


def save_picture(path: Path, picture: Image.Image, **options: Any) -> None:
    """Write a picture, whole or not at all, in the format that the file's name ends in."""
    kind = Image.registered_extensions()[path.suffix.lower()]
    with atomic_write(path) as file:
        picture.save(file, kind, quality=QUALITY, **options)


def read_description(path: Path) -> dict[str, Any] | None:
    """Return what a whole video.js holds, None where there is none."""
    try:
        text = path.read_text()
        return json.loads(text[text.index("[") : text.rindex("]") + 1])[1]
    except (OSError, ValueError, IndexError):
        return None


def write_script(path: Path, before: str, value: Any, after: str = ";") -> None:
    """Write a value as JavaScript: a page that is opened from disk can read nothing else."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    with atomic_write(path) as file:
        file.write(f"{before}{text}{after}\n".encode())


def summary(name: str, description: dict[str, Any]) -> dict[str, Any]:
    """Return what the page knows of a video before it is looked at."""
    doubts = [item["doubt"] for item in description["objects"] if item["doubt"] is not None]
    figures = description["figures"]
    return {
        "name": name,
        "folder": quote(os.fsencode(name)),
        "objects": [item["id"] for item in description["objects"]],
        "doubt": max(doubts, default=None),
        "miou": figures and figures["miou"],
        "size": description["size"],
    }


def write_preview(
    masks: Path, data: Sequence[Path], out: Path, width: int, every: int = 1
) -> tuple[int, list[str]]:
    """Write the preview of all videos below `data` that have masks below `masks`.

    Returns:
        How many videos it shows, and what is wrong with them or others.
    """
    videos = find_in_all(data, every)
    chosen = with_masks(videos, masks, data)
    if len(chosen) < len(videos):
        print(f"{len(videos) - len(chosen)} of {len(videos)} videos have no masks: left out")
    for name in ("index.html", "preview.js", "draw.js"):
        with atomic_write(out / name) as file:
            file.write((PAGE / name).read_bytes())

    def job(video: Video) -> tuple[dict[str, Any], list[str]]:
        name = video.target.as_posix()
        try:
            description = preview_video(name, video, masks / name, out / name, width)
        except UserError as error:
            return {"name": name, "fault": str(error)}, [str(error)]
        return summary(name, description), description["faults"]

    bar = {"leave": False, "disable": None, "unit": "video"}
    results = list(tqdm(in_threads(job, chosen), "drawing", len(chosen), **bar))
    classes = [
        {"name": name, "colour": "#" + bytes(paint).hex()}
        for name, paint in zip(CLASS_NAMES, object_paint().tolist(), strict=True)
    ]
    faults = {name: "#" + bytes(paint).hex() for name, paint in FAULTS.items()}
    page = {"classes": classes, "faults": faults, "videos": [video for video, _ in results]}
    write_script(out / "videos.js", "const PREVIEW = ", page)
    return sum("fault" not in video for video, _ in results), [f for _, fs in results for f in fs]


def main() -> int:
    """Write what the command line asks for; return 1 if a video had a fault, else 0."""
    args = parse_args()
    if not args.masks.is_dir():
        raise UserError(f"{args.masks} is not a folder")
    if args.strip:
        save_strip(args.strip, args.masks, args.data, args.every)
    if not args.out:
        return 0
    if args.out.resolve() in [path.resolve() for path in (args.masks, *args.data)]:
        raise UserError(f"--out {args.out} holds other files: give a folder of its own")
    shown, faults = write_preview(args.masks, args.data, args.out, args.width, args.every)
    for fault in faults:
        print(f"fault: {fault}", file=sys.stderr)
    print(f"{counted(shown, 'video')}: open {args.out / 'index.html'} in a browser")
    return 1 if faults else 0


def save_strip(path: Path, masks: Path, data: Sequence[Path], every: int) -> None:
    """Write a picture of a few videos, a moving one if the name ends in .webp or .gif."""
    suffix = path.suffix.lower()
    if suffix not in (".png", ".webp", ".gif"):
        raise UserError(f"--strip {path}: give a name that ends in .png, or .webp or .gif to move")
    first, *rest = map(Image.fromarray, draw_strip(masks, data, suffix != ".png", every))
    moves = {"save_all": True, "append_images": rest, "duration": FRAME_TIME, "loop": 0}
    save_picture(path, first, **(moves if rest else {}))


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument_group("what is shown").add_argument
    add("--masks", "--pred", type=Path, required=True, help="folder that infer.py wrote")
    add("--data", type=Path, nargs="+", required=True, help="folders of the videos, or video files")
    add("--every", type=at_least(1), default=1, help="that of infer.py (default: %(default)s)")
    add = parser.add_argument_group("what is made: one of the two, or both").add_argument
    add(
        "--out",
        type=Path,
        help="folder for the page that shows all videos (default: preview; with --strip none)",
    )
    add("--strip", type=Path, help="picture of four videos: .png, .webp or .gif (default: none)")
    add(
        "--width",
        type=at_least(16),
        default=240,
        help="of a frame in the page, at most, in pixels (default: %(default)s)",
    )
    args = parser.parse_args()
    if not (args.out or args.strip):
        args.out = Path("preview")
    return args


if __name__ == "__main__":
    run_script(main)
