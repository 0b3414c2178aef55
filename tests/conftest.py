"""Let the tests import the scripts, which lie flat in the folder above, however pytest is started."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config) -> None:
    """Like the scripts, say nothing of a new name for gradient checkpointing, which older releases do not know yet."""
    config.addinivalue_line("filterwarnings", "ignore:.*gradient_checkpointing")
