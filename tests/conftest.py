import pytest
import torch


def pytest_collection_finish(session):
    """Tests of a device say at once that there is none."""
    if session.config.option.collectonly or torch.cuda.is_available():
        return
    if any(item.get_closest_marker("gpu") for item in session.items):
        raise pytest.UsageError(
            f"tests marked gpu need a CUDA device, and torch {torch.__version__} finds none"
        )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Small tensors are slower on several threads, above all while others compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
