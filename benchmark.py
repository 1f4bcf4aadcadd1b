"""Measure what the network and the scripts cost, beside what people would pick instead.

    python benchmark.py --json benchmark.json                     # networks and scripts
    python benchmark.py --only networks scripts memory --minutes 10    # all of it: hours on 2 cores
    python benchmark.py --only --minutes 5 --networks ours smp-unet-resnet34      # quality alone

networks   parameters, multiply-adds; inference (bytes to labels) and training (forward, loss,
           backward, optimiser) of whole frames, in the memory format that is faster for each
scripts    infer.py and train.py end to end, over the network alone and over reading alone
memory     peak of each network in a process of its own; of infer.py on 20 and on 2,000 videos
--minutes  trains each network that long with train.py's recipe and gives its validation mIoU

What is compared runs in one process in turns, A B A B ..., and the figures are medians. "ours" is
`UNet()`, "classic" `UNet(**CLASSIC)`, smp segmentation-models-pytorch, the rest torchvision; none
is pretrained, and for inference all have their batch normalisation folded. "fp32" is PyTorch's
default (convolutions on CUDA use TF32), "bf16" what the scripts do where the hardware has it.
"""

import argparse
import copy
import json
import math
import re
import resource
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import count, cycle, islice, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import optimization
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import segmentation
from torchvision.tv_tensors import Image, Mask

import infer
import train
import utils
from dataset import NUM_CLASSES, CLEVRDataset, DataError, augmentation, find_videos, frame_paths
from model import CLASSIC, UNet

SIZE = infer.FRAME_SIZE
TURN_SECONDS = 0.3  # at least, for one turn of a network: short calls are repeated
SCRIPT_SECONDS = 10.0  # of one turn of a script, so that its start-up does not count
MEMORY_VIDEOS = (20, 2000)
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
INFER_BATCH, TRAIN_BATCH, LEARNING_RATE = 22, 16, 4e-3  # the defaults of infer.py and train.py

Times = dict[Any, list[float]]  # seconds of each turn


class Peer(nn.Module):
    """A network of another project, used as a `UNet` is; inputs are padded to a `multiple`."""

    def __init__(self, network: nn.Module, multiple: int = 1):
        super().__init__()
        self.network, self.multiple = network, multiple
        self.num_classes, self.layout = NUM_CLASSES, "channels_last"

    def forward(self, frames: Tensor, stages: bool = False) -> Tensor | list[Tensor]:
        """Return logits (B, 49, H, W) of frames uint8 or float [0, 1], in a list if `stages`."""
        height, width = frames.shape[-2:]
        x = frames if frames.is_floating_point() else frames / 255
        x = (x - 0.45) / 0.225  # about ImageNet's mean and deviation
        x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")
        logits = self.network(x.contiguous(memory_format=LAYOUTS[self.layout]))
        logits = logits["out"] if isinstance(logits, Mapping) else logits
        logits = logits[..., :height, :width]
        return [logits] if stages else logits

    def labels(self, logits: Tensor) -> Tensor:
        """Return labels (B, H, W) uint8."""
        return logits.argmax(dim=1).to(torch.uint8)

    def predict(self, frames: Tensor) -> Tensor:
        """Return labels (B, H, W) uint8 of frames."""
        return self.labels(self(frames))

    def fuse(self) -> "Peer":
        """Fold the batch normalisation into the convolutions, as `UNet.fuse` does."""
        self.network = optimization.fuse(self.network)
        return self


def smp_unet(encoder: str) -> Peer:
    """Return segmentation-models-pytorch's Unet. Raises ImportError where it is not installed."""
    import segmentation_models_pytorch as smp

    return Peer(smp.Unet(encoder, encoder_weights=None, classes=NUM_CLASSES), multiple=32)


def torchvision_network(name: str) -> Peer:
    """Return one of torchvision.models.segmentation."""
    network = getattr(segmentation, name)
    return Peer(network(weights=None, weights_backbone=None, num_classes=NUM_CLASSES))


UNETS = {"ours": UNet, "classic": partial(UNet, **CLASSIC)}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **UNETS,
    "smp-unet-resnet34": partial(smp_unet, "resnet34"),
    "smp-unet-mobilenet_v2": partial(smp_unet, "mobilenet_v2"),
    "lraspp_mobilenet_v3_large": partial(torchvision_network, "lraspp_mobilenet_v3_large"),
    "deeplabv3_mobilenet_v3_large": partial(torchvision_network, "deeplabv3_mobilenet_v3_large"),
}


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


