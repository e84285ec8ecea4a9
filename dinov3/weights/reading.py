"""Opening weights: any published form, from anywhere, recognised by content; and building a model with them.

`open` takes a path of any name, a folder of transformers or timm, our own checkpoint, a URL or a Hugging Face id, and
gives one thing: a state dict in Meta's names with the configuration it was made for. The file's name never decides
what it is (magic bytes and keys do); it is used only as a hint about the training data when two published files have
the same shapes. Pickles are read with `weights_only=True` and refused if that does not suffice.

Left out: heads (their files are opened by the hub's head functions through `read`), translation itself (`formats`),
downloads (`cache`), distributed training checkpoints.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from dinov3.errors import UnsafeFile, WeightsError, did_you_mean, require, without_secrets
from dinov3.files import nonexistent
from dinov3.models import low_precision
from dinov3.models.architectures import BackboneConfig
from dinov3.weights import configs, formats
from dinov3.weights import download as cache
from dinov3.weights.catalog import ACCESS, LICENCES, ROWS, Row, aliases
from dinov3.weights.identity import main_hash

RESIDUE_FILE = "dinov3_residue.safetensors"
MAIN_HASH = "dinov3_main"  # metadata key of a residue: what it belongs to
OURS = "dinov3"  # metadata key of our own checkpoints: JSON
OWN_HEAD = "dinov3_head"  # the same of a head that `dinov3 train-head` wrote

Triple = tuple[float, float, float]

# Bounds of what a file may ask for, so that a small one can neither hang nor fill the memory.
MOST_HEADER_BYTES = 100_000_000  # of safetensors, as the library has it
MOST_LAYERS, MOST_WIDTH = 1000, 1 << 20  # of a head, where its metadata states them
MOST_NAME = 1000  # characters of a tensor's name
MOST_ENTRIES = 200_000  # of nested dictionaries; the largest training checkpoints have some thousand
LARGEST = 1.25 * max(row.parameters for row in ROWS)  # values, where they are more than the file's bytes
# What a malformed file makes torch and Python raise, where it is read and where a model is built from it.
NONSENSE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass
class OpenedWeights:
    """A readable file of weights, whatever form it came in."""

    state_dict: dict[str, Tensor] = field(repr=False)  # Meta's names
    form: formats.Form  # how it was written
    config: BackboneConfig
    rows: tuple[Row, ...]  # catalogue rows it may be; several if the content cannot tell, () if it is none of them
    source: str  # as given
    path: Path  # the file, or the folder
    metadata: dict[str, Any] = field(default_factory=dict, repr=False)  # of our own checkpoints, else safetensors'
    mean: Triple | None = None  # input statistics that the source itself states, RGB in [0, 1]
    std: Triple | None = None
    licence: str = ""  # as the source states it, else that of the catalogue's file; "" if nothing tells
    notes: list[str] = field(default_factory=list)  # what a careful person would want to know, a sentence each


# ---- opening -------------------------------------------------------------------------------------------------------


def open(
    source: str | os.PathLike[str],
    *,
    check_hash: bool = False,
    sha256: str | None = None,
    periods: formats.Periods = "source",
    progress: cache.Progress | None = None,
) -> OpenedWeights:
    """Opens backbone weights from anywhere.

    source: a file of any name (.pth, .safetensors, .bin; the content decides), a folder of transformers or timm, an
    http(s):// or file:// URL, or a Hugging Face id `org/name[@revision]`.
    check_hash: compare the file's sha256 with the 8 digits in its name; `sha256`: with this one (or a prefix of it).
    periods: rope periods "source" (what the file holds, else what its library computes), "exact" or "bf16".

    Tensors are memory-mapped where the file allows. Raises `WeightsError` (missing, damaged, not a DINOv3 backbone),
    `UnsafeFile` (a pickle that needs to run code), `MissingExtra` (a Hugging Face id without huggingface_hub).
    """
    source = os.fspath(source)
    path, files, raw, metadata = read_all(source, check_hash=check_hash, sha256=sha256, progress=progress)
    try:
        if OWN_HEAD in metadata:
            raise WeightsError(
                "the file holds only a head of your own, no backbone: name it with --head, or hub.own_heads.load_head"
            )
        shaped = low_precision.shapes(raw)
        detected = formats.detect(shaped)
        opened = _understand(shaped, detected, metadata, source, path, files, periods)
        if low_precision.is_quantised(raw):
            opened.state_dict = low_precision.with_parts(opened.state_dict, raw)
        check_finite(opened.state_dict)
    except WeightsError as error:
        raise type(error)(f"{without_secrets(source)}: {error}") from None
    except NONSENSE as error:
        raise WeightsError(f"{source}: its tensors or its configuration make no sense ({first_line(error)})") from error
    return opened


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises `WeightsError` for the first tensor with NaN or infinity: every output would be wrong without a word."""
    for name, value in tensors.items():
        if value.is_floating_point() and not _finite(value):
            raise WeightsError(f"{name} holds NaN or infinity: the file is damaged, or its training diverged")


