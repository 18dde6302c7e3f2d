import os
import subprocess
from pathlib import Path

import pytest
import torch

# Where real volumes lie, if they are there: tests that need them skip where they are not.
DATA = Path(os.environ.get("LSD_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


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


@pytest.fixture
def small_disk(tmp_path):
    """A function that gives a folder on a file system of its own with that many kB."""
    mounted = []

    def mount(kilobytes):
        folder = tmp_path / f"disk_{kilobytes}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a small file system needs root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
