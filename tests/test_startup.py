"""What a script imports before it is needed: seconds for whoever asks for --help."""

import json

import pytest
from conftest import ROOT, make_video, run

from checkpoints import SHIPPED

SLOW = ("torchvision", "torch._dynamo", "tensorboard", "scipy", "torchmetrics")
PROGRAM = f"""
import json, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
script, *arguments = sys.argv[1:]
sys.argv = [script, *arguments]
status = 0
try:
    runpy.run_path(f"{ROOT}/{{script}}", run_name="__main__")
except SystemExit as end:
    status = end.code
print("\\n" + json.dumps([status, [name for name in {SLOW} if name in sys.modules]]))
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    file = tmp_path_factory.mktemp("startup") / "program.py"
    file.write_text(PROGRAM)
    return file


@pytest.mark.parametrize(
    "script", ["train.py", "infer.py", "evaluate.py", "render.py", "preview.py", "dataset.py"]
)
def test_help_imports_nothing_slow(program, script):
    said = run(program, script, "--help").stdout
    assert json.loads(said.splitlines()[-1]) == [0, []]


def test_labelling_a_video_imports_what_it_needs_alone(program, tmp_path):
    data = make_video(tmp_path / "video_0", size=(32, 48))
    options = ("--data", data, "--out", tmp_path / "out", "--device", "cpu")
    done = run(program, "infer.py", "--ckpt", SHIPPED, *options)
    status, imported = json.loads(done.stdout.splitlines()[-1])
    assert status == 0, done.stderr
    assert set(imported) <= {"scipy"}, "objects are followed by its graphs"
