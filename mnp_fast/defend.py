"""The defense: suppress, fit masks, choose the cut, prune."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .config import DefenseConfig
from .data import CleanSet, check_model, clean_set, evaluate
from .distributed import Processes
from .drift import Drift
from .exposure import OffsetExposure, WeightExposure
from .fingerprint import fingerprint, tensors_of
from .frozen import frozen_weights
from .io import ensure_writable, load_checkpoint, save_checkpoint
from .objectives import MaskFit
from .progress import progress_bars
from .repair import Repair
from .result import CutPoint, DefenseResult, EpochRecord, LayerNeurons, PrunedNeuron
from .selection import admissible, affordable, choose, cut_points, prune, pruning_order
from .stats import magnitudes, saliency
from .suppression import favour, favoured_classes, on_kernels, parts, suppress
from .suspects import (
    can_tell,
    conspicuous_again,
    conspicuous_by_both,
    distances,
    is_conspicuous,
    is_doubtful,
    is_drift,
    is_untargeted,
    remembered,
)
from .wrap import masks, unwrap, wrap

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

SALIENCY_BATCH = 256


def defend(
    model: nn.Module,
    data: Any,
    config: DefenseConfig | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    console: Console | None = None,
    group: ProcessGroup | None = None,
) -> DefenseResult:
    """Find and remove the neurons that carry a backdoor, from a small clean set.

    Clean suppression finds suspect classes and exposes the backdoor; masks are fitted to preserve
    clean predictions against the exposure under a penalty on the magnitude they keep
    (Magnitude-based Neuron Pruning, arXiv 2405.17750; where the paper is silent, and how the
    default exposure differs, see `DefenseConfig`); the neurons of lowest mask are pruned, as few
    as stop the exposure. Where a backdoor is conspicuous, norms and biases are then repaired, as
    little as stops what is left of it. No trigger, poisoned image or target class is needed.

    Parameters
    ----------
    model
        A classifier: images ``(N, *)`` to logits (N, classes). It is not changed.
    data
        The clean set: a pair (images, labels) or an iterable of such batches, such as a
        DataLoader. Images floating-point as the model expects them; labels int64 (N,).
    config
        Settings; the defaults if not given.
    checkpoint
        File that is written after every epoch; if it exists, the run it belongs to goes on from
        there. It is left for the caller to delete.
    console
        Where progress with the time left is shown; nowhere if not given.
    group
        Processes that share the work, such as `torch.distributed.group.WORLD`. Each of them calls
        this with the same model, data and settings, and gets the result; the first one shows
        progress and reads and writes the checkpoint.

    Returns
    -------
    DefenseResult
        The purified model, the masks, what was pruned and why.

    Raises
    ------
    TypeError, ValueError
        Bad input, as `mnp_fast.wrap` and `DefenseConfig` say, and for data or weights that are
        empty, of wrong shapes, devices or ranges, or not finite; found before any work is done.
        Also a checkpoint of another run, or processes that were given different things.
    ConnectionError
        Another process failed, or did not answer within the group's timeout.
    CheckpointError
        The checkpoint is damaged.
    OSError
        The checkpoint's folder cannot be written.
    """
    config = DefenseConfig() if config is None else config
    if not isinstance(config, DefenseConfig):
        raise TypeError(f"config must be a DefenseConfig, not {type(config).__name__}")
    clean = replace(clean_set(data), processes=Processes(group, config.shards))
    check_model(model, clean)
    return _Defense(model, clean, config, checkpoint, console).run()


@dataclass
class _State:
    """Where a run stands: all that a checkpoint holds."""

    epochs: dict[str, int] = field(default_factory=lambda: {"suppress": 0, "expose": 0, "fit": 0})
    runs: list[list[float]] = field(default_factory=list)  # what each suppression favours
    favours: dict[int, float] = field(default_factory=dict)  # of the suspects
    offset_sizes: dict[int, float] = field(default_factory=dict)
    offsets: dict[int, dict[str, Any]] = field(default_factory=dict)
    untargeted_size: float | None = None
    untargeted_spread: float | None = None
    drift_favours: dict[int, float] = field(default_factory=dict)  # of all classes
    drift_agreement: float | None = None  # of the offset away from all classes that follows it
    drift_spread: float | None = None  # of the same
    target: int | None = None
    conspicuous: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    suppressed: dict[str, Tensor] = field(default_factory=dict)
    masks: list[Tensor] = field(default_factory=list)
    velocities: list[Tensor] = field(default_factory=list)
    exposure: dict[str, Any] = field(default_factory=dict)


class _Defense:
    def __init__(
        self,
        model: nn.Module,
        data: CleanSet,
        config: DefenseConfig,
        checkpoint: str | os.PathLike[str] | None,
        console: Console | None,
    ) -> None:
        self.model, self.data, self.config = model, data, config
        self.masked = wrap(model, config.site, example_inputs=(data.images[:2],)).eval()
        for parameter in self.masked.parameters():
            parameter.requires_grad_(False)
        for mask in masks(self.masked).values():
            mask.requires_grad_(True)
        processes = data.processes
        first = processes.rank == 0
        self.checkpoint = None if checkpoint is None or not first else Path(checkpoint)
        self.state = _State()
        if checkpoint is not None or processes.size > 1:
            self.fingerprint = fingerprint(model, data, asdict(config))
            if len(set(processes.gather(self.fingerprint))) > 1:
                raise ValueError("processes were given different models, data, configs or versions")
        if self.checkpoint is not None:
            ensure_writable(self.checkpoint.parent)
            if self.checkpoint.exists():
                self._resume(self.checkpoint)
        self.state = processes.gather(self.state)[0]
        self.progress = progress_bars(console if first else None)
        self.drift: Drift | None = None

    def run(self) -> DefenseResult:
        with self.progress, frozen_weights(self.masked):
            exposure = self._expose()
            self._fit(exposure)
            return self._select(exposure)

    def _suppress(self, runs: int) -> dict[int, float]:
        """Suppress until there are so many runs; what these favour, by class, most first."""
        state, config = self.state, self.config
        clean_sets = parts(self.data, runs, config.seed)
        with self._task("Suppressing", len(clean_sets), len(state.runs)) as advance:
            for part in clean_sets[len(state.runs) :]:
                suppressed, images = self._to_suppress(part)
                start = time.perf_counter()
                for accuracy, loss in suppress(
                    suppressed, images, config, state.epochs["suppress"]
                ):
                    state.suppressed = {
                        name: tensor.to("cpu", copy=True)
                        for name, tensor in tensors_of(suppressed).items()
                    }
                    self._record("suppress", -loss, accuracy, start)
                    start = time.perf_counter()
                state.runs.append(favour(suppressed, self.data))
                if config.exposure == "offset":
                    state.suppressed, state.epochs["suppress"] = {}, 0
                self._save()
                advance()
        return favoured_classes(state.runs[:runs])

    def _to_suppress(self, part: CleanSet) -> tuple[nn.Module, CleanSet]:
        """The model as far as its suppression has come, and data, as that runs best."""
        return on_kernels(self._suppressed(), part)

    def _suppressed(self) -> nn.Module:
        """A copy of the model, as far as its suppression has come."""
        suppressed = copy.deepcopy(self.model).eval()
        for parameter in suppressed.parameters():
            parameter.requires_grad_(True)
        if self.state.suppressed:
            suppressed.load_state_dict(self.state.suppressed, strict=False)
        return suppressed

    def _expose(self) -> OffsetExposure | WeightExposure:
        """The exposure of the class that suppression and offsets make suspect, or of all."""
        state, config = self.state, self.config
        if config.exposure == "weights":
            state.target = next(iter(self._suppress(1)))
            suppressed = self._suppressed()
            return WeightExposure(self.masked, suppressed, self.data, state.target, config)
        if config.drift_weight:
            drift = Drift(self.model, self.masked, self.data)
            self.drift = drift if drift.norms else None
        favours = self._suppress(config.suppressions)
        if self.drift is not None and not state.drift_favours:
            found = self.data.processes.gather(self.drift.favours())[0]
            state.drift_favours = dict(enumerate(found))
        first = remembered(state.drift_favours, config)
        shortlist = sorted(favours, key=lambda label: label != first)
        state.favours = {label: favours[label] for label in shortlist[: config.suspects]}
        suspects: list[int | None] = [*state.favours, None]
        with self._task("Exposing", len(suspects), state.epochs["expose"]) as advance:
            for suspect in suspects[state.epochs["expose"] :]:
                start = time.perf_counter()
                if suspect is not None:
                    exposure = OffsetExposure(self.masked, self.data, suspect, config)
                    state.offset_sizes[suspect] = exposure.start()
                    state.offsets[suspect] = exposure.state()
                else:
                    self._suspect()
                self._advance("expose", time.perf_counter() - start)
                advance()
        exposure = OffsetExposure(self.masked, self.data, state.target, config)
        exposure.load(state.exposure)
        if exposure.guided is not None:
            exposure.guide = self.drift
        return exposure

    def _suspect(self) -> None:
        """Choose what to work against, by all offsets that were found."""
        state, config = self.state, self.config
        found = distances(state.offset_sizes, state.favours)
        state.target = min(found, key=found.__getitem__)
        state.conspicuous = is_conspicuous(state.offset_sizes, state.favours, config)
        away = None
        if not state.conspicuous and can_tell(state.offset_sizes):
            away = self._away() if config.untargeted else None
            self._look_further()
        if state.target is None:
            assert away is not None
            exposure = away
        else:
            exposure = OffsetExposure(self.masked, self.data, state.target, config)
            exposure.load(state.offsets[state.target])
            if state.conspicuous and self.drift is not None:
                exposure.follow(self.drift)
        state.offsets, state.exposure = {}, exposure.state()

    def _away(self) -> OffsetExposure:
        """The offset away from all classes; it follows the drift where there is one."""
        state, away = self.state, OffsetExposure(self.masked, self.data, None, self.config)
        state.untargeted_size, state.untargeted_spread = away.start(), away.spread(away.first)
        if self.drift is not None:
            agreement = away.follow(self.drift)
            # The same in all processes, which may round differently.
            found = self.data.processes.gather((agreement, away.spread(away.offsets[0])))[0]
            state.drift_agreement, state.drift_spread = found
        return away

    def _look_further(self) -> None:
        """Where no suspect is conspicuous by the first look: the first that is by another."""
        state, sizes, config = self.state, self.state.offset_sizes, self.config
        label = remembered(state.drift_favours, config)
        if is_drift(state.drift_agreement, state.drift_spread, config):
            state.target = None
        elif label is not None and math.isfinite(sizes.get(label, math.inf)):
            state.target = label
        elif (nearest := self._nearest_again()) is not None:
            state.target = nearest
        elif is_untargeted(state.untargeted_size, state.untargeted_spread, sizes, config):
            state.target = None
        elif (nearest := self._nearest_by_both()) is not None:
            state.target = nearest
        else:
            return
        state.conspicuous = True

    def _nearest_again(self) -> int | None:
        """The class that more suppressions make conspicuous, where they might."""
        state, config = self.state, self.config
        more = config.suppressions_again
        if not more or not is_doubtful(state.offset_sizes, state.favours, config):
            return None
        favours = self._suppress(config.suppressions + more)
        state.favours = {label: favours[label] for label in state.offset_sizes}
        return conspicuous_again(state.offset_sizes, state.favours, config)

    def _nearest_by_both(self) -> int | None:
        """The class that offsets and drift make conspicuous together."""
        state = self.state
        if not state.drift_favours:
            return None
        return conspicuous_by_both(
            state.offset_sizes, state.favours, state.drift_favours, self.config
        )

    def _fit(self, exposure: OffsetExposure | WeightExposure) -> None:
        state = self.state
        fit = MaskFit(self.masked, exposure, self.data, self.config)
        if state.epochs["fit"]:
            with torch.no_grad():
                for mask, stored in zip(fit.masks, state.masks, strict=True):
                    mask.copy_(stored)
                for velocity, stored in zip(fit.velocities, state.velocities, strict=True):
                    velocity.copy_(stored)
        with self._task("Fitting", self.config.fit_epochs, state.epochs["fit"]) as advance:
            for epoch in range(state.epochs["fit"], self.config.fit_epochs):
                start = time.perf_counter()
                objective = fit.epoch(epoch)
                accuracy, _ = evaluate(self.masked, self.data)
                state.masks = [mask.detach().clone() for mask in fit.masks]
                state.velocities, state.exposure = fit.velocities, exposure.state()
                self._record("fit", objective, accuracy, start)
                advance()

    def _select(self, exposure: OffsetExposure | WeightExposure) -> DefenseResult:
        start = time.perf_counter()
        fitted = {name: mask.detach().clone() for name, mask in masks(self.masked).items()}
        prune(self.masked, [])
        saliencies = saliency(self.masked, self.data, SALIENCY_BATCH)
        neurons = {
            name: LayerNeurons(
                *(
                    t.detach().to("cpu", torch.float32)
                    for t in (fitted[name], magnitude, saliencies[name].taylor)
                )
            )
            for name, magnitude in magnitudes(self.masked).items()
        }
        order = pruning_order(neurons)
        conspicuous = self.state.conspicuous
        points = cut_points(self.masked, order, exposure, self.data, self.config, conspicuous)
        curve = []
        with self._task("Cutting", None) as advance:
            for point in points:
                curve.append(point)
                advance()
        known = conspicuous or not can_tell(self.state.offset_sizes)
        most = self.config.max_drop if known else self.config.unsure_drop
        cut, repaired = choose(curve, len(self.data), self.config, most), None
        seconds = {**self.state.seconds, "select": time.perf_counter() - start}
        if conspicuous and self.config.repair_epochs:
            assert isinstance(exposure, OffsetExposure)  # with weights, nothing is conspicuous
            start = time.perf_counter()
            cut, repaired = self._repair(exposure, order, curve, cut)
            seconds["repair"] = time.perf_counter() - start
        prune(self.masked, order[: cut.pruned])
        return DefenseResult(
            model=self._purified(),
            neurons=neurons,
            pruned=order[: cut.pruned],
            curve=curve,
            cut=cut,
            repaired=repaired,
            target=self.state.target,
            conspicuous=conspicuous,
            offset_sizes=self.state.offset_sizes,
            untargeted_size=self.state.untargeted_size,
            untargeted_spread=self.state.untargeted_spread,
            drift_favours=self.state.drift_favours,
            drift_agreement=self.state.drift_agreement,
            drift_spread=self.state.drift_spread,
            history=[EpochRecord(**record) for record in self.state.history],
            seconds=seconds,
            config=self.config,
        )

    def _repair(
        self,
        exposure: OffsetExposure,
        order: Sequence[PrunedNeuron],
        curve: Sequence[CutPoint],
        chosen: CutPoint,
    ) -> tuple[CutPoint, CutPoint | None]:
        """The cut and the quality after a repair; if that costs too much, it is undone."""
        cut = affordable(curve, self.config)
        if 0 < chosen.pruned < cut.pruned:
            cut = chosen
        prune(self.masked, order[: cut.pruned])
        exposure.again()
        repair = Repair(self.masked, exposure, self.data, self.config)
        if not repair.vectors:
            return chosen, None
        with self._task("Repairing", self.config.repair_epochs) as advance:
            start = time.perf_counter()
            for epoch, objective in enumerate(repair.epochs(), 1):
                accuracy, _ = evaluate(self.masked, self.data)
                seconds = time.perf_counter() - start
                record = EpochRecord("repair", epoch, objective, accuracy, seconds)
                self.state.history.append(asdict(record))
                advance()
                start = time.perf_counter()
        repair.shorten()
        repaired = CutPoint(cut.pruned, *evaluate(self.masked, self.data), exposure.success())
        if admissible(curve[0], repaired, len(self.data), self.config.max_drop):
            return cut, repaired
        repair.undo()
        return chosen, None

    def _purified(self) -> nn.Module:
        """The masked model made plain, in the given model's modes."""
        plain = unwrap(self.masked)
        for name, module in self.model.named_modules():
            plain.get_submodule(name).training = module.training
        needs = {name: p.requires_grad for name, p in self.model.named_parameters()}
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(needs.get(name, True))
        return plain

    @contextmanager
    def _task(self, name: str, total: int | None, done: int = 0) -> Iterator[Any]:
        task = self.progress.add_task(name, total=total, completed=done)
        yield lambda: self.progress.advance(task)
        finished = self.progress.tasks[task].completed
        self.progress.update(task, total=max(finished, 1), completed=max(finished, 1))

    def _record(self, phase: str, loss: float, accuracy: float, start: float) -> None:
        seconds = time.perf_counter() - start
        number = 1 + sum(record["phase"] == phase for record in self.state.history)
        record = EpochRecord(phase, number, loss, accuracy, seconds)
        self.state.history.append(asdict(record))
        self._advance(phase, seconds)

    def _advance(self, phase: str, seconds: float) -> None:
        """Note that a step of the phase is done, for good."""
        self.state.epochs[phase] += 1
        self.state.seconds[phase] = self.state.seconds.get(phase, 0.0) + seconds
        self._save()

    def _save(self) -> None:
        if self.checkpoint is not None:
            # Not asdict: it would copy every tensor.
            content = {"fingerprint": self.fingerprint, "state": dict(vars(self.state))}
            save_checkpoint(content, self.checkpoint)

    def _resume(self, path: Path) -> None:
        content = load_checkpoint(path)
        if not isinstance(content, dict) or content.get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"checkpoint '{path}' belongs to another run (other model, data, config or "
                "version); delete it to start anew"
            )
        self.state = _State(**content["state"])
