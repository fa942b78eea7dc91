"""Runs defenses where they cannot see the attack: in a process that gets a model and clean images.

The process is given the weights, the clean images, their labels and a seed, in a folder that holds
nothing else. Poisoned images exist only in the process that started it. In the defense's process,
Python's opening of the attacks' sources or of the store of trained models raises `PermissionError`;
so does importing an attack. This guards against mistakes, not against a defense that sets out to
cheat: libraries that open files without Python, such as safetensors, pass the watch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mnp_fast
from mnp_fast.io import load_weights, save_weights

from .architectures import build
from .defenses import defense

ROOT = Path(__file__).parent.parent
SECRETS = (
    Path(__file__).parent / "attacks",
    Path(__file__).parent / "population.py",
    Path(mnp_fast.__file__).parent / "demo" / "attacks.py",
)


@dataclass(frozen=True)
class Outcome:
    """A defended model in eval mode, and the processor time that the defense took.

    What an earlier defense of the same process has computed already (`benchmarks.peers`) takes
    none. If the defense failed, there is no model, and `error` says why.
    """

    model: nn.Module | None
    seconds: float
    error: str = ""


def run_blind(
    names: Sequence[str],
    model: nn.Module,
    arch: tuple[str, int],
    clean: tuple[Tensor, Tensor],
    seed: int,
    hidden: Iterable[Path],
) -> list[Outcome]:
    """Let defenses work on a model, one after the other, in a process of their own.

    Parameters
    ----------
    names
        As in `benchmarks.defenses.defense`.
    model
        The network.
    arch
        Its name in `benchmarks.architectures` and its width.
    clean
        Images and labels.
    seed
        Of the defenses.
    hidden
        Files and folders that they must not open, besides the attacks' sources.

    Raises
    ------
    RuntimeError
        The process failed; the message has its last line of output.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_weights(model.state_dict(), folder / "model.safetensors")
        images, labels = clean
        save_weights({"images": images, "labels": labels}, folder / "clean.safetensors")
        request = {
            "defenses": list(names),
            "arch": arch,
            "seed": seed,
            "threads": torch.get_num_threads(),
            "hidden": [str(path.resolve()) for path in hidden],
        }
        (folder / "request.json").write_text(json.dumps(request))
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.blind", str(folder)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise RuntimeError(f"defenses failed: {lines[-1] if lines else done.returncode}")
        outcomes = []
        for i, told in enumerate(json.loads((folder / "outcomes.json").read_text())):
            purified = None
            if not told["error"]:
                purified = build(*arch, 0)
                purified.load_state_dict(load_weights(folder / f"purified-{i}.safetensors"))
                purified.eval()
            outcomes.append(Outcome(purified, **told))
    return outcomes


def hide(paths: Iterable[str | Path]) -> None:
    """From now on and for good, opening one of these files, or one under a folder, raises."""
    hidden = [os.path.realpath(path) for path in paths]
    # A module is also its compiled copy.
    hidden += [
        str(path.parent / "__pycache__" / path.stem) for path in map(Path, hidden) if path.suffix
    ]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        path = os.path.realpath(os.fsdecode(arguments[0]))
        for secret in hidden:
            if path == secret or path.startswith((secret + os.sep, secret + ".")):
                raise PermissionError(f"a defense must not open '{path}'")

    sys.addaudithook(watch)


def main(folder: Path) -> None:
    """The process: from the folder's request to its outcomes."""
    request = json.loads((folder / "request.json").read_text())
    hide([*SECRETS, *request["hidden"]])
    torch.set_num_threads(request["threads"])
    arch, width = request["arch"]
    model = build(arch, width, 0)
    model.load_state_dict(load_weights(folder / "model.safetensors"))
    model.eval()
    clean = load_weights(folder / "clean.safetensors")
    outcomes = []
    for i, name in enumerate(request["defenses"]):
        start, error = time.process_time(), ""
        try:
            purified = defense(name)(model, clean["images"], clean["labels"], request["seed"])
            save_weights(purified.state_dict(), folder / f"purified-{i}.safetensors")
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        outcomes.append({"seconds": time.process_time() - start, "error": error})
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
