"""Which layers of a model get a mask: what is asked for, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

Selector = str | Sequence[str] | Callable[[str, nn.Module], bool]
_QUANTIZED = "torch.ao.nn."  # where their classes are defined
_SHOWN = 8  # names in a message


def check_copies(model: nn.Module) -> None:
    """Refuse a model that has no weights yet, or that cannot be copied.

    Raises
    ------
    ValueError
        Naming the module.
    """
    for name, module in model.named_modules():
        kind = f"{name or 'the model'} ({type(module).__name__})"
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(map(is_lazy, tensors)):
            raise ValueError(f"{kind} has no weights yet: run the model on a batch before wrapping")
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                raise ValueError(
                    f"{kind} computes its {key!r} before each call, as torch.nn.utils.weight_norm, "
                    "spectral_norm and prune make it do, and cannot be copied; make it permanent, "
                    "for instance by torch.nn.utils.remove_weight_norm"
                )


def quantized_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The quantised modules of a model by name, without those inside of others."""
    found: dict[str, nn.Module] = {}
    inside = set()
    for name, module in model.named_modules():
        within = name.rpartition(".")[0] in inside
        if within or _is_quantized(module):
            inside.add(name)
        if _is_quantized(module) and not within:
            found[name] = module
    return found


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__module__.startswith(_QUANTIZED)


def check_weights(name: str, module: nn.Module) -> None:
    """Refuse a layer whose weights a mask cannot be folded into.

    Raises
    ------
    ValueError
        Naming the layer, and what to do about it.
    """
    weight = getattr(module, "weight", None)
    if _is_quantized(module):
        why = "is quantised: wrap the model before it is"
    elif parametrize.is_parametrized(module):
        why = "is parametrised: call torch.nn.utils.parametrize.remove_parametrizations first"
    elif "forward" in vars(module):
        why = "has a forward of its own, which a mask cannot be in: remove it from the instance"
    elif weight is None:
        return
    elif "weight" not in module._parameters:
        why = "has a weight that is no parameter: make permanent what computes it"
    elif type(weight.data) is not Tensor or not weight.is_floating_point():
        kind = f"{type(weight.data).__name__} of {weight.dtype}"
        why = f"has weights of kind {kind}: wrap the model before they are converted"
    else:
        return
    raise ValueError(f"{name} ({type(module).__name__}) {why}, or pass exclude={name!r}")


def select(
    layers: Mapping[str, nn.Module], include: Selector | None, exclude: Selector | None
) -> set[str]:
    """Names of the layers that `include` chooses, all if it is None, and `exclude` does not.

    Raises
    ------
    TypeError
        A selector is neither a pattern, several, nor a function.
    ValueError
        A pattern matches no layer.
    """
    chosen = set(layers) if include is None else _matches("include", include, layers)
    return chosen if exclude is None else chosen - _matches("exclude", exclude, layers)


def _matches(argument: str, selector: Selector, layers: Mapping[str, nn.Module]) -> set[str]:
    if callable(selector):
        return {name for name, module in layers.items() if selector(name, module)}
    patterns = [selector] if isinstance(selector, str) else selector
    if not isinstance(patterns, Iterable) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(
            f"{argument} must be a pattern, a sequence of patterns, or a function of name and "
            f"module, not {selector!r}"
        )
    matches: set[str] = set()
    for pattern in patterns:
        found = {name for name in layers if fnmatchcase(name, pattern)}
        if not found:
            names = [*list(layers)[:_SHOWN], *["..."] * (len(layers) > _SHOWN)]
            raise ValueError(
                f"{argument}: no layer that can have a mask matches {pattern!r}; "
                f"they are {', '.join(names)}"
            )
        matches |= found
    return matches
