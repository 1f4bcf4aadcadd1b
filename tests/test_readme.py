"""The README's Python, run as it stands there."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_video

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_python_of_the_readme_runs(tmp_path):
    make_video(tmp_path / "path/train/video_0", frames=2, size=(32, 48))
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    torch.save(torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8), tmp_path / "frames.pt")
    start = (
        f"import sys, torch; sys.path.insert(0, {str(ROOT)!r}); frames = torch.load('frames.pt')\n"
    )
    assert len(BLOCKS) == 7
    blocks = [block for block in BLOCKS if "torch.onnx.export" not in block]  # test_model.py's
    code = (
        start
        + "\n".join(blocks)
        + "\nassert loss.isfinite() and objects.labels.shape == (2, 32, 48)"
    )
    for name in ("pandas", "matplotlib"):
        pytest.importorskip(name)
    (tmp_path / "masks/video_7").mkdir(parents=True)
    rows = "name,x,y\nred rubber cube,1.5,2.25\nred rubber cube,2.5,2.25\n"
    (tmp_path / "masks/video_7/objects.csv").write_text(rows)
    np.save(tmp_path / "masks/video_7/mask.npy", np.zeros((2, 32, 48), np.uint8))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MPLBACKEND": "agg"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tracks.png").is_file()


def test_the_readme_shows_every_file():
    tree = (ROOT / "README.md").read_text().split("## How it works")[1].split("```")[1]
    assert {path.name for path in ROOT.glob("*.py")} == set(re.findall(r"\b\w+\.py", tree)) - {
        "X.py"
    }
