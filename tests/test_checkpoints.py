"""Checkpoints come back as they were, or say in a sentence that they did not."""

import random
import zipfile

import pytest
import torch
from conftest import ROOT

from checkpoints import CHECKPOINT_FORMAT, checkpoint_digest, load_checkpoint, save_checkpoint
from model import UNet
from utils import VERSION, UserError

SHIPPED = ROOT / "weights/clevr_unet.pt"


def test_checkpoints_come_back_as_they_were(tmp_path):
    checkpoint = {"model": {"w": torch.ones(2)}, "model_config": {"widths": [8, 16]}, "epoch": 3}
    save_checkpoint(tmp_path / "a.pt", checkpoint)
    found = load_checkpoint(tmp_path / "a.pt")
    assert len(found["digest"]) == 64
    assert torch.equal(found["model"].pop("w"), checkpoint["model"].pop("w"))
    added = {"format": CHECKPOINT_FORMAT, "version": VERSION}
    assert found == checkpoint | added | {"digest": found["digest"]}
    torch.save(UNet((4, 8)).state_dict(), tmp_path / "bare.pt")
    assert load_checkpoint(tmp_path / "bare.pt")["model_config"] == {"widths": [4, 8]}


@pytest.mark.parametrize(("version", "needle"), [(1, "older version"), (99, "newer version")])
def test_checkpoints_of_other_formats_get_a_sentence(tmp_path, version, needle):
    checkpoint = {"format": version, "model": {"w": torch.ones(2)}, "model_config": {}}
    torch.save(checkpoint, tmp_path / "a.pt")
    with pytest.raises(UserError, match=needle):
        load_checkpoint(tmp_path / "a.pt")


def test_a_turned_bit_is_found_or_does_not_matter(tmp_path):
    """Of the shipped file: nearly all of it is weights, which no checksum of PyTorch's guards."""
    whole, rng, sentences = SHIPPED.read_bytes(), random.Random(0), []
    true = load_checkpoint(SHIPPED)["digest"]
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (tmp_path / "a.pt").write_bytes(damaged)
        try:
            loaded = load_checkpoint(tmp_path / "a.pt")["digest"]
        except UserError as error:
            sentences.append(str(error))
        else:
            assert loaded == true
    assert len(sentences) > 30
    assert all(str(tmp_path / "a.pt") in sentence for sentence in sentences)


def shared(depth):
    """Ten references to ten references to ... : a small file, and 10 ** depth values."""
    values = [0.0]
    for _ in range(depth):
        values = [values] * 10
    return values


GOOD = {"model": {"w": torch.ones(2)}, "model_config": {}}


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"},
        {"format": torch.ones(2)},
        {"claim": torch.zeros(1).expand(25_000_000_000)},  # 100 GB
        {"laughs": shared(12)},
        {"sparse": torch.ones(2).to_sparse()},
        {"meta": torch.ones(2, device="meta")},
        {"what": {1, 2}},
        {"what": bytearray(3)},
    ],
)
def test_what_train_never_writes_is_one_sentence(tmp_path, change, recwarn):
    torch.save(GOOD | change, tmp_path / "a.pt")
    recwarn.clear()
    with pytest.raises(UserError, match=r"a\.pt"):
        load_checkpoint(tmp_path / "a.pt")
    assert not recwarn.list


def test_an_archive_that_swells_is_refused_unread(tmp_path):
    torch.save({"w": torch.zeros(1_000_000)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(tmp_path / "a.pt")


def test_an_archive_without_end_is_named(tmp_path):
    """Of some PyTorch says "Invalid argument", without a name."""
    torch.save(GOOD, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    for end in range(len(whole) - 30, len(whole)):
        (tmp_path / "a.pt").write_bytes(whole[:end] + whole[: len(whole) - end - 1])
        with pytest.raises(UserError, match=r"a\.pt"):
            load_checkpoint(tmp_path / "a.pt")


BASE = {"w": torch.tensor([0.0, 1.0]), "plain": [1, None, "a", 0.5]}


@pytest.mark.parametrize(
    "other",
    [
        {"w": torch.tensor([-0.0, 1.0]), "plain": [1, None, "a", 0.5]},
        {"w": torch.tensor([0.0, 1.0], dtype=torch.float64), "plain": [1, None, "a", 0.5]},
        {"w": torch.tensor([[0.0, 1.0]]), "plain": [1, None, "a", 0.5]},
        {"w": torch.tensor([0.0, 1.0]), "plain": [1, None, "a", 0.25]},
        {"v": torch.tensor([0.0, 1.0]), "plain": [1, None, "a", 0.5]},
        {"w": torch.tensor([0.0, 1.0]), "plain": [[1, None], "a", 0.5]},
    ],
)
def test_whatever_differs_changes_the_digest(other):
    assert checkpoint_digest(BASE) == checkpoint_digest({**BASE, "digest": "its own is left out"})
    assert checkpoint_digest(other) != checkpoint_digest(BASE)


def test_a_checkpoint_without_a_digest_loads_and_says_so(tmp_path, caplog):
    save_checkpoint(tmp_path / "new.pt", {"model": {"w": torch.ones(2)}, "model_config": {}})
    load_checkpoint(tmp_path / "new.pt")
    assert not caplog.records
    old = torch.load(tmp_path / "new.pt", weights_only=True)
    del old["digest"]
    torch.save(old, tmp_path / "old.pt")
    assert torch.equal(load_checkpoint(tmp_path / "old.pt")["model"]["w"], torch.ones(2))
    assert caplog.messages == [
        f"{tmp_path / 'old.pt'} has no digest of its own: whether it is undamaged is not known"
    ]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("name", [None, "state_dict", "model_state_dict", "model"])
def test_weights_as_others_save_them(prefix, name, tmp_path):
    network = UNet((8, 12, 16))
    state = {prefix + key: value for key, value in network.state_dict().items()}
    optimizer = {"state": {}, "param_groups": [{"lr": 0.1}]}
    torch.save({name: state, "optimizer": optimizer, "epoch": 3} if name else state, tmp_path / "x")
    found = UNet.load(tmp_path / "x")
    assert found.config == {"widths": [8, 12, 16]}
    assert all(map(torch.equal, found.state_dict().values(), network.state_dict().values()))


def test_a_whole_model_is_named_as_what_it_is(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt holds Python objects, .*: give .* state_dict"):
        load_checkpoint(tmp_path / "x.pt")


def test_weights_without_names_are_a_sentence(tmp_path):
    torch.save(dict(enumerate(torch.nn.Linear(2, 2).parameters())), tmp_path / "net.pt")
    with pytest.raises(UserError, match=r"net\.pt"):
        load_checkpoint(tmp_path / "net.pt")


@pytest.mark.parametrize("inside", [None, "state_dict"])
def test_weights_of_another_network_are_named_as_such(tmp_path, inside):
    state = torch.nn.Sequential(torch.nn.Linear(2, 2)).state_dict()
    torch.save({inside: state} if inside else state, tmp_path / "net.pt")
    with pytest.raises(
        UserError, match=r"net\.pt holds the weights of another network \(0\.weight"
    ):
        load_checkpoint(tmp_path / "net.pt")
