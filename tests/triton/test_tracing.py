"""What torch.compile traces: the kernels themselves, and which of their arguments they write."""

from unittest.mock import patch

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.driver import driver

from mnp_fast.triton import conv
from mnp_fast.triton.conv import masked_conv2d
from mnp_fast.triton.linear import masked_linear

from .resources import Driver

HIGHER_ORDER = torch.ops.higher_order.triton_kernel_wrapper_functional


class Layers(torch.nn.Module):
    """A loss of both operators, whose weights are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(32, 16, 3, 3), requires_grad=False)
        self.head = torch.nn.Parameter(torch.ones(10, 32), requires_grad=False)
        self.mask = torch.nn.Parameter(torch.ones(32))

    def forward(self, x):
        y = masked_conv2d(x, self.weight, self.mask, activation="relu")
        return (masked_linear(y.mean((2, 3)), self.head).sum(),)


@pytest.fixture
def graph(monkeypatch):
    monkeypatch.setattr(driver, "_active", Driver(90))
    # Fake tensors on a CUDA device need a torch with CUDA as soon as they take gradients.
    with patch.object(conv, "why_not_conv2d", lambda *args: None), FakeTensorMode():
        x = torch.ones(2, 16, 8, 8)
        return aot_export_module(Layers(), (x,), trace_joint=True, output_loss_index=0)[0].graph


def test_forward_and_backward_are_traced_to_the_kernels(graph):
    written = []
    for node in graph.nodes:
        assert "mnp_fast" not in str(node.target)
        if node.target is HIGHER_ORDER:
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            name = getattr(kernel, "fn", kernel).__name__
            written.append((name, sorted(node.kwargs["tensors_to_clone"])))
    assert written == [
        ("conv_forward", ["u", "y"]),
        ("conv_forward", ["y"]),
        ("conv_grad_input", ["dx"]),
        ("epilogue_backward", ["sums"]),
    ]
