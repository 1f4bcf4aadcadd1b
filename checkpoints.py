"""Checkpoints: dicts of plain types and tensors, written whole or not at all.

Each carries a digest of all that it holds: a file of which one bit has turned is still a zip with
tensors of the right shapes, and PyTorch reads it.
"""

import hashlib
import io
import itertools
import logging
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from files import atomic_write
from utils import VERSION, UserError, no_memory

SHIPPED = Path(__file__).parent / "weights" / "clevr_unet.pt"  # what comes with the project
CHECKPOINT_FORMAT = 2  # raised when a key changes its meaning
PREFIXES = "module.", "_orig_mod."  # of DistributedDataParallel and DataParallel, torch.compile
logger = logging.getLogger(__name__)


def save_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write a dict of plain types and tensors that `torch.load(weights_only=True)` reads.

    Its tensors lie on the CPU, so that it loads where there is no GPU. Its `version` is that of
    the project that wrote it, for people to read, its `digest` that of all the rest.
    """
    checkpoint = _on_cpu({**checkpoint, "format": CHECKPOINT_FORMAT, "version": VERSION})
    checkpoint["digest"] = checkpoint_digest(checkpoint)
    packed = io.BytesIO()  # where torch cannot write it raises RuntimeError, whatever the cause
    torch.save(checkpoint, packed)
    with atomic_write(path) as file:
        file.write(packed.getbuffer())


def _on_cpu(value: Any) -> Any:
    """Return dicts, lists and tuples with their tensors on the CPU."""
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(item) for item in value)
    return value.cpu() if isinstance(value, torch.Tensor) else value


def checkpoint_digest(checkpoint: dict[str, Any]) -> str:
    """Return the SHA-256 of a dict of plain types and tensors on the CPU, but for its `digest`."""
    sha = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, dict):
            sha.update(b"dict")
            for key, item in value.items():
                feed(key)
                feed(item)
        elif isinstance(value, (list, tuple)):
            sha.update(b"list")
            for item in value:
                feed(item)
        elif isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)}".encode())
            sha.update(value.detach().reshape(-1).contiguous().view(torch.uint8).numpy())
        else:
            sha.update(repr(value).encode())
        sha.update(b"\n")

    feed({key: value for key, value in checkpoint.items() if key != "digest"})
    return sha.hexdigest()


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Returns:
        The dict given to `save_checkpoint`, with its `format`, `version` (0.9.0 is the first that
        is written there) and `digest`. A bare state_dict, or one under the name `state_dict`,
        `model_state_dict` or `model`, comes back as `{"model": state_dict, "model_config": {...},
        "digest": ...}`, without prefixes of DistributedDataParallel and torch.compile and with
        the widths of its weights. Where no digest was written, a warning says so.

    Raises:
        UserError: not a checkpoint, damaged, or of another version's format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give a file that train.py wrote")
    try:
        _must_not_swell(path)
        with warnings.catch_warnings(action="ignore"):  # torch warns of files that are refused here
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        _must_be_plain(checkpoint, path.stat().st_size)
    except Exception as error:  # torch raises half a dozen types for files that are not its own
        if isinstance(error, OSError) and error.filename:  # else it is torch's, of the content
            raise
        if "Unsupported global" in str(error):
            raise UserError(
                f"{path} holds Python objects, perhaps a whole model, which are not read: they "
                "could run code: give a file with its state_dict() alone"
            ) from None
        raise UserError(
            f"{path} is damaged or not a checkpoint ({no_memory(error) or type(error).__name__}): "
            "give a file that train.py wrote"
        ) from None
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise UserError(f"{path} holds no checkpoint: give a file that train.py wrote")
    checkpoint = _as_ours(checkpoint, path)
    has_model = isinstance(checkpoint.get("model"), dict)
    found = checkpoint.get("format", CHECKPOINT_FORMAT)
    if not (has_model and isinstance(checkpoint.get("model_config"), dict) and type(found) is int):
        raise UserError(f"{path} holds no model: give a file that train.py wrote")
    if found != CHECKPOINT_FORMAT:
        age, cure = ("newer", "update it") if found > CHECKPOINT_FORMAT else ("older", "train anew")
        raise UserError(f"{path} was written by an {age} version of this project: {cure}")
    true = checkpoint_digest(checkpoint)
    if "digest" not in checkpoint:
        logger.warning("%s has no digest of its own: whether it is undamaged is not known", path)
    elif checkpoint["digest"] != true:
        raise UserError(f"{path} is damaged, what it holds is not what was saved: copy it anew")
    return checkpoint | {"digest": true}


def _as_ours(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a checkpoint as `save_checkpoint` gets it, whoever saved the weights of a UNet.

    Raises:
        UserError: weights of another network.
    """
    if "model_config" in checkpoint:
        return checkpoint
    state = checkpoint
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(checkpoint.get(name), dict):
            state = checkpoint[name]
    named = (isinstance(k, str) and isinstance(x, torch.Tensor) for k, x in state.items())
    if not state or not all(named):
        return checkpoint
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), ""):
        state = {name[len(prefix) :]: value for name, value in state.items()}
    first = (state.get(f"encoder.{k}.0.conv1.weight") for k in itertools.count())
    widths = [len(weight) for weight in itertools.takewhile(lambda w: w is not None, first)]
    if not widths:
        raise UserError(
            f"{path} holds the weights of another network ({next(iter(state))}, ...), not of "
            "model.py's UNet: give a file that train.py wrote"
        )
    return {"model": state, "model_config": {"widths": widths}}


def is_finite(state: dict[str, torch.Tensor]) -> bool:
    """Return whether all weights and statistics of a network are numbers, not NaN or infinite."""
    return all(bool(value.isfinite().all()) for value in state.values())


def count_weights(state: dict[str, Any]) -> int:
    """Return how many numbers the tensors of a network's state hold."""
    return sum(value.numel() for value in state.values() if isinstance(value, torch.Tensor))


def _must_not_swell(path: Path) -> None:
    """Raise ValueError for an archive that by its own word is larger than its file."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("torch.save packs nothing")


def _must_be_plain(checkpoint: Any, size: int) -> None:
    """Raise ValueError for what `save_checkpoint` never writes: it can take time or memory to read.

    Args:
        checkpoint: What a file holds.
        size: Bytes of the file. A value takes one at least, and tensors are not larger than it; by
            references to one thing a file can claim any number of them.
    """
    rest, values, content = [checkpoint], 0, 0
    while rest:
        value = rest.pop()
        values += 1
        if isinstance(value, dict):
            rest += [*value, *value.values()]
        elif isinstance(value, (list, tuple)):
            rest += value
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
                raise ValueError("not a plain tensor")
            own = value.nelement() * value.element_size()
            if own > value.untyped_storage().nbytes():
                raise ValueError("a tensor that repeats itself")
            content += own
        elif not isinstance(value, (str, int, float, type(None))):
            raise ValueError(f"holds {type(value).__name__}")
        if values + len(rest) > size or content > 2 * size:
            raise ValueError("more than its file")
