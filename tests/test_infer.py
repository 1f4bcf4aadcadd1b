"""Masks for every video: mirrored, whole, in order, whatever the batch size or the faults."""

import copy
import csv
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, torchrun
from conftest import run as run_alone
from PIL import Image
from scipy import ndimage

import infer
import outputs
import pipeline
from borders import fill_holes
from checkpoints import load_checkpoint, save_checkpoint
from classes import CLASS_NAMES
from devices import mixed_precision
from model import UNet
from objects import Objects, follow
from outputs import Outputs, provenance
from tracks import gather
from videos import find_videos

SCRIPT = ROOT / "infer.py"


def write_video(folder, frames, size=(32, 48), seed=0):
    """Write frames that no network takes for one another."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for t in range(frames):
        blocks = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
        blocks.resize(size[::-1], Image.Resampling.NEAREST).save(folder / f"image_{t}.png")


def random_network(**config):
    """Return a network that finds objects of many classes in the frames of `write_video`."""
    torch.manual_seed(0)
    network = UNet(**config).eval()
    for head in network.heads:
        torch.nn.init.normal_(head.weight, std=0.5)
        torch.nn.init.normal_(head.bias, std=0.5)
    return network


@pytest.fixture(scope="module")
def network():
    return random_network(widths=(8, 16))


@pytest.fixture
def data(tmp_path):
    """Three videos of 22, 11 and 3 frames."""
    write_video(tmp_path / "data/a/video_2", 22, seed=1)
    write_video(tmp_path / "data/a/video_10", 11, seed=2)
    write_video(tmp_path / "data/b/video_00001", 3, seed=3)
    return tmp_path / "data"


@pytest.fixture
def ckpt(tmp_path, network, data):
    facts = {"data": str(data), "frame_size": [32, 48]}
    checkpoint = {"model": network.state_dict(), "model_config": network.config, **facts}
    save_checkpoint(tmp_path / "net.pt", checkpoint)
    return tmp_path / "net.pt"


@pytest.fixture
def run(call):
    """Run infer.py in this process; return its exit status, stdout and stderr."""
    return lambda *arguments: call(infer, "--device", "cpu", "--workers", "0", *arguments)


def masks_below(folder):
    """Return every file below a folder but records as an array, by its relative path."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "mask.json"]
    return {path.relative_to(folder).as_posix(): np.load(path) for path in files}


def assert_labels_of(mask, video, network, tracking=True):
    """Check that each mask is what the network finds in its frame, read by other means.

    Objects are where model.predict finds them; with `tracking` they are followed.

    Rounding differs between batch sizes, which may turn a few pixels, and borders are drawn by the
    pixel, of which noise has many; the masks of two frames have half of their pixels in common.
    """
    count = len(list(video.iterdir()))
    pictures = [np.asarray(Image.open(video / f"image_{t}.png")) for t in range(count)]
    frames = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    network = copy.deepcopy(network).fuse()
    with mixed_precision(frames.device):
        expected = network.predict(frames)
    if tracking:
        with mixed_precision(frames.device), torch.inference_mode():
            objectness, kind = network.evidence(network.answers(frames))
        objects = objectness[:, 0] > 0
        assert (objects == (expected > 0)).double().mean() > 0.97
        told = gather(objects, kind).half()  # by which classes of noise are chosen, by a hair
        expected = fill_holes(follow(objects, told, frames.shape[3] / 240).labels)
    expected = expected.numpy()
    assert mask.dtype == np.uint8
    assert mask.shape == expected.shape
    assert (mask == expected).mean(axis=(1, 2)).min() > (0.8 if tracking else 0.95)


