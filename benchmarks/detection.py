"""Detection on a population of models: fit on one half, judge the other.

python -m benchmarks.detection --run              # train and measure what is missing; resumable
python -m benchmarks.detection                    # from what is on disk
python -m benchmarks.detection --calibrate FILE   # and write the calibration

Only models on which the attack took (benchmarks.population) are used; the others are counted.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mnp_fast.config import DefenseConfig
from mnp_fast.data import clean_set
from mnp_fast.detection import STATISTICS, Calibration, Evidence, gather, judge
from mnp_fast.io import atomic_path, ensure_writable
from mnp_fast.stats.correlation import Array, draws

from .attacks import ATTACKS
from .attacks.attack import CLASSES
from .oracle import carriers
from .population import CLEAN, ROOT, STORE, Setting, failures, subject

RUNS = 4  # suppressions of a model
IMAGES = 100  # clean ones, that a model is judged by
FALSE_ALARMS = 0.05
REPEATS = 2000  # of the bootstrap over models
FEWEST = 3  # clean models to calibrate on
WIDTHS = (8, 12, 16)
TEST_SEEDS = 1000  # from here on; those below are for calibration
EVIDENCE = ROOT / "out" / "detection"


@dataclass(frozen=True)
class Measured:
    """A model, what was gathered on it, the seconds that took, and why its attack did not take.

    `carriers` are by layer the neurons that the trigger changes most (`benchmarks.oracle`); none
    for clean models.
    """

    setting: Setting
    evidence: Evidence
    seconds: float
    failures: list[str]
    carriers: dict[str, list[int]]

    @property
    def is_clean(self) -> bool:
        return self.setting.attack == CLEAN

    @property
    def is_test(self) -> bool:
        """Whether nothing may be chosen by this model."""
        return self.setting.seed >= TEST_SEEDS


def members(attacks: list[str], clean: int, attacked: int, epochs: int) -> list[Setting]:
    """Half of each kind for calibration and half for tests, the ones that both need first.

    Width and the attacker's class go with the seed.
    """
    found = []
    for attack in (CLEAN, *attacks):
        for i in range(clean if attack == CLEAN else attacked):
            seed = (TEST_SEEDS if i % 2 else 0) + i // 2
            width = WIDTHS[seed % len(WIDTHS)]
            target = 0 if attack == CLEAN else seed % CLASSES
            found.append(Setting(attack, seed, width=width, epochs=epochs, target=target))
    return sorted(found, key=lambda setting: setting.seed % TEST_SEEDS)


def main(
    run: Annotated[bool, typer.Option(help="Train and measure models that are missing.")] = False,
    attacks: Annotated[str, typer.Option(help="Names with commas between.")] = ",".join(ATTACKS),
    clean: Annotated[int, typer.Option(min=6, help="Clean models.")] = 24,
    attacked: Annotated[int, typer.Option(min=2, help="Models of each attack.")] = 8,
    epochs: Annotated[int, typer.Option(min=1, help="Of training.")] = 20,
    limit: Annotated[
        Optional[int],  # noqa: UP045 (Typer evaluates it on Python 3.10)
        typer.Option(min=1, help="Measure at most so many models more."),
    ] = None,
    store: Annotated[Path, typer.Option(help="Folder of trained models.")] = STORE,
    folder: Annotated[Path, typer.Option("--evidence", help="Folder of evidence.")] = EVIDENCE,
    calibrate: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write the calibration to this file."),
    ] = None,
    roc: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw the ROC curves of held-back models into this PNG."),
    ] = None,
) -> None:
    """Train a population, gather evidence, fit on calibration seeds, judge test seeds."""
    console = Console(width=130)
    config = DefenseConfig()
    measured = []
    for setting in members(attacks.split(","), clean, attacked, epochs):
        file = folder / f"{setting.key}.json"
        if not file.exists() and run and limit != 0:
            console.print(f"measuring {setting.key}", highlight=False)
            measure(setting, store, file, config)
            limit = None if limit is None else limit - 1
        if file.exists():
            measured.append(_read(setting, file))
    failed = [m for m in measured if m.failures]
    calibration_half = [m for m in measured if not m.failures and not m.is_test]
    test_half = [m for m in measured if not m.failures and m.is_test]
    clean_count = sum(m.is_clean for m in calibration_half)
    attacked_seeds = {m.setting.seed for m in calibration_half if not m.is_clean}
    if clean_count < FEWEST or len(attacked_seeds) < 2:
        raise typer.BadParameter(
            f"{len(calibration_half)} models to calibrate on: at least {FEWEST} clean ones and "
            "attacked ones of two seeds are needed; use --run"
        )
    calibration = fit(calibration_half, config)
    show(console, calibration, calibration_half, test_half)
    for m in failed:
        console.print(f"Not used: {m.setting.key}: {', '.join(m.failures)}", highlight=False)
    if calibrate is not None:
        calibration.save(calibrate)
        console.print(f"Calibration: {calibrate}")
    if roc is not None:
        from mnp_fast.stats_plots import roc_curves

        roc_curves(*scores_by_attack(calibration, test_half)).savefig(roc)
        console.print(f"ROC: {roc}")


def measure(setting: Setting, store: Path, file: Path, config: DefenseConfig) -> None:
    """Train the model if needed, gather evidence and keep it."""
    found = subject(setting, store=store)
    images, labels = (part[:IMAGES] for part in found.data.clean)
    start = time.perf_counter()
    evidence = gather(
        found.model, clean_set((images, labels)), config, RUNS, Progress(disable=True)
    )
    content = {
        "evidence": evidence.content(),
        "seconds": time.perf_counter() - start,
        "failures": [] if found.trigger is None else failures(found.figures),
        "carriers": {} if found.trigger is None else carriers(found),
    }
    ensure_writable(file.parent)
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def describe(population: list[Setting]) -> dict[str, Any]:
    """What a calibration says of the models that it was fitted on."""
    kinds = sorted({setting.attack for setting in population})
    return {
        "models": f"ResNet-18 of scikit-learn's digits, 16x16, {IMAGES} clean images",
        "widths": sorted({setting.width for setting in population}),
        "count": {kind: sum(s.attack == kind for s in population) for kind in kinds},
        "members": [asdict(setting) for setting in population],
    }


def fit(measured: list[Measured], config: DefenseConfig) -> Calibration:
    """Logistic regression on all candidates; clean scores by leaving one seed out at a time."""
    table = features(measured)
    labels = np.array([not m.is_clean for m in measured])
    seeds = np.array([m.setting.seed for m in measured])
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    unseen = cross_val_predict(
        pipeline, table, labels, groups=seeds, cv=LeaveOneGroupOut(), method="decision_function"
    )
    scaler, regression = (step for _, step in pipeline.fit(table, labels).steps)

    def by_name(values: Array) -> dict[str, float]:
        return dict(zip(STATISTICS, values.tolist(), strict=True))

    return Calibration(
        weights=by_name(regression.coef_[0]),
        means=by_name(scaler.mean_),
        scales=by_name(scaler.scale_),
        intercept=float(regression.intercept_[0]),
        clean_scores=sorted(unseen[~labels].tolist()),
        false_alarm_rate=FALSE_ALARMS,
        population=describe([m.setting for m in measured]),
        settings={
            **{
                name: value
                for name, value in vars(config).items()
                if name in ("site", "suspects") or name.startswith(("suppress_", "offset_"))
            },
            "runs": RUNS,
        },
    )


def features(measured: list[Measured]) -> Array:
    """(models, statistics)."""
    return np.array([[f(m.evidence) for f in STATISTICS.values()] for m in measured])


def auroc(clean: Array, attacked: Array) -> tuple[float, float, float]:
    """Area under the ROC curve and its 95 % interval by bootstrap over models."""
    if not len(clean) or not len(attacked):
        return (float("nan"),) * 3
    # Share of the pairs that are in the right order, ties for a half.
    right = (attacked[:, None] > clean) + 0.5 * (attacked[:, None] == clean)
    first, second = draws(len(attacked), REPEATS, 0), draws(len(clean), REPEATS, 1)
    values = np.einsum("ra,ac,rc->r", first, right, second, optimize=True) / right.size
    low, high = np.quantile(values, [0.025, 0.975])
    return float(right.mean()), float(low), float(high)


def scores_by_attack(
    calibration: Calibration, measured: list[Measured]
) -> tuple[Array, dict[str, Array]]:
    """Scores of clean models, and of attacked ones by attack."""
    scores: dict[str, list[float]] = {}
    for m in measured:
        scores.setdefault(m.setting.attack, []).append(calibration.score(m.evidence))
    clean = np.array(scores.pop(CLEAN, []))
    return clean, {attack: np.array(values) for attack, values in scores.items()}


def show(
    console: Console, calibration: Calibration, known: list[Measured], unseen: list[Measured]
) -> None:
    """Print how well each candidate and the score do, and what the verdicts are worth."""
    table = Table("statistic", "AUROC, calibration seeds", "AUROC, test seeds", "weight")
    for i, name in enumerate(STATISTICS):
        cells = [_interval(auroc(*_split(features(half)[:, i], half))) for half in (known, unseen)]
        table.add_row(name, *cells, f"{calibration.weights[name]:+.2f}")
    console.print(table)
    title = f"Held-back models; threshold for {100 * FALSE_ALARMS:g} % false alarms"
    columns = "attack", "models", "AUROC", "flagged", "target class right"
    table = Table(*columns, "carriers among suspects", "AUROC of neurons", title=title)
    clean, attacked = scores_by_attack(calibration, unseen)
    groups: dict[str, list[Measured]] = defaultdict(list)
    for m in unseen:
        groups[m.setting.attack].append(m)
    groups["all attacks"] = [m for m in unseen if not m.is_clean]
    attacked["all attacks"] = np.concatenate([np.zeros(0), *attacked.values()])
    for attack, models in groups.items():
        verdicts = [judge(m.evidence, calibration) for m in models]
        cells = [_share([v.verdict for v in verdicts])]
        if attack != CLEAN:
            # Where every class has a target of its own, none is right.
            aimed = [
                v.target_class == m.setting.target
                for v, m in zip(verdicts, models, strict=True)
                if not m.setting.poisoning.all_to_all
            ]
            found = np.array([suspects_found(m) for m in models])
            cells = [_interval(auroc(clean, attacked[attack])), *cells, _share(aimed)]
            cells += [f"{100 * found[:, 0].mean():.0f} %", f"{found[:, 1].mean():.2f}"]
        else:
            cells.insert(0, "")
        table.add_row(attack, str(len(models)), *cells)
    console.print(table)
    seconds = np.median([m.seconds for m in (*known, *unseen)])
    console.print(
        f"{len(known)} models to calibrate on, {len(unseen)} held back; {seconds:.1f} s a model "
        "(median)."
    )


def suspects_found(measured: Measured) -> tuple[float, float]:
    """How well the scores of neurons find those that carry the backdoor.

    The share of carriers among as many first suspects (precision and recall in one), and the area
    under the ROC curve of the scores over all neurons; 0 and a half if no suspect was looked for.
    """
    scores = measured.evidence.changes
    if not scores:
        return 0.0, 0.5
    values = np.concatenate([np.array(s, dtype=np.float64) for s in scores.values()])
    carrier = np.concatenate(
        [np.isin(np.arange(len(s)), measured.carriers[name]) for name, s in scores.items()]
    )
    known = np.isfinite(values)
    values, carrier = values[known], carrier[known]
    first = np.argsort(-values, kind="stable")[: carrier.sum()]
    return float(carrier[first].mean()), float(roc_auc_score(carrier, values))


def _split(values: Array, measured: list[Measured]) -> tuple[Array, Array]:
    clean = np.array([m.is_clean for m in measured], dtype=bool)
    return values[clean], values[~clean]


def _interval(estimate: tuple[float, float, float]) -> str:
    value, low, high = estimate
    return "–" if np.isnan(value) else f"{value:.2f} ({low:.2f} to {high:.2f})"


def _share(flags: list[bool]) -> str:
    return f"{sum(flags)} of {len(flags)}"


def _read(setting: Setting, file: Path) -> Measured:
    content: dict[str, Any] = json.loads(file.read_text())
    evidence = Evidence.from_content(content.pop("evidence"))
    return Measured(setting, evidence, **content)


if __name__ == "__main__":
    typer.run(main)
