"""Which published architectures wrap, and whether the result is exact.

python -m benchmarks.zoo            # all of them, some minutes; needs the extra `zoo`
python -m benchmarks.zoo --quick    # the first of every family
python -m benchmarks.zoo --page     # docs/zoo.md, from docs/results/zoo.json alone
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, Optional

import torch
import typer
from torch import Tensor, nn

import mnp_fast
from mnp_fast.dataflow import WEIGHTED
from mnp_fast.fusion import fused_blocks
from mnp_fast.layers import MaskedHeads, MaskedLayer
from mnp_fast.wrap import masked_layers

ROOT = Path(__file__).parent.parent
STORE = ROOT / "docs" / "results" / "zoo.json"
PACKAGES = ("torch", "torchvision", "timm")
TOLERANCE = 1e-9  # of a relative error, in float64


HEAD = """# Architectures

Networks of torchvision (`tv:`) and timm with random weights, on small images, in float64. Of every
one it is checked, with a tolerance of 1e-9:

- outputs while all masks are 1, fused and not, against the plain model;
- outputs and gradients of masks between 0 and 1, a tenth of them 0, fused and not, against the
  plain model with masks multiplied in by hooks, which is their definition;
- outputs of the unwrapped model at these masks.

"Without mask" are convolutions and linear layers that have neither a mask nor a masked norm behind
them: those that make the output, subclasses of torch's layers, and layers whose weights are used
without calling them. "Blocks" run as one operator. Seconds are for all checks. Printed by
`python -m benchmarks.zoo --json docs/results/zoo.json`, then `--page`, with """
COLUMNS = (
    "| family | network | outcome | why | masked layers | neurons | blocks | without mask "
    "| error | s |\n|---|---|---|---|---|---|---|---|---|---|\n"
)


class Entry(NamedTuple):
    """A name, with `tv:` in front for torchvision; the side of images; what its maker is told."""

    name: str
    size: int = 64
    options: Mapping[str, Any] = MappingProxyType({})


def _sized(name: str, size: int = 64, **options: Any) -> Entry:
    """One whose constructor has to know the side of the images."""
    return Entry(name, size, {"img_size": size, **options})


FAMILIES: dict[str, list[Entry]] = {
    "ResNet": [
        Entry("tv:resnet18"),
        Entry("tv:resnet50"),
        Entry("resnet26d"),
        Entry("res2net50_26w_4s"),
        Entry("skresnet18"),
        Entry("resnest14d"),
        Entry("seresnet50"),
        Entry("cspresnet50"),
        Entry("dla34"),
    ],
    "pre-activation ResNet": [Entry("resnetv2_50d"), Entry("resnetv2_50x1_bit")],
    "ResNeXt": [Entry("tv:resnext50_32x4d"), Entry("resnext26ts")],
    "WideResNet": [Entry("tv:wide_resnet50_2")],
    "DenseNet": [Entry("tv:densenet121"), Entry("densenet121"), Entry("dpn68")],
    "VGG": [
        Entry("tv:vgg11", 32),
        Entry("tv:vgg11_bn", 32),
        Entry("repvgg_a0"),
        Entry("ese_vovnet19b_dw"),
    ],
    "AlexNet, SqueezeNet": [Entry("tv:alexnet"), Entry("tv:squeezenet1_1")],
    "MobileNet": [
        Entry("mobilenetv1_100"),
        Entry("tv:mobilenet_v2"),
        Entry("tv:mobilenet_v3_small"),
        Entry("mobilenetv3_small_100"),
        Entry("mobilenetv4_conv_small"),
        Entry("mobilenetv4_hybrid_medium"),
        Entry("mobileone_s0"),
    ],
    "EfficientNet": [
        Entry("tv:efficientnet_b0"),
        Entry("tv:efficientnet_v2_s"),
        Entry("efficientnet_b0"),
        Entry("tf_efficientnet_b0"),
        Entry("tf_mixnet_s"),
        Entry("ghostnet_100"),
        Entry("rexnet_100"),
        Entry("lcnet_050"),
    ],
    "MnasNet": [Entry("tv:mnasnet1_0"), Entry("mnasnet_100"), Entry("fbnetc_100")],
    "RegNet": [Entry("tv:regnet_y_400mf"), Entry("tv:regnet_x_400mf"), Entry("regnety_002")],
    "ShuffleNet": [Entry("tv:shufflenet_v2_x1_0")],
    "Inception": [
        Entry("tv:googlenet", 64, {"init_weights": False}),
        Entry("tv:inception_v3", 96, {"init_weights": False}),
        Entry("inception_v4", 96),
        Entry("inception_resnet_v2", 96),
        Entry("xception41", 64),
        Entry("inception_next_atto"),
    ],
    "ConvNeXt": [
        Entry("tv:convnext_tiny"),
        Entry("convnext_atto"),
        Entry("convnextv2_atto"),
        Entry("convmixer_768_32"),
    ],
    "NFNet": [Entry("nf_regnet_b0"), Entry("eca_nfnet_l0"), Entry("dm_nfnet_f0", 32)],
    "HRNet": [Entry("hrnet_w18_small")],
    "ViT": [
        Entry("tv:vit_b_16", 32, {"image_size": 32}),
        _sized("vit_tiny_patch16_224"),
        _sized("beit_base_patch16_224", depth=4),
        _sized("cait_xxs24_224"),
        _sized("xcit_nano_12_p16_224"),
        _sized("pit_ti_224"),
        Entry("twins_svt_small"),
        Entry("pvt_v2_b0"),
        Entry("tiny_vit_5m_224", 224),
        _sized("mvitv2_tiny"),
    ],
    "DeiT": [_sized("deit_tiny_patch16_224"), _sized("deit_tiny_distilled_patch16_224")],
    "Swin": [
        Entry("tv:swin_t"),
        Entry("tv:swin_v2_t"),
        _sized("swin_tiny_patch4_window7_224"),
        Entry("focalnet_tiny_srf"),
    ],
    "MLP-Mixer": [_sized("mixer_s32_224"), _sized("resmlp_12_224"), _sized("gmlp_s16_224")],
    "PoolFormer": [Entry("poolformer_s12"), Entry("sequencer2d_s", 224)],
    "hybrids": [
        _sized("vit_tiny_r_s16_p8_224"),
        _sized("coatnet_0_224"),
        Entry("tv:maxvit_t", 224),
        Entry("levit_128s", 224),
        Entry("efficientformer_l1", 224),
        Entry("mobilevit_xxs"),
        Entry("edgenext_xx_small"),
        Entry("fastvit_t8"),
        Entry("efficientvit_b0"),
        Entry("botnet26t_256", 256),
        Entry("repvit_m0_9"),
        Entry("starnet_s1"),
    ],
}


def build(entry: Entry) -> nn.Module:
    """The network in float64, in eval mode, with no two weights of a vector alike."""
    source, _, name = entry.name.rpartition(":")
    if source == "tv":
        import torchvision

        model = torchvision.models.get_model(name, num_classes=10, **entry.options)
    else:
        import timm

        model = timm.create_model(name, num_classes=10, **entry.options)
    with torch.no_grad():
        for parameter in model.parameters():
            # Constants at the start, zeros above all, would hide what a mask does.
            if (parameter == parameter.flatten()[0]).all():
                if parameter.abs().max() < 0.01:
                    nn.init.uniform_(parameter, -0.5, 0.5)
                else:
                    parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.double().eval()


def check(entry: Entry) -> dict[str, Any]:
    """Everything that is claimed of a wrapped model, on one architecture."""
    torch.manual_seed(0)
    model, x = build(entry), torch.randn(2, 3, entry.size, entry.size).double()
    start = time.perf_counter()
    try:
        masked = mnp_fast.wrap(model, example_inputs=(x,))
        apart = mnp_fast.wrap(model, example_inputs=(x,), fuse=False)
    except (TypeError, ValueError) as error:
        return {"name": entry.name, "outcome": "refused", "why": str(error)}
    errors = dict(_errors(model, masked, apart, x))
    wrong = [claim for claim, error in errors.items() if not error <= TOLERANCE]
    layers = masked_layers(masked)
    return {
        "name": entry.name,
        "outcome": "wrong" if wrong else "exact",
        "why": ", ".join(f"{claim}: {errors[claim]:.1e}" for claim in wrong),
        "layers": len(layers),
        "neurons": sum(layer.neurons for layer in layers.values()),
        "blocks": len(fused_blocks(masked)),
        "without": _without_mask(masked),
        "error": max(errors.values()),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _errors(
    model: nn.Module, masked: nn.Module, apart: nn.Module, x: Tensor
) -> Iterator[tuple[str, float]]:
    """Relative errors of what is claimed to be equal."""
    with torch.no_grad():
        plain = model(x)
        yield "masks of 1, fused", _relative(masked(x), plain)
        yield "masks of 1", _relative(apart(x), plain)
        for mask, other in zip(
            mnp_fast.masks(masked).values(), mnp_fast.masks(apart).values(), strict=True
        ):
            mask.uniform_(0.5, 1)
            mask[torch.rand_like(mask) < 0.1] = 0
            other.copy_(mask)
        direction = torch.randn_like(plain)
    expected, gradients = _by_hooks(model, masked, x, direction)
    yield "masks without effect", 0.0 if _relative(expected, plain) > 1e-4 else 1.0
    whole = torch.cat(gradients).norm()
    for claim, network in (("fused", masked), ("unfused", apart)):
        y = network(x)
        yield f"output, {claim}", _relative(y, expected)
        mine = torch.autograd.grad((y * direction).sum(), list(mnp_fast.masks(network).values()))
        # Of a layer whose gradient is nothing but rounding, only the size can be compared.
        yield (
            f"gradients, {claim}",
            max(
                float((a - b).norm() / (b.norm() + 1e-6 * whole))
                for a, b in zip(mine, gradients, strict=True)
            ),
        )
    with torch.no_grad():
        yield "unwrapped", _relative(mnp_fast.unwrap(masked)(x), expected)


def _by_hooks(
    model: nn.Module, masked: nn.Module, x: Tensor, direction: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of masks by hooks on the plain model, the masks' definition."""
    model.requires_grad_(False)
    masks, hooks = [], []
    weights: dict[str, Tensor] = {}
    for name, layer in masked_layers(masked).items():
        mask = layer.mask.detach().clone().requires_grad_()
        module = model.get_submodule(name)
        if isinstance(layer, MaskedHeads):
            columns = mask.repeat_interleave(layer.in_features // layer.heads)
            weights[f"{name}.weight"] = model.get_parameter(f"{name}.weight") * columns
        else:
            hooks.append(module.register_forward_hook(partial(_multiply, mask, layer.site)))
        masks.append(mask)
    y = torch.func.functional_call(model, weights, (x,))
    for hook in hooks:
        hook.remove()
    return y.detach(), list(torch.autograd.grad((y * direction).sum(), masks))


def _multiply(mask: Tensor, site: str, layer: nn.Module, args: Any, y: Tensor) -> Tensor:
    kept = None if site == "neuron" else dict(layer.named_parameters()).get("bias")
    axis = -1 if isinstance(layer, nn.Linear) else 1
    y = y.movedim(axis, -1)
    y = y * mask if kept is None else (y - kept) * mask + kept
    return y.movedim(-1, axis)


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach() - expected).norm() / expected.norm())


