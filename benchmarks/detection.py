"""Detection on a population of models: fit on one half, judge the other.

python -m benchmarks.detection                    # the page, from the stored figures
python -m benchmarks.detection --run              # train and measure what is missing; resumable
python -m benchmarks.detection --calibrate FILE   # and write the calibration

Only models on which the attack took (benchmarks.population) are used; the others are named.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import typer
from rich.progress import Progress
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mnp_fast.config import DefenseConfig
from mnp_fast.data import clean_set
from mnp_fast.detection import STATISTICS, Calibration, Evidence, gather
from mnp_fast.detection.evidence import suspect_class
from mnp_fast.io import atomic_path, ensure_writable
from mnp_fast.stats.correlation import Array, draws

from .attacks import ATTACKS
from .attacks.attack import CLASSES
from .effectiveness_page import table
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
FIGURES = ROOT / "docs" / "results" / "detection.json"
PAGE = ROOT / "docs" / "detection.md"
HEAD = """# Detection on a population of models

Printed by `python -m benchmarks.detection` from stored figures; with `--run` it trains what is
missing. Half of the seeds calibrate: weights, scales and the threshold come from them alone. The
others are held back, and all figures but the first column are of those.

- AUROC: the chance that an attacked model scores above a clean one, with a 95 % interval by
  bootstrap over models.
- Flagged: models whose score is above the threshold.
- Carriers: the 1 % of the neurons that the trigger changes most, which only one who has the trigger
  can tell. Of as many first suspects, the share that are carriers; chance is 1 %. And the AUROC of
  the neurons' scores; chance is 0.5.

