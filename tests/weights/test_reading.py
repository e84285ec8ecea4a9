"""Opening weights of every form and every kind of damage, building models, saying what does not fit."""

from __future__ import annotations

import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file, save_file

from dinov3.errors import MissingExtra, UnsafeFile, WeightsError, WeightsMismatch
from dinov3.models.architectures import ViTConfig
from dinov3.models.build import backbone
from dinov3.weights import catalog, configs, download, filling, formats, identity, reading, writing
from tests.weights.test_download import Server
from tests.weights.test_formats import HUB, TINY, filled, images, same


def plain(state) -> dict[str, torch.Tensor]:
    """Without the second name of a tensor, which safetensors refuses."""
    return {k: v.contiguous().clone() for k, v in state.items() if not k.startswith("norms.")}


def write_transformers(folder: Path, config, state, **about) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    out, _ = formats.from_meta(state, "transformers", config)
    save_file(plain(out), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(configs.transformers_config(config) | about))
    return folder


# ---- forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_every_kind_of_file_opens_to_the_same_state_and_fingerprint(name, tmp_path):
    config = TINY[name]
    model = filled(config)
    state = dict(model.state_dict())
    torch.save(state, tmp_path / "a.pth")
    torch.save(state, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items()}, "iteration": 3}, tmp_path / "training.ckpt")
    save_file(plain(state), tmp_path / "anything.bin")
    writing.save(model, tmp_path / "ours.safetensors", {"row": "none", "step": 7})
    for file in ("a.pth", "legacy", "training.ckpt", "anything.bin", "ours.safetensors"):
        opened = reading.open(tmp_path / file)
        assert opened.form == "meta"
        assert same(opened.state_dict, state), file
        assert configs.signature(opened.config) == configs.signature(config)
        assert identity.fingerprint(opened.state_dict) == identity.fingerprint(model)
    assert reading.open(tmp_path / "ours.safetensors").metadata["step"] == 7
    assert reading.open(tmp_path / "ours.safetensors").config == config

    folder = write_transformers(tmp_path / "tf", config, state)
    for source in (folder, folder / "model.safetensors"):
        opened = reading.open(source)
        assert opened.form == "transformers"
        assert identity.fingerprint(opened.state_dict) == identity.fingerprint(model)
    out, _ = formats.from_meta(state, "timm", config)
    save_file(plain(out), tmp_path / "timm.safetensors")
    assert reading.open(tmp_path / "timm.safetensors").form == "timm"


@pytest.mark.parametrize("name", TINY)
def test_a_built_model_is_equal_strict_and_in_eval_mode(name, tmp_path):
    model, x = filled(TINY[name]), images(64, 64)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    opened = reading.open(tmp_path / "w.pth")
    built = filling.build(opened.config, opened)
    assert not built.training
    assert all(p.requires_grad for p in built.parameters())
    with torch.no_grad():
        assert torch.equal(built(x), model(x))
    if name == "convnext":
        assert built.norms[3] is built.norm
        built.norm.weight.data.fill_(5)
        assert float(built.state_dict()["norms.3.weight"][0]) == 5


def test_low_precision_leaves_the_rope_periods_alone(tmp_path):
    model = filled(TINY["mlp"])
    torch.save(model.state_dict(), tmp_path / "w.pth")
    opened = reading.open(tmp_path / "w.pth")
    built = filling.build(opened.config, opened, dtype=torch.bfloat16)
    assert built.cls_token.dtype == torch.bfloat16
    assert torch.equal(built.rope_embed.periods, model.rope_embed.periods)
    built(images(64, 64).bfloat16())


def test_a_sharded_folder_opens_and_a_missing_shard_is_named(tmp_path):
    state = dict(filled(TINY["mlp"]).state_dict())
    folder = write_transformers(tmp_path / "tf", TINY["mlp"], state)
    tensors = load_file(folder / "model.safetensors")
    whole = reading.open(folder)
    (folder / "model.safetensors").unlink()
    keys = sorted(tensors)
    where = {}
    for i, part in enumerate((keys[:9], keys[9:])):
        save_file({k: tensors[k].clone() for k in part}, folder / f"model-{i}.safetensors")
        where |= dict.fromkeys(part, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert same(reading.open(folder).state_dict, whole.state_dict)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"shard model-1\.safetensors of 2 is missing"):
        reading.open(folder)