def multiply_adds(model: nn.Module, frame: Tensor) -> int:
    """Return the multiply-adds of the convolutions and matrix products for `frame`."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(frame)
    return counter.get_total_flops() // 2


def timed(call: Callable[[], Any], number: int, device: torch.device) -> float:
    """Return the seconds of one of `number` calls, with what they leave a GPU to do."""
    start = time.perf_counter()
    for _ in range(number):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / number


def calls_for(seconds: float, call: Callable[[], Any], device: torch.device) -> int:
    """Return how many calls take `seconds`, after a warm-up; at least one."""
    timed(call, 2, device)
    return max(1, math.ceil(seconds / timed(call, 1, device)))


def take_turns(
    calls: dict[Any, Callable[[], Any]], numbers: dict[Any, int], repeats: int, device: torch.device
) -> Times:
    """Return the seconds of a call of each, `repeats` times, in turns of `numbers` calls."""
    times: Times = {key: [] for key in calls}
    for _ in range(repeats):
        for key, call in calls.items():
            times[key].append(timed(call, numbers[key], device))
    return times


def ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Return by how much `reference` is faster: the median of `times` over its median."""
    return statistics.median(times) / statistics.median(reference)


def precisions(device: torch.device) -> list[str]:
    """Return fp32, and bf16 if the scripts use it on this device."""
    with utils.mixed_precision(device):
        return ["fp32", "bf16"] if torch.is_autocast_enabled(device.type) else ["fp32"]


