"""The files that infer.py writes for a video: mask.npy, objects.csv, mask.json; are they true?

masks/train/video_7/mask.npy      uint8 (frames, height, width), ids 0..48
masks/train/video_7/objects.csv   a row for each object and frame; if asked for
masks/train/video_7/mask.json     what made them, by which `infer.py --resume` knows what to keep
"""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from classes import CLASS_NAMES, NUM_CLASSES
from files import atomic_write, delete_leftovers, digest, write_json
from objects import Objects
from proposals import check_names, encode, file_name
from utils import VERSION, UserError
from videos import MASKS, Video, list_video

TABLE, RECORD = "objects.csv", "mask.json"
SAID = {"mask": "mask", "table": TABLE, "proposal": "proposal"}
CHANGES = {  # what differs from the record, and how that is said
    "checkpoint": "another checkpoint made them",
    "options": "other options made them",
    "version": "another version made them",
    "frames": "their frames have changed",
}


class Row(NamedTuple):
    """One object in one frame."""

    frame: int  # from 0
    object: int  # its number, from 1, by when it is first seen
    class_id: int  # 1..48
    name: str
    x: float  # of the mean of its pixels; the centre of the top left pixel is (0, 0)
    y: float
    left: int  # first and last column and row
    top: int
    right: int
    bottom: int
    pixels: int
    at_edge: int  # 1 where it touches the picture's edge, which may hide some of it
    confidence: float
    number: int  # of the frame, in its name
    seconds: float | str  # of a frame of a clip, since its start; else ""


def table(objects: Objects) -> list[Row]:
    """Return a row for each object and frame, by frame and number."""
    labels = objects.labels.numpy()
    _, height, width = labels.shape
    first_column, last_column, first_row, last_row = objects.bars
    last_column, last_row = width - 1 - last_column, height - 1 - last_row
    where = np.flatnonzero(labels)
    if not len(where):
        return []

    # The pixels in the order of their frames and classes, and where each of these begins.
    key = where // (height * width) * NUM_CLASSES + labels.reshape(-1)[where]
    order = np.argsort(key, kind="stable")
    starts = np.flatnonzero(np.diff(key[order], prepend=-1))
    y, x = where[order] // width % height, where[order] % width

    # Of each: means, first and last column and row.
    pixels = np.diff(starts, append=len(order))
    frames, ids = np.divmod(key[order][starts], NUM_CLASSES)
    columns = [frames, ids]
    columns += [np.add.reduceat(values, starts) / pixels for values in (x, y)]
    columns += [np.minimum.reduceat(values, starts) for values in (x, y)]
    columns += [np.maximum.reduceat(values, starts) for values in (x, y)]

    numbers = objects.numbers or range(len(labels))
    seconds = objects.seconds or [None] * len(labels)
    number = {class_id: i for i, class_id in enumerate(dict.fromkeys(ids.tolist()), 1)}
    rows = []
    for frame, class_id, x, y, left, top, right, bottom, count in zip(
        *(column.tolist() for column in (*columns, pixels)), strict=True
    ):
        row = Row(
            frame=frame,
            object=number[class_id],
            class_id=class_id,
            name=CLASS_NAMES[class_id],
            x=round(x, 2),
            y=round(y, 2),
            left=left,
            top=top,
            right=right,
            bottom=bottom,
            pixels=count,
            at_edge=int(
                left == first_column
                or top == first_row
                or right == last_column
                or bottom == last_row
            ),
            confidence=round(objects.confidence.get(class_id, 0.0), 4),
            number=numbers[frame],
            seconds="" if seconds[frame] is None else round(seconds[frame], 3),
        )
        rows.append(row)
    return sorted(rows)


def read_confidence(folder: Path) -> dict[int, float]:
    """Return the confidence by class id of a folder's objects.csv; empty if there is none.

    Raises:
        UserError: it is not such a table.
    """
    path = folder / TABLE
    if not os.path.lexists(path):
        return {}
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError
        with path.open(newline="") as file:
            rows = csv.DictReader(file)
            found = {int(row["class_id"]): float(row["confidence"]) for row in rows}
        if not all(0 <= confidence <= 1 for confidence in found.values()):
            raise ValueError
        return found
    except (OSError, KeyError, TypeError, ValueError, csv.Error):
        raise UserError(
            f"{path}: not a table of objects as infer.py writes it, delete the file."
        ) from None