def test_heads_and_statistics_come_from_the_files_beside(tmp_path):
    config = ViTConfig(embed_dim=96, depth=1, num_heads=3, **HUB)  # 32 wide: not the guess
    folder = write_transformers(tmp_path / "tf", config, filled(config).state_dict())
    processor = {"image_mean": [0.43, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    opened = reading.open(folder)
    assert opened.config.num_heads == 3
    assert opened.mean == (0.43, 0.411, 0.296)
    assert opened.std == (0.213, 0.156, 0.143)


def test_an_activation_that_dinov3_lacks_is_refused(tmp_path):
    config = TINY["mlp"]
    folder = write_transformers(tmp_path / "tf", config, filled(config).state_dict(), hidden_act="relu")
    with pytest.raises(WeightsError, match="hidden_act = 'relu'"):
        reading.open(folder)


# ---- which published model -----------------------------------------------------------------------------------------


@pytest.fixture
def small_catalogue(monkeypatch):
    """The published L and 7B pairs, shrunk: L has `local_cls_norm` only when trained on satellite images."""
    rows = []
    for row in catalog.ROWS:
        if row.arch in ("dinov3_vitl16", "dinov3_vit7b16"):
            heads = 1 if row.arch == "dinov3_vitl16" else 2
            rows.append(replace(row, config=replace(row.config, embed_dim=64, depth=1, num_heads=heads)))
    monkeypatch.setattr(configs, "ROWS", tuple(rows))
    return {row.id: row for row in rows}


def test_metas_large_tells_its_dataset_by_its_keys(small_catalogue, tmp_path):
    for name in ("dinov3_vitl16_lvd1689m", "dinov3_vitl16_sat493m"):
        torch.save(filled(small_catalogue[name].config).state_dict(), tmp_path / "w.pth")
        assert [r.id for r in reading.open(tmp_path / "w.pth").rows] == [name]


@pytest.mark.parametrize("arch", ["dinov3_vitl16", "dinov3_vit7b16"])
def test_a_transformers_folder_tells_its_dataset_by_statistics_or_name(small_catalogue, tmp_path, arch):
    sat = small_catalogue[f"{arch}_sat493m"]
    state = filled(sat.config).state_dict()
    about = {"num_attention_heads": sat.config.num_heads}
    for i, (name, mean, expected) in enumerate(
        [
            ("some-sat493m", None, ["sat493m"]),
            ("some-lvd1689m", (0.485, 0.456, 0.406), ["lvd1689m"]),
            ("model", (0.43, 0.411, 0.296), ["sat493m"]),
            ("model-lvd1689m", (0.43, 0.411, 0.296), ["sat493m"]),
            ("some-sat493m", (0.485, 0.456, 0.406), ["sat493m"]),
            ("model", None, ["lvd1689m", "sat493m"]),
        ]
    ):
        folder = write_transformers(tmp_path / str(i) / name, sat.config, state, **about)
        if mean:
            text = json.dumps({"image_mean": mean, "image_std": (0.2, 0.2, 0.2)})
            (folder / "preprocessor_config.json").write_text(text)
        opened = reading.open(folder)
        assert [r.dataset for r in opened.rows] == expected, name
        for row in opened.rows:  # whichever it is, it builds: `local_cls_norm` is filled in where it is needed
            filling.build(row.config, opened)


def test_an_ambiguous_pth_is_decided_by_its_hash(small_catalogue, tmp_path, monkeypatch):
    rows = [r for r in small_catalogue.values() if r.arch == "dinov3_vit7b16"]
    torch.save(filled(rows[0].config).state_dict(), tmp_path / "w.pth")
    assert len(reading.open(tmp_path / "w.pth").rows) == 2
    assert [r.dataset for r in reading.open(tmp_path / "w.pth").rows] == ["lvd1689m", "sat493m"]
    digest = download.sha256_of(tmp_path / "w.pth")
    known = tuple(replace(r, hash=digest[:8]) if r.dataset == "sat493m" else r for r in configs.ROWS)
    monkeypatch.setattr(configs, "ROWS", known)
    assert [r.dataset for r in reading.open(tmp_path / "w.pth").rows] == ["sat493m"]


def test_timms_plain_large_gets_its_silent_biases_back(small_catalogue, tmp_path):
    row = small_catalogue["dinov3_vitl16_lvd1689m"]
    model = filled(row.config)
    for block in model.blocks:
        block.attn.qkv.bias.data.zero_()
    out, _ = formats.from_meta(model.state_dict(), "timm", row.config)
    save_file(plain(out), tmp_path / "vit_large_patch16_dinov3.lvd1689m.safetensors")
    opened = reading.open(tmp_path / "vit_large_patch16_dinov3.lvd1689m.safetensors")
    assert opened.rows == (row,)
    assert opened.config == row.config
    assert identity.fingerprint(filling.build(row.config, opened)) == identity.fingerprint(model)


# ---- damage and danger ---------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_malicious_pickle_is_named_and_never_run(tmp_path, new_format):
    mark = tmp_path / "mark"
    bad = {"cls_token": torch.zeros(1), "x": Bomb(mark)}
    torch.save(bad, tmp_path / "w.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(UnsafeFile, match=r"(posix|nt)\.system") as caught:
        reading.open(tmp_path / "w.pth")
    assert "\n" not in str(caught.value)
    (tmp_path / "bare.bin").write_bytes(pickle.dumps(bad["x"]))
    with pytest.raises(WeightsError):
        reading.open(tmp_path / "bare.bin")
    assert not mark.exists()


def test_a_whole_pickled_module_is_refused_by_name(tmp_path):
    torch.save(filled(TINY["mlp"]), tmp_path / "w.pth")
    with pytest.raises(UnsafeFile, match="VisionTransformer"):
        reading.open(tmp_path / "w.pth")


def test_every_damage_is_one_sentence(tmp_path):
    state = dict(filled(TINY["mlp"]).state_dict())
    torch.save(state, tmp_path / "good.pth")
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(plain(state), tmp_path / "good.safetensors")
    good, legacy, safe = ((tmp_path / n).read_bytes() for n in ("good.pth", "legacy.pth", "good.safetensors"))
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    cases = {
        "empty.pth": (b"", "is empty"),
        "page.pth": (b"\n<!DOCTYPE html><html></html>", "web page"),
        "denied.pth": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
        "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        "half.pth": (good[: len(good) // 2], "truncated"),
        "half_legacy.pth": (legacy[: len(legacy) // 2], "truncated"),
        "half.safetensors": (safe[: len(safe) // 2], "truncated"),
        "header.safetensors": (safe[:100], "truncated"),
        "longer.safetensors": (safe + b"x", "damaged"),
        "zip.pth": ((tmp_path / "z.zip").read_bytes(), "without a checkpoint"),
        "text.pth": (b"just some text, no weights at all", "no checkpoint"),
        "gguf.bin": (b"GGUF\x03\x00\x00\x00\x00", "GGUF"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=words) as caught:
            reading.open(tmp_path / name)
        assert "\n" not in str(caught.value), name
        assert len(str(caught.value)) < 400 + len(str(tmp_path)), name


def test_other_contents_are_named(tmp_path):
    torch.save({"weight": torch.zeros(1000, 8), "bias": torch.zeros(1000)}, tmp_path / "head.pth")
    with pytest.raises(WeightsError, match=r"head\.pth: the file holds only the ImageNet-1k linear classifier"):
        reading.open(tmp_path / "head.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(WeightsError, match="no tensors"):
        reading.open(tmp_path / "none.pth")
    torch.save(dict(list(filled(TINY["mlp"]).state_dict().items())[:5]), tmp_path / "part.pth")
    with pytest.raises(WeightsError):
        reading.open(tmp_path / "part.pth")


def test_folders_without_one_clear_file_are_explained(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(WeightsError, match="holds no weights"):
        reading.open(tmp_path / "a")
    for name in ("x.pth", "y.pth"):
        torch.save({}, tmp_path / "a" / name)
    with pytest.raises(WeightsError, match=r"2 files of weights \(x\.pth, y\.pth\)"):
        reading.open(tmp_path / "a")


def test_a_path_that_is_not_there_is_met_with_the_nearest_name(tmp_path):
    torch.save({}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=r"did you mean 'model\.pth'"):
        reading.open(tmp_path / "modle.pth")
    with pytest.raises(WeightsError, match="names a model, not a file"):
        reading.open("dinov3_vits16")


@pytest.mark.parametrize("name", ["dinov3_vitt16", "vitt16", "dinov3_vitt16.safetensors"])
def test_the_name_of_the_model_that_ships_is_its_file(name):
    assert reading.locate(name) == catalog.FILES / "dinov3_vitt16.safetensors"
    with pytest.raises(WeightsError, match=r"sha256|SHA-256|hash"):
        reading.locate(name, sha256="0" * 64)


def test_the_hash_of_a_local_file_is_checked_when_asked(tmp_path):
    torch.save(filled(TINY["mlp"]).state_dict(), tmp_path / "w-01234567.pth")
    reading.open(tmp_path / "w-01234567.pth")
    with pytest.raises(WeightsError, match="01234567 promised by its name"):
        reading.open(tmp_path / "w-01234567.pth", check_hash=True)
    digest = download.sha256_of(tmp_path / "w-01234567.pth")
    reading.open(tmp_path / "w-01234567.pth", sha256=digest)
    (tmp_path / "w-01234567.pth").rename(tmp_path / f"w-{digest[:8]}.pth")
    reading.open((tmp_path / f"w-{digest[:8]}.pth").as_uri(), check_hash=True)


def test_a_url_opens_through_the_cache_and_is_shown_without_its_signature(tmp_path, monkeypatch):
    monkeypatch.setenv("DINOV3_CACHE", str(tmp_path / "cache"))
    torch.save(filled(TINY["mlp"]).state_dict(), tmp_path / "w.pth")
    with Server() as server:
        server.files |= {"w.pth": (tmp_path / "w.pth").read_bytes(), "bad.pth": b"garbage, not weights at all"}
        opened = reading.open(server.url("w.pth?Signature=secret"))
        with pytest.raises(WeightsError, match=r"^http://127.*/bad\.pth is no checkpoint"):
            reading.open(server.url("bad.pth?Signature=secret"))
        server.shutdown()
    with pytest.raises(WeightsMismatch) as caught:
        filling.build(TINY["swiglu"], opened)
    assert "secret" not in str(caught.value)


# ---- residue -------------------------------------------------------------------------------------------------------


def test_a_residue_is_merged_only_if_it_belongs(tmp_path):
    config = TINY["mlp"]
    state = dict(filled(config, rounded_periods=True).state_dict())
    folder = write_transformers(tmp_path / "tf", config, state)
    out, residue = formats.from_meta(state, "transformers", config)
    save_file(residue, folder / reading.RESIDUE_FILE, {reading.MAIN_HASH: identity.main_hash(out)})
    assert same(reading.open(folder).state_dict, state)
    assert not torch.equal(
        reading.open(folder, periods="exact").state_dict["rope_embed.periods"], state["rope_embed.periods"]
    )
    write_transformers(folder, config, filled(config, seed=1).state_dict())
    opened = reading.open(folder)
    assert any("belongs to other weights" in note for note in opened.notes)
    assert not torch.equal(opened.state_dict["rope_embed.periods"], state["rope_embed.periods"])


# ---- mismatch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [r.arch for r in catalog.ROWS if r.dataset == "lvd1689m"])
def test_a_mismatch_is_explained_in_ten_lines(asked, tmp_path):
    row = catalog.resolve("dinov3_vits16")[0]
    model = backbone(row.config)
    model.init_weights()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    opened = reading.open(tmp_path / "w.pth")
    wanted = catalog.resolve(asked)[0]
    if wanted == row:
        filling.build(wanted.config, opened)
        return
    with pytest.raises(WeightsMismatch) as caught:
        filling.build(wanted.config, opened)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 10
    assert max(map(len, lines)) < 200 + len(str(tmp_path))
    assert "dinov3_vits16_lvd1689m" in lines[1]
    assert wanted.id in lines[2]
    assert "call dinov3_vits16 with this file" in lines[-1]


def test_a_mismatch_of_unpublished_models_says_what_would_fit(tmp_path):
    torch.save(filled(TINY["mlp"]).state_dict(), tmp_path / "w.pth")
    opened = reading.open(tmp_path / "w.pth")
    with pytest.raises(WeightsMismatch) as deeper:
        filling.build(replace(TINY["mlp"], depth=3, n_storage_tokens=0), opened)
    assert "missing in the file: blocks.2." in str(deeper.value)
    assert "not in the model: storage_tokens" in str(deeper.value)
    assert "depth=2" in str(deeper.value)
    with pytest.raises(WeightsMismatch, match=r"\(1, 1, 64\) in the file, \(1, 1, 128\) in the model"):
        filling.build(replace(TINY["mlp"], embed_dim=128), opened)


# ---- identity and saving -------------------------------------------------------------------------------------------


def test_a_fingerprint_counts_what_acts_and_nothing_else():
    model = filled(TINY["mlp"])
    before = identity.fingerprint(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert identity.fingerprint(dict(reversed(state.items()))) == before
    state["mask_token"] += 1
    state["blocks.0.attn.qkv.bias"][64:128] += 1
    state["rope_embed.periods"] = state["rope_embed.periods"].bfloat16().float()
    assert identity.fingerprint(state) == before
    for key in ("cls_token", "norm.bias", "blocks.1.mlp.fc2.weight", "blocks.0.attn.qkv.bias"):
        changed = {k: v.clone() for k, v in state.items()}
        changed[key].view(-1)[0] += 1
        assert identity.fingerprint(changed) != before, key
    assert identity.fingerprint({k: v.bfloat16() for k, v in state.items()}) != before


def test_saving_is_atomic(tmp_path, monkeypatch):
    model = filled(TINY["mlp"])
    writing.save(model, tmp_path / "w.safetensors", {"step": 1})
    before = (tmp_path / "w.safetensors").read_bytes()

    def fails(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="no space"):
        writing.save(model, tmp_path / "w.safetensors", {"step": 2})
    assert (tmp_path / "w.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


# ---- Hugging Face --------------------------------------------------------------------------------------------------


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a snapshot needs. `good/model` is there, `gated/model` is gated."""

    folder: Path
    sha = "a" * 40

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if "gated/model" in path:
            return self._reply(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
        if "good/model" not in path:
            return self._reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/"):
            if "/revision/" in path and not path.endswith(("/main", self.sha)):
                return self._reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            names = [{"rfilename": p.name, "size": p.stat().st_size} for p in self.folder.iterdir()]
            files = [{"type": "file", "path": n["rfilename"], "size": n["size"], "oid": "0" * 40} for n in names]
            about = {"id": "good/model", "sha": self.sha, "siblings": names, "private": False, "tags": []}
            return self._reply(200, json.dumps(files if "/tree/" in path else about).encode(), {})
        file = self.folder / path.rsplit("/", 1)[-1]
        if not file.is_file():
            return self._reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        self._reply(200, file.read_bytes(), {"X-Repo-Commit": self.sha, "ETag": f'"{file.name}-1"'})

    def _reply(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def test_hugging_face_ids_open_through_the_client_online_and_offline(tmp_path):
    pytest.importorskip("huggingface_hub")
    config = TINY["swiglu"]
    model = filled(config)
    write_transformers(tmp_path / "repo", config, model.state_dict())
    FakeHub.folder = tmp_path / "repo"
    script = """
import sys
from dinov3.weights import identity, reading
from dinov3.errors import DinoError
for source in sys.argv[1:]:
    try:
        print(identity.fingerprint(reading.open(source).state_dict))
    except DinoError as error:
        print("sentence:", error)
"""

    def run(offline: str, *sources: str) -> list[str]:
        env = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": offline,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        root = ROOT
        done = subprocess.run(
            [sys.executable, "-c", script, *sources], env=env, cwd=root, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        online = run("0", "good/model", "good/model@none", "gated/model", "missing/model")
        server.shutdown()
    expected = identity.fingerprint(model)
    assert online[0] == expected
    assert "no revision 'none'" in online[1]
    assert "accept its terms" in online[2]
    assert "hf auth login" in online[2]
    assert "knows no missing/model" in online[3]
    assert len(online) == 4
    offline = run("1", "good/model", "other/model")
    assert offline[0] == expected
    assert "not in the local Hugging Face cache" in offline[1]
    assert len(offline) == 2


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"pip install .*\[hub\]'"):
        reading.open("facebook/dinov3-vits16-pretrain-lvd1689m")


def test_the_run_of_a_head_on_a_frozen_backbone_holds_none(tmp_path):
    (tmp_path / "ckpt" / "9").mkdir(parents=True)
    (tmp_path / "ckpt" / "9" / ".metadata").touch()
    with pytest.raises(WeightsError, match="has not written its teacher yet"):
        reading.open(tmp_path)
    (tmp_path / "head.safetensors").touch()
    with pytest.raises(WeightsError, match=r"a head on a backbone that stayed as it was.*--head"):
        reading.open(tmp_path)
