"""Heads of attention that masks have silenced, removed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class PrunedAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` without some of its heads; it is called in the same way.

    The weights of attention, which torch returns with its output by default, are always None: those
    of removed heads are gone, and so is the mean over all of them. Made by `adopt` alone.

    Attributes
    ----------
    num_heads
        Number of heads before any was removed: masks (N * num_heads, L, S) are still of all.
    kept_heads
        Indices of those that stay, in ascending order.
    in_proj_weight
        (3 * kept * head_dim, embed_dim), or None where keys or values have widths of their own;
        then `q_proj_weight`, `k_proj_weight` and `v_proj_weight` have kept * head_dim rows each.
    in_proj_bias
        (3 * kept * head_dim,), or None.
    out_proj
        Linear layer with a weight (embed_dim, kept * head_dim).
    """

    kept_heads: tuple[int, ...]

    @classmethod
    def adopt(cls, attention: nn.MultiheadAttention, kept: Tensor) -> PrunedAttention:
        """Take heads out of an attention in place.

        Hooks, names and references to it stay as they are.

        Parameters
        ----------
        attention
            Exactly of torch's class, without `bias_k`, `bias_v` and `add_zero_attn`.
        kept
            (num_heads,) bool: which heads stay, at least one.
        """
        rows = kept.repeat_interleave(attention.head_dim)
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            _keep(attention, name, rows)
        for name in ("in_proj_weight", "in_proj_bias"):
            _keep(attention, name, rows.repeat(3))
        _keep(attention.out_proj, "weight", rows, dim=1)
        attention.out_proj.in_features = int(rows.sum())
        attention.__class__ = cls
        assert isinstance(attention, cls)
        attention.kept_heads = tuple(kept.nonzero().flatten().tolist())
        # Torch's encoder layers would compute with the weights themselves, as those of all heads.
        attention._qkv_same_embed_dim = False
        return attention

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As torch's, except for the weights, which are None.

        Raises
        ------
        ValueError
            Key or value have other dimensions or samples than query; `is_causal` without a mask.
        """
        self._check(query, key=key, value=value)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says what attn_mask is, so it needs an attn_mask")
        q, k, v = map(self._split, self._project(query, key, value))
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None  # as torch: the kernel knows a causal mask better
        else:
            is_causal = False
            mask = self._merge(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal).transpose(1, 2)
        if query.is_nested:
            y = y.contiguous().reshape(y.size(0), -1, self.out_proj.in_features)
            return self._project_back(y), None
        if query.dim() == 2:
            y = y[0]
        elif not self.batch_first:
            y = y.transpose(0, 1)
        return self._project_back(y.flatten(-2)), None

    def _check(self, query: Tensor, **others: Tensor) -> None:
        """Refuse what would be broadcast."""
        if query.is_nested:
            return
        batch = 0 if self.batch_first else 1
        for name, x in others.items():
            if x.dim() != query.dim() or (x.dim() == 3 and x.shape[batch] != query.shape[batch]):
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}; it must have as many dimensions and "
                    f"samples as query, which has shape {tuple(query.shape)}"
                )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        weights = (
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            if weight is None
            else weight.chunk(3)
        )
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(map(F.linear, (query, key, value), weights, biases))

    def _split(self, x: Tensor) -> Tensor:
        """(N, kept heads, positions, head_dim) of what was projected."""
        if x.is_nested:
            x = x.view(x.size(0), -1, len(self.kept_heads), self.head_dim)
            return x.transpose(1, 2).contiguous()
        if x.dim() == 2:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (len(self.kept_heads), self.head_dim)).transpose(1, 2)

    def _merge(self, attention: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added, and can be broadcast to (N, kept heads, L, S)."""
        masks = []
        if attention is not None:
            if attention.dim() == 3:
                of_heads = attention.unflatten(0, (q.size(0), self.num_heads))
                attention = of_heads[:, self.kept_heads]
            masks.append(_added(attention, q.dtype))
        if padding is not None:
            masks.append(_added(padding[..., None, None, :], q.dtype))
        return sum(masks[1:], masks[0]) if masks else None

    def _project_back(self, y: Tensor) -> Tensor:
        return F.linear(y, self.out_proj.weight, self.out_proj.bias)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of bools, True where nobody looks, as one that is added."""
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _keep(module: nn.Module, name: str, rows: Tensor, dim: int = 0) -> None:
    """Keep some rows of a parameter, or some columns, if the module has it."""
    old = getattr(module, name)
    if old is not None:
        indices = rows.nonzero().flatten().to(old.device)
        setattr(module, name, parameter(old.detach().index_select(dim, indices), old))


def parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter that replaces another one."""
    return nn.Parameter(value.to(like), requires_grad=like.requires_grad)


def remove_heads(model: nn.Module, example_inputs: tuple[Any, ...]) -> bool:
    """Take out, in place, heads whose columns of the output projection are 0.

    Attentions stay as they are if anything reads what `PrunedAttention` lacks when the model runs
    on the inputs, if they have hooks or are not called, and if they are not exactly torch's. One
    without any heads left keeps the first.

    Returns
    -------
    bool
        Whether there were any.
    """
    silent = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and _is_plain(module):
            used = (module.out_proj.weight.detach() != 0).any(0)
            kept = used.reshape(module.num_heads, -1).any(1).cpu()
            kept[0] |= not kept.any()
            if not kept.all():
                silent[module] = kept
    if not silent:
        return False
    run = _Run(set(silent))
    with torch.no_grad(), run:
        run.note(model(*copy.deepcopy(example_inputs)))
    run.end()
    chosen = run.called - run.read
    for attention in chosen:
        PrunedAttention.adopt(attention, silent[attention])
    return bool(chosen)


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    """Whether an attention does what its class says, and `PrunedAttention` can do it."""
    modules = (attention, attention.out_proj)
    return (
        [type(module) for module in modules]
        == [nn.MultiheadAttention, NonDynamicallyQuantizableLinear]
        and all(type(tensor) is nn.Parameter for tensor in attention.parameters())
        and not any(module._forward_pre_hooks or module._forward_hooks for module in modules)
        and "forward" not in vars(attention)
        and attention.bias_k is None
        and not attention.add_zero_attn
    )


class _Run(TorchFunctionMode):
    """Which attentions a run calls, and of which it reads parameters or weights besides."""

    def __init__(self, attentions: set[nn.MultiheadAttention]) -> None:
        super().__init__()
        self.called = set[nn.MultiheadAttention]()
        self.read = set[nn.MultiheadAttention]()
        self.running = 0
        self.owners: dict[int, list[nn.MultiheadAttention]] = {}
        self.alive: list[Tensor] = []  # keeps identities unique
        self.hooks = []
        for attention in attentions:
            for tensor in attention.parameters():
                self.owners.setdefault(id(tensor), []).append(attention)
            self.hooks += [
                attention.register_forward_pre_hook(self._enter),
                attention.register_forward_hook(self._leave),
            ]

    def end(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not self.running:
            self.note((args, kwargs))
        return func(*args, **(kwargs or {}))

    def note(self, value: Any) -> None:
        """All tensors in a value are read."""
        for leaf in tree_leaves(value):
            self.read.update(self.owners.get(id(leaf), ()))

    def _enter(self, attention: nn.MultiheadAttention, args: Any) -> None:
        self.running += 1

    def _leave(self, attention: nn.MultiheadAttention, args: Any, result: Any) -> None:
        self.running -= 1
        self.called.add(attention)
        weights = result[1]
        if weights is not None:
            self.owners[id(weights)] = [attention]
            self.alive.append(weights)
