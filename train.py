"""Train the UNet on labelled CLEVR videos, or on rendered ones if you have none.

    python train.py                                        # renders data/demo first
    python train.py --data path --num-epochs 10            # your own videos
    python train.py --data path --resume                   # go on after an interruption
    python train.py --data path --init none                # do not start from the shipped weights
    torchrun --nproc-per-node=8 train.py --data path --batch-size 256  # eight GPUs

`path` is a folder of videos (a tenth of them is set aside for validation) or has train/ and val/.
Training on it starts from weights/clevr_unet.pt, and an epoch of few videos goes through them
several times: some thirty videos are enough to learn their look.
Writes Unet_checkpoint_epoch_X.pt every 5 epochs and after the last, Unet_checkpoint_last.pt after
every epoch and every 5 minutes, Unet_checkpoint_best.pt by weighted IoU in validation, log.csv and
TensorBoard events to --out. Weights that it starts from are validated first, as epoch 0, if they
learned frames of this width: where training does not help, they are the best. SIGTERM and Ctrl-C
stop it after the current step, with all of its state saved.

The whole of training is told here, from its options to its last words: so this is one long file.
"""

import argparse
import copy
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from augment import augment
from batches import make_loaders
from checkpoints import SHIPPED, load_checkpoint
from classes import CLASS_NAMES, NUM_CLASSES
from dataset import CLEVRDataset, split_data
from devices import Processes, choose_device, compile_network, mixed_precision
from files import digest
from log import Log, Progress, epoch_line
from metrics import confusion_matrix, summarise
from model import MAX_STAGES, UNet, for_labelling
from optim import USUAL_BATCH, scaled_rate, update_bn, update_ema
from page.pictures import draw_columns
from render import DEMO_DATA, render_demo
from runs import (
    LAST,
    LOOK_EVERY,
    Keeper,
    Run,
    check_folder,
    first_words,
    hold,
    last_words,
    options_of,
)
from scale import Scale, learned_size
from utils import UserError, at_least, counted, log_header, make_parser, run_script, seed_everything

RATES = 4e-3, 1e-3  # highest learning rate: from nothing, from trained weights
DEMO_BATCH = 8  # frames: what few there are teach more in more steps
DEMO_EPOCHS = 6  # more of them learn what they show by heart: more videos teach more
MAX_NORM = 5.0  # of the gradient: some ten times a usual one, so that only an accident is cut
L2_SP = 1300  # strength of MuonAdamW's L2-SP, times the training frames
BN_STEPS = 10  # batches, or a tenth of the epoch if more, give the average its batch statistics
FROM_NOTHING = Path("none")  # of --init
NOTHING_TRAINED = dict.fromkeys(("train_loss", "lr", "frames_per_s"))  # of epoch 0
SHOWN = 3  # validation frames in TensorBoard
BLIND_STEPS = 100  # steps after which a warning says that the network sees no object


