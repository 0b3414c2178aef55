"""Let the tests import the scripts, which lie flat in the folder above, however pytest is started; and let them run on the CPU.

There the policy computes in 32 bits, so figures can be compared closely. What needs a GPU is in test_gpu.py.
"""
import os
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as in rl.py
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("TEST_GPU", "")  # before torch is imported, here and in what the tests start
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config) -> None:
    """Like rl.py, say nothing of names that are to change in a later transformers, nor of experts' ranks."""
    config.addinivalue_line("filterwarnings", "ignore:.*(gradient_checkpointing|past_key_values|(rank|alpha)_pattern keys)")
