"""Whole videos in, objects out: for pipeline.py, and for whoever labels from Python.

    labeller = Labeller.load("weights/clevr_unet.pt")
    (objects,) = labeller.label([frames])  # uint8 (T, 3, H, W), all frames of a video
    objects.labels                         # uint8 (T, H, W), ids 0..48

`Labeller.label` sees, follows and enlarges: the network looks at all frames, objects are followed
through the video, and frames of another scale get masks in their own size.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from borders import fill_holes, sharpen
from checkpoints import load_checkpoint
from content import WHOLE, Bars, Box, is_flat, may_have_bars
from details import Details, join, look_again, split
from devices import compile_network, mixed_precision, shared_threads, to_cpu
from model import Answer, UNet, for_labelling
from objects import Objects, by_frame, follow, follow_each
from scale import USUAL_SCALE, Scale, View, fill, learned_size, resize
from stills import are_stills, thumbnails
from tracks import gather, occupied
from utils import UserError
from videos import Frame, size_text

BATCH_SIZE = 22  # frames at once: those of a video of the usual length
MAX_AT_ONCE = 2**24  # pixels that the network sees together: some 2 GB, and more is no faster
MAX_ON_CPU = 2**20  # such pixels on a CPU, whose caches hold no more
WIDER = 0.3  # logits by which the network is surer of objects that are drawn wider than they are
SURVEYED = 16  # frames of a video by which it is told what its squares were made of
DRAWN_AT_ONCE = 2**23  # pixels of labels that are drawn together


class Seen(NamedTuple):
    """What the network sees in N frames, on the CPU; cells are 2 x 2 pixels of what it looks at."""

    objects: Tensor  # (N, h, w) bool, where there is an object
    evidence: Tensor  # (n, 13) logits of attributes of the cells that hold one, in order
    ground: Tensor  # (N, h / 8, w / 8) half, as of `stills.thumbnails`
    details: Details  # what finer looks tell


class Labeller:
    """A network, and how it labels.

    Args:
        model: Is changed: fused, cast and moved to the device.
        device: Where it runs.
        batch_size: Frames at once.
        tracking: Whether objects are followed through the video; else each frame is labelled by
            itself.
        scale: At which the network sees frames; labels have the frames' own size.
    """

    def __init__(
        self,
        model: UNet,
        device: torch.device | str = "cpu",
        batch_size: int = BATCH_SIZE,
        tracking: bool = True,
        scale: Scale = USUAL_SCALE,
    ):
        self.device, self.batch_size, self.scale = torch.device(device), batch_size, scale
        self.model = for_labelling(model, self.device)
        self.tracking = tracking

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> "Labeller":
        """Return a labeller with the network of a checkpoint, at the scale that it learned."""
        checkpoint = load_checkpoint(path)
        scale = Scale(learned_size(checkpoint, path))
        return cls(UNet.from_checkpoint(checkpoint, path), **{"scale": scale, **options})

    def compile(self) -> None:
        """Compile the network for batches of frames of the size it learned, if that works here."""
        size = (self.batch_size, 3, *self.scale.learned)
        with shared_threads(self.device):  # for another number of threads it would be made anew
            compile_network(self.model, torch.zeros(size, dtype=torch.uint8, device=self.device))

    def label(
        self, videos: Sequence[Tensor], numbers: Sequence[Sequence[int]] | None = None
    ) -> list[Objects]:
        """Return the objects of videos, each uint8 (T, 3, H, W) on the CPU, all of one frame size.

        A video has the same labels whichever others come with it. `numbers` are those of the
        frames of each, from 0 by default.

        Raises:
            UserError: they are no such videos, or too large for the network.
        """
        check_videos(videos)
        if not videos:
            return []
        numbers = numbers or [range(len(video)) for video in videos]
        if [len(part) for part in numbers] != [len(video) for video in videos]:
            raise UserError("numbers are not one for each frame of each video: give those, or none")
        views = self.scale.views(*videos[0].shape[2:])
        if len(views) == 1 and not any(may_have_bars(video[0]) for video in videos):
            frames = torch.cat(list(videos))
            parts = math.ceil(len(frames) / self.at_once(views[0]))
            batches = frames.tensor_split(parts)  # all about as large
            seen = [self.see(batch, WHOLE, views[0]) for batch in batches]
            return self.find_objects(seen, numbers, WHOLE, views[0])

        def read(v: int) -> Iterator[Frame]:
            for pixels, number in zip(videos[v], numbers[v], strict=True):
                yield Frame(pixels, number, None)

        found = [self.label_ahead(partial(read, v)) for v in range(len(videos))]
        return [video._replace(seconds=None) for video in found]

    def label_ahead(
        self, read: Callable[[], Iterable[Frame]], pool: Executor | None = None, ahead: int = 0
    ) -> Objects:
        """Return the objects of one video, however long, whose frames are never held together.

        Args:
            read: Gives the frames of the video, one after the other; is called twice where all of
                them must be seen before, as of squares and of frames with bars.
            pool: Threads that let the network look at its frames; None: this one does.
            ahead: How many batches of its frames threads of the pool look at at once.
        """
        frames = iter(read())
        first = next(frames)
        box, (view, *others) = WHOLE, self.scale.views(*first.pixels.shape[1:])
        if others or may_have_bars(first.pixels):
            box, view = self.survey(read())
        seen, numbers, seconds = [], [], []
        waiting: deque[Future] = deque()
        for batch in batched(itertools.chain([first], frames), self.at_once(view)):
            pixels = torch.stack([frame.pixels for frame in batch])
            numbers += [frame.number for frame in batch]
            seconds += [frame.seconds for frame in batch]
            if pool is None:
                seen.append(self.see(pixels, box, view))
                continue
            waiting.append(pool.submit(self.see, pixels, box, view))
            if len(waiting) > ahead:
                seen.append(waiting.popleft().result())
        seen += [future.result() for future in waiting]
        return self.find_objects(seen, [numbers], box, view)[0]._replace(seconds=seconds)

    def survey(self, frames: Iterable[Frame]) -> tuple[Box, View]:
        """Return where the picture is in the frames of a video, and how it is best looked at.

        Of two views that is the one in which the network is surer, by up to SURVEYED frames that
        show something, spread over the video; less WIDER, since squeezed ones are drawn wider.
        """
        bars, chosen, step, count = Bars(), [], 1, 0
        for frame in frames:
            bars.add(frame.pixels[None])
            if is_flat(frame.pixels[None]):
                continue
            if count % step == 0:
                chosen.append(frame.pixels)
            if len(chosen) > SURVEYED:
                chosen, step = chosen[::2], 2 * step
            count += 1
        size = bars.box.cut(frame.pixels).shape[1:]
        views = self.scale.views(*size)
        if len(views) == 1 or not chosen:
            return bars.box, views[0]
        pictures = bars.box.cut(torch.stack(chosen)).to(self.device)
        squeezed, cut = views
        surer = [sureness(self.look(resize(pictures, view.size))) for view in (squeezed, cut)]
        return bars.box, cut if surer[1] > surer[0] - WIDER else squeezed

    def at_once(self, view: View) -> int:
        """Return how many frames the network looks at together."""
        # In their own size frames are bytes, a quarter of floats.
        pixels = max(math.prod(view.size), math.prod(view.own) // 4)
        most = MAX_ON_CPU if self.device.type == "cpu" else MAX_AT_ONCE
        return min(self.batch_size, max(1, most // pixels))

    @torch.inference_mode()
    def find_objects(
        self, seen: list[Seen], numbers: Sequence[Sequence[int]], box: Box, view: View
    ) -> list[Objects]:
        """Return the objects of videos whose frames, of these numbers, were seen in this order.

        Args:
            seen: Is emptied.
            numbers: Those of the frames, of each video.
            box: Where their picture is.
            view: How it was looked at.
        """
        lengths, counts = [len(video) for video in numbers], [len(part.objects) for part in seen]
        objects = torch.cat([part.objects for part in seen]).split(lengths)
        ground = torch.cat([part.ground for part in seen]).split(lengths)
        cells = [int(occupied(part).sum()) for part in objects]
        evidence = torch.cat([part.evidence for part in seen]).split(cells)
        pixels = math.prod(view.size)
        details = join([part.details for part in seen], counts, pixels)
        seen.clear()
        found = []
        for video in zip(
            objects, evidence, ground, split(details, lengths, pixels), numbers, strict=True
        ):
            found.append(self.find_in_one(*video, box, view))
        return found

    def find_in_one(
        self,
        objects: Tensor,
        evidence: Tensor,
        ground: Tensor,
        details: Details,
        numbers: Sequence[int],
        box: Box,
        view: View,
    ) -> Objects:
        """Return the objects of one video: followed, in the size of its frames, and drawn well."""
        remarks = [self.scale.describe(view)]
        if not self.tracking:
            found = by_frame(objects, evidence)
        elif are_stills(ground, objects, evidence):
            found = follow_each(objects, evidence, view.unit)._replace(stills=True)
        else:
            found = follow(objects, evidence, view.unit)

        # In the picture's own size, a few frames at a time: of long videos less is held at once.
        with torch.inference_mode(False):  # else nobody could ever change them
            labels = torch.empty((len(objects), *view.own), dtype=torch.uint8)
        counts = frames_at_once(len(objects), math.prod(view.own))
        cells = [int(part.sum()) for part in occupied(objects).split(counts)]
        for part in zip(
            labels.split(counts),
            found.labels.split(counts),
            objects.split(counts),
            evidence.split(cells),
            split(details, counts, math.prod(view.size)),
            strict=True,
        ):
            self.draw(*part)
        if box != WHOLE:
            with torch.inference_mode(False):
                labels = F.pad(labels, box)
            shown = f"{size_text(view.own)} of {size_text(labels.shape[1:])}"
            remarks.append(f"bars along the sides are background: pictures are {shown}")
        said = list(filter(None, remarks))
        return found._replace(labels=labels, numbers=list(numbers), bars=box, remarks=said)

    def draw(
        self, drawn: Tensor, labels: Tensor, objects: Tensor, evidence: Tensor, details: Details
    ) -> None:
        """Write labels in the picture's own size into `drawn` (T, H, W), uint8.

        They are made of `labels` (T, h, w), at the size of the first look, and of what was seen.
        Without tracking they stay what the network says of each pixel, holes and borders too.
        """
        own = tuple(drawn.shape[1:])
        full = labels
        if details.outlines is not None:
            full = fill(labels, objects, details.outlines, own)
        if self.tracking:
            full = fill_holes(sharpen(full, labels, objects, evidence, details))
        drawn.copy_(full)

    @torch.inference_mode()
    def look(self, picture: Tensor) -> Answer:
        """Return what the network says of pictures uint8 (N, 3, h, w), on its device."""
        answers = self.model.answers
        if picture.shape[2:] != self.scale.learned:  # for which alone it may have been compiled
            answers = partial(type(self.model).answers, self.model)
        with mixed_precision(self.device):
            return self.model.evidence(answers(picture))

    @torch.inference_mode()
    def see(self, frames: Tensor, box: Box, view: View) -> Seen:
        """Let the network look at frames (N, 3, H, W), uint8, on the CPU, as far as `box` goes."""
        frames = box.cut(frames)
        flat = is_flat(frames)
        on_device = frames.to(self.device, non_blocking=True)  # bytes
        picture = resize(on_device, view.size)
        answer = self.look(picture)
        found = [answer.objectness[:, 0] > 0, answer.attributes, thumbnails(picture)]
        if view.size != view.own:
            found.append(answer.objectness)
        objects, attributes, ground, *objectness = to_cpu(found)
        objects[flat] = False
        evidence = gather(objects, attributes)
        evidence = evidence.half() if self.tracking else evidence
        edges = objectness[0] if objectness else None
        shown = on_device if view.finer else picture
        details = look_again(self.look, shown, objects, evidence, edges, view, self.tracking)
        return Seen(objects, evidence, ground, details)


def sureness(answer: Answer) -> float:
    """Return how sure a network is of objects that it sees: the mean of their pixels' logits."""
    objectness = answer.objectness.float()
    return float(objectness[objectness > 0].mean()) if (objectness > 0).any() else 0.0