def test_script_mirrors_the_data_it_was_trained_on(tmp_path, data, ckpt, network):
    write_video(data / "c/other", 2, size=(33, 47))  # a size of its own, no multiple of anything
    (data / "a/video_2/mask.npy").write_bytes(b"labels are not even read")
    options = ("--scale", 1, "--device", "cpu")  # by whose rounding classes of noise are chosen
    done = run_alone("infer.py", "--ckpt", ckpt, "--out", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert "4 videos, 38 frames in " in done.stdout.splitlines()[-2]
    (data / "a/video_2/mask.npy").unlink()
    found = masks_below(tmp_path / "out")
    videos = "a/video_2", "a/video_10", "b/video_00001", "c/other"
    assert set(found) == {f"{video}/mask.npy" for video in videos}
    for video in videos:
        assert_labels_of(found[f"{video}/mask.npy"], data / video, network)


@pytest.mark.parametrize("threads", [1, 4])  # of which two label batches of their own
@pytest.mark.parametrize("batch_size", [1, 4, 22, 64])
def test_batch_size_never_mixes_frames(run, tmp_path, data, ckpt, network, batch_size, threads):
    write_video(data / "a/video_5", 2, size=(24, 16), seed=4)  # between the others
    torch.set_num_threads(threads)
    try:
        options = ("--batch-size", batch_size, "--scale", 1)
        result = run("--ckpt", ckpt, "--out", tmp_path / "out", *options)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    status, _, err = result
    assert (status, err) == (0, "")
    found = masks_below(tmp_path / "out")
    assert len(found) == 4
    for name, mask in found.items():
        assert_labels_of(mask, (data / name).parent, network)


def test_a_single_video(run, tmp_path, data, ckpt, network):
    video = data / "b/video_00001"
    assert run("--ckpt", ckpt, "--out", tmp_path / "out", "--data", video)[0] == 0
    assert_labels_of(np.load(tmp_path / "out/mask.npy"), video, network)


def test_bare_and_half_precision_state_dict(run, tmp_path, data):
    network = random_network().half().float()
    torch.save(network.half().state_dict(), tmp_path / "bare.pt")
    arguments = "--ckpt", tmp_path / "bare.pt", "--out", tmp_path / "out"
    status, _, err = run(*arguments)
    assert status == 2  # it does not say what it was trained on
    assert "--data" in err
    assert run(*arguments, "--data", data / "b", "--scale", 1)[0] == 0
    mask = np.load(tmp_path / "out/video_00001/mask.npy")
    assert_labels_of(mask, data / "b/video_00001", network.float())


def test_faulty_videos_are_named_and_the_others_done(run, tmp_path, data, ckpt, network):
    for number, name in enumerate(("video_3", "video_4", "video_5", "video_6")):
        write_video(data / "a" / name, 4, seed=number)
    (data / "a/video_3/image_2.png").write_bytes(b"not a PNG")
    (data / "a/video_4/image_1.png").rename(data / "a/video_4/image_01.png")
    shutil.copy(data / "a/video_4/image_01.png", data / "a/video_4/image_1.png")
    Image.new("RGB", (8, 8)).save(data / "a/video_5/image_3.png")
    whole = (data / "a/video_6/image_0.png").read_bytes()
    (data / "a/video_6/image_0.png").write_bytes(whole[: len(whole) // 2])
    status, out, err = run("--ckpt", ckpt, "--out", tmp_path / "out")
    assert status == 1
    assert "3 videos, 36 frames" in out
    assert "4 videos skipped" in err
    for named in (
        "video_3/image_2.png",
        "video_4: two frames have the same number",
        "video_5: frames of different sizes: 48 x 32, 8 x 8",
        "video_6/image_0.png",
    ):
        assert named in err
    found = masks_below(tmp_path / "out")
    assert set(found) == {f"{v}/mask.npy" for v in ("a/video_2", "a/video_10", "b/video_00001")}
    for name, mask in found.items():
        assert_labels_of(mask, (data / name).parent, network)


@pytest.mark.parametrize("content", [None, b"", b"garbage", "other network", "no network"])
def test_a_faulty_checkpoint_is_named(run, tmp_path, data, content):
    path = tmp_path / "net.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "other network":
        weights = UNet(widths=(8, 16)).state_dict()
        torch.save({"model": weights, "model_config": {"widths": [8, 24]}}, path)
    elif content == "no network":
        torch.save({"model": {}, "model_config": {"colour": "red"}}, path)
    status, _, err = run("--ckpt", path, "--out", tmp_path / "out", "--data", data)
    assert status == 2
    assert str(path) in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_frame_that_is_a_link_to_nothing_costs_its_video_alone(run, tmp_path, data, ckpt):
    (data / "a/video_10/image_3.png").unlink()
    (data / "a/video_10/image_3.png").symlink_to("nowhere")
    arguments = ("--ckpt", ckpt, "--out", tmp_path / "out")
    for options, said in (((), "2 videos, 25 frames"), (("--resume",), "2 of 3 videos have")):
        status, out, err = run(*arguments, *options)
        assert status == 1
        assert said in out
        assert "image_3.png: unreadable" in err


@pytest.mark.parametrize("text", ["[" * 100_000, '{"mask":' * 50_000, "[]", "{}", "\0", "1" * 5000])
def test_records_of_nonsense_make_masks_anew(run, tmp_path, data, ckpt, text):
    arguments = ("--ckpt", ckpt, "--out", tmp_path / "out", "--data", data / "b")
    assert run(*arguments)[0] == 0
    record = tmp_path / "out/video_00001/mask.json"
    record.write_text(text)
    status, out, _ = run(*arguments, "--resume")
    assert status == 0
    assert "masks of 1 video are made again: nothing tells what made them" in out
    record.unlink()
    os.mkfifo(record)  # which would be waited for
    assert "nothing tells what made them" in run(*arguments, "--resume")[1]


def test_what_a_checkpoint_says_of_its_data_may_be_nonsense(run, tmp_path, network):
    for data in (5, ["a"], "\0"):
        checkpoint = {"model": network.state_dict(), "model_config": network.config, "data": data}
        save_checkpoint(tmp_path / "net.pt", checkpoint)
        status, _, err = run("--ckpt", tmp_path / "net.pt", "--out", tmp_path / "out")
        assert status == 2
        assert "net.pt was trained on" in err


def test_nothing_to_label(run, tmp_path, ckpt):
    (tmp_path / "empty").mkdir()
    for data in (tmp_path / "empty", tmp_path / "absent"):
        status, _, err = run("--ckpt", ckpt, "--out", tmp_path / "out", "--data", data)
        assert status == 2
        assert str(data) in err


@pytest.mark.parametrize("out", ["data", "link", "data/a", "data/../data"])
def test_labels_are_never_written_over(run, tmp_path, data, ckpt, out):
    labels = data / "a/video_2/mask.npy"
    labels.write_bytes(b"labels")
    (tmp_path / "link").symlink_to(data)
    root = data / "a" if out == "data/a" else data
    before = sorted(tmp_path.rglob("*"))
    status, _, err = run("--ckpt", ckpt, "--data", root, "--out", tmp_path / out)
    assert status == 2
    assert "--out" in err
    assert labels.read_bytes() == b"labels"
    assert sorted(tmp_path.rglob("*")) == before


def test_labels_of_another_split_are_never_written_over(run, tmp_path, data, ckpt):
    shutil.copytree(data / "a", tmp_path / "val")  # videos of the same names
    (tmp_path / "val/video_2/mask.npy").write_bytes(b"labels")
    assert run("--ckpt", ckpt, "--data", data / "a", "--out", tmp_path / "val")[0] == 2
    assert (tmp_path / "val/video_2/mask.npy").read_bytes() == b"labels"


def test_a_mask_that_cannot_be_written_is_named(run, tmp_path, ckpt):
    (tmp_path / "out/a").mkdir(parents=True)
    (tmp_path / "out/a/video_2").write_text("a file where a folder must go")
    status, _, err = run("--ckpt", ckpt, "--out", tmp_path / "out")
    assert status == 2
    assert "out/a/video_2: File exists: move away the file that is where a folder has to be" in err


def changed_since(before, folder):
    """Return the names of the videos whose masks are not the files that they were."""
    return {p.parent.name for p, old in before.items() if (folder / p).stat().st_mtime_ns != old}


def times(folder):
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("mask.npy")}


def test_a_second_run_writes_anew_and_resume_does_not(run, tmp_path, data, ckpt):
    out = tmp_path / "out"
    assert run("--ckpt", ckpt, "--out", out)[0] == 0
    before = times(out)
    status, said, _ = run("--ckpt", ckpt, "--out", out, "--resume")
    assert status == 0
    assert "3 of 3 videos have their masks already" in said
    assert changed_since(before, out) == set()
    assert run("--ckpt", ckpt, "--out", out)[0] == 0
    assert len(changed_since(before, out)) == 3


def touch_a_frame(out, data):
    frame = data / "a/video_2/image_1.png"
    frame.write_bytes((data / "a/video_2/image_0.png").read_bytes())


def turn_a_bit(out, data):
    mask = bytearray((out / "a/video_2/mask.npy").read_bytes())
    mask[-7] ^= 1
    (out / "a/video_2/mask.npy").write_bytes(mask)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda out, data: (out / "a/video_2/mask.npy").unlink(), None),
        (lambda out, data: (out / "a/video_2/mask.json").unlink(), "nothing tells what made them"),
        (lambda out, data: (out / "a/video_2/mask.json").write_text("[1]"), "nothing tells"),
        (turn_a_bit, "their mask is not what was written"),
        (touch_a_frame, "their frames have changed"),
    ],
)
def test_resume_keeps_only_what_is_whole_and_of_these_frames(
    run, tmp_path, data, ckpt, spoil, reason
):
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(data, copy)
    arguments = ("--ckpt", ckpt, "--data", copy, "--out", out)
    assert run(*arguments)[0] == 0
    spoil(out, copy)
    before = times(out)
    status, said, _ = run(*arguments, "--resume")
    assert status == 0
    assert "2 of 3 videos have their masks already" in said
    assert (reason or "") in said
    assert said.count("are made again") == (reason is not None)
    assert changed_since(before, out) <= {"video_2"}
    fresh = tmp_path / "fresh"
    assert run("--ckpt", ckpt, "--data", copy, "--out", fresh)[0] == 0
    np.testing.assert_array_equal(
        *(np.load(folder / "a/video_2/mask.npy") for folder in (out, fresh))
    )
    assert "3 of 3 videos" in run(*arguments, "--resume")[1]


