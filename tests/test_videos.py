"""Videos on disk: their order, their pixels, and every fault by name."""

import io
import os
import struct
import tracemalloc
import zlib

import numpy as np
import PIL.Image
import pytest
from conftest import REAL, make_video, needs_real, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dataset
from dataset import CLEVRDataset
from decode import read_frame
from utils import UserError
from videos import find_labelled, find_videos, inspect_video, list_video, read_video

SIZE = (6, 8)  # height, width, of make_video
pytestmark = pytest.mark.usefixtures("own_cache")


# Folders and frames


def test_videos_come_in_natural_order_at_any_depth(tmp_path):
    names = ["video0", "video2", "video10", "video_7", "video_00007", "video_10", "z/deep/video_3"]
    for name in names:
        make_video(tmp_path / name, frames=1)
    make_video(tmp_path / ".hidden" / "video_1", frames=1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "z" / "deep" / "round").symlink_to(tmp_path)  # a circle of links
    found = [str(video.path.relative_to(tmp_path)) for video in find_videos(tmp_path)]
    assert found[:3] == ["video0", "video2", "video10"]
    assert set(found[3:5]) == {"video_7", "video_00007"}
    assert found[5:] == ["video_10", "z/deep/video_3"]


def test_folders_may_lie_deeper_than_python_can_recurse(tmp_path, deep):
    deep(1_100)
    PIL.Image.new("RGB", (2, 2)).save("image_0.png")
    assert len(find_videos(tmp_path)[0].path.parts) == 1_100 + len(tmp_path.parts)


def test_links_to_videos_are_followed(tmp_path):
    make_video(tmp_path / "elsewhere" / "video_1", frames=1)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(tmp_path / "elsewhere")
    assert [v.path for v in find_videos(tmp_path / "data")] == [
        tmp_path / "data" / "train" / "video_1"
    ]
    assert [v.path for v in find_videos(tmp_path / "elsewhere" / "video_1")] == [
        tmp_path / "elsewhere" / "video_1"
    ]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_pixels_equal_pillows(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).convert(mode).save(tmp_path / "image_0.png")
    frame = read_frame(tmp_path / "image_0.png")
    expected = np.asarray(PIL.Image.open(tmp_path / "image_0.png").convert("RGB"))
    assert np.array_equal(frame.permute(1, 2, 0).numpy(), expected)


# Faults


def no_frame(video):
    (video / "image_1.png").unlink()


def twice(video):
    (video / "image_01.png").write_bytes((video / "image_1.png").read_bytes())


