"""Small models of the digits, clean and attacked, trained once and kept on disk."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mnp_fast.demo.attacks import ATTACKS, TARGET, Trigger, poison
from mnp_fast.demo.digits import Digits, load_digits
from mnp_fast.demo.resnet import ResNet18
from mnp_fast.demo.train import accuracy, attack_success_rate, train
from mnp_fast.io import atomic_path, load_weights, save_weights

CLASSES = 10
CLEAN = "none"
POISON_RATE = 0.1
WIDTHS = (8, 12, 16)
TEST_SEEDS = 1000  # from here on; those below are for calibration


@dataclass(frozen=True)
class Member:
    """A model: the name of its attack, the seed of everything, and the width of its network."""

    attack: str
    seed: int
    epochs: int = 20

    @property
    def width(self) -> int:
        """Channels of the stem."""
        return WIDTHS[self.seed % len(WIDTHS)]

    @property
    def target(self) -> int | None:
        """The attacker's class."""
        return None if self.attack == CLEAN else self.seed % CLASSES

    @property
    def is_test(self) -> bool:
        """Whether nothing may be chosen by this model."""
        return self.seed >= TEST_SEEDS

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.attack}-{self.seed}-{self.width}-{self.epochs}"


def members(clean: int, attacked: int, epochs: int) -> list[Member]:
    """Half of each kind for calibration and half for tests, the ones that both need first."""
    found = [
        Member(attack, (TEST_SEEDS if i % 2 else 0) + i // 2, epochs)
        for attack in (CLEAN, *ATTACKS)
        for i in range(clean if attack == CLEAN else attacked)
    ]
    return sorted(found, key=lambda member: member.seed % TEST_SEEDS)


@dataclass(frozen=True)
class Trained:
    """A member's model in eval mode, its data, accuracy and attack success rate in percent."""

    model: nn.Module
    digits: Digits
    accuracy: float
    asr: float | None
    seconds: float


def trained(member: Member, folder: Path) -> Trained:
    """The member's model, from disk if it is there."""
    digits = load_digits(member.seed)
    trigger = ATTACKS.get(member.attack)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(member.seed)
        model = ResNet18(member.width)
    facts, weights = folder / "training.json", folder / "model.safetensors"
    if facts.exists():
        model.load_state_dict(load_weights(weights))
        return Trained(model.eval(), digits, **json.loads(facts.read_text()))
    start = time.perf_counter()
    images, labels = digits.train
    if trigger is not None and member.target is not None:
        # The demo's attacks have one target; turned labels give them another.
        turned = (labels + TARGET - member.target) % CLASSES
        images, turned = poison(images, turned, trigger, POISON_RATE, member.seed)
        labels = (turned + member.target - TARGET) % CLASSES
    for _ in train(model, images, labels, epochs=member.epochs, seed=member.seed):
        pass
    result = Trained(
        model,
        digits,
        accuracy(model, *digits.test),
        _success(model, digits, trigger, member.target),
        time.perf_counter() - start,
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model.state_dict(), weights)
    write_json({"accuracy": result.accuracy, "asr": result.asr, "seconds": result.seconds}, facts)
    return result


def write_json(content: Any, path: Path) -> None:
    """Write plain data, NaN and infinity included."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def describe(population: list[Member]) -> dict[str, Any]:
    """What a calibration says of the models that it was fitted on."""
    kinds = sorted({member.attack for member in population})
    return {
        "models": "ResNet-18 of scikit-learn's digits, 16x16, 100 clean images",
        "widths": sorted({member.width for member in population}),
        "count": {kind: sum(m.attack == kind for m in population) for kind in kinds},
        "members": [asdict(member) for member in population],
    }


def _success(
    model: nn.Module, digits: Digits, trigger: Trigger | None, target: int | None
) -> float | None:
    if trigger is None or target is None:
        return None
    images, labels = digits.test
    others = labels != target
    shift = TARGET - target
    turned = (labels + shift) % CLASSES

    class Turned(nn.Module):
        """The model with its classes turned as the labels are."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = model(x)
            return logits.roll(shift, 1)

    return attack_success_rate(Turned(), images[others], turned[others], trigger)
