"""Video files: masks of their frames, whole clips or a sentence, other names, shares, strides."""

import csv
import json
import os
import shlex
import shutil
import subprocess
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from conftest import REAL, make_video, needs_real, write_video
from PIL import Image
from pycocotools import mask as coco
from torch.utils.data import DataLoader, SequentialSampler

import dataset
import evaluate
import infer
import outputs
import preview
import proposals
import train
from checkpoints import SHIPPED
from classes import class_id
from dataset import CLEVRDataset
from decode import count_frames, read_clip
from objects import Objects
from render import render_video
from utils import UserError
from videos import find_videos, list_video, read_video

SIZE = (64, 96)
FRAMES = 30


def write_clip(path, frames, codec="libx264"):
    """Encode frames uint8 (T, 3, H, W), 25 a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(25))
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for frame in frames.permute(0, 2, 3, 1).numpy():
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def frames():
    return render_video(2, (4, 6), FRAMES, height=SIZE[0], width=SIZE[1])[0]


@pytest.fixture(scope="module")
def clip(tmp_path_factory, frames):
    return write_clip(tmp_path_factory.mktemp("clips") / "video_00007.mp4", frames)


@pytest.fixture
def run(call):
    """Run infer.py with the shipped weights in this process."""
    options = ("--ckpt", SHIPPED, "--device", "cpu", "--workers", 0)
    return lambda *arguments: call(infer, *options, *arguments)


def decoded(clip):
    """Return the frames of a clip by other calls than the program's."""
    with av.open(str(clip)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def write_frames(folder, clip):
    folder.mkdir(parents=True)
    for t, frame in enumerate(decoded(clip)):
        Image.fromarray(frame).save(folder / f"image_{t}.png")
    return folder


def mask(path):
    return np.load(path)


@pytest.mark.parametrize("batch_size", [7, 22, 64])  # the clip is 30 frames long
def test_a_clip_has_the_masks_of_its_frames(run, tmp_path, clip, batch_size):
    data = tmp_path / "data"
    write_frames(data / "a/frames", clip)
    shutil.copy(clip, data / "a/clip.mp4")
    status, said, err = run("--data", data, "--out", tmp_path / "out", "--batch-size", batch_size)
    assert (status, err) == (0, "")
    assert "2 videos, 60 frames" in said
    found = mask(tmp_path / "out/a/clip/mask.npy")
    assert found.shape == (FRAMES, *SIZE)
    assert found.any()
    assert np.array_equal(found, mask(tmp_path / "out/a/frames/mask.npy"))
    assert run("--data", data / "a/clip.mp4", "--out", tmp_path / "one")[0] == 0
    assert np.array_equal(found, mask(tmp_path / "one/clip/mask.npy"))


@needs_real
def test_a_clip_of_clevrer_shows_its_six_objects_in_all_frames(run, tmp_path):
    """video_a.mp4 holds two spheres, three cylinders and a cube; none comes or goes."""
    names = "yellow metal sphere, gray metal sphere, cyan metal cylinder, purple metal cylinder, "
    names += "purple rubber cylinder, purple metal cube"
    there = set()
    for name in names.split(", "):
        colour, material, shape = name.split()
        there.add(class_id(shape, material, colour))
    source = REAL / "clevrer/video_a.mp4"
    assert run("--data", source, "--out", tmp_path / "out")[0] == 0
    found = mask(tmp_path / "out/video_a/mask.npy")
    assert found.shape == (128, 320, 480)
    assert set(np.unique(found)) == {0, *there}


def test_frames_of_a_clip_are_read_in_any_order_and_by_workers(clip, frames):
    data = CLEVRDataset(clip.parent, labelled=False)
    whole = torch.from_numpy(decoded(clip)).permute(0, 3, 1, 2)
    assert len(data) == FRAMES
    assert data.index.tolist() == [[0, t] for t in range(FRAMES)]
    for t in (5, 6, 29, 0, 0, 17):
        assert torch.equal(data[t], whole[t])
    for workers in (0, 2):  # a container that this process has opened is not read from by another
        loader = DataLoader(data, 11, sampler=SequentialSampler(data), num_workers=workers)
        assert torch.equal(torch.cat(list(loader)), whole)
    assert (whole.float() - frames.float()).abs().mean() < 8, "as they were encoded"


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".gif", "gif"), (".webm", "libvpx"), (".avi", "mpeg4")]
)
def test_other_video_files_are_read(tmp_path, frames, suffix, codec):
    path = write_clip(tmp_path / f"video{suffix}", frames, codec)
    video = list_video(path)
    assert len(read_video(video)) == video.count() == FRAMES


