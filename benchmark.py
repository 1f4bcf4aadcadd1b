"""Measure what the network and the scripts cost, beside what people would pick instead.

    python benchmark.py --json benchmark.json                     # networks and scripts
    python benchmark.py --only networks scripts memory --minutes 10    # all of it: hours on 2 cores
    python benchmark.py --only --minutes 5 --networks ours smp-unet-resnet34      # quality alone
    python benchmark.py --check         # does the project work here? Two minutes, for bug reports

networks   parameters, multiply-adds; inference (bytes to labels) and training (forward, loss,
           backward, optimiser) of whole frames, in the memory format that is faster for each
scripts    infer.py and train.py end to end, over their network alone and their reading alone
memory     peak of each network in its own process; of infer.py in threads, on 20 and 2,000 videos
--minutes  trains each network that long with train.py's recipe; its validation mIoU, frame by frame
           and through objects.py, and after how many minutes it saw 0.9 of the objects

What is compared runs in one process in turns, A B A B ..., and the figures are medians: speed.py of
bench/ holds the clock. "ours" is `UNet()`, "classic" the UNet of 2015, smp
segmentation-models-pytorch, the rest torchvision, all in bench/peers.py; none is pretrained, and
for inference all have their batch normalisation folded. "fp32" is
PyTorch's default (convolutions on CUDA use TF32), "bf16" what the scripts do where the hardware has
it.
"""

import argparse
import contextlib
import copy
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import checkpoints
import devices
import files
import infer
import utils
from bench import check
from bench.peers import NETWORKS
from bench.quality import measure_quality
from bench.speed import (
    linked_videos,
    measure_infer,
    measure_networks,
    measure_train,
    network_call,
    precisions,
    synthetic_batch,
    timed,
)
from checkpoints import SHIPPED
from devices import end_processes, follow_parent, start_process, without_ctrl_c
from model import UNet
from optim import USUAL_BATCH
from render import DEMO_DATA, render_demo
from videos import Video, find_videos

try:
    import resource
except ImportError:  # Windows
    resource = None

MEMORY_VIDEOS = (20, 2000)


def installed(names: Sequence[str]) -> list[str]:
    """Return the networks that can be built here; say of each other, in a line, why not."""
    found = []
    for name in names:
        try:
            NETWORKS[name]()
            found.append(name)
        except ImportError as error:
            print(f"{name} is left out ({error}): pip install -r requirements-dev.txt", flush=True)
    return found


def in_new_process(job: Callable[..., int | None], *args: Any) -> int | None:
    """Return job(*args), run in a process of its own: a peak of memory never falls again.

    Raises:
        UserError: it was killed. RuntimeError: it failed, with its traceback.
    """
    with without_ctrl_c():  # this process ends it
        process, receiver = start_process(_send, job, args, daemon=False)  # it may start readers
    try:
        result, fault = receiver.recv()
    except EOFError:
        raise utils.UserError(
            f"the process that measures ({job.__name__}) was killed, perhaps for lack of memory: "
            "give a smaller --batch-size"
        ) from None
    finally:
        end_processes([process])
    if fault:
        raise RuntimeError(fault)
    return result


