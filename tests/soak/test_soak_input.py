"""Broken input by the thousand; `pytest -m soak -n 0 -s tests/soak/test_soak_input.py` counts it.

Each test forks a process that reads one input after the other. Each input must give the right
result, or one sentence that names the file, in 20 seconds and 2 GiB, and must not be changed.
"""

import logging
import os
import shutil
import stat
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import broken
import numpy as np
import PIL.Image
import pytest
import torch
from broken import SIZE, call, in_fork
from conftest import make_video
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from test_clips import write_clip

import dataset
import evaluate
import infer
import preview
import train
from checkpoints import checkpoint_digest, load_checkpoint
from dataset import CLEVRDataset
from decode import read_clip, read_frame
from devices import Processes
from log import Log
from model import UNet
from outputs import Outputs, read_confidence
from render import render_video
from runs import LAST, Run
from scale import learned_size
from utils import UserError
from videos import inspect_video, list_video, read_labels

SEED = int(os.environ.get("SOAK_SEED", 0))
MANY = 100  # fewer are the same in every run, since their shares are a matter of chance
SCRIPTS = 4  # of so many inputs, one also goes through the scripts that take longer
# How many, in the soak (four minutes on a core) and in the suite (some seconds).
PNGS = [pytest.param(10_000, marks=pytest.mark.soak), 60]
MASKS = [pytest.param(5_000, marks=pytest.mark.soak), 60]
VIDEOS = [pytest.param(500, marks=pytest.mark.soak), 6]
CHECKPOINTS = [pytest.param(2_000, marks=pytest.mark.soak), 20]
CLIPS = [pytest.param(500, marks=pytest.mark.soak), 30]
TABLES = [pytest.param(3_000, marks=pytest.mark.soak), 30]
pytestmark = pytest.mark.usefixtures("own_cache")


def for_each(examples: int, inputs: Any, check: Callable) -> Callable:
    """Return a job for in_fork: check(watch, counts, input) for each of so many `inputs`."""

    def job(watch):
        counts, start = Counter(), time.monotonic()
        number = SEED if examples >= MANY else 0

        @seed(number)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(inputs)
        def each(item):
            check(watch, counts, item)

        with warnings.catch_warnings(action="ignore"):
            each()
        print(f"\nseed {number}: {watch.count} in {time.monotonic() - start:.0f} s, {dict(counts)}")
        return counts

    return job


@pytest.fixture
def try_each(tmp_path, record_property):
    """Return a function that tries so many inputs in a forked process, and returns the counts."""

    def run_all(examples, inputs, check):
        record_property("broken inputs", examples)
        return in_fork(tmp_path, for_each(examples, inputs, check))

    return run_all


def sentence(read: Callable, *paths: Path) -> tuple[Any, str]:
    """Return what `read` returns, and the sentence about one of the `paths` that it raised."""
    try:
        return read(), ""
    except UserError as error:
        text = str(error)
        assert any(str(path) in text for path in paths), text
        assert "\n" not in text
        assert len(text) < 500, text
        return None, text


def ends(result: tuple[int, str, str], *statuses: int) -> str:
    """Check how a script has ended; return what it said."""
    status, out, err = result
    assert status in statuses, (status, out, err)
    assert "Traceback" not in err
    assert status == 0 or err or "faults" in out
    return out + err


def start_run() -> Run:
    return Run.open(UNet(widths=(4, 8)), Processes(torch.device("cpu")))


def save_network(folder: Path, **facts: object) -> Path:
    """Write the last checkpoint of a run that has not begun."""
    torch.manual_seed(0)
    run = start_run()
    run.facts = {"frame_size": list(SIZE), **facts}
    run.save_last(folder)
    return folder / LAST


# PNG and mask.npy


@pytest.mark.parametrize("examples", PNGS)
def test_pngs(tmp_path, examples, try_each):
    path = tmp_path / "image_0.png"

    def check(watch, counts, png):
        path.write_bytes(png)
        watch.begin(png)
        frame, said = sentence(lambda: read_frame(path), path)
        counts["sentence" if said else "frame"] += 1
        if not said:
            assert broken.is_sound(png), png
            with PIL.Image.open(path) as picture:
                assert np.array_equal(frame.permute(1, 2, 0), picture.convert("RGB"))
        assert path.read_bytes() == png
        watch.end()

    counts = try_each(examples, broken.pngs(), check)
    assert min(counts["frame"], counts["sentence"]) > examples / 30


