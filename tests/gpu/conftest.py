import pytest
import torch


@pytest.fixture(autouse=True)
def _exact_and_without_waiting():
    """Full float32 precision; an operator that waits for the device fails."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
