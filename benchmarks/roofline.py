"""Bytes that the GPU kernels must move, and the time that takes: python -m benchmarks.roofline.

Nothing here is measured. Times are bytes over an H100's bandwidth or operations over its peak,
without launches; what eager torch and torch.compile move is counted from the tensors that their
kernels read and write.
"""

from __future__ import annotations

from dataclasses import dataclass

import typer

from mnp_fast.demo.resnet import ResNet18

BANDWIDTH = 3.35e12  # bytes a second of an H100 (SXM)
CACHE = 50 * 2**20  # bytes of its second cache
PEAK = 989e12  # operations a second of its tensor cores in float16, without sparsity
BATCH, ITEM = 128, 2  # samples, bytes of a float16
# Channels and side of ResNet-18's stages on images of 32 x 32, and of its first one on 224 x 224.
STAGES = [(64, 32), (128, 16), (256, 8), (512, 4), (64, 56)]
FLOAT = 4
TAPS = 9  # of a 3x3 filter
TILE = 128, 64  # pixels and neurons of the tile that Triton's products are counted with


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
    # A layer's norm is a kernel of torch; its mask step is one compiled, and five in eager torch.
    for name, size, item, eager in (
        ("magnitude", sum(w.numel() for w in weights), ITEM, 1),
        ("mask update", 6 * sum(len(w) for w in weights), FLOAT, 5),
    ):
        time = 1e6 * size * item / BANDWIDTH
        figures = f"{size * item / 1e6:.2f}", f"{time:.2f} us (fits the L2 cache)"
        launches = [f"{count * len(weights)} launches to 1" for count in (1, eager)]
        table.append((name, "all layers of a ResNet-18", *figures, *launches))
    return table


def product_rows() -> list[tuple[str, ...]]:
    """The table of Triton's products: 3x3 convolutions, as many channels as neurons."""
    table: list[tuple[str, ...]] = [
        (
            *("kernel", "shape, float16", "GFLOP", "MB", "MB out of L2", "time on an H100"),
            *("torch.compile", "eager torch"),
        )
    ]
    epilogue = PASSES[0]
    for name, images, others in (
        ("forward", 3, epilogue),  # x, residual, y
        ("forward, u is kept", 5, epilogue),  # and u, in float32
        ("gradient of the input", 2, None),  # g, dx
    ):
        for channels, side in STAGES:
            image = BATCH * channels * side * side * ITEM
            weight = TAPS * channels * channels * ITEM
            operations = image // ITEM * 2 * TAPS * channels
            tiles = -(-BATCH * side * side // TILE[0]) * -(-channels // TILE[1])
            read = tiles * sum(TILE) * TAPS * channels * ITEM
            moved = images * image + weight
            time = max(moved / BANDWIDTH, operations / PEAK)
            # Theirs: a convolution as good as can be, and the epilogue behind it.
            apart = max((2 * image + weight) / BANDWIDTH, operations / PEAK)
            gains = [
                f"{(apart + passes * image / BANDWIDTH) / time:.1f}"
                for passes in ((others.compiled, others.eager) if others else (0, 0))
            ]
            limit = "bytes" if moved / BANDWIDTH > operations / PEAK else "products"
            table.append(
                (
                    *(name, f"{BATCH}x{channels}x{side}x{side}", f"{operations / 1e9:.1f}"),
                    *(f"{moved / 1e6:.1f}", f"{read / 1e6:.0f}"),
                    *(f"{1e6 * time:.1f} us ({limit})", *gains),
                )
            )
    return table


def page(table: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    head, *body = table
    lines = ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *body)]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.echo(page(rows()) + "\n\n" + page(product_rows()))