def test_resume_makes_again_what_others_made(run, tmp_path, data, ckpt):
    out = tmp_path / "out"
    assert run("--ckpt", ckpt, "--out", out, "--objects")[0] == 0
    status, said, _ = run("--ckpt", ckpt, "--out", out, "--resume", "--no-consistency")
    assert "masks of 3 videos are made again: other options made them" in said
    assert not list(out.rglob("objects.csv"))  # it told of other masks
    other = load_checkpoint(ckpt)
    other["model"] = {k: v * 1.5 if v.is_floating_point() else v for k, v in other["model"].items()}
    save_checkpoint(tmp_path / "other.pt", other)
    arguments = ("--ckpt", tmp_path / "other.pt", "--out", out, "--no-consistency", "--resume")
    assert "masks of 3 videos are made again: another checkpoint" in run(*arguments)[1]
    assert "3 of 3 videos have their masks already" in run(*arguments)[1]


@pytest.mark.parametrize("when", ["mask.npy", "objects.csv", "mask.json"])
def test_resume_sees_what_another_run_wrote_in_between(
    run, tmp_path, data, ckpt, monkeypatch, when
):
    """Two runs with other options into one folder; the other overtakes before a file is written."""
    out, overtaken = tmp_path / "out", []
    real = outputs.atomic_write, outputs.write_json

    def other_run(path):
        if path.name == when and not overtaken:
            overtaken.append(path)
            video = next(v for v in find_videos(data) if v.path.name == path.parent.name)
            others = Outputs(out, provenance("another"), with_table=True)
            others.save(video, Objects(torch.zeros(1, 2, 2).byte(), {}), [])

    def write(path):
        other_run(path)
        return real[0](path)

    def write_record(path, value, compact):
        other_run(path)
        real[1](path, value, compact=compact)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "atomic_write", write)
        patch.setattr(outputs, "write_json", write_record)
        assert run("--ckpt", ckpt, "--out", out, "--objects", "--data", data)[0] == 0
    assert overtaken
    arguments = "--ckpt", ckpt, "--objects", "--data", data, "--out"
    assert run(*arguments, out, "--resume")[0] == 0
    assert run(*arguments, tmp_path / "fresh")[0] == 0
    for path in (tmp_path / "fresh").rglob("*.*"):
        assert path.read_bytes() == (out / path.relative_to(tmp_path / "fresh")).read_bytes()


