"""What a store holds: its facts, its rows, and both as Arrow writes them.

Shapes: D width of the vector, h × w grid of patches, P width of a patch's features, N rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dinov3.config.bounds import check
from dinov3.embedding.place import IMAGES, TOO_OLD
from dinov3.errors import StoreError

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 2
FACTS_KEY = b"dinov3.store"  # in the table's schema metadata: schema version and StoreFacts as JSON
ROOT_KEY = b"dinov3.root"  # in the metadata of the column `path`: the folder that relative paths start from
CHECKSUM_KEY = b"dinov3.checksum"  # of either of them, beside it
SOURCES_KEY = (
    b"dinov3.sources"  # beside the root, as JSON: the folders that were embedded, below the root relative to it
)
SOURCES_CHECKSUM_KEY = b"dinov3.sources.checksum"
PatchPrecision = Literal["none", "float16", "float32", "int8"]
_ALL_PATCH_COLUMNS = ("patches", "grid_h", "grid_w", "patches_scale")


@dataclass(frozen=True)
class StoreFacts:
    """What is true of every row of a store.

    `model` is an id that changes with the weights' content; `model_name` and `weights` are what loads the model again
    for a search (they may change without making the store another one), as `preprocessing_json` rebuilds the transform.
    """

    model: str  # "dinov3_vits16_lvd1689m@<fingerprint>"
    dim: int = field(metadata={"at_least": 1})  # D
    preprocessing: str  # short id
    preprocessing_json: str = "{}"
    model_name: str = ""
    weights: str = ""
    pooling: str = "cls"
    layer: int = -1
    normed: bool = True
    vector_dtype: Literal["float32", "float16"] = "float32"
    patches: PatchPrecision = "none"
    patch_dim: int = 0  # width of the patches where the vector is wider (cls and mean side by side); 0: as the vector

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_dim", self.patch_dim or self.dim)
        check(self, "store", StoreError)


@dataclass(frozen=True)
class Row:
    """One embedded image; the store adds model and preprocessing, which are the same for all."""

    path: str
    content_hash: str  # sha256 of the image's bytes, hex
    stamp: str  # the source's cheap change detector, e.g. size and time of modification
    width: int  # original upright pixels
    height: int
    vector: np.ndarray  # [D]
    patches: np.ndarray | None = None  # [h, w, P], exactly where the store keeps patches


@dataclass(frozen=True)
class Failure:
    """One image that could not be embedded; stored so that the next run need not try it again."""

    path: str
    stamp: str
    reason: str


@lru_cache(maxsize=16)  # every batch needs it
def arrow_schema(facts: StoreFacts, root: str = "") -> pa.Schema:
    """The columns of the store's own; `root` is the folder that relative paths start from."""
    import pyarrow as pa

    number = {"float16": pa.float16(), "float32": pa.float32()}[facts.vector_dtype]
    types: dict[str, Any] = {
        "path": pa.string(),
        "content_hash": pa.string(),
        "stamp": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "model": pa.string(),
        "preprocessing": pa.string(),
        "id": pa.int64(),  # random; stays when an image is renamed
        "checksum": pa.int64(),  # see `checksums`
        "vector": pa.list_(number, facts.dim),
        "patches": pa.large_binary(),  # [h, w, P] little-endian; h and w differ from image to image
        "grid_h": pa.int32(),
        "grid_w": pa.int32(),
        "patches_scale": pa.float32(),  # int8 only: value = number · scale
    }
    names = [name for name in types if name not in _ALL_PATCH_COLUMNS or name in patch_columns(facts)]
    about = json.dumps({"schema_version": SCHEMA_VERSION, **dataclasses.asdict(facts)}).encode()
    on_path = {"metadata": root_metadata(root)}
    fields = [pa.field(n, types[n], nullable=False, **(on_path if n == "path" else {})) for n in names]
    return pa.schema(fields, metadata=_with_checksum(FACTS_KEY, about))


def root_metadata(root: str) -> dict[bytes, bytes]:
    """What the column `path` says about the root."""
    return _with_checksum(ROOT_KEY, root.encode())


def root_of(schema: pa.Schema, uri: str) -> str:
    """The folder that relative paths of a store start from, "" if there is none."""
    return _checked(schema.field("path").metadata or {}, ROOT_KEY, uri).decode()


def sources_metadata(sources: Sequence[str]) -> dict[bytes, bytes]:
    """What the column `path` says about the sources."""
    return _with_checksum(SOURCES_KEY, json.dumps(sources).encode(), SOURCES_CHECKSUM_KEY)


def sources_of(schema: pa.Schema, uri: str) -> list[str]:
    """The folders that were embedded into a store, as they are stored; none where the store does not say."""
    metadata = schema.field("path").metadata or {}
    return json.loads(_checked(metadata, SOURCES_KEY, uri, SOURCES_CHECKSUM_KEY)) if SOURCES_KEY in metadata else []