def test_every_so_manyth_frame_is_taken_of_clips_and_of_folders(run, tmp_path, clip):
    data = tmp_path / "data"
    write_frames(data / "frames", clip)
    shutil.copy(clip, data / "clip.mp4")
    status, said, _ = run("--data", data, "--out", tmp_path / "out", "--every", 6, "--objects")
    assert status == 0
    assert "2 videos, 10 frames" in said
    found = [mask(tmp_path / f"out/{name}/mask.npy") for name in ("clip", "frames")]
    assert np.array_equal(*found)
    rows = list(csv.DictReader((tmp_path / "out/clip/objects.csv").open(newline="")))
    assert {(row["frame"], row["number"], row["seconds"]) for row in rows} == {
        (str(i), str(6 * i), str(6 * i / 25)) for i in range(5)
    }
    rows = list(csv.DictReader((tmp_path / "out/frames/objects.csv").open(newline="")))
    assert {(row["number"], row["seconds"]) for row in rows} == {(str(6 * i), "") for i in range(5)}


@pytest.mark.parametrize("name", ["12:00:00.mp4", "file:1.mp4", "-i.mp4"])
def test_a_name_is_no_address(tmp_path, clip, name, monkeypatch):
    shutil.copy(clip, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert len(read_video(list_video(name))) == FRAMES


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="no ffmpeg")
@pytest.mark.parametrize(
    ("change", "suffix"),
    [
        (("-ss", "0.4", "-c", "copy"), ".mp4"),  # an edit list leaves out frames that are there
        (("-c:v", "libx264", "-bf", "2"), ".avi"),  # which has no time stamps
        (("-c", "copy", "-metadata:s:v", "rotate=90"), ".mov"),
        (("-c", "copy", "-movflags", "frag_keyframe"), ".mp4"),
        (("-c", "copy"), ".mkv"),
    ],
)
def test_clips_of_other_programs_have_the_pixels_that_ffmpeg_writes(tmp_path, clip, change, suffix):
    path = tmp_path / f"clip{suffix}"
    ffmpeg = ["ffmpeg", "-nostdin", "-v", "error", "-i"]
    before = change[:2] if change[0] == "-ss" else ()
    command = ["ffmpeg", "-nostdin", "-v", "error", *before, "-i", clip, *change[len(before) :]]
    subprocess.run([*command, path], check=True)
    (tmp_path / "png").mkdir()
    frames = ["-fps_mode", "passthrough", "-start_number", "0", tmp_path / "png/image_%d.png"]
    subprocess.run([*ffmpeg, path, *frames], check=True)
    found, expected = read_video(list_video(path)), read_video(list_video(tmp_path / "png"))
    assert torch.equal(found, expected)
    assert list_video(path).count() == len(expected)


def test_what_would_meet_in_one_folder_is_refused_before_anything_is_labelled(run, tmp_path, clip):
    write_frames(tmp_path / "data/x", clip)
    shutil.copy(clip, tmp_path / "data/x.mp4")
    status, _, err = run("--data", tmp_path / "data", "--out", tmp_path / "out")
    assert status == 2
    assert "data/x and " in err
    assert "data/x.mp4 would both be labelled in" in err
    assert not (tmp_path / "out").exists()