def provenance(checkpoint: str | None, **options: Any) -> dict[str, Any]:
    """Return what makes all masks of a run: the checkpoint's digest, the options, the version."""
    return {"checkpoint": checkpoint, "options": options, "version": VERSION}


def is_whole(path: Path, recorded: str | None) -> bool:
    """Return whether a file can be read and has the digest that was recorded."""
    try:
        return digest(path.read_bytes()) == recorded
    except OSError:
        return False


class Outputs:
    """The files of labelled videos below one folder, in the tree of the videos.

    Args:
        out: The folder.
        origin: As of `provenance`.
        with_table: Whether objects.csv is written.
        form: Of masks: "npy", "npz" (compressed, under the key `mask`), or "" for none.
        proposals: The folder for proposals, if they are written.
        resume: Whether files that are whole and still true are kept.
    """

    def __init__(
        self,
        out: Path,
        origin: dict[str, Any],
        with_table: bool = False,
        form: str = "npy",
        proposals: Path | None = None,
        resume: bool = False,
    ):
        self.out, self.origin, self.with_table = out, origin, with_table
        self.form, self.proposals, self.resume = form, proposals, resume

    def folder(self, video: Video) -> Path:
        """Return where the files of a video are."""
        return self.out / video.target

    def files(self, video: Video) -> dict[str, Path]:
        """Return which files of a video are written, by what they are in its record."""
        folder, files = self.folder(video), {}
        if self.with_table:
            files["table"] = folder / TABLE
        if self.form:
            files["mask"] = folder / f"mask.{self.form}"
        if self.proposals:
            files["proposal"] = self.proposals / file_name(video)
        return files

    def check_apart(self, videos: Iterable[Video]) -> None:
        """Raise UserError if files of two videos, or of one and its labels, would meet."""
        targets: dict[Path, Video] = {}
        for video in videos:
            other = targets.setdefault(video.target, video)
            if other is not video:
                raise UserError(
                    f"{other} and {video} would both be labelled in {self.folder(video)}: "
                    "rename one, or label them apart"
                )
        if self.proposals:
            check_names(videos)
        paths = {video.path.resolve() for video in videos}
        for video in videos:
            folder = self.folder(video)
            if folder.resolve() in paths or (folder.is_dir() and list_video(folder).names):
                raise UserError(
                    f"--out {self.out} would put masks over the labels in {folder}, a folder of "
                    "frames: give a folder of its own"
                )

    def check_proposals(self, videos: Iterable[Video]) -> None:
        """Raise UserError if proposals that others made would be written over."""
        for video in videos if self.proposals else ():
            file, record = self.files(video)["proposal"], self._record(video)
            own = record.get("proposals") == self._place() or is_whole(file, record.get("proposal"))
            if file.exists() and not own:
                raise UserError(
                    f"--proposals {self.proposals} holds {file.name}, which --out {self.out} "
                    "knows nothing of: give a folder of its own"
                )

    def _place(self) -> str:
        """Return where the proposals are, seen from the other files; "" if none are written."""
        return (
            os.path.relpath(self.proposals.resolve(), self.out.resolve()) if self.proposals else ""
        )

    def _record(self, video: Video) -> dict[str, Any]:
        """Return the record of a video; {} where there is none that can be read."""
        path = self.folder(video) / RECORD
        try:
            record = json.loads(path.read_bytes()) if path.is_file() else {}  # a pipe would hang
        except (OSError, ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) else {}

    def _change(self, record: dict[str, Any], state: list) -> str:
        """Return why what a record stands for is no longer true; "" if it is."""
        expected = {**self.origin, "frames": state}
        return next((CHANGES[key] for key in CHANGES if record.get(key) != expected[key]), "")

    def has_files(self, video: Video) -> bool:
        """Return whether something is there that would be written anew, or deleted."""
        masks = (self.folder(video) / name for name in MASKS)
        return any(path.is_file() for path in (*self.files(video).values(), *masks))

    def is_done(self, video: Video) -> bool:
        """Return whether the files of a video are kept; another run may have made them by now."""
        return self.resume and not self.stale_reason(video)

    def pending(self, videos: Iterable[Video]) -> tuple[list[Video], Counter[str]]:
        """Return the videos whose files must be made, and why those that are there must be so.

        What a killed run has left half-written beside them is deleted.
        """
        rest, reasons = [], Counter()
        for video in videos:
            delete_leftovers(self.folder(video))
            if reason := self.stale_reason(video):
                rest.append(video)
                reasons[reason] += 1
        del reasons["missing"]
        return rest, reasons

    def stale_reason(self, video: Video) -> str:
        """Return why the files of a video must be made again; "" if they are whole and still true.

        "missing" where there are none.
        """
        folder, files = self.folder(video), self.files(video)
        masks = [folder / name for name in MASKS if (folder / name).is_file()]
        if not files.get("mask", folder / RECORD).is_file():
            return "they are in another format" if self.form and masks else "missing"
        record = self._record(video)
        if not {"mask", "table"} <= record.keys():
            return "nothing tells what made them"
        if reason := self._change(record, video.state()):
            return reason
        expected = {path: what for what, path in files.items()}
        if (folder / TABLE).is_file():  # of others, perhaps, where this run wants none
            expected[folder / TABLE] = "table"
        if self.form:  # there may be two
            expected |= dict.fromkeys(masks, "mask")
        for path, what in expected.items():
            if not path.is_file():
                return f"they have no {SAID[what]}"
            if not is_whole(path, record.get(what)):
                return f"their {SAID[what]} is not what was written with them"
        return ""

    def save(self, video: Video, objects: Objects, state: list) -> None:
        """Write the files of a video: the record, then the table, the mask and the proposal.

        The record has the digests of what is to be written, by which a run that goes on after a
        kill sees what is missing, and says where proposals are, by which any run knows its own. A
        table or a mask of a former run that is not written anew is deleted, unless it is still true
        and the run resumes.

        Args:
            video: Whose files they are.
            objects: What was found in it.
            state: `video.state()` before its frames were read.

        Raises:
            OSError: with the name of what cannot be written.
        """
        folder, files, before = self.folder(video), self.files(video), self._record(video)
        contents = {what: self._content(what, video, objects) for what in files}
        digests = {what: digest(content) for what, content in contents.items()}
        kept: dict[str, Path] = {}
        if not self._change(before, state):
            kept = self._still_true(video, before) if self.resume else {}
            true = [what for what in (*kept, "proposal") if what in before]
            digests = {what: before[what] for what in true} | digests
        record = {**self.origin, "frames": state, "mask": None, "table": None, **digests}
        if place := self._place() or before.get("proposals"):
            record["proposals"] = place
        write_json(folder / RECORD, record, compact=True)
        for path in {folder / name for name in (TABLE, *MASKS)} - {*files.values(), *kept.values()}:
            path.unlink(missing_ok=True)
        for what, path in files.items():
            with atomic_write(path) as file:
                file.write(contents[what])

    def _still_true(self, video: Video, record: dict[str, Any]) -> dict[str, Path]:
        """Return the table and the mask that a run keeps, though it writes none itself."""
        folder, files = self.folder(video), self.files(video)
        former = [("table", folder / TABLE), *(("mask", folder / name) for name in MASKS)]
        return {
            what: path
            for what, path in former
            if what not in files and path.is_file() and is_whole(path, record.get(what))
        }

    def _content(self, what: str, video: Video, objects: Objects) -> bytes:
        if what == "proposal":
            return encode(video, objects)
        if what == "table":
            text = io.StringIO(newline="")
            csv.writer(text).writerows([Row._fields, *table(objects)])
            return text.getvalue().encode()
        mask = io.BytesIO()
        if self.form == "npz":
            np.savez_compressed(mask, mask=objects.labels.numpy())
        else:
            np.save(mask, objects.labels.numpy())
        return mask.getvalue()
