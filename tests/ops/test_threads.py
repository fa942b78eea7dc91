"""Calls from several Python threads, and from forked processes."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mnp_fast import frozen_weights, masks, wrap
from mnp_fast.ops import mask_update_, masked_affine, masked_conv2d, neuron_magnitude

from ..models import resnet
from .cases import Conv, conv_inputs, require_grad, torch_threads

CONVS = (
    (Conv(4, 24, 13, 13, 40), "direct"),
    (Conv(4, 24, 13, 13, 40), "winograd4"),
    (Conv(4, 24, 13, 13, 40, stride=(2, 2)), "winograd4"),
    (Conv(2, 12, 9, 9, 18, stride=(2, 2), groups=3), "auto"),
    (Conv(3, 20, 9, 9, 20, groups=5), "auto"),
    (Conv(3, 3, 21, 17, 24, kernel=(5, 5), padding=(2, 2)), "auto"),
    (Conv(5, 20, 6, 6, 70, kernel=(1, 1), padding=(0, 0)), "auto"),
)


def work(seed: int) -> list[Tensor]:
    """What every operator makes of the inputs of a seed, gradients included."""
    generator = torch.Generator().manual_seed(seed)
    conv, algorithm = CONVS[seed % len(CONVS)]
    shapes = {name: t.shape for name, t in conv_inputs(conv, torch.float32).items()}
    inputs = require_grad({k: torch.randn(s, generator=generator) for k, s in shapes.items()})
    y = masked_conv2d(**inputs, **conv.geometry, activation="relu", algorithm=algorithm)
    z = masked_affine(y, inputs["mask"], inputs["scale"], activation="relu")
    mask, grad, velocity = torch.ones(3, 500).mul_(0.5), *torch.randn(2, 500, generator=generator)
    magnitudes = neuron_magnitude([inputs["weight"].detach()])
    mask_update_([mask[0]], [grad], [velocity], [mask[1]], lr=0.1, momentum=0.9, penalty=0.1)
    grads = torch.autograd.grad(z.square().sum(), list(inputs.values()))
    return [y.detach(), z.detach(), *grads, *magnitudes, mask, velocity]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_at_once_give_the_bits_of_one_after_the_other(threads):
    with torch_threads(threads):
        alone = [work(seed) for seed in range(8)]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                together = list(pool.map(work, range(8)))
                assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_regions_at_once_give_the_bits_of_one_after_the_other():
    """Regions whose samples the threads share, in several threads of Python."""
    model = wrap(resnet().eval())
    wanted = list(masks(model).values())

    def gradients(seed: int) -> tuple[Tensor, ...]:
        x = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        return torch.autograd.grad(model(x).square().sum(), wanted)

    with torch_threads(2), frozen_weights(model), ThreadPoolExecutor(4) as pool:
        alone = [gradients(seed) for seed in range(8)]
        for _ in range(3):
            together = list(pool.map(gradients, range(8)))
            assert all(map(torch.equal, chain(*alone), chain(*together)))


class Worked(Dataset[list[Tensor]]):
    """Samples that the operators make in the worker, and the number of threads there."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, seed: int) -> list[Tensor]:
        return [torch.tensor([torch.get_num_threads(), os.getpid()]), *work(seed)]


def test_data_loader_workers_forked_after_use():
    expected = [work(seed) for seed in range(4)]
    loader = DataLoader(
        Worked(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=30
    )
    for mine, (process, *theirs) in zip(expected, loader, strict=True):
        assert process[0] == 1
        assert process[1] != os.getpid()
        assert same(mine, theirs)


def test_forked_child_with_one_thread():
    """More threads than one hang in torch's own operators too: OpenMP's do not survive a fork."""
    expected = work(0)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            status = 0 if same(work(0), expected) else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


SET_THREADS = """
import os
import torch
from tests.ops.test_threads import work

torch.set_num_threads(1)
torch.ones(1, requires_grad=True).mul(2).backward()  # autograd may start threads of its own
before = len(os.listdir("/proc/self/task"))
for seed in range(4):
    work(seed)
assert len(os.listdir("/proc/self/task")) == before
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_one_thread_starts_no_other():
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", SET_THREADS], cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