def test_the_page_plays_a_clip(run, call, tmp_path, clip):
    for every in (1, 5):
        out, page = tmp_path / f"out{every}", tmp_path / f"page{every}"
        assert run("--data", clip, "--out", out, "--every", every)[0] == 0
        arguments = ("--masks", out, "--data", clip, "--every", every)
        assert call(preview, *arguments, "--out", page, "--strip", tmp_path / "s.webp")[0] == 0
        shown = preview.read_description(page / "video_00007/video.js")
        assert (shown["frames"], shown["size"]) == (FRAMES // every, [SIZE[1], SIZE[0]])
        assert shown["objects"]
    truth = write_frames(tmp_path / "labelled/video_1", clip)
    every_fifth = mask(tmp_path / "out5/video_00007/mask.npy")
    np.save(truth / "mask.npy", np.repeat(every_fifth, 5, axis=0))  # right at each fifth alone
    out = tmp_path / "out"
    status, said, _ = run("--data", truth.parent, "--out", out, "--every", 5)
    typed = shlex.split(said.splitlines()[-1].partition(": ")[2])
    assert typed[-2:] == ["--every", "5"]
    options = ("--masks", out, "--data", truth.parent, "--every", 5, "--out", tmp_path / "page")
    assert call(preview, *options)[0] == 0
    shown = preview.read_description(tmp_path / "page/video_1/video.js")
    assert shown["figures"]["miou"] == pytest.approx(1, abs=1e-3)


# Damage


def test_what_is_no_whole_clip_is_named_and_the_others_are_done(run, tmp_path, clip, call):
    data = tmp_path / "data"
    data.mkdir()
    content = clip.read_bytes()
    shutil.copy(clip, data / "good.mp4")
    (data / "half.mp4").write_bytes(content[: len(content) // 2])
    (data / "empty.mp4").write_bytes(b"")
    (data / "text.mp4").write_text("no video")
    with av.open(str(data / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    os.mkfifo(data / "pipe.mp4")
    status, said, err = run("--data", data, "--out", tmp_path / "out")
    assert status == 1
    assert "1 video, 30 frames" in said
    assert "5 videos skipped" in err
    for name in ("half", "empty", "text", "sound", "pipe"):
        assert f"{name}.mp4" in err
    assert "Traceback" not in err
    assert [path.parent.name for path in (tmp_path / "out").rglob("mask.npy")] == ["good"]
    status, said, _ = call(dataset, data)
    assert status == 1
    assert "videos with faults: 5" in said


def test_a_clip_that_ends_before_its_header_says_is_no_clip(tmp_path, clip):
    """Its index says 30 frames, and so does `stts`, but the last of them are zeros."""
    content = bytearray(clip.read_bytes())
    start = content.index(b"mdat") + 4
    end = content.index(b"moov") - 4 if content.index(b"moov") > start else len(content)
    content[start + 9 * (end - start) // 10 : end] = bytes(end - start - 9 * (end - start) // 10)
    (tmp_path / "zeros.mp4").write_bytes(content)
    with pytest.raises(UserError, match=r"zeros\.mp4: "):
        list(read_clip(tmp_path / "zeros.mp4"))


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".gif", "gif"), (".webm", "libvpx"), (".mkv", "libx264")]
)
def test_half_a_clip_is_none_where_the_header_counts_no_frames(tmp_path, frames, suffix, codec):
    path = write_clip(tmp_path / f"clip{suffix}", frames, codec)
    assert len(list(read_clip(path))) == FRAMES
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"clip\{suffix}: "):
        list(read_clip(path))


@pytest.mark.parametrize("box", [b"ctts", b"stts", b"mvhd"])  # times, and what they count in
def test_a_damaged_time_does_not_leave_out_a_frame(tmp_path, clip, box):
    content = clip.read_bytes()
    start = content.index(box) + 4
    size = int.from_bytes(content[start - 8 : start - 4]) - 8
    path, said = tmp_path / "clip.mp4", []
    for at in range(start, start + min(size, 120)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 3]) + content[at + 1 :])
        try:
            assert len(list(read_clip(path))) == FRAMES
        except UserError as error:
            said.append(str(error))
    assert said
    assert all(str(path) in text for text in said)


def test_a_frame_of_another_size_is_a_fault_of_a_long_folder_too(run, tmp_path, clip):
    video = write_frames(tmp_path / "data/video_1", clip)
    Image.new("RGB", (32, 24)).save(video / "image_25.png")
    write_frames(tmp_path / "data/video_2", clip)
    status, said, err = run("--data", tmp_path / "data", "--out", tmp_path / "out")
    assert status == 1
    assert "1 video, 30 frames" in said
    assert "video_1: frames of different sizes: 96 x 64, 32 x 24" in err


def test_a_header_that_claims_too_many_pixels_is_refused(tmp_path, frames):
    """60,000 x 60,000, of a GIF, whose header alone says how large its frames are."""
    path = write_clip(tmp_path / "bomb.gif", frames, "gif")
    content = bytearray(path.read_bytes())
    assert [int.from_bytes(content[i : i + 2], "little") for i in (6, 8)] == [*SIZE[::-1]]
    content[6:10] = (60_000).to_bytes(2, "little") * 2
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bomb\.gif: "):
        list(read_clip(path))


