"""Speed: networks on frames in memory and the scripts on files, each timed in turns.

The bound of infer.py is the cores over the core time of a frame: of its decoding, network, objects
and writing, each measured by itself with all cores busy.

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
from functools import partial
from itertools import cycle, islice, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import infer
import train
import utils
from augment import augment
from batches import ShardedBatches, lanes_for
from bench.peers import NETWORKS, Peer
from dataset import CLEVRDataset, split_videos
from model import UNet
from objects import Tracks, follow
from optim import MuonAdamW, learning_rate_at
from parts import gather
from videos import frame_paths, read_video

SIZE = infer.FRAME_SIZE
TURN_SECONDS = 0.3  # at least, for one turn of a network: short calls are repeated
SCRIPT_SECONDS = 10.0  # of one turn of a script, so that its start-up does not count
MAX_VIDEOS = 1000  # of one turn of infer.py, however fast the network is
VIDEOS_IN_MEMORY = 8  # whose frames, and what the network says of them, are kept in memory
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
INFER_BATCH, LEARNING_RATE = 22, 4e-3  # the defaults of infer.py and train.py

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
    return ["fp32", "bf16"] if utils.has_bfloat16(device) else ["fp32"]


def synthetic_batch(frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return frames uint8 (B, 3, H, W), and masks uint8 (B, H, W) with 6 % of object pixels."""
    height, width = SIZE
    masks = torch.zeros(frames, height, width, dtype=torch.uint8, device=device)
    masks[:, height // 2 : 2 * height // 3, width // 3 : 2 * width // 3] = 29
    return torch.randint(0, 256, (frames, 3, *SIZE), dtype=torch.uint8, device=device), masks


def network_call(
    name: str, training: bool, precision: str, layout: str, frames: Tensor, masks: Tensor
) -> Callable[[], Any]:
    """Return a call that labels `frames` as infer.py does, or trains a step as train.py does."""
    model = NETWORKS[name]().to(frames.device)
    if isinstance(model, Peer):
        model.layout = LAYOUTS[layout]  # of its input, which decides; the UNet's is channels_last
    arithmetic = nullcontext() if precision == "fp32" else utils.mixed_precision(frames.device)
    if not training:
        model = model.eval().fuse().to(memory_format=LAYOUTS[layout])

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


def linked_videos(videos: list[Path], folder: Path, number: int) -> dict[Path, Path]:
    """Make `number` videos of links to the frames of `videos`; return where the masks go."""
    for k in range(number):
        (folder / f"data/video_{k}").mkdir(parents=True)
        for frame in frame_paths(videos[k % len(videos)]):
            link = folder / f"data/video_{k}/{frame.name}"
            try:
                link.symlink_to(frame.resolve())
            except OSError:  # Windows asks for a privilege
                shutil.copyfile(frame, link)
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


def in_all_lanes(job: Callable[[Any], Any], items: list[Any], lanes: int, share: int) -> None:
    """Do job(item) for all items, `lanes` of them at once, each with a `share` of the threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(share)
    deque(infer.in_lanes(job, items, lanes), maxlen=0)
    torch.set_num_threads(threads)


def core_seconds(call: Callable[[], Any]) -> float:
    """Return how long this process had cores in a call: waiting, as for the disk, is not in it."""
    start = time.process_time()
    call()
    return max(time.process_time() - start, 1e-9)  # Windows counts in steps of 16 ms


def parts_of_infer(
    model: UNet, targets: dict[Path, Path], device: torch.device
) -> dict[str, tuple[Callable[[Any], Any], list[Any]]]:
    """Return what infer.py does with a video, part by part: a job, and an item for each video.

    Only decoding reads files: the items of the others, of few videos, are in memory.
    """

    @torch.inference_mode()
    def look(frames: Tensor) -> list[Tensor]:
        answers = []
        for batch in frames.split(INFER_BATCH):
            with utils.mixed_precision(device):
                answers.append(model.evidence(model.stages(batch.to(device))))
        return [torch.cat(parts) for parts in zip(*answers, strict=True)]

    @torch.inference_mode()
    def find(answer: list[Tensor]) -> Tracks:
        return follow(answer[0], gather(*answer))

    frames = [read_video(video) for video in list(targets)[:VIDEOS_IN_MEMORY]]
    answers = [[part.cpu() for part in look(video)] for video in frames]
    tracks = [find(answer) for answer in answers]
    parts = {
        "decoding alone": (read_video, targets),
        "the network alone": (look, [video.to(device) for video in frames]),
        "objects alone": (find, answers),
        "writing alone": (
            lambda item: infer.save(*item, False),
            zip(targets.values(), cycle(tracks), strict=False),
        ),
    }
    return {what: (job, [*islice(cycle(x), len(targets))]) for what, (job, x) in parts.items()}


def bound_of(seconds: dict[str, float], cores: int, device: torch.device) -> float:
    """Return the most frames/s of infer.py, from the seconds a frame of each of its parts.

    On a CPU all parts share the cores; a GPU has the network, beside them, with its frames at hand.
    """
    on_device = 0.0 if device.type == "cpu" else seconds["the network alone"]
    return 1 / max(on_device, (sum(seconds.values()) - on_device) / cores)


def infer_rows(
    times: Times, core: Times, total: int, cores: int, device: torch.device
) -> list[dict[str, Any]]:
    """Return a row each for infer.py, for its bound and for its parts, of turns of `total` frames.

    `times` are the seconds of each turn, by what was done; `core` those that this process had
    `cores` for, of what a CPU did.
    """
    parts = {what: [t / total for t in core.get(what, times[what])] for what in times}
    script = parts.pop("infer.py")
    turns = [dict(zip(parts, turn, strict=True)) for turn in zip(*parts.values(), strict=True)]
    bounds = [1 / bound_of(turn, cores, device) for turn in turns]
    ends = {"infer.py": [t / total for t in times["infer.py"]], "its bound": bounds}
    had = {w: [c / (cores * t) for c, t in zip(core[w], times[w], strict=True)] for w in core}
    if device.type == "cpu":  # the network waits for nothing but a core that other programs have
        shares = zip(bounds, had["the network alone"], strict=True)
        ends["its bound on the cores that others leave"] = [t / share for t, share in shares]
    rows = rates(ends, dict.fromkeys(ends, 1))
    for what, turns in parts.items():
        ms, at_once = 1000 * statistics.median(turns), cores if what in core else 1
        row = {"what": what, "frames_per_s": 1000 * at_once / ms, "ms_a_frame": ms}
        rows.append(row | {"seconds_a_frame": turns})
    if device.type == "cpu":  # elsewhere other processes decode
        rows[0]["ms_a_frame"] = 1000 * statistics.median(script)
        for row in (row for row in rows if row["what"] in had):
            row["cores_had"] = statistics.median(had[row["what"]])
    return rows


def measure_infer(
    model: UNet, videos: list[Path], repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """Return the rate of infer.py, its bound, and the time of each of its parts."""
    model = infer.make_ready(model, device, INFER_BATCH, compiled=False)
    cores = utils.usable_cpus()
    lanes, share = lanes_for(torch.device("cpu"), torch.get_num_threads())
    cores = min(cores, lanes * share) if device.type == "cpu" else cores
    core: Times = {}

    def note(what: str, call: Callable[[], Any]) -> None:
        core.setdefault(what, []).append(core_seconds(call))

    with tempfile.TemporaryDirectory() as folder:
        one = linked_videos(videos, Path(folder, "one"), 1)
        look, frames = parts_of_infer(model, one, device)["the network alone"]
        number = calls_for(SCRIPT_SECONDS, lambda: look(frames[0]), device)
        targets = linked_videos(videos, Path(folder, "all"), min(MAX_VIDEOS, number))
        total = sum(len(frame_paths(video)) for video in targets)
        workers = infer.decoders(targets, None, INFER_BATCH, utils.Processes(device))
        script = partial(infer.label_videos, model, targets, device, INFER_BATCH, workers)
        calls: dict[str, Callable[[], Any]] = {"infer.py": partial(note, "infer.py", script)}
        for what, part in parts_of_infer(model, targets, device).items():
            at_once = max(1, cores // share)
            calls[what] = partial(note, what, partial(in_all_lanes, *part, at_once, share))
            if what == "the network alone" and device.type != "cpu":
                calls[what] = partial(in_all_lanes, *part, 1, share)
        times = take_turns(calls, dict.fromkeys(calls, 1), repeats, device)
    return infer_rows(times, core, total, cores, device)


def train_loader(
    dataset: CLEVRDataset, batches: Iterable[list[int]], device: torch.device
) -> DataLoader:
    """Return a DataLoader as train.py's is by default."""
    return DataLoader(dataset, batch_sampler=batches, pin_memory=device.type not in ("cpu", "mps"))


def schedule(total_steps: float) -> Callable[[int], float]:
    """Return train.py's learning rate by the step, of a run of `total_steps`."""
    return lambda step: learning_rate_at(step / total_steps, LEARNING_RATE)


def measure_train(
    model: UNet, data: Path, batch_size: int, repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """Return the rates of train.py, of its step on one batch in memory, and of its data."""
    utils.seed_everything(0, deterministic=device.type == "cpu")  # as train.py does
    training = CLEVRDataset(split_videos(data, 0)[0])
    batches = ShardedBatches(len(training), batch_size, utils.Processes(device), True)
    batch = [part.to(device) for part in next(iter(train_loader(training, batches, device)))]
    crops = augment(*batch)
    model = model.to(device)
    run, rate_at = train.Run.start(model), schedule(10**6)  # so long a run hardly learns

    def bare(number: int) -> None:
        in_memory = repeat(batch, number)
        train.train_one_epoch(run, model, in_memory, rate_at, device, lambda *_: crops)

    number = 3 * calls_for(SCRIPT_SECONDS, lambda: bare(3), device)
    loader = train_loader(training, list(islice(cycle(batches), number)), device)

    def read() -> None:
        for images, masks in loader:
            augment(images.to(device), masks.to(device))

    calls = {
        "train.py": lambda: train.train_one_epoch(run, model, loader, rate_at, device),
        "the step alone": lambda: bare(number),
        "reading and augmenting alone": read,
    }
    times = take_turns(calls, dict.fromkeys(calls, 1), repeats, device)
    return rates(times, dict.fromkeys(calls, number * len(batch[0])))