@pytest.mark.parametrize("examples", MASKS)
def test_masks(tmp_path, examples, try_each):
    video = make_video(tmp_path / "video_0", labelled=False)
    path = video / "mask.npy"

    def check(watch, counts, npy):
        path.write_bytes(npy)
        watch.begin(npy)
        mask, said = sentence(lambda: read_labels(video, 3, SIZE), path)
        assert (path.read_bytes(), bool(inspect_video(list_video(video)).faults)) == (
            npy,
            bool(said),
        )
        counts["sentence" if said else "mask"] += 1
        if not said:
            assert np.array_equal(mask, np.load(path))
            assert mask.max() < 49
        watch.end()

    counts = try_each(examples, broken.masks(), check)
    assert min(counts["mask"], counts["sentence"]) > examples / 30


@pytest.mark.parametrize("examples", VIDEOS)
def test_broken_videos_through_all_scripts(tmp_path, examples, try_each):
    """One video of three is broken: what is right with the others is done."""
    data, network = tmp_path / "data", save_network(tmp_path)
    for k in range(3):
        make_video(data / f"video_{k}", seed=k)
    png, npy = data / "video_1/image_1.png", data / "video_1/mask.npy"
    good = png.read_bytes(), npy.read_bytes()
    machine = ("--device", "cpu", "--workers", 0)

    def check(watch, counts, item):
        number, new = item
        files = [new if number == k else old for k, old in enumerate(good)]
        for path, content in zip((png, npy), files, strict=True):
            path.write_bytes(content)
        before = {path: path.read_bytes() for path in data.rglob("*.*")}
        watch.begin(number, new)
        faults = " ".join(inspect_video(list_video(data / "video_1")).faults)
        frames = not (number == 0 and faults)
        masks, out, page = (tmp_path / name for name in ("masks", "out", "page"))
        for folder in (masks, out, page):
            shutil.rmtree(folder, ignore_errors=True)
        said = ends(call(dataset, data), 1 if faults else 0)
        assert faults.split(" (")[0].split(". ")[0] in said  # in brackets may be an address
        labelling = ("--ckpt", network, "--data", data, "--out", masks, *machine)
        assert f"{2 + frames} videos" in ends(call(infer, *labelling), 1 - frames)
        if frames:
            said = ends(call(evaluate, "--pred", masks, "--data", data), 0)
            assert ("1 skipped" in said) == bool(faults)
        ends(call(preview, "--masks", masks, "--data", data, "--out", page), 0, 1)
        if watch.count % SCRIPTS == 0:
            learn = ("--data", data, "--out", out, "--num-epochs", 1, "--init", network, *machine)
            # With a fault in it, the one video to validate on may be the one that is left out.
            ends(call(train, *learn, "--batch-size", 4), *((0, 2) if faults else (0,)))
        counts["left out" if faults else "taken"] += 1
        assert {path: path.read_bytes() for path in data.rglob("*.*")} == before
        watch.end()

    kinds = (st.tuples(st.just(0), broken.pngs()), st.tuples(st.just(1), broken.masks()))
    try_each(examples, st.one_of(*kinds), check)


# Checkpoints


DELETED = object()
NONSENSE = [
    *(DELETED, None, -1, 0, 1, 2**31, 2**63, 10**40, 1.5, float("nan"), float("inf"), "", "x"),
    *(b"x", [], [1], [[1]], {}, {1: 2}, True, "\udcff", 2**1000, {1, 2}, bytearray(3), "\0"),
    *([-1, 8], [10**9] * 2, [4, "8"], [4.0, 8.0], [4, 8] * 50, [1] * 8, (4, 8), [20_000] * 2),
    *({"widths": widths} for widths in ("ab", [10**9] * 2, [30_000] * 2, None, [0, 8], [True, 8])),
    *({"blocks": 5}, {"blocks": [[1]]}, {"in_channels": torch.zeros(3)}, {3: 4}),
    *(torch.zeros(2), torch.tensor(5), torch.tensor(float("nan")), torch.zeros(2).to_sparse()),
    *(torch.zeros(1).expand(25_000_000_000), torch.zeros(2, device="meta"), torch.float32),
    *(torch.zeros(2, dtype=torch.complex64), torch.zeros(2).half(), torch.device("cpu")),
]


