from pathlib import Path

import pytest
import torch

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def data_dir():
    """Folder with real volumes and labels; tests that need it skip where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}")
    return DATA


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small networks are fastest on one thread, above all where other work keeps the cores busy."""
    torch.set_num_threads(1)
