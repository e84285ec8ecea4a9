"""Every public name leads to the right row."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dinov3.errors import UnknownName
from dinov3.weights.catalog import ROWS, resolve


@pytest.mark.parametrize(
    "name, id",
    [
        ("dinov3_vits16", "dinov3_vits16_lvd1689m"),
        ("DINOv3_ViTS16", "dinov3_vits16_lvd1689m"),
        ("facebook/dinov3-vits16-pretrain-lvd1689m", "dinov3_vits16_lvd1689m"),
        ("facebook/dinov3-vitl16-pretrain-sat493m", "dinov3_vitl16_sat493m"),
        ("vit_small_patch16_dinov3.lvd1689m", "dinov3_vits16_lvd1689m"),
        ("vit_small_patch16_dinov3_qkvb.lvd1689m", "dinov3_vits16_lvd1689m"),
        ("vit_huge_plus_patch16_dinov3_qkvb", "dinov3_vith16plus_lvd1689m"),
        ("timm/vit_7b_patch16_dinov3.sat493m", "dinov3_vit7b16_sat493m"),
        ("vit_large_patch16_dinov3_qkvb.sat493m", "dinov3_vitl16_sat493m"),
        ("convnext_tiny.dinov3_lvd1689m", "dinov3_convnext_tiny_lvd1689m"),
        ("facebook/dinov3-convnext-large-pretrain-lvd1689m", "dinov3_convnext_large_lvd1689m"),
        ("dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth", "dinov3_vitl16_sat493m"),
        ("vit7b16", "dinov3_vit7b16_lvd1689m"),
        ("dinov3_vitt16", "dinov3_vitt16_own"),
    ],
)
def test_a_public_name_means_its_row(name: str, id: str) -> None:
    assert resolve(name)[0].id == id


def test_an_architecture_with_two_files_names_both_the_web_one_first() -> None:
    both = ["dinov3_vitl16_lvd1689m", "dinov3_vitl16_sat493m"]
    assert [r.id for r in resolve("dinov3_vitl16")] == [*both, "dinov3_vitl16_lingbot"]
    assert [r.id for r in resolve("vit_7b_patch16_dinov3")] == ["dinov3_vit7b16_lvd1689m", "dinov3_vit7b16_sat493m"]
    assert len(resolve("dinov3_vitl16_sat493m")) == 1


def test_ids_and_files_are_unique() -> None:
    assert len({r.id for r in ROWS}) == len({r.file or r.hf for r in ROWS}) == len(ROWS) == 14 + 9


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("dinov3_vits", "dinov3_vits16"),
        ("dinov3-vitb-16", "dinov3_vitb16"),
        ("vit_smal_patch16_dinov3.lvd1689m", "vit_small"),
    ],
)
def test_an_unknown_name_is_answered_with_a_near_one(wrong: str, right: str) -> None:
    with pytest.raises(UnknownName, match=f"did you mean .*{right}"):
        resolve(wrong)


def test_an_unknown_name_without_neighbours_points_to_the_list() -> None:
    with pytest.raises(UnknownName, match="dinov3 models"):
        resolve("resnet50")


def test_tokens_follow_the_published_table() -> None:
    vit, convnext = resolve("dinov3_vits16")[0], resolve("dinov3_convnext_tiny")[0]
    sizes = {224: 201, 256: 261, 384: 581, 512: 1029, 768: 2309, 896: 3141, 1024: 4101, 2048: 16389}
    assert {s: vit.tokens(s) for s in sizes} == sizes
    assert convnext.tokens(256) == 1 + 64


def test_importing_the_package_costs_nothing() -> None:
    """No torch, and well under 50 ms beyond the interpreter's own start."""
    code = (
        "import sys, time; t = time.perf_counter(); import dinov3; s = time.perf_counter() - t; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules and 'PIL' not in sys.modules; print(s)"
    )
    best = min(
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    )
    assert best < 0.05


def test_the_catalogue_needs_no_torch() -> None:
    code = (
        "import sys; import dinov3.weights.catalog as c; c.resolve('dinov3_vits16'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_public_function_shares_its_name_with_a_package() -> None:
    """Importing a sub-package sets an attribute of the package: `dinov3.embed` would turn from a function into a module."""
    import pkgutil

    import dinov3

    modules = {m.name for m in pkgutil.iter_modules(dinov3.__path__)}
    assert modules.isdisjoint(dinov3.__all__)
    assert "weights" in modules
