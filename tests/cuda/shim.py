"""Kernels compiled for the CPU, and calls of them in a process of their own."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SHIM = Path(__file__).parent / "shim"
KERNELS = ("epilogue", "epilogue_grad", "magnitude", "mask_update")
ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
COMPILER = shutil.which("g++") or "c++"
FLAGS = ("-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
# Accesses of 16 bytes have to start at a border of 16 bytes on a device.
CHECKS = ("-fsanitize=address,alignment", "-fno-sanitize-recover=alignment")
SANITIZE = ("-O0", "-g", "-fno-omit-frame-pointer", *CHECKS)
NAMES = {name: i for i, name in enumerate(KERNELS)}


def compile_unit(source: Path, csrc: Path, cache: Path, flags: Sequence[str]) -> Path:
    """The object of a source file, from the cache where nothing that it includes has changed."""
    headers = [*csrc.glob("*.h"), *csrc.glob("cuda/*.*h"), *csrc.glob("ops/**/*.h")]
    text = [p.read_bytes() for p in (source, *sorted(headers), *sorted(SHIM.glob("*.h")))]
    key = hashlib.sha256(b"\0".join([repr((COMPILER, flags)).encode(), *text])).hexdigest()[:20]
    target = cache / f"{source.stem}-{key}.o"
    if not target.exists():
        unfinished = target.with_suffix(".part")
        include = [f"-I{csrc}", f"-I{SHIM}"]
        run([COMPILER, *FLAGS, *flags, *include, "-x", "c++", "-c", source, "-o", unfinished])
        unfinished.rename(target)
    return target


def compile_units(
    sources: Sequence[Path], csrc: Path, cache: Path, flags: Sequence[str]
) -> list[Path]:
    """The objects of all sources; a compiler for each core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: compile_unit(source, csrc, cache, flags), sources))


def run(command: Sequence[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    """A process that has to succeed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done


def build(cache: Path, csrc: Path = CSRC) -> Path:
    """The program that runs the kernels of a source tree, under AddressSanitizer."""
    kernels = [csrc / "cuda" / f"{name}.cu" for name in KERNELS]
    return link([*kernels, SHIM / "fibers.cpp", SHIM / "main.cpp"], cache, csrc)


def link(sources: Sequence[Path], cache: Path, csrc: Path = CSRC) -> Path:
    """A program from sources, under AddressSanitizer."""
    objects = compile_units(sources, csrc, cache, SANITIZE)
    key = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:20]
    program = cache / f"{sources[-1].stem}-{key}"
    if not program.exists():
        run([COMPILER, *CHECKS, *objects, "-o", program])
    return program


@dataclass
class Buffer:
    """Memory that a kernel is given.

    Attributes
    ----------
    tensor
        What is in it; of an output, its size and dtype.
    role
        `"in"`, `"out"` or `"inout"`.
    offset
        Bytes from a border of 16.
    """

    tensor: Tensor | None
    role: str = "in"
    offset: int = 0


@dataclass
class Call:
    """One call of a kernel's launcher."""

    kernel: str
    ints: list[int]
    buffers: list[Buffer]
    floats: list[float] = field(default_factory=list)

    def request(self, reverse: bool) -> bytes:
        counts = (len(self.ints), len(self.floats), len(self.buffers))
        parts = [
            struct.pack("5q", NAMES[self.kernel], reverse, *counts),
            struct.pack(f"{len(self.ints)}q", *self.ints),
            struct.pack(f"{len(self.floats)}d", *self.floats),
        ]
        for buffer in self.buffers:
            if buffer.tensor is None:
                parts.append(struct.pack("3q", 3, 0, 0))
                continue
            data = raw(buffer.tensor)
            role = ("in", "out", "inout").index(buffer.role)
            parts.append(struct.pack("3q", role, len(data), buffer.offset))
            parts.append(b"" if buffer.role == "out" else data)
        return b"".join(parts)


def raw(t: Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b""


@dataclass
class Done:
    """What a call wrote, and its accesses of 16 bytes."""

    written: list[Tensor]
    wide_reads: int
    wide_writes: int


def execute(program: Path, calls: Sequence[Call], reverse: bool) -> list[Done]:
    """What every call did, threads and blocks taken in order or in reverse."""
    done = subprocess.run(
        [program],
        input=b"".join(call.request(reverse) for call in calls),
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    results, at = [], 0
    for call in calls:
        reads, writes, length = struct.unpack_from("3q", done.stdout, at)
        at += 24 + length
        assert not length, done.stdout[at - length : at].decode()
        written = []
        for buffer in call.buffers:
            if buffer.tensor is None or buffer.role == "in":
                continue
            size = buffer.tensor.numel() * buffer.tensor.element_size()
            data = bytearray(done.stdout[at : at + size])
            at += size
            if size:
                flat = torch.frombuffer(data, dtype=buffer.tensor.dtype)
                written.append(flat.reshape(buffer.tensor.shape))
            else:
                written.append(torch.empty_like(buffer.tensor))
        results.append(Done(written, reads, writes))
    assert at == len(done.stdout)
    return results
