"""The toy's images and configuration, written once a file of tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_training import write_config, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_config(tmp_path_factory.mktemp("config"))
