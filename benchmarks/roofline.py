"""Bytes that the CUDA kernels must move, and the time that takes: python -m benchmarks.roofline.

Nothing here is measured. Times are bytes over an H100's bandwidth, without launches; what eager
torch and torch.compile move is counted from the tensors that their kernels read and write.
"""

from __future__ import annotations

from dataclasses import dataclass

import typer

from mnp_fast.demo.resnet import ResNet18

BANDWIDTH = 3.35e12  # bytes a second of an H100 (SXM)
CACHE = 50 * 2**20  # bytes of its second cache
BATCH, ITEM = 128, 2  # samples, bytes of a float16
# Channels and side of ResNet-18's stages on images of 32 x 32, and of its first one on 224 x 224.
STAGES = [(64, 32), (128, 16), (256, 8), (512, 4), (64, 56)]
FLOAT = 4


@dataclass(frozen=True)
class Passes:
    """How often each competitor reads or writes a tensor of the image's size."""

    name: str
    least: int  # every tensor that is needed once
    compiled: int
    eager: int


PASSES = [
    # Reads u and residual, writes y. Eager: times scale, plus shift, times mask, plus bias, plus
    # residual, ReLU. Compiled: one kernel.
    Passes("epilogue", 3, 3, 13),
    # Reads grad, y and u, writes dz and g. Eager: ReLU's gradient, dz * t and its sum, dz * mask,
    # and that * scale. Compiled: a kernel for dz and g, which reads two, and one for the sum, which
    # reads three.
    Passes("epilogue's gradient", 5, 7, 11),
]


def epilogue_bytes(elements: int, item: int, residual: bool = True) -> int:
    """What the epilogue moves."""
    return (3 if residual else 2) * elements * item


def gradient_bytes(elements: int, item: int, residual: bool = True) -> int:
    """What the epilogue's gradient moves, sums aside."""
    return (5 if residual else 4) * elements * item


def rows() -> list[tuple[str, ...]]:
    """The table, heading first."""
    table: list[tuple[str, ...]] = [
        ("kernel", "shape, float16", "MB", "time on an H100", "torch.compile", "eager torch")
    ]
    for passes in PASSES:
        for channels, side in STAGES:
            size = BATCH * channels * side * side * ITEM
            inside = " (fits the L2 cache)" if passes.least * size <= CACHE else ""
            table.append(
                (
                    passes.name,
                    f"{BATCH}x{channels}x{side}x{side}",
                    f"{passes.least * size / 1e6:.1f}",
                    f"{1e6 * passes.least * size / BANDWIDTH:.1f} us{inside}",
                    f"{passes.compiled / passes.least:.1f}",
                    f"{passes.eager / passes.least:.1f}",
                )
            )
    weights = [p for p in ResNet18(64).parameters() if p.dim() == 4]
    for name, size, item in (
        ("magnitude", sum(w.numel() for w in weights), ITEM),
        ("mask update", 6 * sum(len(w) for w in weights), FLOAT),
    ):
        time = 1e6 * size * item / BANDWIDTH
        figures = f"{size * item / 1e6:.2f}", f"{time:.2f} us (fits the L2 cache)"
        table.append((name, "all layers of a ResNet-18", *figures, "launches", "launches"))
    return table


def page() -> str:
    """The table in Markdown."""
    head, *body = rows()
    lines = ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *body)]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.echo(page())
