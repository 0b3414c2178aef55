"""Let the tests import the scripts, which lie flat in the folder above, however pytest is started."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