"""


@dataclass(frozen=True)
class Measured:
    """A model, and what was measured on it.

    Attributes
    ----------
    setting
        The model.
    statistics
        All candidates, by name.
    target_class
        The suspect class.
    carriers_found, neurons_auroc
        As `suspects_found` says; None for clean models.
    seconds
        That gathering the evidence took.
    failures
        Why the attack did not take.
    correlations
        Of magnitude and clean saliency, by depth; None where undefined.
    """

    setting: Setting
    statistics: dict[str, float]
    target_class: int
    carriers_found: float | None
    neurons_auroc: float | None
    seconds: float
    failures: list[str]
    correlations: list[float | None]

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
    figures: Annotated[Path, typer.Option(help="File of all models' figures.")] = FIGURES,
    page: Annotated[Path, typer.Option(help="Page to write.")] = PAGE,
    calibrate: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write the calibration to this file."),
    ] = None,
    roc: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw the ROC curves of held-back models into this PNG."),
    ] = None,
    depth: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw correlations by depth, clean and attacked, into this PNG."),
    ] = None,
) -> None:
    """Fit on calibration seeds, judge test seeds, write the page."""
    config = DefenseConfig()
    stored = _stored(figures)
    measured = []
    for setting in members(attacks.split(","), clean, attacked, epochs):
        file = folder / f"{setting.key}.json"
        if not file.exists() and setting.key not in stored and run and limit != 0:
            typer.echo(f"measuring {setting.key}")
            measure(setting, store, file, config)
            limit = None if limit is None else limit - 1
        if file.exists():
            measured.append(_summary(setting, file))
        elif setting.key in stored:
            measured.append(stored[setting.key])
    _store(measured, figures)
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
    text = HEAD + "\n".join(report(calibration, calibration_half, test_half, failed)) + "\n"
    with atomic_path(page) as path:
        path.write_text(text, encoding="utf-8")
    typer.echo(text)
    if calibrate is not None:
        calibration.save(calibrate)
        typer.echo(f"Calibration: {calibrate}")
    if roc is not None:
        from mnp_fast.stats_plots import roc_curves

        roc_curves(*scores_by_attack(calibration, test_half)).savefig(roc)
        typer.echo(f"ROC: {roc}")
    if depth is not None:
        from mnp_fast.stats_plots import correlation_by_depth

        groups: dict[str, list[Array]] = {"clean": [], "backdoored": []}
        for m in (*calibration_half, *test_half):
            groups["clean" if m.is_clean else "backdoored"].append(
                np.array([m.correlations], float)
            )
        correlation_by_depth(groups).savefig(depth)
        typer.echo(f"Correlations: {depth}")


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
    return np.array([[m.statistics[name] for name in STATISTICS] for m in measured])


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
        scores.setdefault(m.setting.attack, []).append(calibration.score_of(m.statistics))
    clean = np.array(scores.pop(CLEAN, []))
    return clean, {attack: np.array(values) for attack, values in scores.items()}


def report(
    calibration: Calibration,
    known: list[Measured],
    unseen: list[Measured],
    failed: list[Measured],
) -> Iterator[str]:
    """How well each candidate and the score do, and what the verdicts are worth, as Markdown."""
    head = ["statistic", "AUROC, calibration seeds", "AUROC, test seeds", "weight"]
    rows = []
    for i, name in enumerate(STATISTICS):
        cells = [_interval(auroc(*_split(features(half)[:, i], half))) for half in (known, unseen)]
        rows.append([name, *cells, f"{calibration.weights[name]:+.2f}"])
    yield table(head, rows)
    yield f"Held-back models; threshold for {100 * FALSE_ALARMS:g} % false alarms:\n"
    head = ["attack", "models", "AUROC", "flagged", "target class right"]
    head += ["carriers among suspects", "AUROC of neurons"]
    clean, attacked = scores_by_attack(calibration, unseen)
    groups: dict[str, list[Measured]] = defaultdict(list)
    for m in unseen:
        groups[m.setting.attack].append(m)
    groups["all attacks"] = [m for m in unseen if not m.is_clean]
    attacked["all attacks"] = np.concatenate([np.zeros(0), *attacked.values()])
    rows = []
    for attack, models in groups.items():
        flags = [calibration.score_of(m.statistics) > calibration.threshold for m in models]
        row = [attack, str(len(models)), "", _share(flags), "", "", ""]
        if attack != CLEAN:
            # Where every class has a target of its own, none is right.
            aimed = [
                m.target_class == m.setting.target
                for m in models
                if not m.setting.poisoning.all_to_all
            ]
            row[2], row[4] = _interval(auroc(clean, attacked[attack])), _share(aimed)
            row[5] = f"{100 * _mean([m.carriers_found for m in models]):.0f} %"
            row[6] = f"{_mean([m.neurons_auroc for m in models]):.2f}"
        rows.append(row)
    yield table(head, rows)
    seconds = np.median([m.seconds for m in (*known, *unseen)])
    widths = ", ".join(map(str, sorted({m.setting.width for m in (*known, *unseen)})))
    yield (
        f"{len(known)} models to calibrate on, {len(unseen)} held back, ResNet-18 of widths "
        f"{widths}; {seconds:.0f} s a model (median)."
    )
    yield f"\nNot flagged, with their scores (threshold {calibration.threshold:.2f}):\n"
    for m in groups["all attacks"]:
        score = calibration.score_of(m.statistics)
        if score <= calibration.threshold:
            yield f"- {m.setting.key}: {score:.2f}"
    for m in failed:
        yield f"\nNot used: {m.setting.key}: {', '.join(m.failures)}."


def suspects_found(evidence: Evidence, carriers: dict[str, list[int]]) -> tuple[float, float]:
    """How well the scores of neurons find those that carry the backdoor.

    The share of carriers among as many first suspects (precision and recall in one), and the area
    under the ROC curve of the scores over all neurons; 0 and a half if no suspect was looked for.
    """
    scores = evidence.changes
    if not scores:
        return 0.0, 0.5
    values = np.concatenate([np.array(s, dtype=np.float64) for s in scores.values()])
    carrier = np.concatenate(
        [np.isin(np.arange(len(s)), carriers[name]) for name, s in scores.items()]
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


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")


def _share(flags: list[bool]) -> str:
    return f"{sum(flags)} of {len(flags)}"


def _summary(setting: Setting, file: Path) -> Measured:
    """The figures of a model whose evidence was gathered."""
    content: dict[str, Any] = json.loads(file.read_text())
    evidence, carriers = Evidence.from_content(content["evidence"]), content["carriers"]
    share, area = suspects_found(evidence, carriers) if carriers else (None, None)
    return Measured(
        setting,
        {name: function(evidence) for name, function in STATISTICS.items()},
        suspect_class(evidence.favours, evidence.offset_sizes),
        share,
        area,
        content["seconds"],
        content["failures"],
        [c if np.isfinite(c) else None for c in evidence.correlations.values()],
    )


def _store(measured: list[Measured], file: Path) -> None:
    with atomic_path(file) as path:
        rows = [asdict(m) for m in measured]
        path.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _stored(file: Path) -> dict[str, Measured]:
    """By the settings' keys; none where there is no file."""
    if not file.exists():
        return {}
    rows = [
        Measured(**{**row, "setting": Setting(**row["setting"])})
        for row in json.loads(file.read_text())
    ]
    return {row.setting.key: row for row in rows}


if __name__ == "__main__":
    typer.run(main)
