"""Every CUDA kernel in all its forms on small, odd shapes: what compute-sanitizer watches.

test_sanitizer.py runs it, without torch's own cache of memory: each tensor is then an allocation of
its own, whose borders the tool knows.
"""

from __future__ import annotations

import torch

from mnp_fast import ops

DEVICE = "cuda"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPES = [(2, 3, 7, 1), (2, 24, 5, 2), (1, 2, 61, 83), (1, 1032, 5, 1), (2, 64, 40, 40)]


def image(shape: tuple[int, ...], dtype: torch.dtype, last: bool, aligned: bool) -> torch.Tensor:
    """Random, in either layout, at a border of 16 bytes or not."""
    layout = torch.channels_last if last else torch.contiguous_format
    dense = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=layout)
    if aligned:
        return dense
    moved = torch.empty(dense.numel() + 1, dtype=dtype, device=DEVICE)[1:]
    return moved.as_strided(dense.shape, dense.stride(), 1).copy_(dense)


def epilogues(shape: tuple[int, ...], dtype: torch.dtype, last: bool, aligned: bool) -> None:
    """Forward and backward, with masks for all samples and for each."""
    n, k = shape[:2]
    for sizes in ((k,), (n, k)):
        x, residual = (image(shape, dtype, last, aligned).requires_grad_() for _ in range(2))
        mask = torch.rand(sizes, device=DEVICE, requires_grad=dtype != torch.float64)
        mask = mask.double() if dtype == torch.float64 else mask
        vectors = torch.randn(3, k, device=DEVICE).to(dtype).unbind()
        y = ops.masked_affine(x, mask, *vectors, residual, activation="relu")
        y.backward(image(tuple(y.shape), dtype, last, aligned))


def lists(dtype: torch.dtype) -> None:
    """Magnitudes, and mask steps where masks can have the type."""
    sizes = [1, 3, 27, 257, 1100] * 15
    for norm in ("l1", "l2", "linf"):
        ops.neuron_magnitude([torch.randn(3, s, device=DEVICE).to(dtype) for s in sizes], norm)
    if dtype in (torch.float32, torch.float64):
        state = [[torch.rand(s, device=DEVICE, dtype=dtype) for s in sizes] for _ in range(4)]
        ops.mask_update_(*state, lr=0.1, momentum=0.9, penalty=0.3)


def main() -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            for last in (False, True):
                for aligned in (False, True):
                    epilogues(shape, dtype, last, aligned)
        lists(dtype)
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