def test_two_runs_that_resume_do_no_video_twice(run, tmp_path, data, ckpt, monkeypatch):
    """The other labels all but the first between this one's plan and its work."""
    out, plan, written = tmp_path / "out", infer.plan, []
    save = outputs.Outputs.save

    def overtaken(*arguments):
        videos = plan(*arguments)
        monkeypatch.setattr(infer, "plan", plan)
        assert run("--ckpt", ckpt, "--out", out)[0] == 0
        shutil.rmtree(out / videos[0].target)
        monkeypatch.setattr(
            outputs.Outputs, "save", lambda *args: written.append(args[1]) or save(*args)
        )
        return videos

    monkeypatch.setattr(infer, "plan", overtaken)
    assert run("--ckpt", ckpt, "--out", out, "--resume")[0] == 0
    assert len(written) == 1
    assert len(masks_below(out)) == 3


def test_resume_makes_a_table_of_others_again(run, tmp_path, data, ckpt):
    """Also where this run wants none: whoever reads it would take it for that of these masks."""
    out = tmp_path / "out"
    assert run("--ckpt", ckpt, "--out", out)[0] == 0
    (out / "a/video_2/objects.csv").write_text("of another run")
    said = run("--ckpt", ckpt, "--out", out, "--resume")[1]
    assert "masks of 1 video are made again: their objects.csv is not what was written" in said
    assert not list(out.rglob("objects.csv"))


