"""Loads the compiled extension, or says exactly why it cannot be loaded."""

from __future__ import annotations

import platform
import sys
from importlib.util import find_spec
from pathlib import Path

import torch  # its libraries must be loaded before the extension's


def _built() -> list[str]:
    """Extension modules in the package, and the one that an editable install keeps elsewhere."""
    found = {str(path) for path in Path(__file__).parent.glob("_C*.so")}
    spec = find_spec(f"{__package__}._C")
    return sorted(found | ({spec.origin} if spec and spec.origin else set()))


def _explain(error: ImportError) -> str:
    built = _built()
    lines = [
        f"mnp_fast's compiled extension cannot be loaded: {error}",
        f"  python {platform.python_version()} ({sys.executable}), torch {torch.__version__} "
        f"({Path(torch.__file__).parent})",
        f"  extension modules: {', '.join(built) or 'none'}",
    ]
    if not built:
        lines.append("  The package was not built here: install it with pip.")
    elif "undefined symbol" in str(error):
        lines.append("  mnp_fast needs torch >= 2.10; this torch lacks the symbol named above.")
    return "\n".join(lines)


try:
    from . import _C
except ImportError as error:
    raise ImportError(_explain(error)) from error


def _load_cuda() -> str | None:
    """Load the CUDA kernels where torch has CUDA; None, or why they are missing."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if _C.cuda_left_out:
        return f"{_C.cuda_left_out}; install it again with -Ccmake.define.MNP_FAST_CUDA=ON"
    library = Path(_C.__file__).with_name("_cuda.so")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library} cannot be loaded: {error.__cause__ or error}"
    return None


cuda_missing = _load_cuda()

__all__ = ["_C", "cuda_missing"]