def _with_checksum(key: bytes, value: bytes, checksum_key: bytes = CHECKSUM_KEY) -> dict[bytes, bytes]:
    return {key: value, checksum_key: str(_signed64(value)).encode()}


def _checked(metadata: Mapping[bytes, bytes], key: bytes, uri: str, checksum_key: bytes = CHECKSUM_KEY) -> bytes:
    value = metadata.get(key, b"")
    if metadata.get(checksum_key) != str(_signed64(value)).encode():
        raise StoreError(f"the store at {uri} is damaged: its metadata {key.decode()} is not what was written")
    return value


def new_id() -> int:
    return secrets.randbits(63)


def path_checksum(path: str) -> int:
    """64 bits of a path as it is stored, signed."""
    return _signed64(path.encode())


def _signed64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def checksums(table: pa.Table, facts: StoreFacts) -> Iterator[int]:
    """The checksum of each row: of its content hash, size, vector and patches, exclusive-or that of its path.

    So a renamed image needs no second look at its vector: the old path's checksum is taken out, the new one's put in.
    """
    vectors = as_matrix(table["vector"], facts.dim)  # [N, D]; float16 → float32 is exact
    names = ["path", "content_hash", "width", "height", *patch_columns(facts)]
    for row, vector in zip(table.select(names).to_pylist(), vectors):
        patches, path = row.pop("patches", b""), row.pop("path")
        yield _signed64(json.dumps(row).encode() + vector.tobytes() + patches) ^ path_checksum(path)


def failed_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([pa.field(field.name, pa.string(), nullable=False) for field in dataclasses.fields(Failure)])


def patch_columns(facts: StoreFacts) -> tuple[str, ...]:
    return {"none": (), "int8": _ALL_PATCH_COLUMNS}.get(facts.patches, _ALL_PATCH_COLUMNS[:3])


def facts_of(schema: pa.Schema, uri: str) -> StoreFacts:
    written = (schema.metadata or {}).get(FACTS_KEY)
    if written is None:
        raise StoreError(f"the database at {uri} was not made by dinov3: its table {IMAGES!r} has no metadata of ours")
    try:
        about = json.loads(written)
        version = int(about.pop("schema_version"))
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"the store at {uri} has schema version {version}, made by a newer dinov3; "
                f"this one reads up to {SCHEMA_VERSION}: upgrade it"
            )
        if version < SCHEMA_VERSION:
            raise StoreError(
                f"the store at {uri} has schema version {version}, without checksums and a root, {TOO_OLD}"
            )
        _checked(schema.metadata, FACTS_KEY, uri)
        facts = StoreFacts(**about)
        lost = [field.name for field in arrow_schema(facts) if field.name not in schema.names]
        if lost:
            raise StoreError(f"the store at {uri} is damaged: its column {lost[0]!r} is lost")
        return facts
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"the store at {uri} is damaged: its metadata cannot be read ({error})") from error


def encode_patches(row: Row, facts: StoreFacts) -> dict[str, Any]:
    if facts.patches == "none":
        if row.patches is not None:
            raise StoreError(f"patches came with {row.path!r}, but the store was created without them")
        return {}
    shape = np.shape(row.patches) if row.patches is not None else None
    if shape is None or len(shape) != 3 or shape[2] != facts.patch_dim:
        raise StoreError(f"the patches of {row.path!r} have shape {shape}, expected (h, w, {facts.patch_dim})")
    values = np.asarray(row.patches, dtype=np.float32)
    if not np.isfinite(values).all():
        raise StoreError(f"the patches of {row.path!r} hold an infinite number or one that is none")
    scale = 1.0
    if facts.patches == "int8":
        scale = float(np.abs(values).max(initial=0.0)) / 127 or 1.0
        stored = np.rint(values / scale).astype(np.int8)
    else:
        with np.errstate(over="ignore"):
            stored = values.astype({"float16": "<f2", "float32": "<f4"}[facts.patches])
        if not np.isfinite(stored).all():
            raise StoreError(f"the patches of {row.path!r} are too large for {facts.patches}")
    return {"patches": stored.tobytes(), "grid_h": shape[0], "grid_w": shape[1], "patches_scale": scale}


def decode_patches(row: Mapping[str, Any], facts: StoreFacts) -> np.ndarray:
    kind = {"float16": "<f2", "float32": "<f4", "int8": "i1"}[facts.patches]
    stored = np.frombuffer(row["patches"], dtype=kind).astype(np.float32)
    return stored.reshape(row["grid_h"], row["grid_w"], facts.patch_dim) * np.float32(row.get("patches_scale", 1.0))


def as_matrix(column: Any, dim: int) -> np.ndarray:
    """An Arrow column of vectors as float32 [N, D]."""
    flat = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return (np.concatenate(flat) if flat else np.empty(0)).astype(np.float32, copy=False).reshape(-1, dim)