# What frames there are is what is labelled


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (["image_11.png", "image_12.png"], [11, 12]),
        (["image_21.png"], [21]),
        (["image_0.png", "image_3.png", "frame_1.png", "7.jpg"], [0, 3]),
        (["frame_00001.png", "frame_00002.png"], [1, 2]),
        (["10.jpg", "9.jpg"], [9, 10]),
        (["image_0.jpeg"], [0]),
    ],
)
def test_frames_are_labelled_in_the_order_of_their_numbers(run, tmp_path, names, numbers, caplog):
    frames, _ = render_video(3, (3, 4), len(names), height=SIZE[0], width=SIZE[1])
    folder = tmp_path / "data/video_1"
    folder.mkdir(parents=True)
    for name, frame in zip(names, frames, strict=True):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(folder / name, quality=95)
    arguments = ("--data", tmp_path / "data", "--out", tmp_path / "out", "--objects")
    status, said, _ = run(*arguments)
    assert status == 0
    assert len(mask(tmp_path / "out/video_1/mask.npy")) == len(numbers)
    rows = csv.DictReader((tmp_path / "out/video_1/objects.csv").open(newline=""))
    assert {int(row["number"]) for row in rows} <= set(numbers)
    gaps = numbers != list(range(len(numbers)))
    assert ("1 video without frame 0 or with gaps" in said) == gaps
    unread = len(names) - len(numbers)
    assert (f"not read: {unread} pictures" in caplog.text) == bool(unread)


def test_with_labels_a_gap_stays_a_fault(tmp_path):
    video = make_video(tmp_path / "video_1", frames=3)
    (video / "image_1.png").unlink()
    np.save(video / "mask.npy", np.zeros((2, 6, 8), np.uint8))
    with pytest.raises(UserError, match=r"missing frame: image_1\.png"):
        read_video(list_video(video))


def test_frames_of_two_kinds_are_a_fault(tmp_path):
    video = make_video(tmp_path / "video_1", frames=2, labelled=False)
    for t in (0, 1):
        (video / f"image_{t}.png").rename(video / f"{t}.png")
    shutil.copy(video / "1.png", video / "frame_1.png")
    with pytest.raises(UserError, match=r"frames of several kinds: 1\.png, frame_1\.png: keep one"):
        read_video(list_video(video))


def test_a_jpeg_that_is_cut_off_or_none_is_named(tmp_path):
    video = make_video(tmp_path / "video_1", frames=2, size=(64, 96), labelled=False)
    for t in (0, 1):
        path = video / f"{t}.jpg"
        Image.open(video / f"image_{t}.png").save(path)
        (video / f"image_{t}.png").unlink()
    assert read_video(list_video(video)).shape == (2, 3, 64, 96)
    whole = (video / "1.jpg").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no picture"):
        (video / "1.jpg").write_bytes(content)
        with pytest.raises(UserError, match=r"1\.jpg: unreadable JPEG"):
            read_video(list_video(video))


def test_what_is_not_read_is_counted_once_with_what_to_do(tmp_path, caplog):
    video = make_video(tmp_path / "video_1", frames=2)
    for name in ("mask_0.png", "masks.npy", "frames.zip", "notes.txt", ".hidden.png"):
        (video / name).write_bytes(b"")
    find_videos(tmp_path)
    assert caplog.text.count("not read: 1 archives, 1 arrays, 1 pictures; frames are image_0") == 1


# Proposals


def read_proposals(path, size):
    """Read masks as loaders of CLEVRER do: decoded by pycocotools, frame after frame."""
    anno = json.loads(path.read_text())
    masks = np.zeros((len(anno["frames"]), *size), np.uint8)
    for t, frame in enumerate(anno["frames"]):
        for item in frame["objects"]:
            kind = class_id(item["shape"], item["material"], item["color"])
            assert 0 <= item["score"] <= 1
            masks[t][coco.decode(item["mask"]) > 0] = kind
    return anno, masks


def test_proposals_are_the_masks(run, tmp_path, clip):
    data = tmp_path / "data"
    write_frames(data / "video_12", clip)
    shutil.copy(clip, data / "video_00007.mp4")
    arguments = ("--data", data, "--proposals", tmp_path / "proposals", "--every", 5)
    assert run(*arguments, "--out", tmp_path / "out")[0] == 0
    for number, name in ((7, "video_00007"), (12, "video_12")):
        path = tmp_path / f"proposals/proposal_{number:05}.json"
        anno, masks = read_proposals(path, SIZE)
        assert (anno["video_index"], anno["video_name"]) == (number, f"{name}.mp4")
        assert [frame["frame_index"] for frame in anno["frames"]] == list(range(0, FRAMES, 5))
        assert np.array_equal(masks, mask(tmp_path / "out" / name / "mask.npy"))


def test_without_masks_proposals_are_resumed_by_their_records(run, tmp_path, clip):
    out, folder = tmp_path / "out", tmp_path / "proposals"
    arguments = ("--data", clip, "--out", out, "--proposals", folder, "--no-masks")
    assert run(*arguments)[0] == 0
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["mask.json"]
    assert "1 of 1 videos are done already" in run(*arguments, "--resume")[1]
    (folder / "proposal_00007.json").write_text("{}")
    said = run(*arguments, "--resume")[1]
    assert "files of 1 video are made again: their proposal is not what was written" in said
    assert json.loads((folder / "proposal_00007.json").read_text())["frames"]