def _send(job: Callable[..., int | None], args: tuple, sender: Connection) -> None:
    """Send what job(*args) returns, or the traceback of its failure."""
    follow_parent()
    try:
        sender.send((job(*args), ""))
    except BaseException:
        sender.send((None, traceback.format_exc()))


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes this process has held, on the GPU or else in memory.

    None where nobody counts them: on Windows, and on Apple's GPUs.
    """
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError):
            return torch.accelerator.max_memory_allocated(device)
        return None
    with contextlib.suppress(FileNotFoundError):  # Linux
        # Unlike getrusage's, this peak is not inherited from the process that started this one.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def network_peak(name: str, training: bool, batch_size: int, device: torch.device) -> int | None:
    """Return the peak of a process that only builds and runs a network, in the best precision."""
    batch = synthetic_batch(batch_size, device)
    call = network_call(name, training, precisions(device)[-1], "channels_last", *batch)
    timed(call, 3, device)
    return peak_memory(device)


def infer_peak(arguments: list[str]) -> int | None:
    """Return the peak of a process that runs infer.py, by its threads alone."""
    sys.argv = ["infer.py", *arguments, "--workers", "0"]
    utils.keep_freed_memory()  # as its run_script does
    infer.main()
    return peak_memory(torch.device("cpu"))


def measure_memory(
    names: list[str], model: UNet, videos: list[Video], batch_size: int, device: torch.device
) -> list[dict[str, Any]]:
    """Return peaks in bytes: of each network, and of infer.py on few and on many videos."""
    rows = []
    for name in names:
        for what, training in (("inference", False), ("training", True)):
            peak = in_new_process(network_peak, name, training, batch_size, device)
            rows.append({"what": f"{name}, {what}", "peak_bytes": peak})
    with tempfile.TemporaryDirectory() as folder:
        ckpt = Path(folder, "network.pt")
        checkpoints.save_checkpoint(
            ckpt, {"model": model.state_dict(), "model_config": model.config}
        )
        for number in MEMORY_VIDEOS:
            root = Path(folder, str(number))
            linked_videos(videos, root / "data", number)
            paths = ["--ckpt", ckpt, "--data", root / "data", "--out", root / "masks"]
            peak = in_new_process(infer_peak, [*map(str, paths), "--device", str(device)])
            rows.append({"what": f"infer.py, {number} videos", "peak_bytes": peak})
    few, many = (row["peak_bytes"] for row in rows[-2:])
    if few and many:
        rows[-1]["over_few_videos"] = many / few
    if any(row["peak_bytes"] is None for row in rows):
        print("memory is not measured here where a peak is -: nothing counts it", flush=True)
    return rows


def table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, Callable]) -> str:
    """Return a Markdown table of `columns`: title -> what to write for a row."""
    cells = [list(columns), ["---"] * len(columns)]
    cells += [[str(write(row)) for write in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def if_known(value: float | None, form: str = "{:.2f} x") -> str:
    """Write a figure, or a dash."""
    return "-" if value is None else form.format(value)


TABLES: dict[str, dict[str, Callable[[Mapping[str, Any]], object]]] = {
    "networks": {
        "network": lambda r: r["network"],
        "precision": lambda r: r["precision"],
        "parameters": lambda r: f"{r['parameters'] / 1e6:.2f} M",
        "GMAC a frame": lambda r: f"{r['multiply_adds'] / 1e9:.2f}",
        "infer, ms a frame": lambda r: f"{r['infer_ms']:.4g}",
        "frames/s": lambda r: f"{1000 / r['infer_ms']:.4g}",
        "ours is faster": lambda r: if_known(r["infer_over_ours"]),
        "train, ms a frame": lambda r: f"{r['train_ms']:.4g}",
        "trained frames/s": lambda r: f"{1000 / r['train_ms']:.4g}",
        "ours trains faster": lambda r: if_known(r["train_over_ours"]),
    },
    "scripts": {
        "what": lambda r: r["what"],
        "frames/s": lambda r: f"{r['frames_per_s']:.4g}",
        "end to end over it": lambda r: if_known(r.get("end_to_end_over"), "{:.3f}"),
    },
    "memory": {
        "what": lambda r: r["what"],
        "peak, MB": lambda r: if_known(r["peak_bytes"] and r["peak_bytes"] / 1e6, "{:.0f}"),
        "over that of few videos": lambda r: if_known(r.get("over_few_videos")),
    },
    "quality": {
        "network": lambda r: r["network"],
        "minutes": lambda r: f"{r['minutes']:g}",
        "frames seen": lambda r: r["frames"],
        "validation mIoU": lambda r: f"{r['miou']:.4f}",
        "through objects.py": lambda r: f"{r['tracked_miou']:.4f}",
        "foreground IoU": lambda r: f"{r['foreground_iou']:.4f}",
        "minutes until it was 0.9": lambda r: if_known(r["minutes_until_seen"], "{:.1f}"),
    },
}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = utils.make_parser(__doc__)
    add = parser.add_argument_group("what is measured").add_argument
    add(
        "--only",
        nargs="*",
        default=["networks", "scripts"],
        choices=("networks", "scripts", "memory"),
        help="parts (default: networks scripts)",
    )
    add(
        "--networks",
        nargs="+",
        default=list(NETWORKS),
        choices=NETWORKS,
        metavar="NAME",
        help=f"{', '.join(NETWORKS)} (default: all)",
    )
    add(
        "--minutes", type=float, default=0.0, help="of training, to measure quality (default: none)"
    )
    add("--check", action="store_true", help="say whether all works on this device, and no more")
    add = parser.add_argument_group("how").add_argument
    add("--repeats", type=int, default=5, help="turns of each (default: %(default)s)")
    add("--batch-size", type=int, help="frames a call of a network (default: CPU 4, GPU 64)")
    add("--device", help="cpu, cuda or cuda:N (default: CUDA if available)")
    add = parser.add_argument_group("files").add_argument
    add("--data", type=Path, default=DEMO_DATA, help="videos (default: %(default)s, rendered)")
    add(
        "--ckpt",
        type=Path,
        help="weights for scripts and memory (default: untrained), or for --check (default: "
        "those that come with the project)",
    )
    add("--json", type=Path, help="also write every figure to this file (default: none)")
    args = parser.parse_args()
    if not args.only and not args.minutes:
        parser.error("nothing to measure: give --only a part, or --minutes")
    if args.check and args.json:
        parser.error("--check prints its report: leave out --json")
    if args.repeats < 1 or args.minutes < 0 or (args.batch_size or 1) < 1:
        parser.error("--repeats and --batch-size must be 1 or more, --minutes 0 or more")
    return args


def main() -> int:
    """Measure what the command line asks for, one part after another; 1 if --check is not well."""
    args = parse_args()
    device = devices.choose_device(args.device)
    batch_size = args.batch_size or (64 if device.type != "cpu" else 4)
    train_batch = max(USUAL_BATCH, batch_size)
    header = utils.log_header(device)
    print(header, flush=True)
    if args.check:
        return check.report(device, args.ckpt or SHIPPED)
    names = installed(args.networks)
    videos: list[Video] = []
    if args.minutes or set(args.only) - {"networks"}:
        folder = args.data
        if folder == DEMO_DATA:
            render_demo()
            folder = folder / "val"  # whose videos have more frames
        videos = find_videos(folder)[:20]
    network = UNet.load(args.ckpt) if args.ckpt else NETWORKS["ours"]()
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "networks": lambda: measure_networks(names, batch_size, args.repeats, device),
        "memory": lambda: measure_memory(names, network, videos, batch_size, device),
        "scripts": lambda: [
            *measure_infer(copy.deepcopy(network), videos, args.repeats, device),
            *measure_train(network, args.data, train_batch, args.repeats, device),
        ],
        "quality": lambda: measure_quality(names, args.data, args.minutes, train_batch, device),
    }
    result: dict[str, Any] = {"header": header.splitlines(), "batch_size": batch_size}
    for part, measure in parts.items():
        if part in args.only or (part == "quality" and args.minutes):
            result[part] = measure()
            print(f"\n{table(result[part], TABLES[part])}", flush=True)
            if args.json:  # after every part: the next may take hours
                files.write_json(args.json, result, indent=1)
    return 0


if __name__ == "__main__":
    utils.run_script(main)
