"""The whole defense of the demo, beside the same objectives and epochs in plain PyTorch.

The public way takes gradients of all weights, runs NCHW, and updates masks with an optimizer. Its
norms are in eval mode all the same, as ours: train mode would be another objective. The search for
offsets and the rule of the cut are the same code, on its network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from torch import nn

from mnp_fast import DefenseConfig, defend
from mnp_fast.data import CleanSet, clean_set, evaluate
from mnp_fast.defend import _Defense
from mnp_fast.demo.attacks import badnets
from mnp_fast.demo.digits import load_digits
from mnp_fast.demo.run import measure, trained_model
from mnp_fast.exposure import OffsetExposure, WeightExposure
from mnp_fast.objectives import MaskFit, exposed_loss
from mnp_fast.result import DefenseResult
from mnp_fast.seeds import FIT

from .networks import freeze, public
from .timing import OURS, Case, Function, Tensors

POINTS = 10.0  # of accuracy lost, or of attack success left, with which it is no defense
QUICK = DefenseConfig(suppress_epochs=2, suspects=2, offset_steps=6, fit_epochs=1)


class PlainDefense(_Defense):
    """`mnp_fast.defend` on torch's own operators."""

    def __init__(
        self, model: nn.Module, data: Tensors, config: DefenseConfig, frozen: bool
    ) -> None:
        super().__init__(model, clean_set(data), config, None, None)
        masked = public(model).eval()
        self.masked = freeze(masked) if frozen else masked

    def _to_suppress(self, part: CleanSet) -> tuple[nn.Module, CleanSet]:
        return self._suppressed(), part

    def _fit(self, exposure: OffsetExposure | WeightExposure) -> None:
        config, data = self.config, self.data
        fit = MaskFit(self.masked, exposure, data, config)
        optimizer = torch.optim.SGD(fit.masks, config.fit_lr, config.fit_momentum)
        for epoch in range(config.fit_epochs):
            start, total = time.perf_counter(), 0.0
            exposure.renew(epoch)
            batches = data.batches(config.fit_batch_size, config.seed, FIT, epoch)
            for index, (images, labels) in enumerate(batches):
                self.masked.zero_grad()
                kept = [
                    (mask * size).sum()
                    for mask, size in zip(fit.masks, fit.magnitudes, strict=True)
                ]
                step = epoch * len(batches) + index
                loss = exposed_loss(self.masked, exposure, images, labels, step, config.alpha)
                loss = loss + config.weight_penalty * torch.stack(kept).sum()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    for mask in fit.masks:
                        mask.clamp_(0, 1)
                total += loss.item() * len(labels)
            self._record("fit", total / len(data), evaluate(self.masked, data)[0], start)


def cases(quick: bool) -> Iterator[Case]:
    """The demo's network with its first attack; with `quick` hardly trained nor defended."""
    width, epochs, config = (8, 1, QUICK) if quick else (16, 20, DefenseConfig())
    digits, seed = load_digits(config.seed), config.seed
    model = trained_model(digits, badnets, seed, width, epochs, Console(quiet=True))
    before = measure(model, digits, badnets)

    def outcome(run: Callable[[], DefenseResult]) -> Function:
        def function() -> Tensors:
            result = run()
            after = measure(result.model, digits, badnets)
            target = -1 if result.target is None else result.target
            found = after["accuracy"], after["asr"], len(result.pruned), target
            return (torch.tensor(found, dtype=torch.float64),)

        return function

    def plain(frozen: bool) -> Function:
        return outcome(lambda: PlainDefense(model, digits.clean, config, frozen).run())

    yield Case(
        f"defense, ResNet-18 width {width}, {describe((torch.tensor([*before.values()]),))} before",
        {
            "torch, public style": plain(frozen=False),
            "torch, weights frozen": plain(frozen=True),
            OURS: outcome(lambda: defend(model, digits.clean, config)),
        },
        (torch.tensor([before["accuracy"], 0.0]),),
        limit=math.inf if quick else POINTS,
        error=lambda found, exact: (found[0][:2] - exact[0]).abs().max().item(),
        describe=describe,
        heavy=True,
    )


def describe(found: Tensors) -> str:
    """Accuracy and attack success rate, and what was cut where that is known."""
    accuracy, asr, *rest = found[0].tolist()
    cut = f", {rest[0]:.0f} cut, class {rest[1]:.0f}" if rest else ""
    return f"ACC {accuracy:.1f} %, ASR {asr:.1f} %{cut}"
