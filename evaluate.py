"""Score masks against true masks: mIoU and what the network confuses.

    python evaluate.py --pred masks --data path                    # the report
    python evaluate.py --pred masks --data path --json score.json  # and all of it as JSON

Every labelled video below --data is compared with the mask.npy at the same relative path below
--pred. miou is over all videos together, from one integer confusion matrix; video_miou is the mean
of each video's own. pq, sq and rq are panoptic quality over segments, a segment being a class in a
frame. border_accuracy is the share of right pixels among those beside an object of another class. A
ghost is a class that is predicted in a video and not there; a class is lost that is there and of
which more than half is found in no frame.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from classes import NUM_CLASSES
from files import write_json
from metrics import (
    Segments,
    at_borders,
    count_segments,
    frame_confusions,
    mean_iou,
    panoptic_quality,
    summarise,
    video_figures,
)
from proposals import check_names, has_proposals, read_masks
from utils import UserError, at_least, make_parser, run_script
from videos import MASK, find_videos, read_labels, read_truth, size_text

NUM_WORST = 10  # videos listed at the end of the report


class Tally:
    """What is counted over the videos of a data set."""

    def __init__(self):
        self.confusion = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.int64)
        self.last_frames = torch.zeros_like(self.confusion)
        self.segments = Segments(0, 0, 0, 0.0)
        self.frames = self.at_borders = self.right_at_borders = 0
        self.videos: list[dict[str, Any]] = []

    def add(self, name: str, truth: Tensor, mask: Tensor) -> None:
        """Count a video's true and predicted ids, (T, H, W) each."""
        confusions = frame_confusions(truth, mask)
        self.confusion += confusions.sum(0)
        self.last_frames += confusions[-1]
        self.segments += count_segments(confusions)
        self.frames += len(truth)
        beside = at_borders(truth)
        self.at_borders += int(beside.sum())
        self.right_at_borders += int((truth == mask)[beside].sum())
        self.videos.append({"video": name, **video_figures(confusions)})

    def figures(self) -> dict[str, Any]:
        """Return all figures, plain and fit for JSON."""
        worst = sorted(self.videos, key=lambda video: video["miou"])[:NUM_WORST]
        return {
            "frames": self.frames,
            "videos": len(self.videos),
            **summarise(self.confusion),
            "last_frame_miou": mean_iou(self.last_frames),
            "video_miou": sum(video["miou"] for video in self.videos) / len(self.videos),
            **panoptic_quality(self.segments),
            "border_accuracy": self.right_at_borders / self.at_borders if self.at_borders else None,
            **{what: self.named(what) for what in ("ghosts", "lost")},
            "worst_videos": [{key: video[key] for key in ("video", "miou")} for video in worst],
        }

    def named(self, what: str) -> list[dict[str, str]]:
        """Return the video and the class of all "ghosts", or of all that were "lost"."""
        return [
            {"video": video["video"], "class": name}
            for video in self.videos
            for name in video[what]
        ]


def score(pred: Path, data: Path, proposals: Path | None = None, every: int = 1) -> dict[str, Any]:
    """Compare every labelled video below `data` with its prediction below `pred`.

    With `proposals` the true labels are those of CLEVRER's proposals in that folder. With `every`
    of 6 the predictions are of every sixth frame.

    Videos with faulty labels are named on stderr and left out.

    Raises:
        UserError: a prediction is missing, faulty or of another size than the truth, or there is
            nothing to score.
    """
    tally, missing, skipped, videos = Tally(), [], 0, find_videos(data, every)
    if proposals:
        videos = [video for video in videos if has_proposals(video, proposals)]
        check_names(videos)
    for video in videos:
        name = video.target  # "." if `data` is itself a video
        try:
            if proposals:
                numbers = video.numbers or range(0, every * video.count(), every)
                truth = read_masks(video, proposals, numbers)
            else:
                truth = read_truth(video)
        except UserError as error:
            print(f"skipped: {error}", file=sys.stderr)
            skipped += 1
            continue
        if truth is None:
            continue
        mask = read_labels(pred / name, len(truth))
        if mask is None:
            missing.append(pred / name / MASK)
            continue
        if mask.shape != truth.shape:
            raise UserError(
                f"{pred / name / MASK} is {size_text(mask.shape[1:])}, the true masks in {video} "
                f"are {size_text(truth.shape[1:])}: label these frames again, or mend the truth"
            )
        tally.add(name.as_posix(), truth, mask)
    if missing:
        raise UserError(
            f"{len(missing)} of {len(tally.videos) + len(missing)} labelled videos have no "
            f"prediction, the first is {missing[0]}: give their folder as --pred, or run infer.py "
            "on them (mend or move those that it skips)"
        )
    if not tally.videos:
        raise UserError(f"{data} holds no labelled video to score ({skipped} skipped)")
    return {"skipped": skipped, **tally.figures()}