def _without_mask(masked: nn.Module) -> dict[str, int]:
    """By class, how many layers have neither a mask nor a norm behind them that has one."""
    layers = masked_layers(masked)
    owners = {masked.get_submodule(layer.weight_owner) for layer in layers.values()}
    return dict(
        Counter(
            type(module).__name__
            for module in masked.modules()
            if isinstance(module, WEIGHTED)
            and not isinstance(module, MaskedLayer)
            and module not in owners
        )
    )


def _page(content: dict[str, Any]) -> str:
    rows = content["rows"]
    text = HEAD + f"{content['versions']}.\n\n**{_counts(rows)}**\n\n" + COLUMNS
    for row in rows:
        if row["outcome"] == "refused":
            cells = [row["why"], *[""] * 6]
        else:
            without = ", ".join(f"{count} {kind}" for kind, count in row["without"].items())
            cells = [
                row["why"],
                str(row["layers"]),
                str(row["neurons"]),
                str(row["blocks"]),
                without,
                f"{row['error']:.0e}",
                f"{row['seconds']:.1f}",
            ]
        text += f"| {row['family']} | {row['name']} | {row['outcome']} | {' | '.join(cells)} |\n"
    return text


def _counts(rows: list[dict[str, Any]]) -> str:
    outcomes = Counter(row["outcome"] for row in rows)
    fused = sum(row.get("blocks", 0) > 0 for row in rows)
    return (
        f"{len(rows)} architectures: {outcomes['exact']} exact ({fused} with fused blocks), "
        f"{outcomes['refused']} refused, {outcomes['wrong']} wrong."
    )


def main(
    quick: Annotated[bool, typer.Option(help="The first of every family.")] = False,
    only: Annotated[str, typer.Option(help="Names with commas between.")] = "",
    output: Annotated[
        Optional[Path],  # noqa: UP045 (Typer evaluates it on Python 3.10)
        typer.Option("--json", help="File for all figures."),
    ] = None,
    page: Annotated[
        bool, typer.Option(help="Run nothing: write docs/zoo.md from the stored figures.")
    ] = False,
) -> None:
    """Wrap architectures of torchvision and timm; exit with 1 where a result is wrong."""
    if page:
        (ROOT / "docs" / "zoo.md").write_text(_page(json.loads(STORE.read_text())))
        return
    torch.set_num_threads(1)  # inputs are too small for more
    rows = []
    for family, entries in FAMILIES.items():
        for entry in entries[:1] if quick else entries:
            if only and entry.name not in only.split(","):
                continue
            try:
                row = {"family": family, **check(entry)}
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                row = {"family": family, "name": entry.name, "outcome": "wrong", "why": why}
            rows.append(row)
            typer.echo(", ".join(f"{value}" for value in row.values() if value != ""))
    typer.echo(_counts(rows))
    if output is not None:
        versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    if any(row["outcome"] == "wrong" for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