def damaged_png(video):
    data = (video / "image_1.png").read_bytes()
    (video / "image_1.png").write_bytes(data[: len(data) // 2])


def flipped_bit(video):  # in the pixels, which Pillow decodes without looking at the checksum
    data = bytearray((video / "image_1.png").read_bytes())
    data[len(data) // 2] ^= 1
    (video / "image_1.png").write_bytes(data)


def transparent_palette(video):
    picture = PIL.Image.open(video / "image_1.png").convert("P")
    picture.save(video / "image_1.png", transparency=bytes([0, 128]))


def empty_png(video):
    (video / "image_1.png").write_bytes(b"")


def dangling_link(video):
    (video / "image_1.png").unlink()
    (video / "image_1.png").symlink_to(video / "nowhere")


def sixteen_bits(video):
    PIL.Image.fromarray(np.zeros(SIZE, np.uint16)).save(video / "image_1.png")


def sixteen_bit_colours(video):
    rows = b"".join(b"\0" + bytes(6 * SIZE[1]) for _ in range(SIZE[0]))
    header = struct.pack(">IIBBBBB", SIZE[1], SIZE[0], 16, 2, 0, 0, 0)
    write_png(video / "image_1.png", (b"IHDR", header), (b"IDAT", zlib.compress(rows)))


def bomb(video):  # 10 GB of pixels by its own word
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    write_png(video / "image_1.png", (b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))))


def jpeg(video):
    PIL.Image.new("RGB", SIZE[::-1]).save(video / "image_1.png", "JPEG")


def write_png(path, *chunks):
    """Write a PNG of these chunks, with right checksums."""
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in (*chunks, (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        data += struct.pack(">I", len(content)) + name + content + checksum
    path.write_bytes(data)


def few_rows(video):  # in whole zlib streams with right checksums: Pillow leaves the rest black
    header = struct.pack(">IIBBBBB", SIZE[1], SIZE[0], 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 + 3 * SIZE[1]) * (SIZE[0] - 1))
    write_png(video / "image_1.png", (b"IHDR", header), (b"IDAT", rows))


def pixels_before_the_header(video):
    header = struct.pack(">IIBBBBB", SIZE[1], SIZE[0], 8, 2, 0, 0, 0)
    pixels = b"IDAT", zlib.compress(bytes(1000))
    write_png(video / "image_1.png", pixels, (b"IHDR", header), pixels)


def sliver(video):  # which would be 16 times as wide and as high for the network
    rows = zlib.compress(bytes(3_000_000 * 4))
    header = struct.pack(">IIBBBBB", 1, 3_000_000, 8, 2, 0, 0, 0)
    write_png(video / "image_1.png", (b"IHDR", header), (b"IDAT", rows))


def large_bomb(video):  # Pillow warns of such a size and opens it
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    write_png(video / "image_1.png", (b"IHDR", header), (b"IDAT", zlib.compress(b"")))


def broken_animation(video):
    header = struct.pack(">IIBBBBB", SIZE[1], SIZE[0], 8, 2, 0, 0, 0)
    twice = [(b"acTL", struct.pack(">II", 2, 0))] * 2
    write_png(video / "image_1.png", (b"IHDR", header), *twice, (b"IDAT", zlib.compress(b"")))


def pipe(video):  # it would be waited for until someone writes to it
    (video / "image_1.png").unlink()
    os.mkfifo(video / "image_1.png")


def folder_of_that_name(video):
    (video / "image_1.png").unlink()
    (video / "image_1.png").mkdir()


def pipe_of_masks(video):
    (video / "mask.npy").unlink()
    os.mkfifo(video / "mask.npy")


def write_header(video, text, body=b""):
    """Write a mask.npy of these words."""
    content = text.encode("latin1") + b"\n"
    start = b"\x93NUMPY\1\0" + struct.pack("<H", len(content))
    (video / "mask.npy").write_bytes(start + content + body)


def header_that_warns(video):  # Python, of what it parses
    write_header(video, "{'descr': 1is 1, 'fortran_order': False, 'shape': (3, 6, 8), }")


def header_without_end(video):
    write_header(video, f"{{'descr': '|u1', 'fortran_order': '{'no' * 4_000}', 'shape': (3,), }}")


def shape_that_overflows(video):
    huge = "(9223372036854775807, 9223372036854775807, 0)"
    write_header(video, f"{{'descr': '|u1', 'fortran_order': False, 'shape': {huge}, }}", b"?" * 9)


def mask_of_terabytes(video):  # of which a file system stores nothing
    shape = "(3, 1000000, 1000000)"
    write_header(video, f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}")
    os.truncate(video / "mask.npy", 3_000_000_001_000)


def odd_frame(video):
    PIL.Image.new("RGB", (5, 5)).save(video / "image_1.png")


def odd_video(video):
    for path in list_video(video).frames:
        PIL.Image.new("RGB", (5, 4)).save(path)
    np.save(video / "mask.npy", np.zeros((3, 4, 5), np.uint8))


def short_mask(video):
    np.save(video / "mask.npy", np.load(video / "mask.npy")[:2])


def long_mask(video):
    np.save(video / "mask.npy", np.zeros((4, *SIZE), np.uint8))


def small_mask(video):
    np.save(video / "mask.npy", np.zeros((3, 5, 5), np.uint8))


def flat_mask(video):
    np.save(video / "mask.npy", np.zeros(SIZE, np.uint8))


def high_id(video):
    mask = np.load(video / "mask.npy")
    mask[1, 2, 3] = 49
    np.save(video / "mask.npy", mask)


def negative_id(video):
    np.save(video / "mask.npy", np.full((3, *SIZE), -1))


def wraps_to_0(video):
    np.save(video / "mask.npy", np.full((3, *SIZE), 256))


def float_mask(video):
    np.save(video / "mask.npy", np.ones((3, *SIZE)))


def bool_mask(video):
    np.save(video / "mask.npy", np.ones((3, *SIZE), bool))


def pickled_mask(video):
    np.save(video / "mask.npy", np.full((3, *SIZE), None), allow_pickle=True)


def zipped_mask(video):
    np.savez(video / "mask.npz", mask=np.zeros((3, *SIZE), np.uint8))
    (video / "mask.npz").rename(video / "mask.npy")


def truncated_mask(video):
    (video / "mask.npy").write_bytes((video / "mask.npy").read_bytes()[:-1])


FAULTS = {
    no_frame: "missing frame: image_1.png",
    twice: "same number",
    damaged_png: "image_1.png: unreadable",
    flipped_bit: "image_1.png: unreadable",
    transparent_palette: "image_1.png: not plain 8-bit RGB",
    empty_png: "image_1.png: unreadable",
    dangling_link: "image_1.png: unreadable",
    sixteen_bits: "image_1.png: not plain 8-bit RGB",
    sixteen_bit_colours: "image_1.png: not plain 8-bit RGB",
    bomb: "image_1.png: ",
    jpeg: "image_1.png: unreadable",
    few_rows: "image_1.png: unreadable",
    pixels_before_the_header: "image_1.png: unreadable",
    sliver: "image_1.png: 1 x 3000000 pixels are no shape of a frame",
    large_bomb: "image_1.png: 10000 x 10000 pixels are too many",
    broken_animation: "image_1.png: unreadable",
    pipe: "image_1.png: unreadable",
    folder_of_that_name: "image_1.png: unreadable",
    odd_frame: "frames of different sizes: 8 x 6, 5 x 5",
    odd_video: "frames are 5 x 4, those of most labelled videos 8 x 6",
    short_mask: "too short: 2 masks, 3 frames",
    long_mask: "too long: 4 masks, 3 frames",
    small_mask: "mask.npy is 5 x 5, frames are 8 x 6",
    flat_mask: "mask.npy: holds uint8 (6, 8)",
    high_id: "ids outside 0..48: 49",
    negative_id: "ids outside 0..48: -1",
    wraps_to_0: "ids outside 0..48: 256",
    float_mask: "mask.npy: holds float64",
    bool_mask: "mask.npy: holds bool",
    pickled_mask: "mask.npy: unreadable",
    zipped_mask: "mask.npy: unreadable",
    truncated_mask: "mask.npy: unreadable",
    pipe_of_masks: "mask.npy: unreadable",
    header_that_warns: "mask.npy: unreadable",
    header_without_end: "mask.npy: unreadable",
    shape_that_overflows: "mask.npy: ",
    mask_of_terabytes: "mask.npy is 1000000 x 1000000, frames are 8 x 6",
}


@pytest.mark.filterwarnings("ignore")  # pytest's own filters let pass what videos.py does not
@pytest.mark.parametrize("damage", FAULTS, ids=lambda damage: damage.__name__)
def test_each_fault_is_named_and_the_video_left_out(data, damage, call, caplog):
    CLEVRDataset(data)  # the cache from before must not hide the fault
    damage(data / "video_2")
    status, out, err = call(dataset, data)
    assert status == 1
    assert [line for line in out.splitlines() if "video_2" in line and FAULTS[damage] in line], out
    assert "videos with faults: 1" in out
    assert not err
    for cache in (True, False):
        caplog.clear()
        data_set = CLEVRDataset(data, cache=cache)
        assert [video.path.name for video in data_set.videos] == ["video0", "video_10"]
        assert list(data_set.skipped) == [data / "video_2"]
        assert FAULTS[damage] in data_set.skipped[data / "video_2"]
        assert len(caplog.messages) == 1
        assert str(data / "video_2") in caplog.messages[0]
        assert len(data_set) == 6
        data_set[5]


def test_a_repaired_video_comes_back(data):
    mask = np.load(data / "video_2" / "mask.npy")
    short_mask(data / "video_2")
    assert len(CLEVRDataset(data)) == 6
    np.save(data / "video_2" / "mask.npy", mask)
    assert len(CLEVRDataset(data)) == 9


def test_all_faults_of_a_video_are_named(data):
    no_frame(data / "video_2")
    high_id(data / "video_2")
    (data / "video_2" / "image_2.png").write_bytes(b"?")
    text = " ".join(inspect_video(list_video(data / "video_2")).faults)
    assert "image_1.png" in text
    assert "image_2.png" in text
    assert "49" in text


def test_a_large_number_is_no_endless_list_of_gaps(tmp_path):
    video = make_video(tmp_path / "video_1", frames=2)
    (video / "image_1.png").rename(video / f"image_{10**40}.png")
    assert (
        "image_1.png, image_2.png, image_3.png, ..." in inspect_video(list_video(video)).faults[0]
    )


def test_a_gap_is_named_as_the_other_frames_are(tmp_path):
    video = make_video(tmp_path / "video_1", frames=3)
    for t in (0, 2):
        (video / f"image_{t}.png").rename(video / f"frame_{t:03}.png")
    (video / "image_1.png").unlink()
    assert "missing frame: frame_001.png." in inspect_video(list_video(video)).faults[0]


# The report


def test_report_on_good_data(data, call):
    make_video(data / "more" / "video_1", frames=11, size=(5, 9), labelled=False)
    for video in ("video0", "video_2", "video_10"):
        np.save(data / video / "mask.npy", np.zeros((3, *SIZE), np.uint8))
    np.save(data / "video_2" / "mask.npy", np.full((3, *SIZE), 21, np.int32))
    status, out, err = call(dataset, data)
    assert status == 0
    assert not err
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert f"{data}: 4 videos, 20 frames" in lines
    assert f"{data}: 3 x 3 frames, 8 x 6, labelled" in lines
    assert f"{data / 'more'}: 1 x 11 frames, 9 x 5, without mask.npy" in lines
    assert "0 background 2" in lines
    assert "21 brown metal sphere 1" in lines
    assert "videos with faults: 0" in lines


def test_report_from_the_command_line(data):
    damaged_png(data / "video0")
    (data / os.fsdecode(b"video_\xff")).mkdir()  # no text in any encoding
    (data / os.fsdecode(b"video_\xff") / "image_0.png").touch()
    warned_of = (large_bomb, broken_animation, header_that_warns, shape_that_overflows)
    for k, damage in enumerate(warned_of):  # by libraries, which is not for the user's eyes
        damage(make_video(data / f"{k}"))
    result = run("dataset.py", data)
    assert result.returncode == 1
    assert "videos with faults: 6" in result.stdout
    assert not result.stderr
    assert max(map(len, result.stdout.splitlines())) < 300 + len(str(data))


def test_report_without_videos(tmp_path, call):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        status, out, err = call(dataset, path)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert str(path) in err


def damaged(good):
    """Bytes that are noise, or a good file with bytes changed, cut or added."""
    changes = st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), max_size=4)

    def change(edits, end, more):
        content = bytearray(good)
        for position, value in edits:
            content[position] = value
        return bytes(content[:end] + more)

    ends = st.one_of(st.just(len(good)), st.integers(0, len(good)))
    return st.one_of(
        st.binary(max_size=200), st.builds(change, changes, ends, st.binary(max_size=5))
    )


