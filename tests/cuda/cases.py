"""Calls of the kernels and what they have to write, from the reference in float64."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mnp_fast import reference

from ..ops.cases import random_mask
from .shim import ELEMENTS, Buffer, Call, execute, raw

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
Expected = list[Tensor]
Case = tuple[Call, Expected]

# Samples, neurons, and elements of each: vectors that reach over neurons and samples, several tiles
# of channels, rows for a part of a warp and for a block, and samples that several blocks share.
SHAPES = [
    (1, 1, 1),
    (3, 5, 1),
    (2, 3, 7),
    (2, 8, 49),
    (3, 24, 10),
    (1, 16, 300),
    (2, 64, 37),
    (2, 301, 3),
    (1, 2, 5003),
    (1, 1032, 5),
    (0, 4, 9),
]


def computed(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def image(n: int, k: int, inner: int, dtype: torch.dtype, special: bool = False) -> Tensor:
    """Random (N, K, inner), here and there infinite or NaN if `special`."""
    t = torch.randn(n, k, inner).to(dtype)
    if special and t.numel() > 20:
        where = torch.randperm(t.numel())[:3]
        t.view(-1)[where] = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)
    return t


def laid_out(t: Tensor, channels_last: bool) -> Tensor:
    return t.transpose(1, 2).contiguous() if channels_last else t.contiguous()


class Epilogue:
    """Random arguments of an epilogue, some of them missing."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, channels_last: bool):
        n, k, _ = shape
        self.shape, self.dtype, self.channels_last = shape, dtype, channels_last
        self.per_sample, self.relu = random.random() < 0.5, random.random() < 0.7
        self.wide = random.random() < 0.5  # vectors in the dtype that is computed in
        vector = computed(dtype) if self.wide else dtype
        sizes = (n, k) if self.per_sample else (k,)
        self.mask = random_mask(*sizes, dtype=torch.float32).to(vector)
        self.scale, self.shift, self.bias = (
            torch.randn(k).to(vector) if random.random() < 0.8 else None for _ in range(3)
        )
        if not self.per_sample and random.random() < 0.2:
            self.mask = None
        self.u = image(*shape, dtype, special=True)
        self.residual = image(*shape, dtype) if random.random() < 0.5 else None
        # Not at a border of 16 bytes: then elements are accessed one by one.
        self.offset = self.u.element_size() if random.random() < 0.25 else 0

    def exact(self, *names: str) -> list[Tensor | None]:
        values = (getattr(self, name) for name in names)
        return [None if v is None else v.double() for v in values]

    @property
    def y(self) -> Tensor:
        names = ("u", "mask", "scale", "shift", "bias", "residual")
        return reference.epilogue(*self.exact(*names), "relu" if self.relu else "none")

    @property
    def ints(self) -> list[int]:
        element = ELEMENTS[self.dtype]
        return [*self.shape, self.channels_last, element, self.per_sample, self.wide, self.relu]

    def buffer(self, t: Tensor | None, role: str = "in") -> Buffer:
        return Buffer(None if t is None else laid_out(t, self.channels_last), role, self.offset)

    def forward(self) -> Case:
        vectors = [Buffer(v) for v in (self.mask, self.scale, self.shift, self.bias)]
        ends = [self.buffer(self.residual), self.buffer(self.u, "out")]
        call = Call("epilogue", self.ints, [self.buffer(self.u), *vectors, *ends])
        return call, [laid_out(self.y.to(self.dtype), self.channels_last)]

    def backward(self) -> Case:
        n, k, _ = self.shape
        grad = image(*self.shape, self.dtype)
        y = self.y.to(self.dtype) if self.relu else None
        dz, g, sums = reference.epilogue_backward(
            grad.double(),
            None if y is None else y.double(),
            *self.exact("u", "mask", "scale", "shift"),
        )
        wanted = [random.random() < 0.8 for _ in range(3)]
        outputs = [
            self.buffer(self.u if wanted[0] else None, "out"),
            self.buffer(self.u if wanted[1] else None, "out"),
            Buffer(torch.empty(3, n, k, dtype=computed(self.dtype)) if wanted[2] else None, "out"),
        ]
        inputs = [self.buffer(grad), self.buffer(y), self.buffer(self.u)]
        vectors = [Buffer(v) for v in (self.mask, self.scale, self.shift)]
        call = Call("epilogue_grad", self.ints, [*inputs, *vectors, *outputs])
        images = [laid_out(t.to(self.dtype), self.channels_last) for t in (dz, g)]
        expected = [*images, sums.to(computed(self.dtype))]
        return call, [t for t, want in zip(expected, wanted, strict=True) if want]


