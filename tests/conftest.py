"""Shared by all tests: where real images come from, and the oracles' import shim."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach out; those that do so talk to a local server
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    import torch

    torch.set_num_threads(int(os.environ.get("DINOV3_TEST_THREADS", "1")))


@pytest.fixture(scope="session")
def skimage_images() -> Path:
    """The folder of photographs inside scikit-image's wheel (astronaut.png, chelsea.png, coffee.png, rocket.jpg, …)."""
    skimage = pytest.importorskip("skimage")
    return Path(skimage.__file__).parent / "data"


@pytest.fixture(scope="session")
def development_data() -> Path:
    """The development images, where they are present; a test that needs them says that it was skipped."""
    root = Path(os.environ.get("DINOV3_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"development data not present at {root} (set DINOV3_DATA)")
    return root


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for the tests that had no development images, so that nobody takes them for passed."""
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "data" in r.keywords]
    if skipped:
        reason = skipped[0].longrepr[2].removeprefix("Skipped: ")
        terminalreporter.write_line(f"{len(skipped)} tests on real images were skipped: {reason}")


@pytest.fixture(scope="session")
def oracles() -> None:
    """Makes timm and transformers importable beside a CPU-only torch.

    The published torchvision wheel registers its operators from a CUDA library; without it `import torchvision` fails
    because two operator schemas are missing. Declaring them is enough for everything the oracles use.
    """
    import sys

    import torch

    try:
        import torchvision
    except RuntimeError:
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        oracles.library = library  # type: ignore[attr-defined]  # keeps the definitions alive
        import torchvision  # noqa: F401
