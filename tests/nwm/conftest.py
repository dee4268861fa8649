"""Lets the tests beside it import `published`, which they share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
