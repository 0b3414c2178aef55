"""Let the tests import the scripts, which lie flat in the folder above, however pytest is started."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config) -> None:
    """Like rl.py, say nothing of names that are to change in a later transformers, nor of experts' ranks."""
    config.addinivalue_line("filterwarnings", "ignore:.*(gradient_checkpointing|past_key_values|(rank|alpha)_pattern keys)")
