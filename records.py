"""What made a mask: mask.json beside it, by which infer.py --resume knows what to keep."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from objects import TABLE
from utils import VERSION, atomic_write, delete_scraps
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


def write_record(target: Path, made_by: Mapping[str, Any]) -> None:
    """Write mask.json beside `target`, a mask.npy that is whole."""
    text = json.dumps({**made_by, "mask": _digest(target)}, separators=(",", ":"))
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
        found = record["mask"]
        changed = next((key for key in CHANGES if record.get(key) != made_by.get(key)), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "nothing tells what made them"
    if changed:
        return CHANGES[changed]
    if with_table and not target.with_name(TABLE).is_file():
        return f"they have no {TABLE}"
    return None if _digest(target) == found else "they are not what was written"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def unfinished(
    targets: Mapping[Path, Path], made_by: Mapping[str, Any], with_table: bool
) -> tuple[dict[Path, Path], Counter[str]]:
    """Return the targets that must be made, and why those of them that are there must be so again.

    What a killed run has left half-written beside them is deleted.
    """
    rest, reasons = {}, Counter()
    for video, target in targets.items():
        reason = why_again(target, {**made_by, "frames": frames_of(video)}, with_table)
        if reason is None:
            continue
        rest[video] = target
        reasons[reason] += 1
        for name in (target.name, TABLE, RECORD):
            delete_scraps(target.with_name(name))
    del reasons["missing"]
    return rest, reasons
