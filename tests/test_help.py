"""--help and --version of every script."""

import argparse
import sys
from pathlib import Path

import pytest
from conftest import make_video

import benchmark
import dataset
import evaluate
import infer
import preview
import render
import train
from utils import VERSION


@pytest.mark.parametrize("script", [train, infer, evaluate, render, preview, benchmark, dataset])
def test_help_has_the_version_and_the_default_of_every_option(script, call, monkeypatch):
    status, said, _ = call(script, "--version")
    assert (status, said) == (0, f"clevr-unet {VERSION}\n")
    status, said, _ = call(script, "--help")
    assert status == 0
    assert script.__doc__.splitlines()[0] in said
    parsers = []

    def stop(parser, *arguments):
        parsers.append(parser)
        sys.exit()

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    call(script)
    for group in parsers[0]._action_groups:
        for action in group._group_actions:
            optional = not action.required and action.nargs != 0
            assert not optional or "default" in f"{group.title} {action.help}", action.dest


def test_an_option_of_other_projects_is_hinted_at(call):
    status, _, err = call(train, "--lr", "0.1")
    assert status == 2
    assert "unrecognized arguments: --lr 0.1 (--lr is --learning-rate here)" in err
    assert "(--num_epochs is --num-epochs here)" in call(train, "--num_epochs", "3")[2]
    status, _, err = call(infer, "--data", "data", "--output=masks")
    assert status == 2
    assert "required: --out (--output is --out here)" in err


def test_without_a_checkpoint_the_shipped_weights_label_and_the_page_has_a_place(
    call, tmp_path, monkeypatch
):
    make_video(tmp_path / "data/video_0", frames=2, size=(16, 32), labelled=False)
    monkeypatch.chdir(tmp_path)
    status, said, _ = call(infer, "--data", "data", "--out", "masks", "--device", "cpu")
    assert status == 0
    assert "1 video, 2 frames" in said
    assert call(preview, "--pred", "masks", "--data", "data")[0] == 0
    assert Path("preview/index.html").is_file()