def synthetic_batch(frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return frames uint8 (B, 3, H, W), and masks int64 (B, H, W) with 6 % of object pixels."""
    height, width = SIZE
    masks = torch.zeros(frames, height, width, dtype=torch.int64, device=device)
    masks[:, height // 2 : 2 * height // 3, width // 3 : 2 * width // 3] = 29
    return torch.randint(0, 256, (frames, 3, *SIZE), dtype=torch.uint8, device=device), masks


def network_call(
    name: str, training: bool, precision: str, layout: str, frames: Tensor, masks: Tensor
) -> Callable[[], Any]:
    """Return a call that labels `frames` as infer.py does, or trains a step as train.py does."""
    model = NETWORKS[name]().to(frames.device)
    if isinstance(model, Peer):
        model.layout = layout  # of its input, which decides; the UNet's is channels_last
    arithmetic = nullcontext() if precision == "fp32" else utils.mixed_precision(frames.device)
    if not training:
        model = model.eval().fuse().to(memory_format=LAYOUTS[layout])

        @torch.inference_mode()
        def label() -> None:
            with arithmetic:
                model.predict(frames)

        return label
    model.train()
    optimizer = train.MuonAdamW(model)

    def step() -> None:
        with arithmetic:
            stages = model(frames, stages=True)
        train.loss_function(stages, masks).backward()
        optimizer.step(1e-5)  # always the same batch: learn next to nothing

    return step


def measure_networks(
    names: list[str], batch_size: int, repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """Return a row of figures for each precision and network, all turns' seconds among them."""
    frames, masks = synthetic_batch(batch_size, device)
    rows = []
    for name in names:
        model = NETWORKS[name]().to(device)
        size = sum(p.numel() for p in model.parameters())
        row = {"parameters": size, "multiply_adds": multiply_adds(model, frames[:1])}
        rows += [{"network": name, "precision": p, **row} for p in precisions(device)]
    for what in ("infer", "train"):
        calls, numbers = {}, {}
        for row in rows:
            key, best = (row["precision"], row["network"]), math.inf
            for layout in LAYOUTS if row["network"] not in UNETS else ["channels_last"]:
                call = network_call(key[1], what == "train", key[0], layout, frames, masks)
                calls_for(0, call, device)
                if (seconds := min(timed(call, 1, device) for _ in range(3))) < best:
                    best, calls[key], row[f"{what}_layout"] = seconds, call, layout
            numbers[key] = max(1, math.ceil(TURN_SECONDS / best))
        times = take_turns(calls, numbers, repeats, device)
        for row in rows:
            seconds = times[row["precision"], row["network"]]
            ours = times.get((row["precision"], "ours"))
            row[f"{what}_ms"] = 1000 * statistics.median(seconds) / batch_size  # a frame
            row[f"{what}_over_ours"] = ratio(seconds, ours) if ours else None
            row[f"{what}_batch_s"] = seconds
    return rows


def linked_videos(videos: list[Path], folder: Path, number: int) -> dict[Path, Path]:
    """Make `number` videos of links to the frames of `videos`; return where the masks go."""
    for k in range(number):
        (folder / f"data/video_{k}").mkdir(parents=True)
        for frame in frame_paths(videos[k % len(videos)]):
            (folder / f"data/video_{k}/{frame.name}").symlink_to(frame.resolve())
    return infer.plan(folder / "data", folder / "masks")


def rates(times: Times, frames: dict[str, int]) -> list[dict[str, Any]]:
    """Return frames/s, from the `frames` of a call, and the first one's over each."""
    seconds = {what: [t / frames[what] for t in turns] for what, turns in times.items()}
    first = next(iter(seconds.values()))
    return [
        {
            "what": what,
            "frames_per_s": 1 / statistics.median(turns),
            "end_to_end_over": ratio(turns, first),
            "seconds_a_frame": turns,
        }
        for what, turns in seconds.items()
    ]


def measure_infer(
    model: UNet, videos: list[Path], repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """Return the rates of infer.py, of the network on one batch in memory, and of decoding."""
    dataset = infer.Frames(videos[:1])
    frames = torch.stack([dataset[i % len(dataset)] for i in range(INFER_BATCH)]).to(device)
    model = model.to(device, memory_format=torch.channels_last).eval().fuse()

    def label() -> None:
        with utils.mixed_precision(device):
            model.predict(frames)

    batches = calls_for(SCRIPT_SECONDS, label, device)
    workers = infer.default_workers(device)
    with tempfile.TemporaryDirectory() as folder:
        targets = linked_videos(videos, Path(folder), min(1000, batches))

        def read() -> None:
            data, collate = infer.Frames(list(targets)), CLEVRDataset.collate
            loader = DataLoader(data, INFER_BATCH, num_workers=workers, collate_fn=collate)
            deque(loader, maxlen=0)

        calls = {
            "infer.py": lambda: infer.label_videos(model, targets, device, INFER_BATCH, workers),
            "the network alone": label,
            "decoding alone": read,
        }
        numbers = {"infer.py": 1, "the network alone": batches, "decoding alone": 1}
        times = take_turns(calls, numbers, repeats, device)
        total = len(infer.Frames(list(targets)))
    return rates(times, dict.fromkeys(calls, total) | {"the network alone": INFER_BATCH})


def measure_train(
    model: UNet, data: Path, batch_size: int, repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """Return the rates of train.py, of its step on one batch in memory, and of its data."""
    utils.seed_everything(0)  # as train.py does: it asks for deterministic kernels
    training = CLEVRDataset(train.split_videos(data, 0)[0])
    batches = train.ShardedBatches(len(training), batch_size, utils.Processes(device), True)
    augment = augmentation(train.CROPS_PER_FRAME)
    batch = [part.to(device) for part in training.__getitems__(next(iter(batches)))]
    crops = augment(Image(batch[0]), Mask(batch[1]))
    model = model.to(device)
    average, optimizer = copy.deepcopy(model), train.MuonAdamW(model)

    def steps(loader: Iterable, change: Callable) -> None:
        args = (model, average, loader, change, optimizer, device)
        train.train_one_epoch(*args, first_step=0, total_steps=10**6, highest_rate=LEARNING_RATE)

    def bare(number: int) -> None:
        steps(repeat(batch, number), lambda *_: crops)

    number = 3 * calls_for(SCRIPT_SECONDS, lambda: bare(3), device)
    chosen = list(islice(cycle(batches), number))
    loader = DataLoader(training, batch_sampler=chosen, **train_loading(device))

    def read() -> None:
        for images, masks in loader:
            augment(Image(images.to(device)), Mask(masks.to(device)))

    calls = {
        "train.py": lambda: steps(loader, augment),
        "the step alone": lambda: bare(number),
        "reading and augmenting alone": read,
    }
    times = take_turns(calls, dict.fromkeys(calls, 1), repeats, device)
    return rates(times, dict.fromkeys(calls, number * len(crops[0]) // train.CROPS_PER_FRAME))


def train_loading(device: torch.device) -> dict[str, Any]:
    """Return the options of train.py's DataLoader."""
    return {"collate_fn": CLEVRDataset.collate, "pin_memory": device.type == "cuda"}


def in_new_process(job: Callable[..., int], *args: Any) -> int:
    """Return job(*args), run in a process of its own: a peak of memory never falls again."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(job, *args).result()


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process has held: on the GPU, or else in memory (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Unlike getrusage's, this peak is not inherited from the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def network_peak(name: str, training: bool, batch_size: int, device: torch.device) -> int:
    """Return the peak of a process that only builds and runs a network, in the best precision."""
    batch = synthetic_batch(batch_size, device)
    call = network_call(name, training, precisions(device)[-1], "channels_last", *batch)
    timed(call, 3, device)
    return peak_memory(device)


def infer_peak(arguments: list[str]) -> int:
    """Return the peak of a process that runs infer.py, and of the largest that decodes for it."""
    sys.argv = ["infer.py", *arguments]
    utils.keep_freed_memory()  # as its run_script does
    infer.main()
    workers = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak_memory(torch.device("cpu")) + workers


def measure_memory(
    names: list[str], model: UNet, videos: list[Path], batch_size: int, device: torch.device
) -> list[dict[str, Any]]:
    """Return peaks in bytes: of each network, and of infer.py on few and on many videos."""
    rows = []
    for name in names:
        for what, training in (("inference", False), ("training", True)):
            peak = in_new_process(network_peak, name, training, batch_size, device)
            rows.append({"what": f"{name}, {what}", "peak_bytes": peak})
    with tempfile.TemporaryDirectory() as folder:
        ckpt = Path(folder, "network.pt")
        utils.save_checkpoint(ckpt, {"model": model.state_dict(), "model_config": model.config})
        for number in MEMORY_VIDEOS:
            root = Path(folder, str(number))
            linked_videos(videos, root, number)
            paths = ["--ckpt", ckpt, "--data", root / "data", "--out", root / "masks"]
            peak = in_new_process(infer_peak, [*map(str, paths), "--device", str(device)])
            rows.append({"what": f"infer.py, {number} videos", "peak_bytes": peak})
    rows[-1]["over_few_videos"] = rows[-1]["peak_bytes"] / rows[-2]["peak_bytes"]
    return rows


def endless(loader: DataLoader) -> Iterator[Any]:
    """Yield the batches of epoch after epoch, each in another order."""
    for loader.batch_sampler.epoch in count():
        yield from loader


def measure_quality(
    names: list[str], data: Path, minutes: float, batch_size: int, device: torch.device
) -> list[dict[str, Any]]:
    """Train each network for `minutes` with train.py's recipe; return its validation figures.

    The learning rate goes by the time that has passed, so that each completes its schedule.
    """
    processes = utils.Processes(device)
    training, validation = map(CLEVRDataset, train.split_videos(data, 0))
    val_batches = train.ShardedBatches(len(validation), 2 * batch_size, processes, False)
    val_loader = DataLoader(validation, batch_sampler=val_batches, **train_loading(device))
    augment = augmentation(train.CROPS_PER_FRAME)
    rows = []
    for name in names:
        utils.seed_everything(0)
        batches = train.ShardedBatches(len(training), batch_size, processes, True)
        loader = DataLoader(training, batch_sampler=batches, **train_loading(device))
        stream = endless(loader)
        model = NETWORKS[name]().to(device)
        average = copy.deepcopy(model).requires_grad_(False)
        optimizer = train.MuonAdamW(model)
        step, start = 0, time.perf_counter()
        while (passed := (time.perf_counter() - start) / (60 * minutes)) < 1:
            total = step / passed if step else 1.0  # steps, at the pace so far
            number = max(1, int(total / 200))  # how many until the next look at the clock
            args = (model, average, islice(stream, number), augment, optimizer, device)
            total = max(total, step + number)
            train.train_one_epoch(*args, step, total, highest_rate=LEARNING_RATE)
            step += number
        figures = train.validate(average, val_loader, device, processes)
        rows.append({"network": name, "minutes": minutes, "steps": step, **figures})
        rows[-1]["frames"] = step * min(batch_size, len(training))
        print(f"{name}: mIoU {figures['miou']:.3f} after {step} steps", flush=True)
    return rows


def table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, Callable]) -> str:
    """Return a Markdown table of `columns`: title -> what to write for a row."""
    cells = [list(columns), ["---"] * len(columns)]
    cells += [[str(write(row)) for write in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def times_ours(value: float | None) -> str:
    """Write a ratio."""
    return "-" if value is None else f"{value:.2f} x"


TABLES: dict[str, dict[str, Callable[[Mapping[str, Any]], object]]] = {
    "networks": {
        "network": lambda r: r["network"],
        "precision": lambda r: r["precision"],
        "parameters": lambda r: f"{r['parameters'] / 1e6:.2f} M",
        "GMAC a frame": lambda r: f"{r['multiply_adds'] / 1e9:.2f}",
        "infer, ms a frame": lambda r: f"{r['infer_ms']:.4g}",
        "frames/s": lambda r: f"{1000 / r['infer_ms']:.4g}",
        "ours is faster": lambda r: times_ours(r["infer_over_ours"]),
        "train, ms a frame": lambda r: f"{r['train_ms']:.4g}",
        "trained frames/s": lambda r: f"{1000 / r['train_ms']:.4g}",
        "ours trains faster": lambda r: times_ours(r["train_over_ours"]),
    },
    "scripts": {
        "what": lambda r: r["what"],
        "frames/s": lambda r: f"{r['frames_per_s']:.4g}",
        "end to end over it": lambda r: f"{r['end_to_end_over']:.3f}",
    },
    "memory": {
        "what": lambda r: r["what"],
        "peak, MB": lambda r: f"{r['peak_bytes'] / 1e6:.0f}",
        "over that of few videos": lambda r: times_ours(r.get("over_few_videos")),
    },
    "quality": {
        "network": lambda r: r["network"],
        "minutes": lambda r: f"{r['minutes']:g}",
        "frames seen": lambda r: r["frames"],
        "validation mIoU": lambda r: f"{r['miou']:.4f}",
        "object IoU": lambda r: f"{r['foreground_iou']:.4f}",
    },
}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=train.DEMO_DATA, help="videos (default: train.py's, rendered)")
    add("--ckpt", type=Path, help="weights for scripts and memory (default: untrained)")
    add("--json", type=Path, help="also write every figure to this file")
    add(
        "--only",
        nargs="*",
        default=["networks", "scripts"],
        choices=("networks", "scripts", "memory"),
        help="(default %(default)s)",
    )
    add("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS, help="(default: all)")
    add("--minutes", type=float, default=0.0, help="of training for quality (default: none)")
    add("--repeats", type=int, default=5, help="turns of each (default %(default)s)")
    add("--batch-size", type=int, help="frames a call of a network (default: CPU 4, CUDA 64)")
    add("--device", help="cpu, cuda or cuda:N (default: CUDA if available)")
    args = parser.parse_args()
    if not args.only and not args.minutes:
        parser.error("nothing to measure: give --only a part, or --minutes")
    if args.repeats < 1 or args.minutes < 0 or (args.batch_size or 1) < 1:
        parser.error("--repeats and --batch-size must be 1 or more, --minutes 0 or more")
    return args


def main() -> None:
    """Measure what the command line asks for, one part after another."""
    args = parse_args()
    device = utils.choose_device(args.device)
    batch_size = args.batch_size or (64 if device.type == "cuda" else 4)
    train_batch = max(TRAIN_BATCH, batch_size)
    header = utils.log_header(device)
    print(header, flush=True)
    names = installed(args.networks)
    videos: list[Path] = []
    if args.minutes or set(args.only) - {"networks"}:
        if args.data == train.DEMO_DATA:
            train.render_demo()
        videos = find_videos(args.data)[:20]
    network = utils.load_model(UNet, args.ckpt)[0] if args.ckpt else NETWORKS["ours"]()
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
                with utils.atomic_write(args.json) as file:
                    file.write(f"{json.dumps(result, indent=1)}\n".encode())


if __name__ == "__main__":
    utils.run_script(main, DataError)
