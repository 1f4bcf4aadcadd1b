"""Label videos with a trained network: a folder of PNGs becomes a folder of masks.

    python infer.py --data path --out masks                            # by the shipped weights
    python infer.py --ckpt checkpoints/Unet_checkpoint_best.pt --out masks  # the data it learned
    python infer.py --ckpt file --out masks --data path --resume            # after an interruption
    torchrun --nproc-per-node=8 infer.py --ckpt file --out masks --data path  # on eight GPUs

Every folder below --data that holds image_0.png, ... is a video, and so is every file such as .mp4;
its masks go to the same relative path below --out, mask.npy, uint8 (frames, height, width), ids
0..48. A video with a fault is named on stderr and gets no mask; the others are done, and the exit
status is 1.

Objects are followed through the video (objects.py), and each is one class. --objects writes them
beside mask.npy to objects.csv, a row for each object and frame; --no-consistency labels each frame
by itself. Frames of another size than the checkpoint learned from are scaled (scale.py).
"""

import argparse
import contextlib
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints import SHIPPED, load_checkpoint
from dataset import CLEVRDataset
from devices import Processes, choose_device
from files import digest
from labelling import BATCH_SIZE, Labeller
from model import UNet
from outputs import Outputs, provenance
from pipeline import choose_labellers, label_videos
from scale import Scale, learned_size, scale_factor
from utils import (
    Stopped,
    UserError,
    at_least,
    counted,
    log_header,
    make_parser,
    resuming,
    run_script,
)
from videos import Video, find_in_all


def main() -> int:
    """Label every video; return 1 if some had a fault, else 0."""
    args = parse_args()
    processes = Processes(choose_device(args.device))
    processes.say(log_header(processes.device))
    checkpoint = load_checkpoint(args.ckpt)
    model = UNet.from_checkpoint(checkpoint, args.ckpt)
    scale = Scale(learned_size(checkpoint, args.ckpt), args.scale)
    tracking = not args.no_consistency
    labeller = Labeller(model, processes.device, args.batch_size, tracking, scale)
    if args.compile:
        labeller.compile()

    options = {"consistency": tracking, "scale": args.scale, "every": args.every}
    origin = provenance(checkpoint["digest"], **options)
    form = "" if args.no_masks else args.format
    outputs = Outputs(args.out, origin, args.objects, form, args.proposals, args.resume)
    roots, videos = args.data, []
    if processes.first:  # what is done is left out before the rest is shared
        roots = roots or [trained_on(checkpoint, args.ckpt)]
        videos = plan(roots, outputs, args.every, args.shard)
    videos = processes.share_out(videos)

    workers = 0 if args.compile else choose_labellers(args.workers, videos, processes)
    if workers and videos:
        processes.say(f"{min(workers, len(videos))} processes label")
    start = time.perf_counter()
    try:
        done, frames, skipped = label(labeller, videos, outputs, workers, processes)
    except KeyboardInterrupt:
        words = f"\ninterrupted, what is done is kept; go on with: python {resuming()}"
        raise Stopped(words if processes.first else "", signal.SIGINT) from None
    seconds = time.perf_counter() - start
    rate = f"{seconds:.1f} s ({frames / seconds:.1f} frames/s)"
    processes.say(f"{counted(done, 'video')}, {counted(frames, 'frame')} in {rate} -> {args.out}")
    if processes.first and done and not args.no_masks:
        script = Path(sys.argv[0]).with_name("preview.py")
        look = ["python", script, "--masks", args.out, "--data", *roots, "--out", "preview"]
        look += ["--every", args.every] if args.every > 1 else []
        print(f"look at them: {shlex.join(map(str, look))}")
    if skipped and processes.first:
        print(f"{counted(skipped, 'video')} skipped, see above", file=sys.stderr)
    return 1 if skipped else 0


def trained_on(checkpoint: dict, ckpt: Path) -> Path:
    """Return the folder that a checkpoint learned from, which is labelled by default."""
    if not checkpoint.get("data"):
        raise UserError(f"{ckpt} does not say what it was trained on: give --data")
    data = Path(str(checkpoint["data"]))
    if not data.is_dir():
        raise UserError(f"{ckpt} was trained on {data}, which is not here: give --data")
    return data


def plan(roots: list[Path], outputs: Outputs, every: int, shard: tuple[int, int]) -> list[Video]:
    """Return the videos to label, without those that are done if the outputs resume.

    Args:
        roots: Folders of videos, or video files; of several each has a folder of its own in --out.
        outputs: Where the files go, and whether those of a former run are kept.
        every: Frames that are taken, as of `find_videos`.
        shard: Which share of the videos, from 1, and of how many.

    Raises:
        UserError: there is no video, or files of two would meet, or masks and frames.
    """
    videos = find_in_all(roots, every)
    outputs.check_apart(videos)
    number, count = shard
    if count > 1:
        shares = [int(digest(os.fsencode(video.target)), 16) % count for video in videos]
        videos = [v for v, share in zip(videos, shares, strict=True) if share == number - 1]
        print(f"share {number} of {count}: {len(videos)} of {counted(len(shares), 'video')}")
    outputs.check_proposals(videos)
    gaps = [str(video) for video in videos if video.missing and not video.labelled]
    if gaps:
        print(
            f"{counted(len(gaps), 'video')} without frame 0 or with gaps, labelled in the order of "
            f"the numbers: {', '.join(gaps[:3])}{', ...' if len(gaps) > 3 else ''}"
        )
    outputs.out.mkdir(parents=True, exist_ok=True)
    if not outputs.resume:
        if there := sum(outputs.has_files(video) for video in videos):
            what = "are made again" if outputs.form else "--no-masks deletes, where there are any"
            print(f"{there} of {len(videos)} videos have masks, which {what} (--resume: kept)")
        return videos
    pending, reasons = outputs.pending(videos)
    done = f"{len(videos) - len(pending)} of {len(videos)} videos"
    print(f"{done} {'have their masks already' if outputs.form else 'are done already'}")
    for reason, count in reasons.items():
        what = "masks" if outputs.form else "files"
        print(f"{what} of {counted(count, 'video')} are made again: {reason}")
    return pending


