"""Speed: networks on frames in memory and the scripts on files, each timed in turns.

What takes turns, A B A B ..., must share one process and one warm machine.
"""

import math
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import devices
import train
import utils
from augment import augment
from batches import ShardedBatches
from bench.peers import NETWORKS, Peer
from classes import FRAME_SIZE
from content import WHOLE
from dataset import CLEVRDataset, split_videos
from labelling import BATCH_SIZE, Labeller
from model import UNet
from optim import MuonAdamW, update_ema
from outputs import Outputs, provenance
from pipeline import label_videos
from runs import Keeper, Run
from scale import AS_THEY_ARE
from videos import Video, read_video

TURN_SECONDS = 0.3  # at least, for one turn of a network: short calls are repeated
SCRIPT_SECONDS = 10.0  # of one turn of a script, so that its start-up does not count
MAX_VIDEOS = 1000  # of one turn of infer.py, however fast the network is
VIDEOS_IN_MEMORY = 8  # whose frames are kept in memory
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

Times = dict[Any, list[float]]  # seconds of each turn


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
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
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
    return ["fp32", "bf16"] if devices.has_bfloat16(device) else ["fp32"]


def synthetic_batch(frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return frames uint8 (B, 3, H, W), and masks uint8 (B, H, W) with 6 % of object pixels."""
    height, width = FRAME_SIZE
    masks = torch.zeros(frames, height, width, dtype=torch.uint8, device=device)
    masks[:, height // 2 : 2 * height // 3, width // 3 : 2 * width // 3] = 29
    return torch.randint(0, 256, (frames, 3, *FRAME_SIZE), dtype=torch.uint8, device=device), masks


def network_call(
    name: str, training: bool, precision: str, layout: str, frames: Tensor, masks: Tensor
) -> Callable[[], Any]:
    """Return a call that labels `frames` as infer.py does, or trains a step as train.py does."""
    model = NETWORKS[name]().to(frames.device)
    if isinstance(model, Peer):
        model.layout = LAYOUTS[layout]  # of its input, which decides; the UNet's is channels_last
    arithmetic = nullcontext() if precision == "fp32" else devices.mixed_precision(frames.device)
    if not training:
        model = model.eval().fuse().to(memory_format=LAYOUTS[layout])
        model = model if precision == "fp32" else model.bfloat16()  # as for_labelling does

        def label() -> None:
            with arithmetic:
                model.predict(frames)

        return label
    model.train()
    optimizer = MuonAdamW(model)

    def step() -> None:
        with arithmetic:
            loss = model(frames, masks)
        loss.backward()
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
            for layout in LAYOUTS if row["network"] != "ours" else ["channels_last"]:
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


def linked_videos(videos: list[Video], folder: Path, number: int) -> CLEVRDataset:
    """Make `number` videos in a folder of links to the frames of `videos`; return them."""
    for k in range(number):
        (folder / f"video_{k}").mkdir(parents=True)
        for frame in videos[k % len(videos)].frames:
            link = folder / f"video_{k}/{frame.name}"
            try:
                link.symlink_to(frame.resolve())
            except OSError:  # Windows asks for a privilege
                shutil.copyfile(frame, link)
    return CLEVRDataset(folder, labelled=False)


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
    model: UNet, videos: list[Video], repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """Return the rates of infer.py, of its network on frames in memory, and of its decoding.

    All in threads of this process, as infer.py labels fewer than `pipeline.MANY_FRAMES`.
    """
    labeller, cpu = Labeller(model, device, scale=AS_THEY_ARE), torch.device("cpu")

    @torch.inference_mode()
    def look(frames: Tensor) -> None:
        (view,) = labeller.scale.views(*frames.shape[2:])
        for batch in frames.split(BATCH_SIZE):
            labeller.see(batch, WHOLE, view)

    def in_worker_threads(job: Callable[[Any], Any], items: list[Any], where: torch.device) -> None:
        with devices.shared_threads(where) as threads:
            deque(devices.in_threads(job, items, threads), maxlen=0)

    with tempfile.TemporaryDirectory() as folder:
        frames = [read_video(video) for video in videos[:VIDEOS_IN_MEMORY]]
        number = min(MAX_VIDEOS, calls_for(SCRIPT_SECONDS, lambda: look(frames[0]), device))
        dataset = linked_videos(videos, Path(folder, "data"), number)
        in_memory = [*islice(cycle(frames), number)]
        outputs = Outputs(Path(folder, "masks"), provenance(None))
        calls = {
            "infer.py": lambda: deque(label_videos(labeller, dataset, outputs), maxlen=0),
            "its network alone": lambda: in_worker_threads(look, in_memory, device),
            "decoding alone": lambda: in_worker_threads(read_video, dataset.videos, cpu),
        }
        times = take_turns(calls, dict.fromkeys(calls, 1), repeats, device)
    frames = dict.fromkeys(calls, len(dataset)) | {"its network alone": sum(map(len, in_memory))}
    return rates(times, frames)


def train_loader(
    dataset: CLEVRDataset, batches: Iterable[list[int]], device: torch.device
) -> DataLoader:
    """Return a DataLoader as train.py's is by default."""
    return DataLoader(dataset, batch_sampler=batches, pin_memory=device.type not in ("cpu", "mps"))


def measure_train(
    model: UNet, data: Path, batch_size: int, repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """Return the rates of train.py, of its step on one batch in memory, and of its data."""
    utils.seed_everything(0, deterministic=device.type == "cpu")  # as train.py does
    processes = devices.Processes(device)
    training = CLEVRDataset(split_videos(data, 0)[0])
    batches = ShardedBatches(len(training), batch_size, processes, True)
    batch = [part.to(device) for part in next(iter(train_loader(training, batches, device)))]
    crops = augment(*batch)
    # So long a run, at so low a rate, hardly learns.
    run = Run.open(model.to(device), processes, batch_size, num_epochs=10**6, learning_rate=1e-6)

    def step() -> None:
        with devices.mixed_precision(device):
            loss = run.model(*crops)
        loss.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), train.MAX_NORM)
        run.optimizer.step(1e-6)
        update_ema(run.ema, run.model, run.step)

    run.model.train()
    number = calls_for(SCRIPT_SECONDS, step, device)
    loader = train_loader(training, list(islice(cycle(batches), number)), device)

    def read() -> None:
        for images, masks in loader:
            augment(images.to(device), masks.to(device))

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        calls = {
            "train.py": lambda: train.train_one_epoch(run, run.model, loader, Keeper(run, out)),
            "the step alone": lambda: deque((step() for _ in range(number)), maxlen=0),
            "reading and augmenting alone": read,
        }
        times = take_turns(calls, dict.fromkeys(calls, 1), repeats, device)
    return rates(times, dict.fromkeys(calls, number * len(batch[0])))