def _finite(value: Tensor) -> bool:
    if 0 in value.stride() and value.numel():  # one value in the place of many
        value = value[tuple(slice(0, 1) if step == 0 else slice(None) for step in value.stride())]
    value = value.float() if value.element_size() == 1 else value
    # a sum reads the values once and makes no copy; where it overflows, the values are looked at one by one
    return bool(value.sum(dtype=torch.float64 if value.dtype == torch.float64 else torch.float32).isfinite()) or bool(
        value.isfinite().all()
    )


def first_line(error: BaseException) -> str:
    """The kind of an error and the first 120 characters of what it says."""
    text = (str(error).splitlines() or [""])[0][:120]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def read_all(
    source: str | os.PathLike[str],
    *,
    check_hash: bool = False,
    sha256: str | None = None,
    progress: cache.Progress | None = None,
) -> tuple[Path, list[Path], dict[str, Tensor], dict[str, Any]]:
    """(file or folder, the files read, all their tensors, their metadata) of a source, whatever model it is of."""
    source = os.fspath(source)
    path = locate(source, check_hash=check_hash, sha256=sha256, progress=progress)
    if path.is_dir():
        files = _files_of(path)
        if (check_hash or sha256) and len(files) == 1:
            cache.check(cache.sha256_of(files[0]), files[0].name, check_hash=check_hash, sha256=sha256)
        elif check_hash or sha256:
            raise WeightsError(f"{path} holds {len(files)} shards; a hash can be compared with one file only")
    else:
        files = [path]
    raw: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for file in files:
        try:
            tensors, meta = read(file)
        except WeightsError as error:  # a cached file is named by its content: say the URL instead
            raise type(error)(
                str(error).replace(str(file), without_secrets(source)) if "://" in source else str(error)
            ) from None
        if any(len(name) > MOST_NAME for name in tensors):
            raise WeightsError(f"{without_secrets(source)}: the name of a tensor has more than {MOST_NAME} characters")
        raw |= tensors
        metadata |= meta
    return path, files, raw, metadata


