"""No test reaches the network: not the Hub, not W&B. A test of tracking asks for its mode itself.

Tests run in two processes (pytest-xdist), a thread each: networks so small keep no more threads busy.
"""

import gc
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

gc.set_threshold(50_000, 20, 20)  # networks that go are collected where they go

LONG = (
    *("test_transfer", "test_adapt", "test_train", "test_parity", "test_training", "test_dry_run"),
    *("test_diversity", "test_paper", "test_similarity", "test_live", "test_workflow", "test_offload"),
    "test_fuzz",
)


def pytest_collection_modifyitems(items):
    """Long modules first, so that no process waits for another in the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True, scope="module")
def settled():
    """What is imported by now is never garbage: networks that go are looked for among less."""
    gc.collect()
    gc.freeze()