def test_proposals_of_others_are_not_written_over(run, tmp_path, clip):
    (tmp_path / "proposals").mkdir()
    foreign = tmp_path / "proposals/proposal_00007.json"
    foreign.write_text("as CLEVRER published it")
    arguments = ("--data", clip, "--out", tmp_path / "out", "--proposals", tmp_path / "proposals")
    for more in ((), ("--resume",)):
        status, _, err = run(*arguments, *more)
        assert status == 2
        assert "holds proposal_00007.json" in err
        assert foreign.read_text() == "as CLEVRER published it"


def test_a_run_that_was_killed_before_its_proposal_goes_on(run, tmp_path, clip, monkeypatch):
    arguments = ("--data", clip, "--out", tmp_path / "out", "--proposals", tmp_path / "proposals")
    write = outputs.atomic_write

    def killed(path):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        return write(path)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "atomic_write", killed)
        assert run(*arguments)[0] == 130
    assert not list((tmp_path / "proposals").glob("*"))
    assert run(*arguments, "--resume")[0] == 0
    assert json.loads((tmp_path / "proposals/proposal_00007.json").read_text())["frames"]
    assert "1 of 1 videos have their masks already" in run(*arguments, "--resume")[1]


def test_a_run_that_was_killed_while_it_made_all_again_goes_on(run, tmp_path, clip, monkeypatch):
    """At whatever moment: what tells that the proposals are its own is never gone."""
    arguments = ("--data", clip, "--out", tmp_path / "out", "--proposals", tmp_path / "proposals")

    def killed(*_, **__):
        raise KeyboardInterrupt

    for moment in ("encode", "write_json", "atomic_write"):
        assert run(*arguments, "--every", 2)[0] == 0
        with monkeypatch.context() as patch:
            patch.setattr(outputs, moment, killed)
            assert run(*arguments)[0] == 130, moment
        assert run(*arguments, "--resume")[0] == 0, moment
    assert "1 of 1 videos have their masks already" in run(*arguments, "--resume")[1]


def test_proposals_of_an_earlier_run_are_not_forgotten(run, tmp_path, clip):
    """A run without them keeps in mind that they are its own, and whether they are still true."""
    path = tmp_path / "proposals/proposal_00007.json"
    arguments, wanted = ("--data", clip, "--out", tmp_path / "out"), ("--proposals", path.parent)
    assert run(*arguments, *wanted)[0] == 0
    before = path.stat().st_mtime_ns
    assert run(*arguments, "--objects", "--resume")[0] == 0
    said = run(*arguments, "--objects", *wanted, "--resume")[1]
    assert "1 of 1 videos have their masks already" in said
    assert path.stat().st_mtime_ns == before
    assert run(*arguments, "--every", 2)[0] == 0  # of which the proposals are not
    (tmp_path / "others").mkdir()
    foreign = shutil.copy(tmp_path / "out/video_00007/mask.json", tmp_path / "others" / path.name)
    status, _, err = run(*arguments, "--proposals", tmp_path / "others")
    assert (status, "holds proposal_00007.json, which" in err) == (2, True)
    assert foreign.is_file()
    status, said, _ = run(*arguments, "--every", 2, *wanted, "--resume")
    assert (status, "their proposal is not what was written" in said) == (0, True)
    assert len(json.loads(path.read_text())["frames"]) == FRAMES // 2


def test_a_resumed_run_says_that_masks_have_another_format(run, tmp_path, clip):
    arguments = ("--data", clip, "--out", tmp_path / "out", "--resume")
    assert run(*arguments, "--format", "npz")[0] == 0
    assert "1 of 1 videos have" in run(*arguments, "--format", "npz")[1]
    expected = np.load(tmp_path / "out/video_00007/mask.npz")["mask"]
    assert "are made again: they are in another format" in run(*arguments)[1]
    assert [path.name for path in (tmp_path / "out").rglob("mask.np*")] == ["mask.npy"]
    assert np.array_equal(np.load(tmp_path / "out/video_00007/mask.npy"), expected)


def test_a_resumed_run_keeps_a_table_that_it_does_not_want_but_is_true(run, tmp_path, clip):
    table = tmp_path / "out/video_00007/objects.csv"
    arguments = ("--data", clip, "--out", tmp_path / "out")
    assert run(*arguments, "--objects")[0] == 0
    made, wanted = table.read_bytes(), ("--proposals", tmp_path / "proposals")
    assert run(*arguments, *wanted, "--resume")[0] == 0
    assert table.read_bytes() == made
    assert "1 of 1 videos have" in run(*arguments, *wanted, "--objects", "--resume")[1]