def _understand(
    raw: dict[str, Tensor],
    detected: formats.Detected,
    metadata: dict[str, Any],
    source: str,
    path: Path,
    files: list[Path],
    periods: formats.Periods,
) -> OpenedWeights:
    ours = _dictionary(json.loads(metadata[OURS]), f"the metadata {OURS!r}") if OURS in metadata else {}
    beside = path if path.is_dir() else path.parent
    # A folder's config.json describes its model; beside a lone file of Meta's form it may belong to anything.
    config_json = _json(beside / "config.json") if path.is_dir() or detected.form != "meta" else {}
    if config_json.get("model_type") == "chmv2":  # transformers' canopy model, of which the backbone is a part
        config_json = config_json.get("backbone_config") or {}
    hints = dict(ours.get("config", {})) or configs.config_from_json(config_json)
    notes: list[str] = []
    if config_json and not configs.is_dinov3_json(config_json) and path.is_dir():
        notes.append(f"config.json describes a {config_json.get('model_type', 'model of another kind')}; left aside")
        config_json = {}

    state, more = formats.to_meta(raw, detected, hints=hints, periods=periods)
    notes += more
    residue = beside / RESIDUE_FILE
    if residue.is_file() and residue not in files and detected.form != "meta":
        tensors, about = read(residue)
        if about.get(MAIN_HASH) == main_hash(raw):
            state |= {k: v for k, v in tensors.items() if periods == "source" or k != "rope_embed.periods"}
            notes.append(f"{RESIDUE_FILE} put back what {detected.form} files cannot hold")
        else:
            notes.append(f"{RESIDUE_FILE} beside the file belongs to other weights; left aside")
    config = configs.infer_config(state, hints)
    rows = configs.fitting_rows(config, detected.form)
    mean, std = (
        _statistics(beside, config_json, ours) if path.is_dir() or detected.form != "meta" or ours else (None,) * 2
    )
    if len(rows) > 1:
        close = "/".join(Path(source).parts[-2:])  # folders further up may be called after anything
        names = [close, *(file.name for file in (path, *files)), json.dumps(config_json)]  # with its "_name_or_path"
        rows = _which(
            rows,
            state,
            files,
            mean,
            [*names, str(ours.get("row", ""))],
            lone=detected.form == "meta" and path.is_file(),
        )
    stated = ours.get("licence") or (config_json.get("pretrained_cfg") or {}).get("license") or metadata.get("license")
    published = rows[0].licence if rows and (not ours or "quantised" in ours) else None  # not what was trained here
    if published is None or stated not in (None, published.slug):
        published = next((licence for licence in LICENCES.values() if licence.slug == stated), None)
    if rows and detected.form != "meta":
        state = formats.complete(state, rows[0].config)
        config = configs.infer_config(state, hints)
    return OpenedWeights(
        state_dict=state,
        form=detected.form,
        config=config,
        rows=rows,
        source=source,
        path=path,
        metadata=ours or metadata,
        mean=mean,
        std=std,
        licence=str(published or stated or ""),
        notes=notes,
    )


def _which(
    rows: tuple[Row, ...],
    state: Mapping[str, Tensor],
    files: list[Path],
    mean: Triple | None,
    names: Iterable[str],
    *,
    lone: bool,
) -> tuple[Row, ...]:
    """Which of several published files of one architecture this is; all of Meta's if nothing tells."""
    text = " ".join(names).lower()
    by_hash = tuple(r for r in rows if r.hash and f"-{r.hash}." in text)
    if named := tuple(r for r in rows if r.known_by_name and r.dataset in text and not by_hash):
        return named
    rows = tuple(r for r in rows if not r.known_by_name)
    if "local_cls_norm.weight" in state:  # L has it only when trained on satellite images
        rows = tuple(r for r in rows if getattr(r.config, "untie_global_and_local_cls_norm", False)) or rows
    by_name = tuple(r for r in rows if r.dataset in text)
    by_mean = tuple(r for r in rows if mean and _near(mean, r.mean))
    if len(rows) > 1 and len(by_hash) != 1 and lone:  # Meta's file under another name: read it all
        digest = cache.sha256_of(files[0])
        by_hash = tuple(r for r in rows if r.hash and digest.startswith(r.hash))
    if len(by_hash) == 1:
        return by_hash
    # A processor saved without thought says ImageNet's mean, so only the satellite one outweighs a name.
    if by_mean and by_mean[0].dataset == "sat493m":
        return by_mean
    for candidates in (by_name, by_mean):
        if len(candidates) == 1:
            return candidates
    return rows


def _near(a: Iterable[float], b: Iterable[float]) -> bool:
    return all(abs(x - y) < 2e-3 for x, y in zip(a, b))


def _statistics(folder: Path, config_json: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[Any, Any]:
    """(mean, std) that the source states: our metadata, preprocessor_config.json, timm's pretrained_cfg."""
    processor = _json(folder / "preprocessor_config.json")
    for holder, keys in (
        (ours, ("mean", "std")),
        (processor, ("image_mean", "image_std")),
        (config_json.get("pretrained_cfg") or {}, ("mean", "std")),
    ):
        mean, std = (holder.get(k) for k in keys)
        if isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3:
            return tuple(map(float, mean)), tuple(map(float, std))
    return None, None


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_HEADER_BYTES:
            raise WeightsError(f"{path.name} has {path.stat().st_size:,} bytes: that is no configuration")
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path.name} cannot be read: {error}") from None
    return _dictionary(value, path.name)


