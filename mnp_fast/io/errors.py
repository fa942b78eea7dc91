"""Errors about the files a user hands in; both are `ValueError`s, so one `except` covers them."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A model file is damaged, unsafe to read, or does not fit the model."""


class DataError(ValueError):
    """A data set is damaged, unsafe to read, or not laid out as documented."""
