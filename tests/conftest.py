"""No test reaches the network: not the Hub, not W&B. A test of tracking asks for its mode itself.

Tests run in two processes (pytest-xdist), a thread each: networks so small keep no more threads busy.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