def _dictionary(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise WeightsError(f"{what} is a {type(value).__name__} where names with values were expected")
    return value


# ---- where it is ---------------------------------------------------------------------------------------------------

_HF_ID = re.compile(r"(?:hf-hub:|hf_hub:|hf://)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_ENDINGS = (".pth", ".pt", ".safetensors", ".bin", ".ckpt")


def locate(
    source: str | os.PathLike[str],
    *,
    check_hash: bool = False,
    sha256: str | None = None,
    progress: cache.Progress | None = None,
) -> Path:
    """The local file or folder of a path, URL or Hugging Face id, fetched if need be."""
    source = os.fspath(source)
    if urlsplit(source).scheme in ("http", "https", "file"):
        return cache.fetch(source, check_hash=check_hash, sha256=sha256, progress=progress)
    path = Path(source).expanduser()
    if path.is_file():
        if check_hash or sha256:
            cache.check(cache.sha256_of(path), path.name, check_hash=check_hash, sha256=sha256)
        return path
    if path.is_dir():
        return newest_teacher(path) or path
    match = _HF_ID.fullmatch(source)
    if match and not source.endswith(_ENDINGS) and not source.startswith((".", "~", "/")):
        return _from_hub(match[1], match[2])
    known = aliases()
    if source.lower() in known:
        row = known[source.lower()][0]
        if row.packaged_path is not None:
            return locate(row.packaged_path, check_hash=check_hash, sha256=sha256)
        raise WeightsError(f"{source!r} names a model, not a file: pass a path, a URL, or {row.hf or row.file!r}")
    raise WeightsError(f"no URL, no Hugging Face id, and {nonexistent(source, known)}")


def newest_teacher(run: Path) -> Path | None:
    """The newest network that a run of `train`, `distill` or `train-head` has written; None where the folder is no run's."""
    dumps = {p.parent.name.removeprefix("training_"): p for p in run.glob("eval/training_*/backbone.safetensors")}
    numbers = [int(number) for number in dumps if number.isdecimal()]
    if numbers:
        return dumps[str(max(numbers))]
    if (run / "student.safetensors").is_file():
        return run / "student.safetensors"
    if any(p.parent.name.isdecimal() for p in run.glob("ckpt/*/.metadata")):
        if (run / "backbone.safetensors").is_file():  # tuned with a head
            return run / "backbone.safetensors"
        if (run / "head.safetensors").is_file():
            raise WeightsError(
                f"{run} holds a head on a backbone that stayed as it was: name that one, and the head as --head {run}"
            )
        raise WeightsError(
            f"{run} is a run that has not written its teacher yet; this makes a file of its newest checkpoint: "
            f"python -m dinov3.train.teacher_files {run} teacher.safetensors"
        )
    return None


_FROM_HUB = ["config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json"]
_FROM_HUB += [RESIDUE_FILE, "LICENSE*", "NOTICE*"]


def _from_hub(repository: str, revision: str | None) -> Path:
    """The snapshot folder of a Hugging Face repository, through its own client and cache (HF_ENDPOINT, HF_HUB_OFFLINE
    and tokens are the client's business)."""
    hub = require("huggingface_hub", "hub", f"loading {repository} from Hugging Face")
    from huggingface_hub import errors

    at = repository + (f"@{revision}" if revision else "")
    page = f"https://huggingface.co/{repository}"
    otherwise = f". {ACCESS}" if repository.startswith("facebook/dinov3") else "; a downloaded file's path works too"

    def snapshot(patterns: list[str]) -> Path:
        try:
            return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
        except errors.GatedRepoError:
            raise WeightsError(
                f"{at} is gated: accept its terms at {page}, then run `hf auth login` (or set HF_TOKEN){otherwise}"
            ) from None
        except errors.RevisionNotFoundError:
            raise WeightsError(f"{repository} has no revision {revision!r} on Hugging Face") from None
        except errors.RepositoryNotFoundError:
            raise WeightsError(
                f"Hugging Face knows no {at}, or shows it only after `hf auth login`; check the name at {page}"
                f"{did_you_mean(repository, aliases())}"
            ) from None
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
            why = (
                "HF_HUB_OFFLINE is set"
                if getattr(hub.constants, "HF_HUB_OFFLINE", False)
                else "the hub is out of reach"
            )
            raise WeightsError(
                f"{at} is not in the local Hugging Face cache and {why}: go online once{otherwise}"
            ) from None
        except errors.HfHubHTTPError as error:
            code = getattr(error.response, "status_code", "?")
            if code in (401, 403):
                raise WeightsError(
                    f"Hugging Face refuses {at} (HTTP {code}): accept the terms at {page} and run `hf auth login`{otherwise}"
                ) from None
            raise WeightsError(f"Hugging Face answered HTTP {code} for {at}; try again later") from None
        except errors.HFValidationError as error:
            raise WeightsError(f"{at!r} is no Hugging Face id: {error}") from None

    folder = snapshot(_FROM_HUB)
    if not any(folder.glob("model*.safetensors")):
        folder = snapshot([*_FROM_HUB, "pytorch_model*", "*.pth", "*.pt"])
    return folder


def _files_of(folder: Path) -> list[Path]:
    """The weight files of a folder: the shards of an index, the file of a usual name, or the one file."""
    # the last: a dump of a training run
    for stem in ("model.safetensors", "pytorch_model.bin", "backbone.safetensors"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            names = _dictionary(_json(index).get("weight_map", {}), f"weight_map of {index.name}").values()
            for name in names:
                if not isinstance(name, str) or Path(name).name != name or name == ".." or len(name) > 250:
                    raise WeightsError(f"{index}: shard {name!r:.100} is no name of a file in this folder")
            shards = sorted(set(names))
            missing = [s for s in shards if not (folder / s).is_file()]
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise WeightsError(f"{folder}: shard {missing[0]}{more} of {len(shards)} is missing; fetch it again")
            if shards:
                return [folder / s for s in shards]
        if (folder / stem).is_file():
            return [folder / stem]
    others = sorted(p for p in folder.iterdir() if p.suffix in _ENDINGS and p.name != RESIDUE_FILE)
    if len(others) == 1:
        return others
    if (folder / ".metadata").is_file():
        raise WeightsError(f"{folder} is a distributed training checkpoint; pass the teacher exported from it")
    if others:
        shown = ", ".join(p.name for p in others[:4]) + (", …" if len(others) > 4 else "")
        raise WeightsError(f"{folder} holds {len(others)} files of weights ({shown}); pass the one you mean")
    if (folder / "dinov3.json").is_file():
        raise WeightsError(f"{folder} is an exported model for another runtime: name the weights that it was made of")
    raise WeightsError(f"{folder} holds no weights (no model.safetensors, pytorch_model.bin or .pth)")


# ---- reading one file ----------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of one file, nested dicts flattened to dotted keys, and the file's metadata. What kind of file it is
    is decided by its first bytes. Raises `WeightsError` or `UnsafeFile` with one sentence."""
    path = Path(path)
    size = path.stat().st_size
    if size == 0:
        raise WeightsError(f"{path} is empty")
    with path.open("rb") as file:
        start = file.read(512)
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(f"{path} is a web page, not weights: the download was answered with a page (log in first?)")
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull`")
    if len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= MOST_HEADER_BYTES:
        return _read_safetensors(path, size)
    if start.startswith(b"PK\x03\x04"):
        return _flat(_read_zip(path, size), path, size), {}
    if start[:1] == b"\x80" and len(start) > 1 and start[1] <= 5:  # a pickle's protocol mark
        return _flat(_read_pickle(path, mmap=False), path, size), {}
    what = "a GGUF file" if start.startswith(b"GGUF") else "no checkpoint (neither safetensors nor a torch file)"
    raise WeightsError(f"{path} is {what}; it starts with {start[:8]!r}")


def _read_safetensors(path: Path, size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with path.open("rb") as file:
        header_bytes = struct.unpack("<Q", file.read(8))[0]
        header_text = file.read(header_bytes)
    try:
        header = json.loads(header_text)
        whole = (
            8 + header_bytes + max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
        )
        metadata = dict(header.get("__metadata__") or {})
    except NONSENSE:
        short = len(header_text) < header_bytes
        raise WeightsError(f"{path} is {'truncated' if short else 'damaged'} (its safetensors header)") from None
    if size != whole:
        state = "truncated" if size < whole else "damaged"
        raise WeightsError(f"{path} is {state}: it has {size} bytes, its header promises {whole}; fetch it again")
    # imported here: Meta's .pth files load with torch alone
    safetensors = require("safetensors.torch", "hub", f"reading {path}")
    from safetensors import SafetensorError

    try:
        return safetensors.load_file(path), metadata
    except (SafetensorError, *NONSENSE) as error:
        raise WeightsError(f"{path} is damaged: {first_line(error)}") from None


def _read_zip(path: Path, size: int) -> Any:
    if not zipfile.is_zipfile(path):  # the directory of a zip is at its end
        raise WeightsError(f"{path} is truncated (a torch file without its end); fetch it again")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, *NONSENSE) as error:
        raise WeightsError(f"{path} is damaged ({first_line(error)}); fetch it again") from None
    names = [entry.filename for entry in entries]
    if not any(n.endswith("/data.pkl") for n in names):
        raise WeightsError(f"{path} is a zip archive without a checkpoint in it (it holds {', '.join(names[:3])}, …)")
    if any(n.endswith("/constants.pkl") for n in names):
        raise WeightsError(f"{path} is a TorchScript program, not a file of weights: save its state_dict() instead")
    if (unpacked := sum(entry.file_size for entry in entries)) > size:  # torch never compresses
        raise WeightsError(f"{path} unpacks to {unpacked:,} bytes from {size:,}: torch.save does not write such a file")
    return _read_pickle(path, mmap=True)


def _read_pickle(path: Path, *, mmap: bool) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols, with a request to report to torch
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        message = str(error)
        found = (re.search(p, message) for p in (r"GLOBAL ([\w.]+)", r"[Uu]nsupported (?:class|global)[: ]+`?([\w.]+)"))
        culprit = next((m[1].rstrip(".") for m in found if m), None)
        if culprit or "weights_only" in message.lower():
            raise UnsafeFile(
                f"{path} is a pickle that wants to run {culprit or 'code'}; it was not opened. "
                "Ask its author for the bare state_dict or a safetensors file"
            ) from None
        raise WeightsError(f"{path} is no torch checkpoint: {message.splitlines()[0][:120]}") from None
    except (*NONSENSE, EOFError, struct.error, OSError) as error:
        raise WeightsError(f"{path} is truncated or damaged ({first_line(error)}); fetch it again") from None


def _flat(value: Any, path: Path, size: int) -> dict[str, Tensor]:
    """Tensors of nested dicts under dotted keys: `{"teacher": {"backbone.x": t}}` → `{"teacher.backbone.x": t}`.

    Raises for dictionaries that hold each other without end, and for views of more values than the file has bytes.
    """
    flat: dict[str, Tensor] = {}
    entries, stack = 0, [("", value)]
    while stack:
        prefix, inner = stack.pop()
        if isinstance(inner, Tensor):
            flat[prefix] = inner
        elif isinstance(inner, Mapping):
            entries += len(inner)
            if entries > MOST_ENTRIES or len(prefix) > MOST_NAME:
                raise WeightsError(f"{path} holds dictionaries in dictionaries without end: it is no file of weights")
            stack += [(f"{prefix}.{k}" if prefix else str(k), v) for k, v in reversed(list(inner.items()))]
    values = sum(tensor.numel() for tensor in flat.values())
    if values > max(size, LARGEST):
        raise WeightsError(f"{path} stands for {values:,} values in {size:,} bytes: it is no file of weights")
    return flat