def test_a_run_without_masks_leaves_none_of_another_beside_its_table(run, tmp_path, clip):
    arguments = ("--data", clip, "--out", tmp_path / "out", "--objects")
    assert run(*arguments)[0] == 0
    assert run(*arguments, "--no-masks", "--every", 2)[0] == 0
    names = {path.name for path in (tmp_path / "out").rglob("*.*")}
    assert names == {"objects.csv", "mask.json"}


def test_a_resumed_run_without_masks_adds_its_table_and_keeps_masks_that_are_true(
    run, tmp_path, clip
):
    path, table = (tmp_path / f"out/video_00007/{name}" for name in ("mask.npy", "objects.csv"))
    arguments = ("--data", clip, "--out", tmp_path / "out")
    assert run(*arguments)[0] == 0
    made = path.read_bytes()
    status, said, _ = run(*arguments, "--resume", "--no-masks", "--objects")
    assert status == 0
    assert "made again: they have no objects.csv" in said
    assert path.read_bytes() == made
    assert table.is_file()
    assert "1 of 1 videos have their masks already" in run(*arguments, "--resume")[1]
    # Where the mask is not what the record says, or of other frames, it goes.
    table.unlink()
    path.write_bytes(made[:-1] + bytes([made[-1] ^ 1]))
    assert run(*arguments, "--resume", "--no-masks", "--objects")[0] == 0
    assert not path.exists()


def test_a_share_writes_its_proposals_beside_those_of_another(run, tmp_path, clip):
    for number in range(6):
        path = tmp_path / f"data/video_{number}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(clip)
    arguments = ("--data", tmp_path / "data", "--proposals", tmp_path / "proposals", "--every", 5)
    for share in ("1/2", "2/2"):
        out = tmp_path / share.replace("/", "-")
        assert run(*arguments, "--out", out, "--shard", share)[0] == 0
        assert any(out.rglob("mask.npy"))
    assert len(list((tmp_path / "proposals").iterdir())) == 6


def test_proposals_need_names_with_one_number_each(run, tmp_path, clip):
    for names, said in (
        (("a.mp4",), "no number in its name"),
        (("1.mp4", "b/01.mp4"), "both write"),
    ):
        data = tmp_path / names[0]
        for name in names:
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(clip, data / name)
        arguments = ("--data", data, "--out", tmp_path / "out", "--proposals", tmp_path / "p")
        status, _, err = run(*arguments)
        assert status == 2
        assert said in err
        assert not (tmp_path / "out").exists()