def test_killed_and_resumed_gives_the_same_bytes(run, tmp_path, ckpt):
    data, out = tmp_path / "many", tmp_path / "out"
    write_video(data / "video_0", 22)
    for number in range(1, 30):
        shutil.copytree(data / "video_0", data / f"video_{number}")
    arguments = ["--ckpt", ckpt, "--data", data, "--batch-size", "2"]
    command = [sys.executable, SCRIPT, *arguments, "--out", out, "--device", "cpu"]
    process = subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("*/mask.npy"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    killed = {path: np.load(path) for path in out.glob("*/mask.npy")}
    assert 3 <= len(killed) < 30
    assert {mask.shape for mask in killed.values()} == {(22, 32, 48)}
    (out / "video_29").mkdir(exist_ok=True)
    (out / "video_29/.mask.npy.0123456789abcdef.tmp").write_bytes(b"what a killed run may leave")
    assert run(*arguments, "--out", out, "--resume")[0] == 0
    assert run(*arguments, "--out", tmp_path / "whole")[0] == 0
    resumed, whole = masks_below(out), masks_below(tmp_path / "whole")
    assert len(resumed) == 30
    assert resumed.keys() == whole.keys()
    for name, mask in resumed.items():
        np.testing.assert_array_equal(mask, whole[name])


def test_masks_that_are_made_again_are_counted(run, tmp_path, data, ckpt):
    arguments = "--ckpt", ckpt, "--data", data, "--out", tmp_path / "out"
    assert "made again" not in run(*arguments)[1]
    (tmp_path / "out/a/video_2/mask.npy").unlink()
    assert "2 of 3 videos have masks, which are made again" in run(*arguments)[1]
    said = run(*arguments, "--no-masks", "--objects")[1]
    assert "3 of 3 videos have masks, which --no-masks deletes, where there are any" in said
    assert not list((tmp_path / "out").rglob("mask.npy"))


def test_a_mask_that_stays_because_its_video_has_gone_bad_is_named(run, tmp_path, data, ckpt):
    arguments = "--ckpt", ckpt, "--data", data, "--out", tmp_path / "out"
    assert run(*arguments)[0] == 0
    before = (tmp_path / "out/a/video_2/mask.npy").read_bytes()
    (data / "a/video_2/image_1.png").write_bytes(b"no picture")
    status, _, err = run(*arguments)
    assert status == 1
    assert f"What a former run wrote in {tmp_path / 'out/a/video_2'} stays there." in err
    assert (tmp_path / "out/a/video_2/mask.npy").read_bytes() == before


def test_ctrl_c_says_how_to_go_on(run, tmp_path, data, ckpt, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(infer, "label", interrupt)
    status, _, err = run("--ckpt", ckpt, "--data", data, "--out", tmp_path / "out")
    assert status == 130
    assert err.strip().startswith("interrupted")
    assert err.strip().endswith("--resume")
    assert f"--out {tmp_path / 'out'}" in err


def test_no_consistency_is_what_the_network_says(run, tmp_path, data, ckpt, network):
    arguments = "--ckpt", ckpt, "--data", data
    assert run(*arguments, "--out", tmp_path / "own", "--no-consistency")[0] == 0
    assert run(*arguments, "--out", tmp_path / "out")[0] == 0
    own, together = masks_below(tmp_path / "own"), masks_below(tmp_path / "out")
    for name, mask in own.items():
        assert_labels_of(mask, (data / name).parent, network, tracking=False)
        reached = [~ndimage.binary_fill_holes(frame > 0) for frame in mask]  # all but holes
        assert not together[name][np.stack(reached)].any()
    assert any((own[name] != together[name]).any() for name in own)


def test_processes_share_out_the_videos(run, tmp_path, data, ckpt):
    """Each video is done once, to the same labels, though they do not divide evenly.

    What is done to frames of another size is said once, though the first process has none.
    """
    write_video(data / "b/video_00002", 3, size=(64, 96))
    arguments = ["--ckpt", ckpt]
    launcher, options = torchrun(5), ["--device", "cpu", "--workers", "0"]
    out = "--out", tmp_path / "many"
    done = run_alone("infer.py", *arguments, *options, *out, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 videos, 39 frames in " in done.stdout.splitlines()[-2]
    status, said, _ = run(*arguments, "--out", tmp_path / "one")
    assert status == 0
    for text in (done.stdout, said):
        assert text.count("frames of 96 x 64 are brought to 48 x 32") == 1
    one, many = masks_below(tmp_path / "one"), masks_below(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[name], many[name]) for name in one)


def test_what_is_left_to_resume_is_shared_out_anew(run, tmp_path, data, ckpt):
    """A video for two processes, of which one has nothing to do."""
    arguments = ("--ckpt", ckpt, "--out", tmp_path / "out")
    assert run(*arguments)[0] == 0
    expected = masks_below(tmp_path / "out")
    (tmp_path / "out/a/video_10/mask.npy").unlink()
    options = ("--device", "cpu", "--workers", "0", "--resume")
    done = run_alone("infer.py", *arguments, *options, launcher=torchrun(2))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 of 3 videos have their masks already") == 1
    assert "1 video, 11 frames in " in done.stdout
    again = masks_below(tmp_path / "out")
    assert all(np.array_equal(again[name], expected[name]) for name in expected)


def test_the_script_runs_on_a_pretended_gpu(run, tmp_path, data, ckpt):
    """In threads and in processes; a result read before its copy came would be rubbish."""
    (tmp_path / "pretended.py").write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import infer, pretend\n"
        "pretend.install()\n"  # in all processes
        "if __name__ == '__main__':\n"
        "    infer.run_script(infer.main)\n"
    )
    assert run("--ckpt", ckpt, "--out", tmp_path / "cpu")[0] == 0
    cpu = masks_below(tmp_path / "cpu")
    for workers in (0, 2):
        out = tmp_path / f"gpu {workers}"
        options = ("--device", "pretend", "--workers", workers, "--ckpt", ckpt, "--out", out)
        done = run_alone(tmp_path / "pretended.py", *options)
        assert done.returncode == 0, done.stderr[-3000:]
        gpu = masks_below(out)
        assert gpu.keys() == cpu.keys()
        assert all((gpu[name] == cpu[name]).mean() > 0.99 for name in cpu)


def test_processes_that_label_change_nothing(call, run, monkeypatch, tmp_path, data, ckpt):
    """Of a faulty video, of short ones, and of some longer than a batch; they are the default."""
    (data / "a/video_10/image_3.png").write_bytes(b"no picture")
    for k in range(5):
        write_video(data / f"c/video_{k}", 1, seed=k)
    monkeypatch.setattr(pipeline, "MANY_FRAMES", 22 + 11 + 3 + 5)
    monkeypatch.setattr(pipeline, "usable_cpus", lambda: 2)
    monkeypatch.setattr(pipeline, "free_memory", lambda device: 2**40)
    arguments = ("--ckpt", ckpt, "--device", "cpu", "--batch-size", 12, "--objects", "--out")
    status, said, err = call(infer, *arguments, tmp_path / "many")
    assert status == 1
    assert "2 processes label" in said
    assert "7 videos, 30 frames in " in said
    assert "video_10/image_3.png" in err
    assert run(*arguments[:2], *arguments[4:], tmp_path / "alone")[0] == 1
    many, alone = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "many", tmp_path / "alone")
    )
    assert many == alone
    assert len(many) == 7 * 3


