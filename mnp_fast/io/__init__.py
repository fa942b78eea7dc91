"""Safe loading and saving: models, weights and data sets of untrusted origin."""

from .data import class_names, load_clean_data
from .errors import CheckpointError, DataError
from .exported import load_exported
from .files import atomic_path, ensure_writable
from .models import build_model
from .weights import load_checkpoint, load_weights, save_checkpoint, save_weights

__all__ = [
    "CheckpointError",
    "DataError",
    "atomic_path",
    "build_model",
    "class_names",
    "ensure_writable",
    "load_checkpoint",
    "load_clean_data",
    "load_exported",
    "load_weights",
    "save_checkpoint",
    "save_weights",
]