def epilogues(dtype: torch.dtype, channels_last: bool) -> Iterator[Case]:
    for shape in SHAPES:
        for _ in range(3):
            yield Epilogue(shape, dtype, channels_last).forward()


def epilogue_grads(dtype: torch.dtype, channels_last: bool) -> Iterator[Case]:
    for shape in SHAPES:
        for _ in range(3):
            if shape[0]:
                yield Epilogue(shape, dtype, channels_last).backward()


def magnitudes(dtype: torch.dtype) -> Iterator[Case]:
    """More layers than a launch takes, rows of all lengths and with gaps between them."""
    for norm, order in enumerate((1, 2, float("inf"))):
        ints, buffers, expected = [ELEMENTS[dtype], norm], [], []
        for layer in range(70):
            neurons, size = random.randint(1, 5), random.choice([1, 3, 27, 64, 129, 700])
            stride = size + random.choice([0, 0, 1, 5])
            rows = torch.randn((neurons - 1) * stride + size).to(dtype)
            if layer % 9 == 0:
                rows[0] = random.choice([torch.inf, -torch.inf, torch.nan])
            ints += [neurons, size, stride]
            norms = torch.empty(neurons, dtype=computed(dtype))
            offset = random.choice([0, rows.element_size()])
            buffers += [Buffer(rows, offset=offset), Buffer(norms, "out")]
            strided = rows.double().as_strided((neurons, size), (stride, 1))
            exact = torch.linalg.vector_norm(strided, order, dim=1)
            expected.append(exact.to(computed(dtype)))
        yield Call("magnitude", ints, buffers), expected


def mask_updates(dtype: torch.dtype) -> Iterator[Case]:
    lr, momentum, penalty = 0.3, 0.9, 0.2
    for offset in (0, torch.finfo(dtype).bits // 8):
        ints, buffers, expected = [ELEMENTS[dtype]], [], []
        for layer in range(70):
            size = random.choice([0, 1, 3, 64, 257, 1100])
            mask, grad, velocity, magnitude = torch.randn(4, size).to(dtype)
            mask = mask.clamp(0, 1)
            if size and layer % 9 == 0:
                grad[-1] = random.choice([torch.inf, torch.nan])
            changed = [mask.double().clone(), velocity.double().clone()]
            given = [changed[0]], [grad.double()], [changed[1]], [magnitude.double()]
            reference.mask_update_(*given, lr, momentum, penalty)
            ints.append(size)
            tensors = zip((mask, grad, velocity, magnitude), ("inout", "in") * 2, strict=True)
            buffers += [Buffer(t, role, offset) for t, role in tensors]
            expected += [t.to(dtype) for t in changed]
        yield Call("mask_update", ints, buffers, [lr, momentum, penalty]), expected


def check(program: Path, cases: list[Case]) -> None:
    """Run all calls with threads in both orders, and compare bits of the two and what is right."""
    calls = [call for call, _ in cases]
    forward = execute(program, calls, reverse=False)
    for (call, expected), done in zip(cases, forward, strict=True):
        dtype = next(d for d, e in ELEMENTS.items() if e == call.ints[4 * ("epi" in call.kernel)])
        for result, right in zip(done.written, expected, strict=True):
            spread = right[right.isfinite()].abs().max().item() if right.isfinite().any() else 0.0
            torch.testing.assert_close(
                result,
                right,
                rtol=TOLERANCE[dtype],
                atol=TOLERANCE[dtype] * (spread + 1e-3),
                equal_nan=True,
            )
    for done, other in zip(forward, execute(program, calls, reverse=True), strict=True):
        assert list(map(raw, done.written)) == list(map(raw, other.written))
