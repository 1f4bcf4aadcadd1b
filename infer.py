"""Label videos with a trained network: a folder of PNGs becomes a folder of masks.

    python infer.py --ckpt weights/clevr_unet.pt --out masks --data path
    python infer.py --ckpt checkpoints/Unet_checkpoint_best.pt --out masks  # the data it learned
    python infer.py --ckpt file --out masks --data path --resume            # after an interruption
    torchrun --nproc-per-node=8 infer.py --ckpt file --out masks --data path  # on eight GPUs

Every folder below --data that holds image_*.png is a video; its masks go to the same relative path
below --out, mask.npy, uint8 (frames, height, width), ids 0..48. A video with a fault is named on
stderr and gets no mask; the others are done, and the exit status is 1.

Objects are followed through the video (objects.py), and each is one class. --objects writes them
beside mask.npy to objects.csv, a row for each object and frame; --no-consistency labels each frame
by itself. Frames of another size than the checkpoint learned from are scaled (scale.py).
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints import load_checkpoint
from dataset import CLEVRDataset
from devices import Processes, choose_device
from labelling import BATCH_SIZE, Labeller, choose_decoders, label_videos
from model import UNet
from outputs import Outputs, provenance
from scale import Scale, learned_size, scale_factor
from utils import UserError, at_least, log_header, make_parser, run_script
from videos import Video, find_videos


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

    data = find_data(args.data, checkpoint, args.ckpt)
    origin = provenance(checkpoint["digest"], consistency=tracking, scale=args.scale)
    outputs = Outputs(args.out, data, origin, args.objects)
    videos = plan(outputs, args.resume) if processes.first else []
    videos = processes.share_out(videos)  # those that are done have been left out before

    start = time.perf_counter()
    done, frames, skipped = label(labeller, videos, outputs, args.workers, processes)
    seconds = time.perf_counter() - start
    rate = f"{seconds:.1f} s ({frames / seconds:.1f} frames/s)"
    processes.say(f"{done} videos, {frames} frames in {rate} -> {args.out}")
    look = ["python", "preview.py", "--masks", args.out, "--data", data, "--out", "preview"]
    processes.say(f"look at them: {shlex.join(map(str, look))}")
    if skipped and processes.first:
        print(f"{skipped} videos skipped, see above", file=sys.stderr)
    return 1 if skipped else 0


def find_data(data: Path | None, checkpoint: dict, ckpt: Path) -> Path:
    """Return the folder to label: `data`, or else the one that the checkpoint learned from."""
    if data is None:
        if not checkpoint.get("data"):
            raise UserError(f"{ckpt} does not say what it was trained on: give --data")
        data = Path(str(checkpoint["data"]))
        if not data.is_dir():
            raise UserError(f"{ckpt} was trained on {data}, which is not here: give --data")
    return data


def plan(outputs: Outputs, resume: bool) -> list[Video]:
    """Return the videos to label; with `resume`, without those that are done.

    Raises:
        UserError: there is no video, or a mask would land among the frames of one.
    """
    videos = find_videos(outputs.data)
    outputs.check_apart(videos)
    outputs.out.mkdir(parents=True, exist_ok=True)
    if not resume:
        return videos
    pending, reasons = outputs.pending(videos)
    print(f"{len(videos) - len(pending)} of {len(videos)} videos have their masks already")
    for reason, count in reasons.items():
        print(f"masks of {count} videos are made again: {reason}")
    return pending


def label(
    labeller: Labeller,
    videos: list[Video],
    outputs: Outputs,
    workers: int | None,
    processes: Processes,
) -> tuple[int, int, int]:
    """Label this process's share of the videos; name each that is skipped on stderr.

    Returns:
        How many videos and frames all processes have labelled, and how many videos they skipped.
    """
    totals, messages = torch.zeros(3, dtype=torch.int64), []
    if videos:
        dataset = CLEVRDataset(videos, labelled=False)
        workers = choose_decoders(dataset, workers, labeller.batch_size, processes)
        with tqdm(total=len(dataset), unit="frame", disable=None) as bar:  # none in a log file
            for done in label_videos(labeller, dataset, outputs, workers):
                totals += torch.tensor([done.videos, done.frames, len(done.faults)])
                bar.update(done.frames)
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
    """Read the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--ckpt", type=Path, required=True, help="weights: a file that train.py wrote")
    add("--out", type=Path, required=True, help="folder for the masks")
    add("--data", type=Path, help="folder of videos (default: what the weights were trained on)")
    add("--objects", action="store_true", help="also write the objects that were followed")
    add("--resume", action="store_true", help="keep the masks that --out holds, do the rest")
    add = parser.add_argument_group("labelling").add_argument
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
        help="processes that decode frames (default: on a CPU 0, else up to 16)",
    )
    add("--compile", action="store_true", help="torch.compile: a minute more to start, then faster")
    args = parser.parse_args()
    if args.objects and args.no_consistency:
        parser.error("--objects are those that are followed: leave out --no-consistency")
    return args


if __name__ == "__main__":
    run_script(main)
