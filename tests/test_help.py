"""--help and --version of every script."""

import argparse
import sys

import pytest

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
