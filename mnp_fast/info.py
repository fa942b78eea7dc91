"""What was built, what is used, and why something is not."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from . import backends
from ._extension import _C, cuda_missing


def build_info() -> dict[str, Any]:
    """Facts on this build and where it runs, as plain data.

    Returns
    -------
    dict
        ``version``, ``compiler``, ``torch_built`` and ``torch_running``, ``python``; under
        ``cpu``, the instruction sets ``built``, ``usable`` on this machine and ``used`` (the best,
        or the one that the environment variable MNP_FAST_CPU names) and the number of
        ``threads``; under ``cuda``, whether its kernels are ``built`` and ``loaded``, the
        ``reason`` if they are not, and the number of ``devices`` that torch finds; under
        ``backends``, the candidates of each operator.
    """
    return {
        "version": metadata.version("mnp_fast"),
        "compiler": _C.compiler,
        "torch_built": _C.built_with_torch,
        "torch_running": torch.__version__,
        "python": platform.python_version(),
        "cpu": {
            "built": list(_C.instruction_sets_built),
            "usable": list(_C.instruction_sets_usable),
            "used": _C.instruction_set,
            "threads": torch.get_num_threads(),
        },
        "cuda": {
            "built": not _C.cuda_left_out,
            "loaded": cuda_missing is None,
            "reason": cuda_missing or "",
            "devices": torch.cuda.device_count(),
        },
        "backends": backends.table(),
    }
