"""Defend a model from a results folder of BackdoorBench (github.com/SCLBD/BackdoorBench).

    python examples/backdoorbench.py make out/bench    # a folder of that layout, from digits
    python examples/backdoorbench.py defend out/bench/record/badnets --data out/bench/data/digits \
        --model mnp_fast.demo.resnet:ResNet18

An attack leaves `attack_result.pt`, a dict with `model_name`, `num_classes`, `model` (state dict),
`data_path`, `img_size`, `clean_data`, `bd_train` and `bd_test`, and its triggered test images as
`bd_test_dataset/CLASS/INDEX.png`. The purified weights go to `defense/mnp/defense_result.pt`, a
dict with `model_name`, `num_classes` and `model`, which the benchmark reads like any defense's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

import mnp_fast
from mnp_fast import DefenseConfig
from mnp_fast.demo.attacks import TARGET, badnets, poison
from mnp_fast.demo.digits import load_digits
from mnp_fast.demo.resnet import ResNet18
from mnp_fast.demo.train import accuracy, train
from mnp_fast.io import (
    CheckpointError,
    DataError,
    build_model,
    load_checkpoint,
    load_clean_data,
    save_checkpoint,
)

KEYS = {"model_name", "num_classes", "model", "img_size", "bd_test"}
# Besides tensors the file holds indices of images, as arrays and scalars of numpy: of these types,
# and made by two functions, which numpy 1 had in another module. All of them keep numbers alone.
_ARRAY, _SCALAR = np.empty(0).__reduce__()[0], np.int64(0).__reduce__()[0]
NUMPY: list[Any] = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in ("i8", "f8"))]
for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    NUMPY += [(_ARRAY, f"{module}._reconstruct"), (_SCALAR, f"{module}.scalar")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def read_attack(folder: Path) -> dict[str, Any]:
    """Read `attack_result.pt` without running anything in it.

    Raises
    ------
    FileNotFoundError
        There is none in the folder.
    CheckpointError
        It is damaged, asks for code to be run, or is of another layout. Files of the benchmark's
        first version, and those that hold images, are.
    """
    path = folder / "attack_result.pt"
    with torch.serialization.safe_globals(NUMPY):
        content = load_checkpoint(path)
    missing = KEYS.difference(content if isinstance(content, dict) else ())
    if missing or "bd_data_container" not in content["bd_test"]:
        raise CheckpointError(
            f"'{path}' is no attack result of version 2: it lacks "
            f"{', '.join(sorted(missing)) or 'bd_test of its kind'}"
        )
    return content


def triggered(folder: Path, attack: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    """Triggered test images, and the classes that the attacker wants for them."""
    images, _ = load_clean_data(folder / "bd_test_dataset", **options)
    samples = attack["bd_test"]["bd_data_container"]["data_dict"]
    # Labels in the order of the files: by names of folders, then of images.
    wanted = {
        (str(sample["other_info"][1]), f"{index}.png"): sample["other_info"][0]
        for index, sample in samples.items()
    }
    if len(wanted) != len(images):
        raise DataError(
            f"'{folder}': {len(wanted)} triggered images in attack_result.pt, "
            f"{len(images)} in bd_test_dataset"
        )
    return images, torch.tensor([wanted[name] for name in sorted(wanted)])


def purify(
    folder: Path, model: str, data: Path, config: DefenseConfig | None = None, **options: Any
) -> mnp_fast.DefenseResult:
    """Defend the folder's model, write its purified weights, and print what changed.

    Parameters
    ----------
    folder
        Has `attack_result.pt` and `bd_test_dataset`.
    model
        `"file.py:factory"` of the network, as `mnp_fast.io.build_model` takes it.
    data
        Clean images, as `mnp_fast.io.load_clean_data` takes them.
    config
        Settings of the defense.
    **options
        `mean` and `std` of `load_clean_data`.
    """
    attack = read_attack(folder)
    options["image_size"] = tuple(attack["img_size"][:2])
    with torch.serialization.safe_globals(NUMPY):
        network = build_model(model, folder / "attack_result.pt")
    clean, bad = load_clean_data(data, **options), triggered(folder, attack, **options)
    result = mnp_fast.defend(network, clean, config)
    out = folder / "defense" / "mnp" / "defense_result.pt"
    out.parent.mkdir(parents=True, exist_ok=True)
    purified = {key: attack[key] for key in ("model_name", "num_classes")}
    save_checkpoint({**purified, "model": dict(result.model.state_dict())}, out)
    for name, images in (("clean accuracy", clean), ("attack success", bad)):
        before, after = accuracy(network, *images), accuracy(result.model, *images)
        print(f"{name}: {before:.1f} % before, {after:.1f} % after")
    print(f"{result.cut.pruned} neurons pruned; wrote {out}")
    return result


def make_folder(root: Path, epochs: int = 20, seed: int = 1) -> Path:
    """Train a backdoored network on digits, and write it as the benchmark's attacks do.

    The clean images for the defense go to `data/digits`, the rest to `record/badnets`, which is
    returned.
    """
    torch.manual_seed(seed)
    digits, folder, model = load_digits(seed), root / "record" / "badnets", ResNet18()
    poisoned = poison(*digits.train, badnets, rate=0.1, seed=seed)
    for _ in train(model, *poisoned, epochs=epochs, seed=seed):
        pass
    for index, (image, label) in enumerate(zip(*digits.clean, strict=True)):
        _save_image(root / "data" / "digits" / str(label.item()) / f"{index}.png", image)
    samples = {}
    for index, (image, label) in enumerate(zip(*digits.test, strict=True)):
        if label == TARGET:
            continue
        path = folder / "bd_test_dataset" / str(label.item()) / f"{index}.png"
        _save_image(path, badnets(image))
        samples[np.int64(index)] = {"path": str(path), "other_info": [TARGET, label.item()]}
    indicator = np.zeros(len(digits.test[1]))
    indicator[list(samples)] = 1
    images = str(folder / "bd_test_dataset")
    torch.save(
        {
            "model_name": "resnet18",
            "num_classes": 10,
            "model": model.state_dict(),
            "data_path": str(root / "data" / "digits"),
            "img_size": [16, 16, 3],
            "clean_data": "digits",
            "bd_train": None,  # optional
            "bd_test": {
                "bd_data_container": {
                    "save_folder_path": images,
                    "data_dict": samples,
                    "save_file_format": ".png",
                },
                "getitem_all": True,
                "getitem_all_switch": False,
                "original_index_array": np.array(list(samples)),
                "poison_indicator": indicator,
                "save_folder_path": images,
            },
        },
        folder / "attack_result.pt",
    )
    return folder


def _save_image(path: Path, image: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)


@app.command()
def make(root: Annotated[Path, typer.Argument(help="Folder to write to.")]) -> None:
    """Write a results folder of a network with a backdoor, trained on handwritten digits."""
    print(make_folder(root))


@app.command()
def defend(
    folder: Annotated[Path, typer.Argument(help="Folder with attack_result.pt.")],
    model: Annotated[str, typer.Option(help="file.py:factory of the network.")],
    data: Annotated[Path, typer.Option(help="Clean images, as for mnp-fast defend.")],
    mean: Annotated[tuple[float, float, float], typer.Option(help="Of the channels.")] = (0, 0, 0),
    std: Annotated[tuple[float, float, float], typer.Option(help="Of the channels.")] = (1, 1, 1),
) -> None:
    """Write the purified weights to defense/mnp/defense_result.pt in the folder."""
    purify(folder, model, data, mean=mean, std=std)


if __name__ == "__main__":
    app()
