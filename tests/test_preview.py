"""preview.py: what it writes, what it keeps, and its page in a real browser, opened from disk."""

import io
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import write_video

import preview
from classes import class_id

RED, BLUE = class_id("cube", "metal", "red"), class_id("sphere", "rubber", "blue")
TABLE = f"frame,object,class_id,confidence\n0,1,{RED},0.9\n0,2,{BLUE},0.6\n"


def moving(shift: int = 0) -> torch.Tensor:
    """Return masks (4, 32, 48): a red cube that moves by 8 pixels a frame, a blue sphere."""
    labels = torch.zeros(4, 32, 48, dtype=torch.uint8)
    for t in range(4):
        labels[t, 8:16, 8 * t + shift : 8 * t + 8 + shift] = RED
    labels[:2, 20:28, 30:40] = BLUE
    return labels


def add(root: Path, name: str, masks=None, truth=None) -> None:
    """Add a video of gray frames, its masks and maybe the truth, below `root`/data and masks."""
    write_video(root / "data" / name, torch.full((4, 3, 32, 48), 128, dtype=torch.uint8), truth)
    folder = root / "masks" / name
    folder.mkdir(parents=True)
    np.save(folder / "mask.npy", (moving() if masks is None else masks).numpy())


def everything(root: Path) -> tuple:
    """Return the arguments that preview all that was added."""
    return ("--masks", root / "masks", "--data", root / "data", "--out", root / "o")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Return a folder that holds data, masks and the preview of four videos, one with a fault."""
    root = tmp_path_factory.mktemp("preview")
    add(root, "train/video_2", truth=moving())
    add(root, "train/video_10", truth=moving(1))
    add(root, "odd #1 100%/vidéo_3", masks=(moving() == RED) * RED)
    add(root, "video_4")
    (root / "data/video_4/image_2.png").write_bytes(b"no picture")
    (root / "masks/train/video_10/objects.csv").write_text(TABLE)
    shown, faults = preview.write_preview(root / "masks", [root / "data"], root / "out", 240)
    assert (shown, len(faults)) == (3, 1)
    return root


def record_of(made: Path, name: str) -> dict:
    return preview.read_description(made / "out" / name / "video.js")


def test_record_of_a_video_worked_out_by_hand(made):
    record = record_of(made, "train/video_10")
    assert [record[key] for key in ("frames", "size", "tile", "columns")] == [
        *(4, [48, 32], [48, 32], 2)
    ]
    red, blue = record["objects"]
    assert (red["id"], red["doubt"], blue["id"], blue["doubt"]) == (RED, 0.1, BLUE, 0.4)
    assert red["trail"] == [[t, 8 * t + 4, 12, 8] for t in range(4)]  # centre and top
    assert [t for t, *_ in blue["trail"]] == [0, 1]
    assert red["iou"] == round(7 / 9, 4)  # 8 columns against 8 that are one further on
    assert record["figures"]["ghosts"] == record["figures"]["lost"] == []
    assert record_of(made, "train/video_2")["figures"]["miou"] == 1
    assert record_of(made, "odd #1 100%/vidéo_3")["figures"] is None


def test_sheets_hold_the_frames_and_what_lies_over_them(made):
    folder = made / "out/train/video_10"
    with PIL.Image.open(folder / "frames.jpg") as sheet:
        assert sheet.size == (96, 64)
        np.testing.assert_allclose(np.asarray(sheet).astype(int), 128, atol=2)
    with PIL.Image.open(folder / "differs.png") as sheet:
        differs = np.asarray(sheet.convert("RGBA"))
    assert differs[:32, :48, 3].astype(bool).sum() == 16  # of frame 0, a column at either side
    assert not (made / "out/odd #1 100%/vidéo_3/truth.png").exists()


def test_what_is_still_true_is_kept_and_the_rest_made_again(tmp_path, call):
    add(tmp_path, "video_0")
    add(tmp_path, "video_1")
    arguments = (
        "--masks",
        tmp_path / "masks",
        "--data",
        tmp_path / "data",
        "--out",
        tmp_path / "o",
    )
    status, out, _ = call(preview, *arguments)
    assert (status, out) == (0, f"2 videos: open {tmp_path / 'o/index.html'} in a browser\n")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("o/video_*/*")}
    leftover = tmp_path / "o/video_1/.masks.png.0123456789abcdef.tmp"  # of a run that was killed
    leftover.touch()
    np.save(tmp_path / "masks/video_1/mask.npy", moving(2).numpy())
    assert call(preview, *arguments)[0] == 0
    changed = {p.parent.name for p, ns in before.items() if p.stat().st_mtime_ns != ns}
    assert changed == {"video_1"}
    assert not leftover.exists()
    (tmp_path / "o/video_0/frames.jpg").unlink()  # "run preview.py again", says the page
    assert call(preview, *arguments)[0] == 0
    assert (tmp_path / "o/video_0/frames.jpg").is_file()


def test_faults_are_named_and_the_rest_is_shown(tmp_path, call):
    add(tmp_path, "video_0", truth=torch.full((4, 32, 48), 77, dtype=torch.uint8))
    add(tmp_path, "video_1")
    add(tmp_path, "video_2")
    np.save(tmp_path / "masks/video_1/mask.npy", moving()[:2].numpy())
    (tmp_path / "masks/video_2/objects.csv").write_text("no,table\n1,2\n")
    shutil.copytree(tmp_path / "data/video_2", tmp_path / "data/video_3")
    arguments = (
        "--masks",
        tmp_path / "masks",
        "--data",
        tmp_path / "data",
        "--out",
        tmp_path / "o",
    )
    for _ in range(2):  # what is kept keeps its faults
        status, out, err = call(preview, *arguments)
        assert status == 1
        assert out.startswith("1 of 4 videos have no masks: left out\n2 videos: open ")
        assert "data/video_0/mask.npy: holds ids outside 0..48: 77." in err
        assert "masks/video_1/mask.npy: too short: 2 masks, 4 frames." in err
        assert "masks/video_2/objects.csv: not a table of objects" in err
        assert "Traceback" not in err


def test_wrong_folders_are_one_sentence(tmp_path, call):
    add(tmp_path, "video_0")
    masks, data = tmp_path / "masks", tmp_path / "data"
    for arguments, sentence in {
        (masks, data, "--out", masks): "holds other files",
        (tmp_path / "no", data, "--out", tmp_path / "o"): "is not a folder",
        (data, masks, "--out", tmp_path / "o"): "no video in it",
        (data, data, "--out", tmp_path / "o"): r"run infer.py on them",
        (masks, data, "--strip", tmp_path / "s.bmp"): ".webp or .gif to move",
    }.items():
        status, _, err = call(preview, "--masks", arguments[0], "--data", *arguments[1:])
        assert (status, sentence in err) == (2, True), err


@pytest.mark.parametrize("sure", ["nan", "inf", "-1", "1.5", "x", None])
def test_tables_of_nonsense_are_named_and_the_video_is_shown(tmp_path, call, sure):
    add(tmp_path, "video_0")
    table = tmp_path / "masks/video_0/objects.csv"
    table.write_text(TABLE.replace("0.6", sure)) if sure else os.mkfifo(table)
    status, out, err = call(preview, *everything(tmp_path))
    assert (status, out.split(":")[0]) == (1, "1 video")
    assert f"{table}: not a table of objects" in err


def test_strip_of_labels_that_do_not_fit_is_one_sentence(tmp_path, call):
    add(tmp_path, "video_0", truth=torch.zeros(2, 8, 8, dtype=torch.uint8))
    sources = ("--masks", tmp_path / "masks", "--data", tmp_path / "data")
    status, _, err = call(preview, *sources, "--strip", tmp_path / "s.png")
    assert status == 2
    assert "data/video_0/mask.npy: too short: 2 masks, 4 frames" in err


@pytest.mark.parametrize(("name", "frames"), [("s.png", 1), ("s.webp", 4), ("s.gif", 4)])
def test_strip_is_a_picture_that_moves_if_its_name_says_so(tmp_path, call, name, frames):
    add(tmp_path, "video_0")
    sources = ("--masks", tmp_path / "masks", "--data", tmp_path / "data")
    assert call(preview, *sources, "--strip", tmp_path / name)[0] == 0
    with PIL.Image.open(tmp_path / name) as picture:
        assert (picture.size, getattr(picture, "n_frames", 1)) == ((48, 64), frames)


@pytest.fixture(scope="module")
def browser():
    """Return a headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver")
    programs = [shutil.which("chromium") or shutil.which("google-chrome")]
    programs.append(shutil.which("chromedriver"))
    if not all(programs):
        pytest.skip("no Chromium with its driver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("headless=new", "disable-dev-shm-usage", "window-size=1000,800"):
        options.add_argument(f"--{argument}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


class Page:
    """The preview in a browser, as a user meets it."""

    def __init__(self, browser, index: Path):
        self.browser = browser
        browser.get(index.as_uri())

    def run(self, script: str, *arguments):
        return self.browser.execute_script(script, *arguments)

    def until(self, true) -> None:
        end = time.monotonic() + 60
        while not true():
            assert time.monotonic() < end, self.browser.get_log("browser")
            time.sleep(0.02)

    def texts(self, selector: str) -> list[str]:
        return [found.text for found in self.browser.find_elements("css selector", selector)]

    def seen(self, selector: str) -> list[str | None]:
        """Return what pictures say that they show."""
        found = self.browser.find_elements("css selector", selector)
        return [canvas.get_attribute("aria-label") for canvas in found]

    def names(self) -> list[str]:
        return self.run("return listed.map((video) => video.name)")

    def choose(self, field: str, value: str) -> None:
        script = (
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'));"
        )
        script += "arguments[0].dispatchEvent(new Event('change'));"
        self.run(script, self.browser.find_element("id", field), value)

    def press(self, key: str) -> None:
        self.browser.switch_to.active_element.send_keys(key)


@pytest.fixture
def page(browser, made):
    opened = Page(browser, made / "out/index.html")
    opened.until(lambda: sum(map(bool, opened.seen("#grid canvas")[:2])) == 2)
    yield opened
    errors = [
        entry for entry in browser.get_log("browser") if "ERR_FILE_NOT_FOUND" not in str(entry)
    ]
    assert errors == []


def test_page_shows_every_video_and_plays_it(page):
    assert page.names() == ["odd #1 100%/vidéo_3", "train/video_2", "train/video_10", "video_4"]
    assert "unreadable PNG" in page.texts("#grid .fault")[0]
    cards = page.texts("#grid .card")
    assert "mIoU 1.000" in cards[1]
    assert "doubt 40 %" in cards[2]
    assert "blue rubber sphere" not in cards[0]
    frames = set()
    page.until(lambda: frames.add(page.seen("#grid canvas")[1]) or len(frames) == 4)
    assert "frame 0: red metal cube, blue rubber sphere" in frames
    assert "frame 3: red metal cube" in frames


def test_names_are_found_objects_filtered_and_figures_sorted(page):
    page.choose("find", "VIDEO_1")
    assert page.names() == ["train/video_10"]
    assert page.texts("#count") == ["1 of 4 videos"]
    page.choose("find", "")
    page.choose("object", str(BLUE))
    assert page.names() == ["train/video_2", "train/video_10"]
    assert "blue rubber sphere (2)" in page.texts("#object option")
    page.choose("sort", "miou")
    assert page.names() == ["train/video_10", "train/video_2"]
    page.choose("object", "")
    page.choose("sort", "doubt")
    assert page.names()[0] == "train/video_10"
    page.choose("find", "nothing is called that")
    assert page.browser.find_element("id", "nothing").is_displayed()


def test_large_video_is_stepped_by_keys_beside_its_truth(page):
    keys = pytest.importorskip("selenium.webdriver").Keys
    page.browser.find_elements("css selector", ".card")[2].click()
    page.until(lambda: all(page.seen("#panels canvas")))
    assert page.texts("#title") == ["train/video_10"]
    captions = page.texts("#panels figcaption")
    assert captions[:2] == ["masks", "true masks"]
    assert "missed" in captions[2]
    page.press(keys.HOME)
    assert page.texts("#frame") == ["frame 0 (1 of 4)"]
    assert page.seen("#panels canvas") == [
        "frame 0: red metal cube, blue rubber sphere",
        "frame 0: true masks",
    ] + ["frame 0: red metal cube, blue rubber sphere"]
    page.press(keys.ARROW_RIGHT)
    page.press(keys.ARROW_RIGHT)
    assert page.texts("#frame") == ["frame 2 (3 of 4)"]
    assert page.seen("#panels canvas")[0] == "frame 2: red metal cube"
    rows = page.texts("#items tr")
    assert [row.split("\n")[-1].split()[-3:] for row in rows] == [
        ["10", "%", "0.778"],
        ["40", "%", "1.000"],
    ]
    time.sleep(0.4)  # a step is a pause
    assert page.texts("#frame") == ["frame 2 (3 of 4)"]
    page.press(" ")
    page.until(lambda: page.texts("#frame") != ["frame 2 (3 of 4)"])
    page.press(keys.ARROW_DOWN)  # what has a fault is passed over
    page.until(lambda: page.texts("#title") == ["odd #1 100%/vidéo_3"])
    assert page.texts("#panels figcaption") == ["masks"]
    page.press(keys.ARROW_UP)
    page.until(lambda: page.texts("#title") == ["train/video_10"])
    page.press(keys.ESCAPE)
    page.until(lambda: not page.browser.find_element("id", "large").is_displayed())
    assert page.seen("#grid canvas")[2]


def test_objects_are_drawn_where_they_are(page):
    page.run("play(false); clock = 0; element('names').click(); element('trails').click()")
    page.until(lambda: (page.seen("#grid canvas")[1] or "").startswith("frame 0"))
    canvas = page.browser.find_elements("css selector", "#grid canvas")[1]
    with PIL.Image.open(io.BytesIO(canvas.screenshot_as_png)) as png:
        scale = png.width / 48
        points = ((4, 12), (35, 24), (20, 12))
        at = [png.convert("RGB").getpixel((x * scale, y * scale)) for x, y in points]
    red, blue, ground = (np.array(pixel).astype(int) for pixel in at)
    assert red[0] > red[2] + 10
    assert blue[2] > blue[0] + 10
    np.testing.assert_allclose(ground, 128, atol=3)


def test_only_what_is_near_the_window_is_loaded(browser, made, tmp_path):
    shutil.copytree(made / "out", tmp_path / "out")
    text = (tmp_path / "out/videos.js").read_text()
    known = json.loads(text[text.index("{") : text.rindex("}") + 1])
    first = next(video for video in known["videos"] if video["name"] == "train/video_2")
    record = record_of(made, "train/video_2")
    names = [f"many/{i}" for i in range(200)]
    for name in names:
        shutil.copytree(tmp_path / "out/train/video_2", tmp_path / "out" / name)
        preview.write_script(tmp_path / "out" / name / "video.js", "arrived(", [name, record], ");")
    known["videos"] = [{**first, "name": name, "folder": name} for name in names]
    preview.write_script(tmp_path / "out/videos.js", "const PREVIEW = ", known)
    page = Page(browser, tmp_path / "out/index.html")
    assert page.texts("#count") == ["200 videos"]
    drawn = "return [...inSight].every((video) => video.record && video.canvas.width)"
    for place in ("document.body.scrollHeight", "0", "document.body.scrollHeight"):
        page.run(f"scrollTo(0, {place})")  # the first of these before all has come
    page.until(lambda: page.run("return inSight.has(videos[199])") and page.run(drawn))
    assert 0 < page.run("return inSight.size") < 60
    assert page.run("return videos.filter((video) => video.record).length") < 60
    far = "const far = videos[50];"  # whose file arrives when nobody looks at it any more
    page.run(f"{far} withRecord(far, () => {{ redraw(far); far.came = true; }})")
    page.until(
        lambda: page.run(
            f"{far} return far.came && !document.querySelector('head script[src*=many]')"
        )
    )
    assert page.run(f"{far} return far.record") is None
    assert page.texts("#grid .fault") == []
    assert browser.get_log("browser") == []


def test_a_file_that_is_gone_is_named_on_its_card(browser, made, tmp_path):
    shutil.copytree(made / "out", tmp_path / "out")
    (tmp_path / "out/train/video_2/frames.jpg").unlink()
    page = Page(browser, tmp_path / "out/index.html")
    page.until(
        lambda: "frames.jpg cannot be read: run preview.py again" in page.texts("#grid .fault")
    )
    browser.get_log("browser")


def test_predictions_in_the_place_of_true_masks_are_marked(page):
    notes = page.browser.find_elements("css selector", "#grid .note")
    assert not any(note.is_displayed() for note in notes)
    page.choose("layer", "truth")
    assert [note.is_displayed() for note in notes] == [True, False, False, False]
    page.choose("layer", "masks")
    assert not any(note.is_displayed() for note in notes)


def test_the_large_video_fits_beside_a_scroll_bar_and_rings_no_arrow(page):
    page.browser.set_window_size(500, 700)
    page.browser.find_elements("css selector", ".card")[2].click()
    page.until(lambda: all(page.seen("#panels canvas")))
    assert page.run("return document.activeElement.id") == "title"  # no arrow
    right = "return element('large').getBoundingClientRect().right"
    assert page.run(right) <= page.run("return document.documentElement.clientWidth")
    assert page.texts("#doubt")[0].startswith("doubt: 100 % minus the confidence")
    page.run("element('large').close()")
    page.browser.set_window_size(1000, 800)


def test_names_lie_over_no_other_object_where_there_is_room(page):
    """Two objects, one right above the other: the lower one's name would lie over the upper one."""
    script = """
        const said = [];
        const brush = {
            canvas: { width: 400, height: 300 }, measureText: () => ({ width: 80 }),
            strokeText: () => {}, fillText: (...words) => said.push(words),
        };
        const here = [[100, 60, 50], [100, 90, 75]].map((at) => [{ id: 1 }, [0, ...at]]);
        drawNames(brush, here, 1, 1);
        return said;
    """
    (_, x, top), (_, below_x, below_top) = page.run(script)
    assert (x, top) == (100, 36)  # above its object, which begins at 50
    upper, lower = (90, 110, 50, 70), (below_x - 40, below_x + 40, below_top, below_top + 14)
    assert lower[1] <= upper[0] or lower[0] >= upper[1] or lower[2] >= upper[3]
