"""The modules of a model, for those who ask for them in every call."""

from __future__ import annotations

import operator
from typing import Any

from torch import nn


class CurrentModules:
    """All modules of a model, which are found anew only where some were replaced."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._found: list[nn.Module] = []
        self._children: list[tuple[dict[str, Any], list[Any]]] = []

    def current(self) -> list[nn.Module]:
        """As `root.modules()` has them; the same list as long as they are the same."""
        if not self._found or not all(_are(table, known) for table, known in self._children):
            self._found = list(self.root.modules())
            tables = [module._modules for module in self._found]
            self._children = [(table, list(table.values())) for table in tables]
        return self._found


def _are(table: dict[str, Any], known: list[Any]) -> bool:
    # By identity: modules may call others equal.
    return len(table) == len(known) and all(map(operator.is_, table.values(), known))