def test_no_masks_and_nothing_else_is_refused(run, tmp_path, clip):
    status, _, err = run("--data", clip, "--out", tmp_path / "out", "--no-masks")
    assert status == 2
    assert "--no-masks leaves nothing to write" in err


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return a folder of two clips of 13 frames of 480 x 320, and their masks by name."""
    root, truth = tmp_path_factory.mktemp("published"), {}
    for k in range(2):
        pictures, masks = render_video([8, k], (3, 5), 13, height=320, width=480)
        path = write_clip(root / f"video_train/video_0000{k}.mp4", pictures)
        (root / "proposals").mkdir(exist_ok=True)
        content = proposals.encode(list_video(path), Objects(masks, {}))
        (root / f"proposals/proposal_0000{k}.json").write_bytes(content)
        truth[path.stem] = masks
    return root, truth


def test_proposals_are_labels_of_every_sixth_frame_at_half_the_size(published, own_cache):
    root, truth = published
    for cache in (True, False, True):
        data = CLEVRDataset(root / "video_train", cache=cache, proposals=root / "proposals")
        assert len(data) == 2 * 3
        for i, (v, t) in enumerate(data.index):
            frame, labels = data[i]
            whole = truth[data.videos[v].path.stem][6 * t]
            assert (frame.shape, labels.shape) == ((3, 160, 240), (160, 240))
            corners = whole.reshape(160, 2, 240, 2).transpose(1, 2).flatten(2)  # (160, 240, 4)
            alike = (corners == corners[..., :1]).all(-1)
            assert torch.equal(labels[alike], corners[..., 0][alike]), "of one class"
            counts = (corners == labels[..., None]).sum(-1)
            assert (counts >= 2).float().mean() > 0.999, "else the larger part of it"


def test_train_and_evaluate_take_proposals(published, tmp_path, call, own_cache, run):
    root, truth = published
    given = ("--data", root / "video_train", "--proposals", root / "proposals")
    options = ("--num-epochs", 1, "--widths", 8, 16, "--batch-size", 3, "--device", "cpu")
    status, said, err = call(train, *given, "--out", tmp_path / "run", *options)
    assert status == 0, err
    assert "3 training frames of 1 video, 3 validation frames of 1 video" in said
    for name, masks in truth.items():
        (tmp_path / "pred" / name).mkdir(parents=True)
        np.save(tmp_path / "pred" / name / "mask.npy", masks)
    score = tmp_path / "score.json"
    status, _, err = call(evaluate, "--pred", tmp_path / "pred", *given, "--json", score)
    assert status == 0, err
    figures = json.loads(score.read_text())
    assert (figures["miou"], figures["frames"]) == (1.0, 26)
    status, _, err = call(train, "--data", root / "video_train", "--proposals", tmp_path, *options)
    assert status == 2
    assert "has a file such as proposal_00000.json" in err


def test_the_surer_of_two_proposals_has_the_pixel_and_nonsense_is_a_fault(
    published, tmp_path, caplog
):
    root, _ = published
    video = list_video(root / "video_train/video_00000.mp4")
    plane = np.zeros((320, 480), np.uint8)
    plane[:100, :100] = 1
    runs = [coco.encode(np.asfortranarray(np.roll(plane, 50 * k, 1))) for k in range(2)]
    items = [
        {"color": "red", "material": "rubber", "shape": "cube", "score": 0.7},
        {"color": "blue", "material": "metal", "shape": "sphere", "score": 0.9},
    ]
    for item, run_lengths in zip(items, runs, strict=True):
        counts = run_lengths["counts"].decode()
        item["mask"] = {"size": run_lengths["size"], "counts": counts}
    path = tmp_path / "proposal_00000.json"
    red, blue = class_id("cube", "rubber", "red"), class_id("sphere", "metal", "blue")
    for order in (items, items[::-1]):
        path.write_text(json.dumps({"frames": [{"objects": order}, {"objects": []}]}))
        masks = proposals.read_masks(video, tmp_path)
        assert masks[0, 0, [0, 49, 50, 149, 150]].tolist() == [red, red, blue, blue, 0]
        assert not masks[1].any()
    for wrong, said in (
        ({"objects": [items[0] | {"color": "pink"}]}, "a pink rubber cube is no object of CLEVR"),
        ({"objects": [{"mask": 1}]}, "no proposals"),
        ({"objects": []}, "holds no masks"),
    ):
        path.write_text(json.dumps({"frames": [wrong] * 13}))
        with pytest.raises(UserError, match=f"proposal_00000.json: .*{said}"):
            proposals.read_masks(video, tmp_path)
    # Damaged run lengths, and frames that are not those of the clip.
    whole = json.loads((root / "proposals/proposal_00000.json").read_text())
    for index, frame in enumerate(whole["frames"]):
        frame["frame_index"] = index + 1
    path.write_text(json.dumps(whole))
    with pytest.raises(UserError, match="has no frame 0"):
        proposals.load_proposed(video.every_nth(6), tmp_path)
    counts = whole["frames"][0]["objects"][0]["mask"]["counts"]
    for wrong in (counts[: len(counts) // 2], ""):
        whole["frames"][0]["objects"][0]["mask"]["counts"] = wrong
        path.write_text(json.dumps(whole))
        with pytest.raises(UserError, match="do not fill their frame"):
            proposals.read_masks(video, tmp_path)
    path.write_text(json.dumps({"frames": [{"objects": []}] * 13}))
    shutil.copy(root / "proposals/proposal_00001.json", tmp_path)
    data = CLEVRDataset(root / "video_train", cache=False, proposals=tmp_path)
    assert [v.path.stem for v in data.videos] == ["video_00001"]
    assert "proposal_00000.json: holds no masks" in caplog.text


# Compact masks


def test_npz_is_small_and_read_wherever_npy_is(run, call, tmp_path, frames):
    _, truth = render_video(5, (4, 6), FRAMES, height=SIZE[0], width=SIZE[1])
    write_video(tmp_path / "data/video_1", frames, truth)
    arguments = ("--data", tmp_path / "data", "--out")
    assert run(*arguments, tmp_path / "npy")[0] == 0
    assert run(*arguments, tmp_path / "npz", "--format", "npz")[0] == 0
    plain, packed = tmp_path / "npy/video_1/mask.npy", tmp_path / "npz/video_1/mask.npz"
    with np.load(packed) as archive:
        assert np.array_equal(archive["mask"], np.load(plain))
    assert packed.stat().st_size < plain.stat().st_size / 10
    scores = []
    for folder in ("npy", "npz"):
        file = tmp_path / f"{folder}.json"
        compared = ("--pred", tmp_path / folder, "--data", tmp_path / "data", "--json", file)
        assert call(evaluate, *compared)[0] == 0
        scores.append(json.loads(file.read_text())["miou"])
    assert scores[0] == scores[1]
    page = ("--masks", tmp_path / "npz", "--data", tmp_path / "data", "--out", tmp_path / "page")
    assert call(preview, *page)[0] == 0
    (tmp_path / "data/video_1/mask.npy").unlink()
    np.savez_compressed(tmp_path / "data/video_1/mask.npz", mask=truth.numpy())
    data = CLEVRDataset(tmp_path / "data", cache=False)
    assert torch.equal(torch.stack([item[1] for item in data]), truth)
    # From one form to the other: the old file does not stay beside the new one.
    assert run(*arguments, tmp_path / "npz")[0] == 0
    assert [p.name for p in (tmp_path / "npz").rglob("mask.np*")] == ["mask.npy"]
    shutil.copy(packed.with_name("mask.npy"), tmp_path / "data/video_1/mask.npy")
    status, said, _ = call(dataset, tmp_path / "data")
    assert status == 1
    assert "holds mask.npy and mask.npz" in said


def test_an_npz_is_not_inflated_before_its_header_is_a_mask(tmp_path):
    video = make_video(tmp_path / "video_1", frames=2, labelled=False)
    for array, said in (
        (np.zeros((2, 6, 8), np.float32), "holds float32"),
        (np.zeros((40, 1000, 1000), np.uint8), "too long: 40 masks, 2 frames"),
        (np.zeros((2, 9, 8), np.uint8), "is 8 x 9, frames are 8 x 6"),
        (np.full((2, 6, 8), 49, np.uint8), "ids outside 0..48"),
    ):
        np.savez_compressed(video / "mask.npz", mask=array)
        assert said in " ".join(dataset.inspect_video(list_video(video)).faults)
    (video / "mask.npz").write_bytes((video / "mask.npz").read_bytes()[:-30])
    assert "unreadable mask" in " ".join(dataset.inspect_video(list_video(video)).faults)


# Several folders and machines


def test_several_folders_have_theirs_in_out(run, call, tmp_path, clip):
    for name in ("a", "b"):
        write_frames(tmp_path / name / "video_1", clip)
    both = (tmp_path / "a", tmp_path / "b")
    status, said, _ = run("--data", *both, clip, "--out", tmp_path / "out", "--every", 10)
    assert status == 0
    found = {
        path.relative_to(tmp_path / "out").parent.as_posix()
        for path in (tmp_path / "out").rglob("mask.npy")
    }
    assert found == {"a/video_1", "b/video_1", "video_00007"}
    page = ("--masks", tmp_path / "out", "--data", *both, clip, "--out", tmp_path / "page")
    status, said, _ = call(preview, *page, "--every", 10)
    assert status == 0
    assert "3 videos" in said
    (tmp_path / "c").symlink_to(tmp_path / "b")  # whose name is its own
    arguments = ("--data", tmp_path / "b", tmp_path / "c", "--out", tmp_path / "links")
    assert run(*arguments, "--every", 10)[0] == 0
    assert (tmp_path / "links/c/video_1/mask.npy").is_file()
    write_frames(tmp_path / "d/a/video_1", clip)
    status, _, err = run("--data", tmp_path / "a", tmp_path / "d/a", "--out", tmp_path / "new")
    assert status == 2
    assert "have the same name" in err


def test_shares_are_all_videos_once(run, tmp_path, clip):
    data = tmp_path / "data"
    for k in range(5):
        write_video(data / f"video_{k}", torch.zeros(1, 3, *SIZE, dtype=torch.uint8))
    found = []
    for share in ("1/3", "2/3", "3/3"):
        out = tmp_path / share[0]
        assert run("--data", data, "--out", out, "--shard", share)[0] == 0
        found += [path.parent.name for path in out.rglob("mask.npy")]
    assert sorted(found) == [f"video_{k}" for k in range(5)]
    for wrong in ("0/3", "4/3", "3", "a/b"):
        status, _, err = run("--data", data, "--out", tmp_path / "out", "--shard", wrong)
        assert status == 2
        assert "such as 3/16" in err


def test_counting_the_frames_of_a_clip_decodes_none(clip):
    assert count_frames(clip) == FRAMES
    assert list_video(clip).count() == FRAMES
    (video,) = find_videos(clip, every=7)
    assert (video.count(), len(read_video(video))) == (5, 5)