def check_videos(videos: Sequence[Tensor]) -> None:
    """Raise UserError unless videos are a list of uint8 (T, 3, H, W) of one frame size, on the CPU.

    Tensors come from elsewhere: the sentence says how each mistake is mended.
    """
    if isinstance(videos, Tensor) or not all(isinstance(video, Tensor) for video in videos):
        raise UserError(
            "videos are no list of tensors: give label([frames]), of an array torch.from_numpy(it)"
        )
    for video in videos:
        if video.dtype != torch.uint8:
            raise UserError(f"a video is {video.dtype}, not torch.uint8: give bytes, 0 to 255")
        if video.dim() != 4 or video.shape[1] != 3 or not video.numel():
            shape = tuple(video.shape)
            raise UserError(f"a video is {shape}, not (T, 3, H, W): give one frame as frame[None]")
        if video.device.type != "cpu":
            raise UserError(f"a video is on {video.device}: give video.cpu()")
        if video.shape[2:] != videos[0].shape[2:]:
            raise UserError("videos of one call have frames of one size: label each size by itself")


def frames_at_once(count: int, pixels: int) -> list[int]:
    """Return how many of `count` frames, of so many pixels each, are drawn together, in order."""
    most = max(1, DRAWN_AT_ONCE // pixels)
    return [min(most, count - start) for start in range(0, count, most)]


def batched(items: Iterable[Any], count: int) -> Iterator[list[Any]]:
    """Yield lists of `count` consecutive items; the last may have fewer."""
    items = iter(items)
    while batch := list(itertools.islice(items, count)):
        yield batch
