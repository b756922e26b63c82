"""What all test files share: fixtures, expected warnings, and the marker of the tests that only SLOW=1 runs."""
import os
from pathlib import Path

import pytest
import torch

from tests.common import TINY, train_main

torch.set_num_threads(1)  # tensors are tiny here: several threads wait for each other, for long where cores are busy
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for programs that tests start


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "slow: takes long; SLOW=1 runs it")
    for warning in ("The image decoding and encoding capabilities", "This DataLoader will create"):  # torchvision 0.29
        config.addinivalue_line("filterwarnings", f"ignore:{warning}")


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if "slow" in item.keywords and "SLOW" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="takes long: SLOW=1 runs it"))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A finished tiny run on the digits, with k-NN, exports and saves."""
    out = tmp_path_factory.mktemp("trained") / "out"
    train_main(*TINY, "--steps", 4, "--out", out, "--eval-every", 2, "--export-every", 3, "--save-every", 2)
    return out


@pytest.fixture
def desk(tmp_path, monkeypatch, cache) -> Path:
    """An empty folder to work in, which is the current one."""
    (tmp_path / "desk").mkdir()
    monkeypatch.chdir(tmp_path / "desk")
    return tmp_path / "desk"