def report(result: dict[str, Any]) -> str:
    """Lay out the dict that `score` returns for reading."""
    lines = ["class                      IoU   true pixels"]
    for name, iou in result["per_class"].items():
        if iou is not None:
            lines.append(f"{name:<24}{_figure(iou)}  {result['pixels'][name]:>12,}")
    absent = sum(iou is None for iou in result["per_class"].values())
    if absent:
        lines.append(f"({absent} further classes occur in neither truth nor prediction)")
    lines += ["", "accuracy on object pixels"]
    for factor in ("shape", "material", "colour"):
        by_name = result[f"{factor}_accuracy"].items()
        lines.append(f"{factor:<9}" + "  ".join(f"{n} {_figure(v).strip()}" for n, v in by_name))
    for what in ("ghosts", "lost"):
        lines += ["", f"{what}: {len(result[what])}"]
        lines += [f"{item['class']:<24}{item['video']}" for item in result[what]]
    lines += ["", "worst videos"]
    lines += [f"{_figure(item['miou'])}  {item['video']}" for item in result["worst_videos"]]
    skipped = f", {result['skipped']} skipped for faulty labels" if result["skipped"] else ""
    lines += [
        "",
        f"videos           {result['videos']} ({result['frames']} frames{skipped})",
        f"mIoU             {_figure(result['miou']).strip()}",
        f"video mIoU       {_figure(result['video_miou']).strip()}",
        f"weighted IoU     {_figure(result['weighted_iou']).strip()}",
        "PQ = SQ x RQ     " + " ".join(_figure(result[key]).strip() for key in ("pq", "sq", "rq")),
        f"border accuracy  {_figure(result['border_accuracy']).strip()}",
        f"foreground IoU   {_figure(result['foreground_iou']).strip()}",
        f"last frame mIoU  {_figure(result['last_frame_miou']).strip()}",
    ]
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "     -" if value is None else f"{value:6.4f}"


def main() -> None:
    """Score the predictions, print the report and write the JSON file."""
    parser = make_parser(__doc__)
    add = parser.add_argument_group("what is compared").add_argument
    add("--pred", "--masks", type=Path, required=True, help="folder that infer.py wrote")
    add("--data", type=Path, required=True, help="folder of labelled videos")
    add("--proposals", type=Path, help="folder of proposal_00000.json, ... as true (default: none)")
    add("--every", type=at_least(1), default=1, help="that of infer.py (default: %(default)s)")
    add = parser.add_argument_group("files beside the report (default: none)").add_argument
    add("--json", type=Path, help="write every figure to this file, shares from 0 to 1")
    args = parser.parse_args()

    if not args.pred.is_dir():
        raise UserError(f"{args.pred} is not a folder")
    result = score(args.pred, args.data, args.proposals, args.every)
    result["command"] = shlex.join(["python", *sys.argv])
    print(report(result))
    if args.json:
        write_json(args.json, result, indent=1)


if __name__ == "__main__":
    run_script(main)
