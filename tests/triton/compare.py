"""What the operators' tests here share: one comparison with the reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mnp_fast import reference
from mnp_fast.triton.conv import masked_conv2d

from ..ops.cases import CONVS, assert_same_grads, relative_error, require_grad

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
UNGROUPED = [name for name, case in CONVS.items() if case.groups == 1]


def compare(
    inputs: dict[str, Tensor | None],
    options: dict[str, object],
    operator: Callable[..., Tensor] = masked_conv2d,
    definition: Callable[..., Tensor] = reference.masked_conv2d,
    place: Callable[[Tensor], Tensor] = torch.clone,
    tolerance: float | None = None,
) -> None:
    """Output and every gradient against autograd through the reference in float64.

    `place` copies what the operator is given to where it shall lie.
    """
    if tolerance is None:
        tolerance = TOLERANCE[inputs["x"].dtype]
    exact = require_grad({k: None if v is None else v.double() for k, v in inputs.items()})
    mine = {k: None if v is None else place(v.detach()).requires_grad_() for k, v in inputs.items()}
    y = operator(**mine, **options)
    expected = definition(**exact, **options)
    assert y.shape == expected.shape
    assert relative_error(y, expected) <= tolerance
    grad = torch.randn_like(expected).to(y.dtype)
    # Rounding may flip the sign of a z near 0; its gradient is then not comparable.
    if options.get("activation") == "relu":
        grad = grad * ((y > 0) == (expected > 0))
    y.backward(place(grad))
    expected.backward(grad.double())
    assert_same_grads(mine, exact, tolerance)


def as_layout(inputs: dict[str, Tensor], layout: torch.memory_format) -> dict[str, Tensor]:
    return {
        name: t.to(memory_format=layout) if name in ("x", "weight", "residual") else t
        for name, t in inputs.items()
    }
