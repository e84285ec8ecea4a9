"""Loading by name: load, the torch.hub functions, and what is said when name and file disagree."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from paths import ROOT

import dinov3
from dinov3.errors import DinoError, UnknownName, WeightsError, WeightsMismatch
from dinov3.hub import assemble
from dinov3.hub.backbones import Weights
from dinov3.weights import reading


@pytest.fixture(scope="module")
def vits(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """A ViT-S with random weights and its state dict in Meta's form, under a name that says nothing."""
    model = dinov3.load("dinov3_vits16", "random", seed=3)
    path = tmp_path_factory.mktemp("weights") / "something.bin"
    torch.save(model.state_dict(), path)
    return model, path


X = torch.linspace(-1, 1, 3 * 32 * 48).view(1, 3, 32, 48)


def test_random_weights_are_reproducible_and_leave_the_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    a, b, c = (dinov3.load("dinov3_vits16", "random", seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(a(X), b(X))
    assert not torch.equal(a(X), c(X))
    assert a.origin.random
    assert "random (seed 1)" in str(a.origin)


@torch.no_grad()
def test_a_file_is_loaded_by_name_by_alias_and_by_content_alone(vits) -> None:
    model, path = vits
    for name in ("dinov3_vits16", "facebook/dinov3-vits16-pretrain-lvd1689m", "vit_small_patch16_dinov3", None):
        loaded = dinov3.load(name, path)
        assert torch.equal(loaded(X), model(X))
        assert not loaded.training
        assert loaded.origin.name == "dinov3_vits16_lvd1689m"


def test_the_wrong_name_is_explained_in_ten_lines(vits) -> None:
    with pytest.raises(WeightsMismatch) as caught:
        dinov3.load("dinov3_vitb16", vits[1])
    text = str(caught.value)
    assert len(text.splitlines()) <= 10
    assert "dinov3_vits16_lvd1689m" in text
    assert "dinov3_vitb16" in text
    assert "call dinov3_vits16" in text


def test_satellite_statistics_follow_the_satellite_file(tmp_path: Path, vits) -> None:
    """ViT-L's two files differ by one norm; the statistics must follow the file, not the name."""
    from dinov3.models.build import backbone
    from dinov3.weights.catalog import resolve

    for id, mean in (("dinov3_vitl16_sat493m", 0.430), ("dinov3_vitl16_lvd1689m", 0.485)):
        with torch.device("meta"):
            meta = backbone(resolve(id)[0].config)
        # zeros share one small storage on disk: no gigabyte is written
        state = {k: torch.zeros(1).expand(v.shape) for k, v in meta.state_dict().items()}
        state["rope_embed.periods"] = vits[0].rope_embed.periods
        torch.save(state, tmp_path / "l.pth")
        model = dinov3.load("dinov3_vitl16", tmp_path / "l.pth", dtype=torch.bfloat16)
        assert model.origin.name == id
        assert model.origin.mean[0] == mean
    with pytest.raises(WeightsMismatch):
        dinov3.load("dinov3_vitl16_sat493m", tmp_path / "l.pth")


def test_an_ambiguous_file_is_taken_as_the_web_model_with_a_warning(tmp_path: Path, vits) -> None:
    from dinov3.weights.catalog import resolve

    both = resolve("dinov3_vitl16")
    opened = reading.open(vits[1])
    opened.rows = (resolve("dinov3_vits16")[0], both[1])
    with pytest.warns(UserWarning, match="taken as dinov3_vits16_lvd1689m"):
        assemble(opened, ())


def test_options_that_leave_the_weights_alone_reach_the_constructor(vits) -> None:
    model = dinov3.load("dinov3_vits16", vits[1], drop_path_rate=0.2)
    assert model.blocks[0].drop_path_rate == 0.2
    with pytest.raises(UnknownName, match="did you mean 'drop_path_rate'"):
        dinov3.load("dinov3_vits16", vits[1], drop_path=0.2)


def test_dtype_changes_the_weights_and_not_the_periods(vits) -> None:
    model = dinov3.load("dinov3_vits16", vits[1], dtype=torch.bfloat16)
    assert model.cls_token.dtype == torch.bfloat16
    assert model.rope_embed.periods.dtype == torch.float32


def test_unpublished_weights_are_said_to_be_so() -> None:
    with pytest.raises(WeightsError, match="no weights of dinov3_vitl16plus were published"):
        dinov3.load("dinov3_vitl16plus")


def test_random_weights_need_a_name() -> None:
    with pytest.raises(DinoError, match="need a model's name"):
        dinov3.load(None, "random")


def test_published_weights_that_cannot_be_reached_say_what_to_do(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(WeightsError, match="cache") as caught:
        dinov3.load("dinov3_vits16")
    assert len(str(caught.value).splitlines()) == 1
    assert "request access at https://ai.meta.com/" in str(caught.value)
    assert "(Meta's .pth, a .safetensors file, a folder of transformers or timm)" in str(caught.value)


def test_torch_hub_loads_a_local_file_and_gives_eval_mode(vits, tmp_path) -> None:
    model, path = vits
    loaded = torch.hub.load(str(ROOT), "dinov3_vits16", source="local", weights=str(path))
    assert torch.equal(loaded(X), model(X))
    assert not loaded.training
    fresh = torch.hub.load(str(ROOT), "dinov3_convnext_tiny", source="local", pretrained=False, patch_size=16)
    assert fresh.patch_size == 16


def test_torch_hub_sees_the_eleven_backbones_and_our_own() -> None:
    import hubconf
    from dinov3.hub import backbones

    names = [n for n in vars(hubconf) if n.startswith("dinov3_") and hasattr(backbones, n)]
    assert len(names) == 12


def test_torch_hub_gives_the_small_model_of_the_package_without_a_network(monkeypatch) -> None:
    monkeypatch.setenv("DINOV3_DOWNLOAD_BASE", "file:///nowhere")
    hub = {"repo_or_dir": str(ROOT), "model": "dinov3_vitt16", "source": "local"}
    model = torch.hub.load(**hub)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model(X), dinov3.load("dinov3_vitt16")(X))
    assert not torch.equal(torch.hub.load(**hub, pretrained=False)(X), model(X))
    with pytest.raises(UnknownName, match="not trained on LVD1689M; leave weights out"):
        torch.hub.load(**hub, weights="LVD1689M")
    with pytest.raises(UnknownName, match=r"dinov3_vits16 was not trained on SAT493M; published: Weights\.LVD1689M"):
        torch.hub.load(str(ROOT), "dinov3_vits16", source="local", weights="SAT493M")


def test_torch_hub_downloads_from_the_published_address(vits, tmp_path, monkeypatch) -> None:
    """file:// stands in for the server: the directory and file name are Meta's."""
    import shutil

    monkeypatch.setenv("DINOV3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DINOV3_DOWNLOAD_BASE", (tmp_path / "base").as_uri())
    place = tmp_path / "base" / "dinov3_vits16" / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    place.parent.mkdir(parents=True)
    shutil.copy(vits[1], place)
    hub = {"repo_or_dir": str(ROOT), "model": "dinov3_vits16", "source": "local"}
    for weights in (Weights.LVD1689M, "LVD1689M"):
        assert torch.equal(torch.hub.load(**hub, weights=weights)(X), vits[0](X))
    with pytest.raises(WeightsError, match="08c60483"):
        torch.hub.load(**hub, check_hash=True)
    with pytest.raises(UnknownName, match="not trained on SAT493M"):
        torch.hub.load(**hub, weights=Weights.SAT493M)


def test_loading_through_torch_hub_needs_only_torch(vits) -> None:
    """Everything else, numpy and Pillow included, is hidden from the import system."""
    code = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"numpy", "PIL", "safetensors", "huggingface_hub", "typer", "rich", "lancedb", "pyarrow"}}:
            raise ModuleNotFoundError(name, name=name)
