"""What made a mask: mask.json beside it, by which infer.py --resume knows what to keep."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from files import atomic_write, delete_scraps
from objects import TABLE
from utils import VERSION
from videos import frame_paths

RECORD = "mask.json"  # beside mask.npy, and written after it
CHANGES = {  # what differs from the record, and how that is said
    "checkpoint": "another checkpoint made them",
    "options": "other options made them",
    "version": "another version made them",
    "frames": "their frames have changed",
}


def maker(digest: str | None, **options: Any) -> dict[str, Any]:
    """Return what makes all masks of one run: the checkpoint's digest, options, version."""
    return {"checkpoint": digest, "options": options, "version": VERSION}


def makers(made_by: Mapping[str, Any], videos: Iterable[Path]) -> dict[Path, dict[str, Any]]:
    """Return what makes the mask of each video: `made_by`, and its frames as they are now."""
    return {video: {**made_by, "frames": frames_of(video)} for video in videos}


def frames_of(video: Path) -> list[list[str | int]]:
    """Return name, size in bytes and time of change, in nanoseconds, of each frame of a video.

    Of one that is not there, a link to nothing, say, that of the link.
    """
    stats = [(path.name, _stat(path)) for path in frame_paths(video)]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        return path.lstat()


def write_record(
    target: Path, made_by: Mapping[str, Any], mask: bytes, table: bytes | None
) -> None:
    """Write mask.json beside `target`, with digests of what was written there.

    They are not of the files, which another run into the same folder may have replaced.
    """
    digests = {"mask": _digest(mask), "table": None if table is None else _digest(table)}
    text = json.dumps({**made_by, **digests}, separators=(",", ":"))
    with atomic_write(target.with_name(RECORD)) as file:
        file.write(f"{text}\n".encode())


def why_again(target: Path, made_by: Mapping[str, Any], with_table: bool) -> str | None:
    """Return why a mask must be made again, or None if it is whole and made by all of `made_by`."""
    if not target.is_file():
        return "missing"
    try:
        if not target.with_name(RECORD).is_file():  # a pipe would be waited for
            raise OSError
        record = json.loads(target.with_name(RECORD).read_bytes())
        digests = record["mask"], record["table"]
        changed = next((key for key in CHANGES if record.get(key) != made_by.get(key)), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "nothing tells what made them"
    if changed:
        return CHANGES[changed]
    table = target.with_name(TABLE)
    if with_table and not table.is_file():
        return f"they have no {TABLE}"
    if _digest(target.read_bytes()) != digests[0]:
        return "they are not what was written"
    if table.is_file() and _digest(table.read_bytes()) != digests[1]:
        return f"their {TABLE} is not what was written with them"
    return None


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def unfinished(
    targets: Mapping[Path, Path], made_by: Mapping[str, Any], with_table: bool
) -> tuple[dict[Path, Path], Counter[str]]:
    """Return the targets that must be made, and why those of them that are there must be so again.

    What a killed run has left half-written beside them is deleted.
    """
    rest, reasons = {}, Counter()
    for video, all_of_it in makers(made_by, targets).items():
        target = targets[video]
        delete_scraps(target.parent)
        reason = why_again(target, all_of_it, with_table)
        if reason is None:
            continue
        rest[video] = target
        reasons[reason] += 1
    del reasons["missing"]
    return rest, reasons