class Code:
    """Makes a file where what a pickle says is done."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def places(value: Any, above: tuple = ()) -> list[tuple]:
    """Return where things are in dicts and lists, as keys and numbers."""
    found = [above] if above else []
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            found += places(value[key], (*above, key))
    return found


def replaced(value: Any, place: tuple, new: Any) -> Any:
    """Return dicts and lists with something else in one place, if it is there."""
    if not place:
        return new
    if not isinstance(value, (dict, list)):
        return value
    value = dict(value) if isinstance(value, dict) else list(value)
    key = place[0]
    there = key in value if isinstance(value, dict) else type(key) is int and key < len(value)
    if there and new is DELETED and len(place) == 1:
        del value[key]
    elif there:
        value[key] = replaced(value[key], place[1:], new)
    return value


@st.composite
def checkpoints(draw: Callable, good: bytes, whole: dict, code: Path) -> tuple[str, bytes]:
    """Draw a broken file of a run, and how it was broken."""
    ways = ["bytes"] * 4 + ["values"] * 5 + ["records"] * 3 + ["packed", "code"]
    way = draw(st.sampled_from(ways))
    if way == "bytes":
        return way, broken.changed(draw, good)
    if way == "code":
        return way, broken.stored({**whole, draw(st.sampled_from(("model", "x"))): Code(code)})
    if way == "packed":
        return way, broken.with_record(good, lambda _, content: content, deflate=True)
    if way == "records":
        names: list[str] = []
        broken.with_record(good, lambda name, content: names.append(name) or content)
        pickles = [name for name in names if name.endswith("data.pkl")]
        chosen = draw(st.sampled_from(pickles * 10 + names))
        change = {True: lambda content: broken.changed(draw, content), False: bytes}
        return way, broken.with_record(good, lambda name, it: change[name == chosen](it))
    value = whole
    for _ in range(draw(st.integers(1, 2))):
        outer = [place for place in places(whole) if len(place) <= 2]
        place = draw(st.sampled_from(draw(st.sampled_from((places(whole), outer)))))
        value = replaced(value, place, draw(st.sampled_from(NONSENSE)))
    value.pop("digest", None)
    huge = any(isinstance(v, torch.Tensor) and v.numel() > 10**8 for v in value.values())
    if draw(st.booleans()) and not huge:
        try:
            value["digest"] = checkpoint_digest(value)  # right again
        except Exception:  # of what cannot have one
            value["digest"] = "x"
    return way, broken.stored(value)


@pytest.mark.parametrize("examples", CHECKPOINTS)
def test_checkpoints(tmp_path, examples, caplog, try_each):
    file = save_network(tmp_path, data="x", seed=0)
    good, whole = file.read_bytes(), torch.load(file, weights_only=True)
    data = make_video(tmp_path / "data/video_0").parent
    make_video(data / "video_1", seed=1)
    init, resumed, code = tmp_path / "a.pt", tmp_path / "out" / LAST, tmp_path / "code"
    resumed.parent.mkdir()
    machine = ("--data", data, "--device", "cpu", "--workers", 0)
    learn = ("--widths", 4, 8, "--num-epochs", 1, "--batch-size", 4, *machine)

    def load():
        checkpoint = load_checkpoint(init)
        model = UNet.from_checkpoint(checkpoint, init)
        learned_size(checkpoint, init)
        assert model.eval().predict(torch.zeros(1, 3, *SIZE, dtype=torch.uint8)).max() < 49
        return checkpoint

    def check(watch, counts, item):
        way, content = item
        init.write_bytes(content)
        resumed.write_bytes(content)
        watch.begin(way, content[:3000])
        loaded, said = sentence(load, init)
        counts[way, "sentence" if said else "loaded"] += 1
        assert way != "code" or said
        assert way != "bytes" or said or loaded["digest"] == whole["digest"]
        _, never = sentence(lambda: start_run().restore(resumed), resumed)
        if watch.count % SCRIPTS == 0:
            out = ("--out", tmp_path / "masks")
            ends(call(infer, "--ckpt", init, *out, *machine), 2 if said else 0)
            _, no_weights = sentence(lambda: UNet.load(init), init)
            if no_weights:
                ends(call(train, *learn, "--init", init, "--out", tmp_path / "new"), 2)
            if never:
                ends(call(train, *learn, "--out", tmp_path / "out", "--resume"), 2)
        assert init.read_bytes() == resumed.read_bytes() == content
        watch.end()

    caplog.set_level(logging.ERROR, "checkpoints")  # most have no digest, which is a line each
    try_each(examples, checkpoints(good, whole, code), check)
    assert not code.exists()


# Tables, records and logs


TEXTS = {
    "objects.csv": b"frame,object,class_id,confidence\n0,1,2,0.9\n1,1,2,0.9\n0,2,40,0.6\n",
    "mask.json": b'{"checkpoint":"x","options":{},"version":"0","frames":[["a",1,2]],"mask":"0"}\n',
    "log.csv": b"epoch,train_loss,val_loss,miou,foreground_iou,lr,frames_per_s,weighted_iou\n"
    b"1,0.5,0.5,0.5,0.5,0.5,0.5,0.5\n2,0.5,0.5,0.5,0.5,0.5,0.5,0.5\n",
}
NUMBERS = b"nan", b"inf", b"-1", b"9" * 5000, b"1e999", b"", b'"', b"[" * 50_000, b"\0"


@st.composite
def texts(draw: Callable) -> tuple[str, bytes]:
    """Draw the name of a file and its broken content."""
    name = draw(st.sampled_from(sorted(TEXTS)))
    content = broken.changed(draw, TEXTS[name])
    if broken.seldom(draw, 3):
        old, new = draw(st.sampled_from((b"0", b"1", b"2", b"x"))), draw(st.sampled_from(NUMBERS))
        content = content.replace(old, new, 1)
    return name, content


@pytest.mark.parametrize("examples", CLIPS)
def test_clips(tmp_path, examples, try_each):
    """h264 has no checksum: some changes are silent, and are counted."""
    frames = render_video(5, (4, 6), 12, height=64, width=96)[0]
    path = write_clip(tmp_path / "data/clip.mp4", frames)
    content, network = path.read_bytes(), save_network(tmp_path)
    whole = [frame.pixels for frame in read_clip(path)]

    def check(watch, counts, damaged):
        path.write_bytes(damaged)
        watch.begin(damaged)
        found, said = sentence(lambda: [frame.pixels for frame in read_clip(path)], path)
        watch.end()
        if said:
            counts["sentence"] += 1
        else:
            assert len(found) <= len(whole)
            same = len(found) == len(whole) and all(map(torch.equal, found, whole))
            counts["the same" if same else "silent" if len(found) == len(whole) else "shorter"] += 1
        if watch.count % SCRIPTS == 0:
            watch.begin(damaged)
            out = ("--out", tmp_path / "masks", "--device", "cpu")
            ends(call(infer, "--ckpt", network, "--data", path.parent, *out), 1 if said else 0)
            watch.end()

    draw_changed = st.composite(lambda draw: broken.changed(draw, content))
    counts = try_each(examples, draw_changed(), check)
    assert counts["shorter"] <= examples / 50, counts
    assert counts["silent"] <= examples / 10, counts


@pytest.mark.parametrize("examples", TABLES)
def test_tables_records_and_logs(tmp_path, examples, try_each):
    data, masks = tmp_path / "data", tmp_path / "masks"
    video, folder = make_video(data / "video_0"), masks / "video_0"
    folder.mkdir(parents=True)
    shutil.copy(video / "mask.npy", folder)

    def check(watch, counts, item):
        name, content = item
        path = folder / name
        path.write_bytes(content)
        watch.begin(name, content[:2000])
        if name == "mask.json":
            origin = {"checkpoint": "y", "options": {}, "version": "0"}
            assert Outputs(masks, origin).stale_reason(list_video(video))
            counts[name, "made again"] += 1
        elif name == "log.csv":
            _, said = sentence(lambda: Log(folder, 2).board.close(), path)
            counts[name, "sentence" if said else "kept"] += 1
            assert not said or path.read_bytes() == content
        else:
            _, said = sentence(lambda: read_confidence(folder), path)
            counts[name, "sentence" if said else "taken"] += 1
            if watch.count % SCRIPTS == 0:
                page = ("--masks", masks, "--data", data, "--out", tmp_path / "page")
                assert not said or str(path) in ends(call(preview, *page), 1)
            assert path.read_bytes() == content
        path.unlink()
        watch.end()

    try_each(examples, texts(), check)


# Folders


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    """Pipes, folders, links to nothing and to themselves, devices."""
    data, good = tmp_path / "data", make_video(tmp_path / "data/good")

    def device(path):
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # zeros without end

    ways = {
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "dangling": lambda path: path.symlink_to("nowhere"),
        "itself": lambda path: path.symlink_to(path.name),
        "zeros": lambda path: path.symlink_to("/dev/zero"),
        "terminal": lambda path: path.symlink_to("/dev/tty"),
        "memory": lambda path: path.symlink_to("/proc/self/mem"),
    } | ({"device": device} if os.geteuid() == 0 else {})
    for name in ("image_1.png", "mask.npy"):
        for way, make in ways.items():
            video = make_video(data / f"{way} {name[:4]}")
            (video / name).unlink()
            try:
                make(video / name)
            except PermissionError:  # a container without devices
                shutil.rmtree(video)
    broken_ones = sum(folder != good for folder in data.iterdir())

    def job(watch):
        watch.begin("folders")
        videos = [video.path for video in CLEVRDataset(data, cache=False).videos]
        watch.end()
        watch.begin("report")
        out = ends(call(dataset, data), 1)
        watch.end()
        return videos, out

    videos, out = in_fork(tmp_path, job)
    assert videos == [good]
    assert f"videos with faults: {broken_ones}" in out


@pytest.mark.soak
def test_names_and_depths_without_end(tmp_path, deep):
    """Bytes that are no text, newlines, the longest names, deep and many folders, loops."""
    data = tmp_path / "data"
    names = [b"video_\xff", b"line\nbreak", b"a" * 255, "\u202evid\x1b[31m".encode(), b"-n", b"'$"]
    for name in names:
        make_video(data / os.fsdecode(name), frames=1)
    for k in range(3_000):
        (data / f"empty/{k % 50}/{k}").mkdir(parents=True)
    deep(3_000)  # deeper than a path can say
    os.chdir(tmp_path)
    (data / "deep").symlink_to(tmp_path / "d")
    (data / "empty/round").symlink_to(data)
    (data / "empty/itself").symlink_to("itself")
    network = save_network(tmp_path)

    def job(watch):
        watch.begin("report and masks")
        ends(call(dataset, data), 0)
        out = data.with_name(os.fsdecode(b"masks\xff"))
        ends(call(infer, "--ckpt", network, "--data", data, "--out", out, "--device", "cpu"), 0)
        watch.end()
        watch.begin("scores and page")
        said = ends(call(evaluate, "--pred", out, "--data", data), 0)
        ends(call(preview, "--masks", out, "--data", data, "--out", tmp_path / "page"), 0)
        watch.end()
        return said

    assert f"videos           {len(names)} (" in in_fork(tmp_path, job)


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can become another user")
def test_folders_that_another_user_may_not_read(tmp_path):
    """One that may not be listed is left out by name; one that may not be entered is a fault."""
    data = tmp_path / "data"
    for name, mode in {"good": 0o755, "listed": 0o744, "entered": 0o711, "closed": 0o700}.items():
        make_video(data / name).chmod(mode)
    (make_video(data / "file") / "image_1.png").chmod(0o600)
    for folder in (tmp_path, *list(tmp_path.parents)[:-2]):
        folder.chmod(folder.stat().st_mode | 0o011)
    tmp_path.chmod(0o777)

    np.unique([])  # imports what that user may not read

    def job(watch):
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        return call(dataset, data)

    status, out, err = in_fork(tmp_path, job)
    assert status == 1
    assert err.count("left out, the folder cannot be read") == 2
    assert "videos with faults: 2" in out
    assert "Traceback" not in err