import torch
sys.meta_path.insert(0, Hidden())
assert "safetensors" not in sys.modules and "PIL" not in sys.modules
model = torch.hub.load({str(ROOT)!r}, "dinov3_vits16", source="local", weights={str(vits[1])!r})
print(tuple(model(torch.zeros(1, 3, 32, 32)).shape))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "(1, 384)"


def test_a_model_carries_where_it_comes_from(vits) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = dinov3.load("dinov3_vits16", vits[1])
    assert model.origin.form == "meta"
    assert Path(model.origin.source) == vits[1]


def test_a_setting_that_no_key_shows_is_taken_from_the_file_and_told(vits, tmp_path) -> None:
    from dinov3.export.convert import convert

    convert(vits[1], tmp_path / "hf", to="transformers")
    path = tmp_path / "hf" / "config.json"
    path.write_text(path.read_text().replace("1e-05", "1e-06"))
    model = dinov3.load("dinov3_vits16", tmp_path / "hf")
    assert model.norm.eps == 1e-6
    assert any("norm_layer='layernorm'" in note for note in model.origin.notes)


def test_the_core_needs_torch_numpy_pillow_and_safetensors_only(vits, tmp_path) -> None:
    code = f"""
import sys
allowed = {{"torch", "numpy", "PIL", "safetensors", "dinov3", "typing_extensions", "packaging", "sympy", "networkx", "jinja2",
           "markupsafe", "filelock", "fsspec", "mpmath", "setuptools", "pkg_resources"}}
allowed |= set(sys.stdlib_module_names) | {{"_distutils_hack", "torchgen", "functorch", "opt_einsum"}}
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in allowed and not name.startswith("_"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hidden())
import dinov3
import numpy
from dinov3.weights import writing
model = dinov3.load("dinov3_vits16", {str(vits[1])!r})
f = dinov3.embed(model, [numpy.zeros((50, 70, 3), numpy.uint8)], size=32)
writing.save(model, {str(tmp_path / "own.safetensors")!r})
again = dinov3.load(weights={str(tmp_path / "own.safetensors")!r})
print(tuple(dinov3.embed(again, numpy.zeros((50, 70, 3), numpy.uint8), size=32).patches.shape))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "(1, 2, 2, 384)"


def test_a_type_may_be_named() -> None:
    assert next(dinov3.load(dtype="bfloat16").parameters()).dtype == torch.bfloat16
    with pytest.raises(UnknownName, match="dtype is one of float32, bfloat16, float16, not 'half'"):
        dinov3.load(dtype="half")


@pytest.mark.parametrize("fast", [None, "fp32"])
def test_a_misspelt_argument_is_named_before_weights_are_looked_for(fast):
    with pytest.raises(UnknownName, match="load has no option 'weight'; did you mean 'weights'"):
        dinov3.load("dinov3_vits16", weight="vits16.pth", fast=fast)
