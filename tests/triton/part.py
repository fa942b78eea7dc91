"""A plugin for pytest: of the tests that are collected, every n-th one from the k-th on.

`MNP_TEST_PART` says which, as in `0/2`.
"""

import os


def pytest_collection_modifyitems(items):
    part, parts = map(int, os.environ["MNP_TEST_PART"].split("/"))
    items[:] = items[part::parts]