def parse_args() -> argparse.Namespace:
    """Read the command line: one list of options."""
    parser = make_parser(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--data", type=Path, default=DEMO_DATA, help="videos (default: %(default)s, rendered)")
    add("--proposals", type=Path, help="folder of proposal_00000.json, ... (default: none)")
    add("--out", type=Path, default=Path("checkpoints"), help="folder (default: %(default)s)")
    add(
        "--resume",
        action="store_true",
        help="go on from Unet_checkpoint_last.pt under --out, "
        "with its epochs, batch size and learning rate where none are given",
    )
    add("--overwrite", action="store_true", help="delete the run that --out holds for the new one")
    add("--no-cache", action="store_true", help="decode the PNG files anew in every epoch")
    add = parser.add_argument_group("learning").add_argument
    add(
        "--num-epochs",
        type=at_least(1),
        help="in all (default: 8, 6 without --data, 30 with a file as --init)",
    )
    add(
        "--batch-size",
        type=at_least(1),
        help="frames a step, of all processes together "
        f"(default: {USUAL_BATCH}, or {DEMO_BATCH} without --data)",
    )
    add(
        "--learning-rate",
        type=float,
        help=f"highest (default: {RATES[0]:g}, or {RATES[1]:g} from trained weights; times the "
        f"square root of batch size / {USUAL_BATCH} where that is more than 1, at most twice)",
    )
    add(
        "--init",
        type=Path,
        help="checkpoint to start from, or none for random weights (default: "
        f"{SHIPPED.parent.name}/{SHIPPED.name}; none without --data, or with --widths)",
    )
    add(
        "--widths",
        type=at_least(1),
        nargs="+",
        help="channels of each stage of the UNet, two or more numbers (default: 32 48 96 160)",
    )
    add("--seed", type=int, default=0, help="of weights, split and batches (default: %(default)s)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cpu, cuda or cuda:N (default: CUDA if available)")
    add(
        "--workers",
        type=at_least(0),
        help="processes that read, of each training process, as many again for validation "
        "(default: on a CPU 0, else up to 4)",
    )
    add("--compile", action="store_true", help="torch.compile: a minute more to start, then faster")
    add(
        "--deterministic",
        action="store_true",
        help="the same bits from the same seed and after --resume on a GPU too, for some speed; "
        "on a CPU that is always so",
    )
    args = parser.parse_args()
    fill_in(args)
    if args.resume and args.overwrite:
        parser.error(
            "--resume keeps the run that --overwrite deletes: leave out one of them (a killed run "
            "with --overwrite that has saved no checkpoint yet begins again with --overwrite)"
        )
    if args.proposals and args.data == DEMO_DATA:
        parser.error("--proposals are labels of your own videos: give them as --data")
    if not -(2**63) <= args.seed < 2**64:
        parser.error("--seed must be below 2**64")
    if args.learning_rate is not None and not 0 < args.learning_rate < math.inf:
        parser.error("--learning-rate must be more than 0")
    if args.widths and not 2 <= len(args.widths) <= MAX_STAGES:
        parser.error(f"--widths needs two to {MAX_STAGES} numbers, one for each stage")
    return args


def fill_in(args: argparse.Namespace) -> None:
    """Give what the command line leaves out: as the run that it resumes has it, or the usual."""
    if args.resume:
        for name, value in options_of(args.out / LAST).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    demo, trained = args.data == DEMO_DATA, args.init and args.init != FROM_NOTHING
    args.num_epochs = args.num_epochs or (30 if trained else DEMO_EPOCHS if demo else 8)
    args.batch_size = args.batch_size or (DEMO_BATCH if demo else USUAL_BATCH)


def main() -> None:
    """Train as the command line says; nobody else writes into --out meanwhile."""
    args = parse_args()
    processes = Processes(choose_device(args.device))
    with hold(args.out, processes):
        learn(args, processes)


def learn(args: argparse.Namespace, processes: Processes) -> None:
    """Prepare data, network and optimiser, then train, validate and save epoch by epoch."""
    device = processes.device
    seed_everything(args.seed, deterministic=args.deterministic or device.type == "cpu")
    replaces = check_folder(args.out, args.resume, args.overwrite, processes)
    processes.say(log_header(device))
    if processes.first and args.data == DEMO_DATA:
        render_demo()
    processes.wait()

    model, init = build_model(args.init, args.data, args.widths, processes)
    training, validation, held_out = split_data(
        args.data, args.seed, args.proposals, cache=not args.no_cache
    )
    counts = [
        f"{counted(len(part), f'{kind} frame')} of {counted(len(part.videos), 'video')}"
        for kind, part in (("training", training), ("validation", validation))
    ]
    processes.say(", ".join(counts))
    loader, val_loader = make_loaders(
        training, validation, args.batch_size, args.seed, args.workers, processes
    )
    run = Run.open(
        model,
        processes,
        batch_size=args.batch_size,
        epoch_steps=len(loader),
        num_epochs=args.num_epochs,
        learning_rate=args.learning_rate or scaled_rate(RATES[bool(init)], args.batch_size),
        l2_sp=L2_SP / len(training) if init else 0.0,
        seed=args.seed,
        facts={
            "data": str(args.data.resolve()),
            "seed": args.seed,
            "held_out": digest(os.fsencode("\n".join(str(v.target) for v in held_out))),
            "frame_size": list(training[0][0].shape[1:]),  # scale.py asks for it
        },
        resume=args.out / LAST if args.resume else None,
        replaces=replaces,
    )
    processes.say(first_words(run, init))
    if args.compile:
        images, masks = next(iter(loader))
        compile_network(model.train(), augment(images.to(device), masks.to(device))[0])
    first = run.begins and validates_first(init, run.facts, processes)
    train_epochs(run, loader, val_loader, args.num_epochs, args.out, first)
    if processes.first:
        print(last_words(args.out, args.data))


def build_model(
    init: Path | None, data: Path, widths: list[int] | None, processes: Processes
) -> tuple[UNet, Path | None]:
    """Return the network to train, on its device, and the file that its weights come from.

    Args:
        init: What --init says; None: the shipped weights, if they are there, `data` is not the
            rendered default and `widths` is not given.
        data: What to learn from.
        widths: What --widths says.
        processes: Those of this run; the first one prints.

    Raises:
        UserError: what --init names cannot be read, or is another network than `widths` says.
    """
    file = init or (None if data == DEMO_DATA or widths else SHIPPED)
    model = None
    if file and file != FROM_NOTHING:
        try:
            model = UNet.load(file)
        except UserError as error:
            if init:
                raise
            if processes.first:
                print(f"the shipped weights are left out: {error}", file=sys.stderr)
        if model and widths and model.config != {"widths": widths}:
            raise UserError(f"{file} is another network: leave out --widths")
    if model is None:
        model, file = UNet(widths) if widths else UNet(), None
    if processes.device.type != "cpu":  # there the convolutions choose their own format
        model = model.to(memory_format=torch.channels_last)
    return model.to(processes.device), file


def validates_first(init: Path | None, facts: dict[str, Any], processes: Processes) -> bool:
    """Return whether what training starts from is validated: trained weights, at their own scale.

    A warning says so if they may have learned from what validates.

    Args:
        init: The file that the weights come from; None: from nothing.
        facts: Data, frame size and held-out videos of this run.
        processes: Those of this run; the first one prints.
    """
    if init is None:
        return False
    checkpoint = load_checkpoint(init)
    same_data = checkpoint.get("data") == facts["data"]
    same_split = checkpoint.get("held_out", facts["held_out"]) == facts["held_out"]
    if processes.first and same_data and not same_split:
        print(
            f"warning: {init} learned from {facts['data']} with other videos set aside, and may "
            "know those that validate now: give the same --seed and the same videos",
            file=sys.stderr,
        )
    height, width = learned = learned_size(checkpoint, init)
    view, *squares = Scale(learned).views(*facts["frame_size"])
    if view.size == view.own and not squares:
        return True
    processes.say(
        f"not validated before, since these weights read frames of {width} x {height} pixels, "
        "to which infer.py would bring yours"
    )
    return False


def train_epochs(
    run: Run,
    loader: DataLoader,
    val_loader: DataLoader,
    num_epochs: int,
    out: Path,
    validate_first: bool = False,
) -> None:
    """Train, validate and save epoch by epoch.

    With `validate_first` what it begins with is validated and saved before: it may be the best.
    """
    processes, epoch_steps = run.processes, len(loader)
    warnings.filterwarnings("ignore", "Grad strides do not match")  # those of sides of length 1
    network = DistributedDataParallel(run.model) if processes.count > 1 else run.model
    if processes.first:
        log = Log(out, -1 if run.begins else run.epoch, bool(run.replaces))
    with Keeper(run, out) as keeper:
        if validate_first:
            figures = NOTHING_TRAINED | validate(run.ema, val_loader, processes, keeper)
            if processes.first:
                run.replace_former(out)
                end_epoch(run, log, figures, out, num_epochs)
            run.begin_clock()
        while run.epoch < num_epochs:
            loader.batch_sampler.set_epoch(run.epoch + 1, skip=run.done)
            figures = train_one_epoch(run, network, loader, keeper)
            refresh_statistics(run, loader)
            figures |= validate(run.ema, val_loader, processes, keeper)
            if processes.first:
                run.replace_former(out)
            run.end_epoch()
            if processes.first:
                if warning := blind_warning(figures, run.step, epoch_steps, run.total_steps):
                    print(warning, file=sys.stderr, flush=True)
                end_epoch(run, log, figures, out, num_epochs)
                if log.wants_picture() or run.epoch == num_epochs:
                    draw_examples(log, run, val_loader.dataset)
            if run.epoch < num_epochs:
                keeper.check_epoch()


def end_epoch(run: Run, log: Log, figures: dict[str, Any], out: Path, num_epochs: int) -> None:
    """Log, save and print an epoch that has been validated with these figures."""
    figures["epoch"] = run.epoch
    log.add(figures)
    run.save(out, figures, num_epochs)
    print(epoch_line(figures, run.time_left()), flush=True)


def train_one_epoch(
    run: Run, network: nn.Module, loader: DataLoader, keeper: Keeper
) -> dict[str, float]:
    """Train on every batch once.

    Args:
        run: What is trained.
        network: `run.model`, or what shares its gradients among the processes.
        loader: Batches of images (B, 3, H, W) and masks (B, H, W), uint8.
        keeper: Saves and stops after a step, where that is due.

    Returns:
        train_loss (mean, also of steps before a stop), lr (the last), frames_per_s (of all
        processes), waiting (share of the time that went into waiting for data).
    """
    device = run.processes.device
    network.train()
    progress = Progress(loader)
    for images, masks in progress:
        run.seed_step()
        images, masks = (part.to(device, non_blocking=True) for part in (images, masks))
        crops, targets = augment(images, masks)  # (2B, 3, 96, 96), (2B, 96, 96)
        with mixed_precision(device):
            loss = network(crops, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)
        run.optimizer.step(run.learning_rate())  # clears the gradients, too
        update_ema(run.ema, run.model, run.step)
        run.count_step(loss)
        if run.step % LOOK_EVERY == 0:
            progress.show(run.loss.latest, run.time_left())
        keeper.check()
    train_loss = run.loss.mean()  # waits for the device: the seconds are its own
    pace = progress.figures()
    return {
        "train_loss": train_loss,
        "lr": run.learning_rate(ago=1),
        "frames_per_s": pace["frames_per_s"] * run.processes.count,
        "waiting": pace["waiting"],
    }


def refresh_statistics(run: Run, loader: DataLoader) -> None:
    """Show the averaged network the last batches of an epoch again, for its batch statistics."""
    device = run.processes.device
    skip = max(0, len(loader) - max(BN_STEPS, len(loader) // 10))
    loader.batch_sampler.set_epoch(run.epoch + 1, skip)
    run.seed_step()
    on_device = ((part.to(device, non_blocking=True) for part in batch) for batch in loader)
    crops = (augment(*batch)[0] for batch in on_device)
    update_bn(crops, run.ema, run.processes)
    run.processes.copy_first(run.ema)


@torch.inference_mode()
def validate(
    model: nn.Module, loader: DataLoader, processes: Processes, keeper: Keeper | None = None
) -> dict[str, Any]:
    """Return evaluate.py's figures and val_loss for whole frames, each counted exactly once.

    They are those of the network as infer.py uses it, frame by frame; `model` stays as it is.
    """
    device = processes.device
    model = for_labelling(copy.deepcopy(model), device)
    confusion = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.int64, device=device)
    losses = [torch.zeros(0, device=device)]
    for images, masks in tqdm(loader, "validating", leave=False, disable=None, unit="batch"):
        images, masks = (part.to(device, non_blocking=True) for part in (images, masks))
        with mixed_precision(device):
            answers = model.answers(images)
        # A loss for each frame by itself, so that the mean does not depend on the batches.
        losses.append(model.frame_losses(answers, masks))
        confusion += confusion_matrix(masks, model.labels(answers))
        if keeper:
            keeper.check_validation()
    losses = torch.cat(losses).cpu().double()
    total = torch.stack((losses.sum(), torch.tensor(len(losses)).double()))
    confusion = confusion.cpu()
    processes.add_up(confusion)
    processes.add_up(total)
    return {"val_loss": (total[0] / total[1]).item(), **summarise(confusion)}


def blind_warning(figures: dict[str, Any], step: int, steps: int, total: int) -> str:
    """Return a warning where a network sees no object, once in a run; "" if all is well.

    Args:
        figures: As of `validate`.
        step: Steps of training that it has had. For the first BLIND_STEPS, more than twice what
            one that starts from nothing needs, it may be so.
        steps: Steps of an epoch.
        total: Steps of the whole run.
    """
    objects = sum(pixels for name, pixels in figures["pixels"].items() if name != CLASS_NAMES[0])
    now = step - steps < min(BLIND_STEPS, total) <= step
    if not objects or figures["foreground_iou"] > 0 or not now:
        return ""
    return (
        f"warning: after {step} steps the network sees no object in any validation frame: look at "
        "the masks with preview.py or dataset.py, and at --learning-rate"
    )


@torch.inference_mode()
def draw_examples(log: Log, run: Run, data: CLEVRDataset) -> None:
    """Show what the network sees of a few frames, always the same ones, evenly apart in `data`."""
    device = run.processes.device
    chosen = sorted({(2 * k + 1) * len(data) // (2 * SHOWN) for k in range(SHOWN)})
    frames, truth = default_collate([data[i] for i in chosen])
    model = for_labelling(copy.deepcopy(run.ema), device)
    with mixed_precision(device):
        labels = model.predict(frames.to(device))
    log.draw(run.epoch, draw_columns(frames, truth, labels.cpu()))


if __name__ == "__main__":
    run_script(main)
