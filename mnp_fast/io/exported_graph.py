"""From an archive's JSON graph to an `fx.GraphModule` whose layers are modules."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .exported_arguments import RefusedError, decode
from .exported_layers import TENSORS, make_layer
from .operators import IGNORED, operator_name, resolve
from .pt2 import Archive

SUMS: dict[str, Callable[..., Any]] = {
    "torch.ops.aten.add.Tensor": operator.add,
    "torch.ops.aten.add_.Tensor": operator.iadd,
}
_ATOM = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class _Stored:
    """A value in the graph that is the model's tensor at `path`."""

    path: str


class GraphBuilder:
    """Rebuilds an archive's graph node by node; names in it never become code unchecked.

    Attributes
    ----------
    input_meta
        The JSON description of the input tensor, once `build` has returned.
    """

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self.input_meta: dict[str, Any] = {}
        self._root = nn.Module()
        self._graph = fx.Graph()
        self._values: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        self._modules: dict[tuple[Any, ...], str] = {}
        self._input: fx.Node | None = None
        self._batch: int | None = None

    def build(self) -> fx.GraphModule:
        """The module, in eval mode.

        Raises
        ------
        RefusedError
            The graph uses what is not allowed or not supported.
        LookupError, RuntimeError, TypeError, ValueError
            The archive is malformed.
        """
        self._read_inputs()
        for node in self.archive.graph["nodes"]:
            self._add(node)
        if not self._modules:
            raise RefusedError(
                "its graph has no convolution, linear layer or batch norm to mask; save the "
                "program that torch.export.export returns, without decompositions"
            )
        self._write_output()
        self._graph.lint()
        return fx.GraphModule(self._root, self._graph, class_name="ExportedModel").eval()

    def _read_inputs(self) -> None:
        for spec in self.archive.signature["input_specs"]:
            ((kind, content),) = spec.items()
            if kind == "user_input":
                if self._input is not None or "as_tensor" not in content["arg"]:
                    raise RefusedError("it has other inputs than one tensor of images")
                name = content["arg"]["as_tensor"]["name"]
                self._input = self._values[name] = self._graph.placeholder("x")
                self.input_meta = self.archive.graph["tensor_values"][name]
                self._batch = self.input_meta["sizes"][0].get("as_int")
            elif kind in ("parameter", "buffer", "tensor_constant"):
                path = content[f"{kind}_name"]
                _check_path(path)
                self._values[content["arg"]["name"]] = _Stored(path)
            # A constant stands for an argument of forward that the export left at its default.
            elif kind != "constant_input":
                raise RefusedError(f"it needs an input of kind '{kind}', which is not supported")
        if self._input is None:
            raise RefusedError("it has no tensor input")

    def _write_output(self) -> None:
        kinds = [kind for spec in self.archive.signature["output_specs"] for kind in spec]
        outputs = self.archive.graph["outputs"]
        if kinds != ["user_output"] or len(outputs) != 1 or "as_tensor" not in outputs[0]:
            raise RefusedError(f"it returns other things than one tensor ({', '.join(kinds)})")
        self._graph.output(self._use(self._values[outputs[0]["as_tensor"]["name"]]))

    def _add(self, node: dict[str, Any]) -> None:
        target = node["target"]
        name = operator_name(target)
        if name in IGNORED:
            return
        function = resolve(target)
        if function is None:
            raise RefusedError(
                f"its graph calls '{target}', which is not on the list of operators that are "
                "known to be harmless; build the model from its code instead"
            )
        given = {item["name"]: decode(item["arg"], self._values) for item in node["inputs"]}
        if given.get("train") is True or given.get("training") is True or given.get("dropout_p"):
            raise RefusedError(
                "it was exported in training mode; call model.eval() before the export"
            )
        self._free_batch(name, given, node)
        if name == "dropout":
            result = given["input"]
        else:
            result = self._layer(name, given, node) or self._call(function, given, node)
        self._bind(node["outputs"], result)

    def _sizes(self, argument: dict[str, Any]) -> list[int | None]:
        """A graph tensor's sizes, None where the export left them open; [] if it is no tensor."""
        if "as_tensor" not in argument:
            return []
        meta = self.archive.graph["tensor_values"][argument["as_tensor"]["name"]]
        return [size.get("as_int") for size in meta["sizes"]]

    def _free_batch(self, name: str, given: dict[str, Any], node: dict[str, Any]) -> None:
        """Replace the exported batch size in a new shape by whatever the batch is."""
        key = "shape" if name == "reshape" else "size"
        if self._batch is None or name not in ("view", "reshape", "expand") or key not in given:
            return
        before, after = self._sizes(node["inputs"][0]["arg"]), self._sizes(node["outputs"][0])
        if after[:1] != [self._batch] or None in after:
            return
        if name == "expand":
            batch = self._graph.call_function(torch.ops.aten.sym_size.int, (self._input, 0))
            given[key] = [batch, *after[1:]]
        elif before[:1] == [self._batch]:
            # -1 also stays right where the first size only happens to equal the batch.
            given[key] = [-1, *after[1:]]

    def _layer(self, name: str, given: dict[str, Any], node: dict[str, Any]) -> fx.Node | None:
        """A call of a module in place of a functional layer; None where there is none."""
        stored = {key: given[key].path for key in TENSORS if isinstance(given.get(key), _Stored)}
        computed = any(given.get(key) is not None and key not in stored for key in TENSORS)
        if computed or not isinstance(given.get("input"), fx.Node):
            return None
        tensors = {key: self._tensor(path) for key, path in stored.items()}
        options = {key: value for key, value in given.items() if key not in (*TENSORS, "input")}
        rank = len(self._sizes(node["inputs"][0]["arg"]))
        module = make_layer(name, tensors, options, rank=rank)
        if module is None:
            return None
        # A layer that is called twice stays one module.
        key = (name, *sorted(stored.items()), repr(sorted(options.items())))
        if key not in self._modules:
            self._modules[key] = self._place(module, name, stored)
        return self._graph.call_module(self._modules[key], (given["input"],))

    def _place(self, module: nn.Module, kind: str, stored: dict[str, str]) -> str:
        """Put a layer where its first tensor lies in the model; its path."""
        owner, _, leaf = next(iter(stored.values())).rpartition(".")
        wanted = owner if owner and leaf in TENSORS else "_".join([owner, leaf, kind]).strip("_")
        wanted = wanted if owner == wanted else wanted.replace(".", "_")
        counter = f"{owner}.num_batches_tracked"
        if "running_mean" in stored and counter in self.archive.tensors:
            module.num_batches_tracked = self.archive.tensors[counter]
        path, number, taken = wanted, 1, set(self._modules.values())
        while path in taken:
            path, number = f"{wanted}_{number}", number + 1
        *parents, name = path.split(".")
        container = self._container(parents)
        previous = container._modules.get(name)
        if previous is not None:
            _adopt(module, previous)
        container._modules[name] = module
        return path

    def _call(
        self, function: Callable[..., Any], given: dict[str, Any], node: dict[str, Any]
    ) -> fx.Node:
        target = node["target"]
        if not isinstance(function, torch._ops.OpOverload):
            numbers = [self._use(decode(item["arg"], self._values)) for item in node["inputs"]]
            return self._graph.call_function(function, tuple(numbers))
        values = {name: self._use(value) for name, value in given.items()}
        # Fusion knows these by their usual functions.
        if target == "torch.ops.aten.relu.default":
            return self._graph.call_function(F.relu, (values["self"],))
        if target == "torch.ops.aten.relu_.default":
            return self._graph.call_function(F.relu, (values["self"],), {"inplace": True})
        if target in SUMS and set(values) == {"self", "other"}:
            return self._graph.call_function(SUMS[target], (values["self"], values["other"]))
        schema = function._schema.arguments
        unknown = set(values) - {argument.name for argument in schema}
        if unknown:
            raise RefusedError(f"'{target}' has no argument '{min(unknown)}'")
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for index, argument in enumerate(schema):
            if argument.name not in values:
                continue
            if len(args) == index and not argument.kwarg_only:
                args.append(values[argument.name])
            else:
                kwargs[argument.name] = values[argument.name]
        return self._graph.call_function(function, tuple(args), kwargs)

    def _bind(self, outputs: list[dict[str, Any]], result: Any) -> None:
        """Name a node's results; several are taken apart by index."""
        if len(outputs) == 1 and "as_tensors" not in outputs[0]:
            for value in outputs[0].values():
                self._values[value.get("name") or value["as_name"]] = result
            return
        parts = outputs[0]["as_tensors"] if len(outputs) == 1 else [_tensor(o) for o in outputs]
        for index, part in enumerate(parts):
            if part is not None:
                item = self._graph.call_function(operator.getitem, (result, index))
                self._values[part["name"]] = item

    def _use(self, value: Any) -> Any:
        """`value` as an argument of a call: the model's tensors become `get_attr` nodes."""
        if isinstance(value, list):
            return [self._use(item) for item in value]
        if not isinstance(value, _Stored):
            return value
        *parents, name = value.path.split(".")
        container = self._container(parents)
        if name not in container._parameters and name not in container._buffers:
            _register(container, name, self._tensor(value.path))
        return self._graph.get_attr(value.path)

    def _tensor(self, path: str) -> Tensor:
        if path not in self._tensors:
            tensor = self.archive.tensors[path]
            if path in self.archive.parameters:
                tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
            self._tensors[path] = tensor
        return self._tensors[path]

    def _container(self, parents: list[str]) -> nn.Module:
        container = self._root
        for name in parents:
            if name not in container._modules:
                container.add_module(name, nn.Module())
            container = container.get_submodule(name)
        return container


def _tensor(output: dict[str, Any]) -> dict[str, Any] | None:
    tensor: dict[str, Any] | None = output.get("as_tensor")
    return tensor


def _adopt(module: nn.Module, previous: nn.Module) -> None:
    """Move what already lies under a module's path into the module."""
    for name, tensor in (*previous._parameters.items(), *previous._buffers.items()):
        if not hasattr(module, name) and tensor is not None:
            _register(module, name, tensor)
    for name, child in previous._modules.items():
        module.add_module(name, child)


def _register(container: nn.Module, name: str, tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        container.register_parameter(name, tensor)
    else:
        container.register_buffer(name, tensor)


def _check_path(path: str) -> None:
    # Paths end up in the Python code that fx generates, and as attributes of modules.
    first, *rest = path.split(".")
    if (
        not all(_ATOM.fullmatch(atom) for atom in (first, *rest))
        or hasattr(fx.GraphModule, first)
        or any(hasattr(nn.Module, atom) for atom in rest)
    ):
        raise RefusedError(f"its tensor name {path!r} is not allowed")
