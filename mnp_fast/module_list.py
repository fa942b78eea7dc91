"""The modules of a model, for those who ask for them in every call."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from itertools import chain

from torch import nn


class CurrentModules:
    """All modules of a model, which are found anew only where some were replaced."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._found: list[nn.Module] = []
        self._tables: list[dict[str, nn.Module | None]] = []  # of the modules' children
        self._sizes: list[int] = []
        self._children: list[nn.Module | None] = []

    def current(self) -> list[nn.Module]:
        """As `root.modules()` has them; the same list as long as they are the same."""
        if not self._found or not self._are_known():
            self._found = list(self.root.modules())
            self._tables = [module._modules for module in self._found]
            self._sizes = list(map(len, self._tables))
            self._children = list(self._present())
        return self._found

    def _are_known(self) -> bool:
        # By identity: modules may call others equal.
        same_sizes = list(map(len, self._tables)) == self._sizes
        return same_sizes and all(map(operator.is_, self._present(), self._children))

    def _present(self) -> Iterator[nn.Module | None]:
        return chain.from_iterable(map(dict.values, self._tables))