DEADLY = """
import os, signal, sys
sys.path.insert(0, os.environ["ROOT"])
import infer
import pipeline
label_short = pipeline.Work.label_short

def ends(work, numbers):
    if not list(work.outputs.out.rglob("mask.npy")):  # the first piece of work
        return label_short(work, numbers)
    if os.environ["END"] == "error":
        raise OSError(28, "No space left on device", "disk")
    if os.environ["END"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ["END"] == "bug":
        class Local(Exception): pass  # which no other process knows
        raise Local("a bug")
    if os.environ["END"] == "exit":
        os._exit(3)
    os.killpg(0, signal.SIGINT)  # as a terminal sends it
    signal.pause()

pipeline.Work.label_short = ends
if __name__ == "__main__":
    infer.run_script(infer.main)
"""


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("kill", 2, "error: a process that labels was killed, perhaps for lack of memory: what"),
        ("exit", 2, "error: a process that labels has ended with status 3, see above"),
        ("bug", 1, "Local: a bug"),
        ("error", 2, "error: disk: No space left on device: make room"),
        ("ctrl-c", 130, "interrupted, what is done is kept; go on with: python"),
    ],
)
def test_what_ends_a_process_that_labels_is_one_line(end, status, said, run, tmp_path, data, ckpt):
    """And nothing is lost: --resume goes on."""
    script = tmp_path / "deadly.py"
    script.write_text(DEADLY)
    arguments = ("--ckpt", ckpt, "--data", data, "--out", tmp_path / "out")
    options = {"env": os.environ | {"ROOT": str(ROOT), "END": end}, "process_group": 0}
    done = run_alone(script, *arguments, "--device", "cpu", "--workers", 1, **options)
    assert done.returncode == status, done.stderr[-3000:]
    assert said in done.stderr
    assert ("Traceback" in done.stderr) == (end == "bug")
    assert len(masks_below(tmp_path / "out")) == 1
    assert run(*arguments, "--resume")[0] == 0
    assert len(masks_below(tmp_path / "out")) == 3


