"""The defenses of the benchmark by name: ours in any configuration, and its peers.

A defense receives a model, clean images (N, 3, H, W), their labels (N,) and a seed, nothing else,
and returns another model of the same class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from types import ModuleType

from torch import Tensor, nn

from mnp_fast import DefenseConfig
from mnp_fast import defend as mnp

from .peers import anp, bnp, clp, fine_pruning, fine_tuning, rnp
from .peers.rule import prune_by_rule

Defense = Callable[[nn.Module, Tensor, Tensor, int], nn.Module]

OURS = "mnp"
RULE = "+rule"
PEERS: dict[str, ModuleType] = {
    "anp": anp,
    "rnp": rnp,
    "clp": clp,
    "bnp": bnp,
    "fine-pruning": fine_pruning,
    "fine-tuning": fine_tuning,
}
GROUPS: dict[str, tuple[str, ...]] = {
    "peers": (*PEERS, *(f"{name}{RULE}" for name in PEERS if name != "fine-tuning")),
    # Without exposure, clean preserving, the penalty, the repair, drift; the paper's exposure; then
    # without each further look where no class is conspicuous: more suppressions, the class that
    # norms remember, all classes by agreement with the drift, and by the offset's size.
    "ablation": (
        "mnp:alpha=1",
        "mnp:alpha=0",
        "mnp:weight_penalty=0",
        "mnp:repair_epochs=0",
        "mnp:drift_weight=0",
        "mnp:exposure=weights",
        "mnp:suppressions_again=0",
        "mnp:drift_favour=1",
        "mnp:drift_agreement=1",
        "mnp:untargeted=0",
    ),
    "sensitivity": (
        *(f"mnp:alpha={value}" for value in (0.5, 0.65, 0.9)),
        *(f"mnp:weight_penalty={value}" for value in (0.1, 0.6, 1.0)),
        *(f"mnp:suppress_decay={value}" for value in (0.0, 0.001, 0.1)),
        *(f"mnp:site={value}" for value in ("norm", "neuron", "filter")),
    ),
}


def names(text: str) -> list[str]:
    """The defenses of a list with `;` between, in which groups stand for their members."""
    return [name for part in text.split(";") for name in GROUPS.get(part, (part,))]


def defense(name: str) -> Defense:
    """The defense of a name.

    `mnp`, or with settings of `DefenseConfig` behind a colon (`mnp:alpha=0.5,site=neuron`); a peer;
    or a peer whose cut is chosen by our rule (`anp+rule`).

    Raises
    ------
    ValueError
        There is no such defense, or a setting is not one.
    """
    kind, _, text = name.partition(":")
    if kind == OURS:
        return _ours(text)
    peer = PEERS.get(name.removesuffix(RULE))
    if peer is None or (name.endswith(RULE) and not hasattr(peer, "scores")):
        raise ValueError(
            f"defense must be {OURS} or one of {', '.join(GROUPS['peers'])}, not {name!r}"
        )
    return _ruled(peer) if name.endswith(RULE) else peer.defend


def _ours(text: str) -> Defense:
    defaults, settings = asdict(DefenseConfig()), {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in defaults or key == "seed":
            raise ValueError(f"defense {OURS} has no setting {key!r}")
        settings[key] = type(defaults[key])(value)
    config = DefenseConfig(**settings)

    def defend(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
        return mnp(model, (images, labels), replace(config, seed=seed)).model

    return defend


def _ruled(peer: ModuleType) -> Defense:
    def defend(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
        scores = peer.scores(model, images, labels, seed)
        pruned = prune_by_rule(model, images, labels, seed, scores, peer.BIAS)
        return fine_pruning.tuned(pruned, images, labels, seed) if peer is fine_pruning else pruned

    return defend
