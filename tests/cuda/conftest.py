import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from . import shim


@pytest.fixture(autouse=True)
def _seed_of_cases():
    random.seed(0)


@pytest.fixture(scope="session")
def objects(request):
    """Where compiled kernels are kept between runs; their names have hashes of what they are."""
    return request.config.cache.mkdir("cuda")


@pytest.fixture(scope="session")
def pool():
    """What waits for processes, one for each core; tests take the results in their own order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield pool


@pytest.fixture(scope="session")
def program(objects):
    return shim.build(objects)
