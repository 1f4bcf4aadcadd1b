"""Broken files without end, and a process of its own to read them in."""

import faulthandler
import io
import logging
import os
import pickle
import resource
import struct
import sys
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from crashes import allow_memory
from hypothesis import strategies as st

from utils import run_script

SIZE = 6, 8  # height and width of good files
PATIENCE = 20  # seconds for one input
MEMORY = 2 * 2**30  # bytes that one input may take beyond the usual
SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of the colour types of PNG


# Processes


class Watch:
    """What a forked process does to one input after the other: each in time, without a crash."""

    def __init__(self, note: Path):
        self.note, self.count = note, 0
        self.usual = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def begin(self, *what: object) -> None:
        """Note what comes next: it is told of if the process does not outlive it."""
        self.count += 1
        self.note.write_text(" ".join(map(repr, what))[:20_000])
        faulthandler.dump_traceback_later(PATIENCE, exit=True)

    def end(self) -> None:
        """Check what the input has cost."""
        faulthandler.cancel_dump_traceback_later()
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self.usual
        assert used < MEMORY, f"{used / 2**30:.1f} GiB more than usual"


def in_fork(folder: Path, job: Callable[[Watch], Any], limit: int = 3 * MEMORY) -> Any:
    """Return what job(watch) returns in a forked process that may have `limit` bytes more.

    Fails with what job raised, or with the input at which the process crashed or hung.
    """
    note, result = folder / "note", folder / "result"
    with warnings.catch_warnings(action="ignore"):  # pytest has threads, which hold nothing
        pid = os.fork()
    if not pid:
        try:
            logging.getLogger().handlers.clear()  # pytest's, which keep warnings from stderr
            allow_memory(limit)
            answer = True, job(Watch(note))
        except BaseException:
            answer = False, traceback.format_exc()
        result.write_bytes(pickle.dumps(answer))
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if status:
        raise AssertionError(f"ended with status {status:#x} at {note.read_text()[:2000]}")
    good, answer = pickle.loads(result.read_bytes())
    assert good, answer
    return answer


def call(module: Any, *arguments: object) -> tuple[int, str, str]:
    """Run a script's main in this process; return its exit status, stdout and stderr."""
    old = sys.argv, sys.stdout, sys.stderr
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "replace")]
    sys.argv = [f"{module.__name__}.py", *map(str, arguments)]
    sys.stdout, sys.stderr = streams
    try:
        run_script(module.main)
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv, sys.stdout, sys.stderr = old
    for stream in streams:
        stream.flush()
    return status, *(stream.buffer.getvalue().decode() for stream in streams)


# Bytes


def seldom(draw: Callable, share: int) -> bool:
    """Return True once in `share` times."""
    return draw(st.sampled_from(range(share))) == 1


def pick(draw: Callable, usual: Any, *others: Any, share: int = 8) -> Any:
    """Return `usual`, or once in `share` times one of the others."""
    return draw(st.sampled_from(others)) if seldom(draw, share) else usual


def changed(draw: Callable, good: bytes, most: int = 4) -> bytes:
    """Return bytes with a few of them changed, cut or added."""
    content = bytearray(good)
    for _ in range(draw(st.integers(0, most))):
        if content:
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    how = draw(st.sampled_from(("as it is", "as it is", "cut", "longer", "hole")))
    at = draw(st.integers(0, len(content)))
    if how == "cut":
        content = content[:at]
    elif how == "longer":
        content += draw(st.binary(max_size=20))
    elif how == "hole":
        content = content[:at] + content[at + draw(st.integers(1, 8)) :]
    return bytes(content)


# PNG