def test_objects_csv_says_where_each_object_is(run, tmp_path, data, ckpt):
    arguments = ("--ckpt", ckpt, "--out", tmp_path / "out", "--data", data / "a/video_10")
    assert run(*arguments, "--objects")[0] == 0
    mask = np.load(tmp_path / "out/mask.npy")
    with (tmp_path / "out/objects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({(row["frame"], row["object"]) for row in rows}) == len(rows)
    seen = np.zeros_like(mask)
    for row in rows:
        t, kind = int(row["frame"]), int(row["class_id"])
        assert row["name"] == CLASS_NAMES[kind]
        y, x = np.nonzero(mask[t] == kind)
        assert int(row["pixels"]) == len(x)
        assert float(row["x"]) == pytest.approx(x.mean(), abs=0.0051)
        assert float(row["y"]) == pytest.approx(y.mean(), abs=0.0051)
        assert (row["number"], row["seconds"]) == (row["frame"], "")
        box = [int(row[side]) for side in ("left", "top", "right", "bottom")]
        assert box == [x.min(), y.min(), x.max(), y.max()]
        edge = box[0] == 0 or box[1] == 0 or box[2] == 47 or box[3] == 31
        assert row["at_edge"] == str(int(edge))
        assert 0 <= float(row["confidence"]) <= 1
        seen[t][mask[t] == kind] = kind
    assert np.array_equal(seen, mask), "every object pixel is in the table"


def test_resume_makes_the_tables_that_are_missing(run, tmp_path, data, ckpt):
    arguments = ("--ckpt", ckpt, "--out", tmp_path / "out", "--data", data)
    assert run(*arguments)[0] == 0
    status, out, _ = run(*arguments, "--resume", "--objects")
    assert status == 0
    assert "0 of 3 videos have their masks already" in out
    assert len(list((tmp_path / "out").rglob("objects.csv"))) == 3
    assert "3 of 3 videos" in run(*arguments, "--resume", "--objects")[1]


def test_objects_need_to_be_followed(run, tmp_path, ckpt):
    options = ("--objects", "--no-consistency")
    status, _, err = run("--ckpt", ckpt, "--out", tmp_path / "out", *options)
    assert status == 2
    assert "--no-consistency" in err