def label(
    labeller: Labeller,
    videos: list[Video],
    outputs: Outputs,
    workers: int,
    processes: Processes,
) -> tuple[int, int, int]:
    """Label this process's share of the videos; name each that is skipped on stderr.

    Returns:
        How many videos and frames all processes have labelled, and how many videos they skipped.
    """
    totals, messages = torch.zeros(3, dtype=torch.int64), []
    if videos:
        dataset = CLEVRDataset(videos, labelled=False)
        pieces = label_videos(labeller, dataset, outputs, workers)
        bar = tqdm(total=len(videos), unit="video", disable=None)  # none in a log file
        with bar, contextlib.closing(pieces):
            for done in pieces:
                totals += torch.tensor([done.videos, done.frames, len(done.faults)])
                bar.update(done.videos + len(done.faults))
                for fault in done.faults:
                    tqdm.write(f"skipped: {fault}", file=sys.stderr)
                new = [message for message in done.messages if message not in messages]
                messages += new
                if new and processes.first:
                    tqdm.write("\n".join(new))
    processes.add_up(totals)
    for message in dict.fromkeys(processes.collect(messages)):
        if message not in messages:  # of frames that the first process, which speaks, has not met
            processes.say(message)
    return tuple(totals.tolist())


def parse_args() -> argparse.Namespace:
    """Read the command line: one list of options."""
    parser = make_parser(__doc__)
    add = parser.add_argument_group("files").add_argument
    add(
        "--ckpt",
        type=Path,
        default=SHIPPED,
        help="weights: a file that train.py wrote (default: those that come with the project)",
    )
    add("--out", type=Path, required=True, help="folder for the masks")
    add(
        "--data",
        type=Path,
        nargs="+",
        help="folders of videos, or video files; of several each gets a folder of its own in --out "
        "(default: what --ckpt was trained on, which the shipped weights do not say)",
    )
    add("--objects", action="store_true", help="also write the objects that were followed")
    add("--resume", action="store_true", help="keep what is whole in --out, do the rest")
    add(
        "--format",
        choices=("npy", "npz"),
        default="npy",
        help="of masks: npz is compressed, a hundredth of the size (default: %(default)s)",
    )
    add(
        "--proposals",
        type=Path,
        help="folder to write proposal_00000.json, ... to, as CLEVRER has them (default: none)",
    )
    add(
        "--no-masks",
        action="store_true",
        help="write no masks, where the others are enough; those of a former run are deleted, but "
        "for true ones with --resume",
    )
    add(
        "--shard",
        type=shard,
        default=(1, 1),
        help="3/16: the third of sixteen shares of the videos (default: all of them)",
    )
    add = parser.add_argument_group("labelling").add_argument
    add("--every", type=at_least(1), default=1, help="6: take every sixth frame (default: all)")
    add("--no-consistency", action="store_true", help="label each frame by itself")
    add(
        "--scale",
        type=scale_factor,
        help="of the frames for the network, 0.5 for half as wide (default: as it learned)",
    )
    add = parser.add_argument_group("machine").add_argument
    add(
        "--batch-size",
        type=at_least(1),
        default=BATCH_SIZE,
        help="frames at once (default: %(default)s)",
    )
    add("--device", help="cpu, cuda or cuda:N (default: CUDA if available)")
    add(
        "--workers",
        type=at_least(0),
        help="processes that label videos of their own; 0: threads of this one do (default: 0; "
        "from 10,000 frames on one for each core, up to 32, with 2 GB and 4 videos each)",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile: a minute more to start, then faster, for frames of the size "
        "that was learned; in threads",
    )
    args = parser.parse_args()
    if args.compile and args.workers:
        parser.error("--compile is for threads: leave out --workers, or --compile")
    if args.no_masks and not (args.objects or args.proposals):
        parser.error("--no-masks leaves nothing to write: give --objects or --proposals")
    if args.no_consistency and (args.objects or args.proposals):
        parser.error(
            "--objects and --proposals are of objects that are followed: leave out --no-consistency"
        )
    return args


def shard(text: str) -> tuple[int, int]:
    """Read a share such as 3/16 from the command line, an argparse type."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"give a share, from 1/1 on, such as 3/16, not {text!r}")
    return int(number), int(count)


if __name__ == "__main__":
    run_script(main)
