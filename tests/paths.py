"""Where the repository and the recorded numbers are."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
GOLDEN_LOSSES = TESTS / "golden_losses"
KEYS = TESTS / "keys"  # published state-dict keys and shapes