def chunk(name: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG with its right checksum."""
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def header(width: int, height: int, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    return struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)


BOMB = zlib.compress(bytes(50_000_000), 9)
ODD_CHUNKS = [
    (b"tEXt", b"a\0b"),
    (b"tEXt", b"\xff" * 80),
    (b"zTXt", b"a\0\0" + BOMB),
    (b"zTXt", b"a\0\1"),
    (b"iTXt", b"a\0\1\0\0\0" + BOMB),
    (b"iTXt", b"a"),
    (b"iCCP", b"a\0\0" + BOMB),
    (b"iCCP", b""),
    (b"tRNS", b"\0" * 6),
    (b"tRNS", b"\0"),
    (b"PLTE", b"\1\2\3" * 4),
    (b"PLTE", b"\1" * 1000),
    (b"pHYs", b"\0"),
    (b"gAMA", b"\0"),
    (b"cHRM", b"\0" * 3),
    (b"sRGB", b""),
    (b"eXIf", b"MM\0*" + b"\xff" * 30),
    (b"acTL", struct.pack(">II", 2**31 - 1, 0)),
    (b"acTL", struct.pack(">II", 2, 0)),
    (b"acTL", b"\0"),
    (b"fcTL", struct.pack(">IIIIIHHBB", 0, 8, 6, 0, 0, 1, 1, 0, 0)),
    (b"fcTL", struct.pack(">IIIIIHHBB", 7, 60_000, 60_000, 9, 9, 0, 0, 9, 9)),
    (b"fdAT", struct.pack(">I", 1) + zlib.compress(bytes(200))),
    (b"IHDR", header(60_000, 60_000)),
    (b"IDAT", b""),
    (b"IDAT", BOMB),
    (b"IEND", b""),
    (b"IEND", b"more"),
    (b"abcD", b"?" * 50),
    (b"\0\0\0\0", b""),
]
SIDES = 0, 1, 5, 9, 240, 60_000, 2**20, 2**31 - 1, 2**32 - 1
KINDS = [(8, 0), (1, 0), (4, 0), (16, 0), (16, 2), (8, 3), (1, 3), (2, 3), (8, 4), (16, 4)]
KINDS += [(8, 0), (8, 3), (8, 4), (8, 6), (8, 6), (16, 6), (3, 2), (8, 5), (0, 0), (255, 255)]


@st.composite
def pngs(draw: Callable) -> bytes:
    """Draw a PNG, more or less broken, its checksums right or not."""
    depth, colour = pick(draw, (8, 2), *KINDS, share=2)
    interlace = pick(draw, 0, 1, 1, 2)
    width, height = (pick(draw, 8, *SIDES, share=12) for _ in range(2))
    row = -(-min(width, 300) * depth * CHANNELS.get(colour, 1) // 8)
    filters = (0, 1, 2, 3, 4, 5, 255) if seldom(draw, 8) else (0, 1, 2, 3, 4)
    high = min(height, 300) if interlace != 1 else 40  # enough for all passes
    high = pick(draw, high, high - 1, high // 2, share=12)
    rows = b"".join(
        bytes([draw(st.sampled_from(filters)) if i < 12 else 0])
        + bytes((i * k + k * k) % 256 for k in range(row))
        for i in range(max(0, high))
    )
    if seldom(draw, 12):
        rows = changed(draw, rows)
    pixels = zlib.compress(rows, draw(st.integers(0, 9)))
    if seldom(draw, 12):
        pixels = changed(draw, pixels)
    chunks = [(b"IHDR", header(width, height, depth, colour, interlace))]
    if colour == 3 and not seldom(draw, 8):
        chunks.append((b"PLTE", bytes(range(3 * pick(draw, 80, 1, 2, 4)))))
    cut = draw(st.integers(0, len(pixels)))
    parts = [pixels] if draw(st.booleans()) else [pixels[:cut], pixels[cut:]]
    chunks += [(b"IDAT", part) for part in parts]
    if not seldom(draw, 16):
        chunks.append((b"IEND", b""))
    for _ in range(pick(draw, 0, 1, 1, 2, share=3)):
        place = draw(st.integers(0, len(chunks)))
        chunks.insert(place, draw(st.sampled_from(ODD_CHUNKS)))
    if seldom(draw, 12):  # content changed, its checksum made right again
        place = draw(st.integers(0, len(chunks) - 1))
        chunks[place] = chunks[place][0], changed(draw, chunks[place][1])
    if seldom(draw, 20):
        chunks = draw(st.permutations(chunks))
    data = SIGNATURE + b"".join(chunk(*part) for part in chunks)
    return changed(draw, data) if seldom(draw, 5) else data


def is_sound(data: bytes) -> bool:
    """Return whether a PNG, as far as its IEND, has right checksums and all of its pixels.

    What zlib's own checksum says after the last row counts as little as it does for libpng, and
    what IEND says of its length and of nothing.
    """
    at, pixels = len(SIGNATURE), b""
    if data[12:16] != b"IHDR":
        return False
    while True:
        if data[at + 4 : at + 8] == b"IEND":
            break
        if len(data) < at + 12:
            return False
        length = struct.unpack(">I", data[at : at + 4])[0]
        end = at + 12 + length
        name, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        if data[at:end] != chunk(name, content):
            return False
        if name == b"IHDR" and not pixels:
            sides = struct.unpack(">IIBBBBB", content[:13])
        elif name == b"IDAT":
            pixels += content
        at = end
    width, height, depth, colour, *_, interlace = sides
    passes = [(8, 8, 0, 0), (8, 8, 4, 0), (4, 8, 0, 4), (4, 4, 2, 0), (2, 4, 0, 2), (2, 2, 1, 0)]
    passes = [*passes, (1, 2, 0, 1)] if interlace else [(1, 1, 0, 0)]  # steps, starts
    need = 0
    for x_step, y_step, x, y in passes:
        wide, high = -(-(width - x) // x_step), -(-(height - y) // y_step)
        if wide > 0 and high > 0:
            need += high * (1 + -(-wide * depth * CHANNELS[colour] // 8))
    try:
        return len(zlib.decompressobj(-15).decompress(pixels[2:], need)) >= need
    except zlib.error:
        return False


# mask.npy


DESCRIPTIONS = [
    *("'|i1'", "'<i2'", "'>i2'", "'<i4'", "'>i4'", "'<i8'", "'>i8'", "'<u8'", "'>u8'", "'<f4'"),
    *("'<f8'", "'<f2'", "'|b1'", "'|O'", "'<c8'", "'|S8'", "'<U9'", "'|V8'", "'<M8[s]'", "'<m8'"),
    *("[('a', '|u1')]", "[('a', '<i4'), ('b', '|O')]", "('|u1', (3,))", "[('a', '|u1', (2, 2))]"),
    *("[]", "None", "3", "'nonsense'", "'|u1' 'x'", "'" + 900 * "u" + "'", "1is 1", "b'|u1'"),
    *("'|S0'", "'|V0'", "'<U0'", "[('a', '|V0')]", "'u1,u1'", "('|u1', 2**40)", "'|S99999999999'"),
]
SHAPES = [
    *("(2, 6, 8)", "(4, 6, 8)", "(3, 8, 6)", "(3, 6, 8, 1)", "(144,)", "()", "(0, 6, 8)"),
    *("(3, 0, 8)", "(3, 6, 0)", "(-1, 6, 8)", "(3, -6, -8)", "(2**40, 6, 8)", "(3, 10**30, 8)"),
    *("(4294967296, 4294967296, 1)", "(9223372036854775807, 1, 1)", "(3, 99999999999, 8)"),
    *("(9223372036854775807, 9223372036854775807, 0)", "(18446744073709551615, 1, 1)"),
    *("(3.0, 6, 8)", "(True, 6, 8)", "'abc'", "[3, 6, 8]", "(3, 6, 8", 90 * "(", "(3L, 6L, 8L)"),
    *("(1,)*64", "(" + 70 * "1, " + ")", "(" + 3000 * "1, " + ")", "3, 6, 8", "None"),
]


@st.composite
def masks(draw: Callable) -> bytes:
    """Draw a mask.npy of three frames, more or less broken."""
    kind = pick(draw, "npy", "npz", "pickle", "noise", "empty")
    description = pick(draw, "'|u1'", *DESCRIPTIONS, share=3)
    shape = pick(draw, "(3, 6, 8)", *SHAPES, share=4)
    values = pick(draw, 1, 0, 48, 49, 128, 255, share=3)
    if kind == "empty":
        return b""
    if kind == "noise":
        return draw(st.binary(max_size=200))
    file = io.BytesIO()
    if kind == "npz":
        np.savez(file, mask=np.zeros((3, *SIZE), np.uint8))
        return changed(draw, file.getvalue())
    if kind == "pickle":
        np.save(file, np.full((3, *SIZE), None), allow_pickle=True)
        return changed(draw, file.getvalue())
    order = pick(draw, "False", "True", "True", "1", "'no'")
    text = f"{{'descr': {description}, 'fortran_order': {order}, 'shape': {shape}, }}"
    if seldom(draw, 16):
        text = draw(st.sampled_from(("", "{}", text[:-3] + "'x': 1}", "[" * 5000, "\\d" + text)))
    elif seldom(draw, 16):
        text += " " * draw(st.sampled_from((9_000, 20_000, 60_000)))
    version = pick(draw, 1, 2, 3, 4, 0)
    content = text.encode("latin1") + b"\n"
    size = len(content) + pick(draw, 0, 1, -1, 70, 30_000, share=12)
    length = struct.pack("<H", size % 2**16) if version == 1 else struct.pack("<I", size % 2**32)
    try:
        item = np.dtype(eval(description)).itemsize  # our own words, of the list above
    except (TypeError, SyntaxError, ValueError, OverflowError):
        item = 1
    body = (bytes([values]) + bytes(max(0, min(item, 40) - 1))) * (3 * SIZE[0] * SIZE[1])
    body = body[: pick(draw, len(body), len(body) - 1, 10, 0)]
    data = b"\x93NUMPY" + bytes([version, 0]) + length + content + body
    return changed(draw, data) if seldom(draw, 5) else data


# Checkpoints


def stored(value: Any) -> bytes:
    """Return what torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def with_record(data: bytes, change: Callable[[str, bytes], bytes], deflate: bool = False) -> bytes:
    """Return a checkpoint with the records of its archive changed, their checksums right."""
    out = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return out.getvalue()
