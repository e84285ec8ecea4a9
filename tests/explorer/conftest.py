"""A small store with planted neighbours, and clients of a service over it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
from starlette.testclient import TestClient

import dinov3
from dinov3.data.sources import open_source
from dinov3.embedding.pipeline import embed_source
from dinov3.embedding.store import EmbeddingStore
from dinov3.explorer.server import application
from dinov3.explorer.source import FrozenModel, Source
from dinov3.features import default_preprocessing
from dinov3.web import Limits

KINDS = ("chelsea", "coffee", "rocket")  # folders; each image has near copies there


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory, skimage_images: Path) -> Path:
    """3 folders of 5 crops each, 80 × 60 px and smaller; chelsea/0.jpg twice; one image that is a link out of the folder."""
    folder = tmp_path_factory.mktemp("images")
    for kind in KINDS:
        whole = Image.open(next(skimage_images.glob(f"{kind}.*"))).convert("RGB").resize((160, 120))
        (folder / kind).mkdir()
        for i in range(5):
            whole.crop((4 * i, 3 * i, 130 + 4 * i, 100 + 3 * i)).resize((80 - 4 * i, 60)).save(
                folder / kind / f"{i}.jpg"
            )
    (folder / "chelsea" / "copy.jpg").write_bytes((folder / "chelsea" / "0.jpg").read_bytes())
    outside = tmp_path_factory.mktemp("outside") / "secret.jpg"
    Image.fromarray(np.full((32, 32, 3), 7, np.uint8)).save(outside)
    os.symlink(outside, folder / "rocket" / "link.jpg")
    return folder


@pytest.fixture(scope="session")
def model() -> FrozenModel:
    net = dinov3.load()
    return FrozenModel(net, default_preprocessing(net, size=64))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, images: Path, model: FrozenModel) -> Path:
    uri = tmp_path_factory.mktemp("stores") / "store"
    embed_source(model.net, open_source(images), uri, preprocessing=model.preprocessing)
    with EmbeddingStore.open(uri) as opened:
        opened.add_column("kind", {path: Path(path).parent.name for path in opened.known()})
    return uri


@pytest.fixture(scope="session")
def source(store: Path) -> Source:
    return Source.open(store)


@pytest.fixture(scope="session")
def client(source: Source, model: FrozenModel) -> Iterator[TestClient]:
    app = application(source, model, limits=Limits(megabytes=1, megapixels=1))
    with TestClient(app, base_url="http://localhost") as client:
        yield client