def good_files():
    png, npy = io.BytesIO(), io.BytesIO()
    PIL.Image.new("RGB", SIZE[::-1], (10, 20, 30)).save(png, "png")
    np.save(npy, np.zeros((1, *SIZE), np.uint8))
    return png.getvalue(), npy.getvalue()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(png=damaged(good_files()[0]), npy=damaged(good_files()[1]))
@pytest.mark.filterwarnings("ignore")
def test_no_bytes_make_a_traceback_or_a_wrong_label(tmp_path, png, npy):
    video = tmp_path / "video_0"
    video.mkdir(exist_ok=True)
    (video / "image_0.png").write_bytes(png)
    (video / "mask.npy").write_bytes(npy)
    faults = inspect_video(list_video(video)).faults
    try:
        _, mask = CLEVRDataset(tmp_path, cache=False)[0]
        assert not faults
        assert mask.max() < 49
    except UserError:
        assert faults


def test_a_picture_with_right_checksums_and_wrong_pixels_is_named(tmp_path):
    """Of such files torchvision's decoder died; a run of thousands of videos must go on."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (SIZE[0], 1 + 3 * SIZE[1]), dtype=np.uint8)
    rows[:, 0] = 9  # no filter of that number exists
    header = struct.pack(">IIBBBBB", SIZE[1], SIZE[0], 8, 2, 0, 0, 0)
    noise = rng.integers(0, 256, 100, dtype=np.uint8).tobytes()
    whole = zlib.compress(rows.tobytes())
    for i, pixels in enumerate((whole, noise, whole[:-20], b"")):
        write_png(tmp_path / f"image_{i}.png", (b"IHDR", header), (b"IDAT", pixels))
        with pytest.raises(UserError, match=f"image_{i}"):
            read_frame(tmp_path / f"image_{i}.png")


def test_a_header_after_the_pixels_claims_nothing(tmp_path):
    sizes = [(SIZE[1], SIZE[0]), (60_000, 60_000)]
    first, second = ((b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)) for size in sizes)
    rows = zlib.compress(bytes(100_000_000))  # all black, and far more than the first one claims
    write_png(tmp_path / "image_0.png", first, (b"IDAT", rows), second)
    tracemalloc.start()
    try:
        assert read_frame(tmp_path / "image_0.png").shape == (3, *SIZE)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_a_frame_is_not_to_blame_where_memory_runs_out(data, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(PIL.Image, "open", fail)
    with pytest.raises(MemoryError):
        CLEVRDataset(data, cache=False)


def test_a_bomb_is_refused_before_memory_is_taken(tmp_path):
    bomb(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"image_1\.png"):
            read_frame(tmp_path / "image_1.png")
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    header = struct.pack(">IIBBBBB", 9_000, 9_000, 8, 2, 0, 0, 0)  # which Pillow alone would take
    write_png(tmp_path / "image_1.png", (b"IHDR", header), (b"IDAT", zlib.compress(b"")))
    with pytest.raises(UserError, match="9000 x 9000 pixels are too many"):
        read_frame(tmp_path / "image_1.png")


def test_a_whole_video_or_a_sentence_that_names_the_file(data):
    frames = read_video(list_video(data / "video_2"))
    assert frames.shape == (3, 3, *SIZE)
    for t, path in enumerate(list_video(data / "video_2").frames):
        assert np.array_equal(frames[t], read_frame(path))
    odd_frame(data / "video_2")
    with pytest.raises(UserError, match="video_2: frames of different sizes: 8 x 6, 5 x 5"):
        read_video(list_video(data / "video_2"))
    no_frame(data / "video_2")
    with pytest.raises(UserError, match=r"video_2: missing frame: image_1\.png"):
        read_video(list_video(data / "video_2"))


def test_a_transparent_colour_of_plain_rgb_is_a_colour(data):
    """As Pillow writes what was a GIF."""
    path = data / "video_2/image_1.png"
    picture = PIL.Image.open(path).convert("RGB")
    picture.save(path, transparency=picture.getpixel((0, 0)))
    assert b"tRNS" in path.read_bytes()
    frame = read_video(list_video(data / "video_2"))[1]
    assert np.array_equal(frame.permute(1, 2, 0), np.asarray(picture))


def test_labelled_videos_are_those_with_a_mask_file(data):
    (data / "video0" / "mask.npy").unlink()
    (data / "video_2" / "mask.npy").unlink()
    (data / "video_2" / "mask.npy").symlink_to("nowhere")  # labelled, and at fault
    assert [video.path.name for video in find_labelled(data)] == ["video_2", "video_10"]
    for video in ("video_2", "video_10"):
        (data / video / "mask.npy").unlink()
    with pytest.raises(UserError, match="no video in it is labelled"):
        find_labelled(data)


def test_ctrl_c_ends_the_report_without_a_traceback(data, call, monkeypatch):
    def interrupt(video):
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "inspect_video", interrupt)
    status, _, err = call(dataset, data)
    assert (status, err.strip()) == (130, "interrupted")


@needs_real
def test_real_videos_are_without_fault(call):
    status, out, _ = call(dataset, REAL)
    assert status == 0
    assert "videos with faults: 0" in out
