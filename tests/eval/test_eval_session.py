"""What evaluations share: arguments, the model, features on disk, few shots, tables, sweeps, the verb."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image
from ranks import run_ranks
from result_tables import read_table

from dinov3.cli.training import EVALUATIONS
from dinov3.data.datasets import make_dataset
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.errors import DinoError, ImageError, UnknownName
from dinov3.eval import session as common
from dinov3.eval.arguments import (
    Arguments,
    EvalConfig,
    FeatureSection,
    ModelSection,
    TransformSection,
    read_arguments,
    split_arguments,
)
from dinov3.eval.features import FeatureCache, check_classes, columns_of, few_shot_subset, labels_of, over_tries
from dinov3.eval.published import published
from dinov3.eval.session import Session
from dinov3.features import default_preprocessing, layer_numbers
from dinov3.models.architectures import ViTConfig
from dinov3.models.build import backbone


def tiny(seed: int = 0) -> torch.nn.Module:
    """Four blocks, width 64; weights large enough that features differ between images."""
    torch.manual_seed(seed)
    model = backbone(ViTConfig(embed_dim=64, depth=4, num_heads=1, n_storage_tokens=2))
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.1)
    return model.eval()


def write_tiny(path: Path) -> Path:
    from dinov3.weights.writing import save

    return save(tiny(), path)


def make_folder(root: Path, classes: int = 2, each: int = 5, seed: int = 0) -> Path:
    """Squares of one colour a class with a little noise."""
    rng = np.random.default_rng(seed)
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(each):
            colour = np.array([40 + 170 * (c % 2), 40 + 85 * (c % 3), 200 - 60 * (c % 4)])
            pixels = np.clip(colour + rng.normal(0, 20, (36, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"class{c}" / f"{i}.png")
    return root


@dataclass
class ToyConfig(EvalConfig):
    transform: TransformSection = field(default_factory=lambda: TransformSection(36, 32))
    features: FeatureSection = field(default_factory=FeatureSection)
    number: float = 1.0
    where: str = "???"


def test_images_are_evaluated_at_a_long_side_rounded_down(tmp_path: Path) -> None:
    preprocessing = Session("toy", tmp_path, "cpu").preprocessing(tiny(), TransformSection())
    plan = preprocessing.plan(640, 427)
    assert (round(640 * plan.scale_x), round(427 * plan.scale_y), plan.offset_x) == (383, 256, 80)
    assert preprocessing == Preprocessing.from_json(preprocessing.to_json())
    assert "rounding" not in Preprocessing().to_json()  # ids of stores stay
    assert Preprocessing(size=256, shape="short", multiple=1).plan(640, 427).input_hw == (256, 384)


# ---- arguments ------------------------------------------------------------------------------------------------------


def test_options_and_overrides_have_any_order_and_every_public_spelling(tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text("number: 2.0\nwhere: file\n")
    for words in (
        ["--output-dir=out", f"config_file={tmp_path}/some.yaml", "where=here"],
        ["where=here", "output_dir=out", "--config-file", f"{tmp_path}/some.yaml"],
        ["--output-dir", "out", f"config={tmp_path}/some.yaml", "where=here"],
    ):
        config, _, _ = read_arguments(ToyConfig, words)
        assert (config.number, config.where, config.output_dir) == (2.0, "here", "out")


def test_errors_of_arguments_have_suggestions() -> None:
    with pytest.raises(DinoError, match="no option '--sweeep'; did you mean '--sweep'"):
        split_arguments(["--sweeep", "x=1"])
    with pytest.raises(DinoError, match="--output-dir needs a value"):
        split_arguments(["--output-dir"])
    with pytest.raises(DinoError, match=r"numbr .*did you mean 'number'") as error:
        read_arguments(ToyConfig, ["numbr=3"])
    assert "where (not set): must be given" in str(error.value)


def test_choices_are_taken_by_name_or_value_in_any_capitals() -> None:
    from dinov3.eval.linear import LinearConfig
    from dinov3.metrics import Metric

    must = ["train.dataset=a", "train.val_dataset=b"]
    words = ["train.val_metric_type=MEAN_AVERAGE_PRECISION_VOC_2007", "train.optimizer_type=ADAMW"]
    config, _, _ = read_arguments(LinearConfig, [*must, *words])
    assert config.train.val_metric_type is Metric.MEAN_AVERAGE_PRECISION_VOC_2007
    assert config.train.optimizer_type == "adamw"
    config, _, _ = read_arguments(LinearConfig, [*must, "train.val_metric_type=map_voc2007"])
    assert config.train.val_metric_type is Metric.MEAN_AVERAGE_PRECISION_VOC_2007
    with pytest.raises(DinoError, match="expected one of mean_accuracy"):
        read_arguments(LinearConfig, [*must, "train.val_metric_type=acc"])


def test_help_lists_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    from dinov3.eval import knn

    assert knn.main(["--help"]) == 0
    output = capsys.readouterr().out
    assert "train.ks=[10,20,100,200]" in output
    assert "eval.test_metric_type=mean_accuracy" in output


# ---- the model ------------------------------------------------------------------------------------------------------


def test_a_model_section_names_a_model_in_one_way_only() -> None:
    def wrong(**given: str) -> list[str]:
        return [key for key, _ in ToyConfig(model=ModelSection(**given)).problems()]

    assert wrong() == wrong(name="dinov3_vits16", weights="random") == []
    assert wrong(dino_hub="dinov3_vits16", name="x") == ["model.dino_hub"]
    assert wrong(pretrained_weights="x.pth") == ["model.pretrained_weights"]
    assert wrong(config_file="x.yaml", weights="y") == ["model.weights"]
    with pytest.raises(DinoError, match="transformers:FOLDER"):
        common.open_model(ModelSection(dino_hub="dinov2_vits14"))


def test_a_training_configuration_and_its_teacher_are_opened(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "student: {arch: vit_tiny, embed_dim: 64, depth: 4, num_heads: 1, n_storage_tokens: 2, "
        "layerscale: null, pos_embed_rope_dtype: fp32}\n"
        "crops: {rgb_mean: [0.1, 0.2, 0.3], rgb_std: [0.4, 0.5, 0.6]}\n"
    )
    model = tiny()
    torch.save({"teacher": {f"backbone.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "teacher.pth")
    section = ModelSection(config_file=str(tmp_path / "run.yaml"), pretrained_weights=str(tmp_path / "teacher.pth"))
    opened = common.open_model(section)
    x = torch.randn(1, 3, 32, 32)
    assert opened.origin.mean == (0.1, 0.2, 0.3)
    torch.testing.assert_close(opened(x), model(x))
    fresh = common.open_model(ModelSection(config_file=str(tmp_path / "run.yaml")))
    assert fresh.origin.random


def test_a_distributed_checkpoint_is_opened(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    (tmp_path / "run.yaml").write_text(
        "student: {arch: vit_tiny, embed_dim: 64, depth: 4, num_heads: 1, n_storage_tokens: 2, "
        "layerscale: null, pos_embed_rope_dtype: fp32}\n"
    )
    model = tiny()
    state = {f"model.teacher.backbone.{k}": v for k, v in model.state_dict().items()}
    dcp.save(state, checkpoint_id=str(tmp_path / "ckpt"), no_dist=True)
    section = ModelSection(config_file=str(tmp_path / "run.yaml"), pretrained_weights=str(tmp_path / "ckpt"))
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(common.open_model(section)(x), model(x))


# ---- features -------------------------------------------------------------------------------------------------------


def test_features_are_computed_once_and_equal_the_models(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images")
    model, dataset = tiny(), make_dataset(str(folder))
    preprocessing = default_preprocessing(model, size=32)
    messages: list[str] = []
    cache = FeatureCache(model, tmp_path / "cache", messages.append)
    columns = columns_of([1, 3], "cls+mean")
    assert [(c.token, c.layer) for c in columns] == [("cls", 1), ("cls", 3), ("mean", 3)]
    arrays = cache.columns(dataset, preprocessing, columns, batch_size=3)
    x = torch.stack([preprocessing(dataset[i][0])[0] for i in range(len(dataset))])
    with torch.inference_mode():
        (_, first), (patches, last) = model.get_intermediate_layers(x, n=[1, 3], return_class_token=True)
    for array, expected in zip(arrays, (first, last, patches.mean(1))):
        torch.testing.assert_close(torch.from_numpy(np.array(array)), expected, atol=1e-5, rtol=1e-5)
    before = len(messages)
    again = cache.columns(dataset, preprocessing, columns_of([3], "mean"))
    assert len(messages) == before, "columns that are known are not computed again"
    np.testing.assert_array_equal(again[0], arrays[2])
    Image.new("RGB", (40, 40)).save(folder / "class0" / "0.png")
    cache.columns(make_dataset(str(folder)), preprocessing, columns_of([3], "mean"))
    assert len(messages) > before, "other images are other features"


def test_other_weights_and_other_preprocessing_have_their_own_features(tmp_path: Path) -> None:
    dataset = make_dataset(str(make_folder(tmp_path / "images", each=1)))
    column = columns_of([3], "cls")
    found = []
    for seed, size in ((0, 32), (1, 32), (0, 48)):
        model = tiny(seed)
        cache = FeatureCache(model, tmp_path / "cache", lambda _: None)
        found.append(np.array(cache.columns(dataset, default_preprocessing(model, size=size), column)[0]))
    assert not np.allclose(found[0], found[1])
    assert not np.allclose(found[0], found[2])
    assert len(list((tmp_path / "cache").glob("*/*"))) == 3


def test_half_precision_on_disk_is_near(tmp_path: Path) -> None:
    dataset, model = make_dataset(str(make_folder(tmp_path / "images", each=2))), tiny()
    cache = FeatureCache(model, tmp_path / "cache", lambda _: None)
    preprocessing, column = default_preprocessing(model, size=32), columns_of([3], "cls")
    exact, half = (cache.columns(dataset, preprocessing, column, dtype=d)[0] for d in ("float32", "float16"))
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, exact, rtol=1e-3, atol=1e-3)


def features_of_rank(root: str) -> np.ndarray:
    model = tiny()
    cache = FeatureCache(model, Path(root) / "cache", lambda _: None)
    dataset = make_dataset(f"{root}/images")
    columns = cache.columns(dataset, default_preprocessing(model, size=32), columns_of([3], "cls"), batch_size=2)
    return np.array(columns[0])


def test_two_processes_share_the_work_and_see_the_same(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", each=3)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "images").symlink_to(tmp_path / "images")
    together = run_ranks(features_of_rank, 2, str(tmp_path))
    np.testing.assert_array_equal(together[0], together[1])
    np.testing.assert_allclose(together[0], features_of_rank(str(tmp_path / "alone")), atol=1e-5)


def test_a_broken_image_stops_an_evaluation_by_its_name(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", each=2)
    (folder / "class1" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    cache = FeatureCache(tiny(), tmp_path / "cache", lambda _: None)
    with pytest.raises(ImageError, match=r"class1/0\.png.*needs all of its images"):
        cache.columns(make_dataset(str(folder)), default_preprocessing(tiny(), size=32), columns_of([3], "cls"))


def test_images_without_a_class_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", each=1)
    Image.new("RGB", (32, 32)).save(folder / "loose.png")
    with pytest.raises(DinoError, match="1 of 3 images have no class"):
        labels_of(make_dataset(str(folder)), "these")


def test_classes_that_are_numbered_differently_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "a", classes=2, each=1)
    make_folder(tmp_path / "b", classes=2, each=1)
    (tmp_path / "b" / "class0").rename(tmp_path / "b" / "another")
    with pytest.raises(
        DinoError, match=r"these: .*other classes.*: only these have another and only training has class0$"
    ):
        check_classes(make_dataset(str(tmp_path / "a")), make_dataset(str(tmp_path / "b")), "these")


def test_a_size_that_is_no_multiple_of_the_patch_is_refused_with_one_that_is(tmp_path: Path) -> None:
    session = Session("toy", tmp_path)
    with pytest.raises(DinoError, match="no multiple of the patch \\(16\\); try 224"):
        session.preprocessing(tiny(), TransformSection(256, 230))
    with pytest.raises(DinoError, match="layer 4 does not exist: this model has 4"):
        layer_numbers(tiny(), [4])


# ---- other libraries' backbones -------------------------------------------------------------------------------------


def test_a_transformers_model_is_a_backbone(tmp_path: Path, oracles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Dinov2Config
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

    from dinov3 import load
    from dinov3.features import run
    from dinov3.models.base import Backbone

    torch.manual_seed(0)
    about = Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, patch_size=14, image_size=56)
    theirs = Dinov2Model(about).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(f"transformers:{tmp_path / 'theirs'}")
    assert isinstance(model, Backbone)
    x = torch.randn(2, 3, 42, 56)
    with torch.no_grad():
        expected = theirs(pixel_values=x, output_hidden_states=True)
    output = run(model, x)
    torch.testing.assert_close(output["cls"], expected.last_hidden_state[:, 0])
    torch.testing.assert_close(output["patches"].flatten(1, 2), expected.last_hidden_state[:, 1:])
    shorter = load(f"transformers:{tmp_path / 'theirs'},layer=1")
    assert (shorter.n_blocks, model.n_blocks) == (2, 3)
    torch.testing.assert_close(run(shorter, x)["cls"], theirs.layernorm(expected.hidden_states[2])[:, 0])
    torch.testing.assert_close(run(shorter, x)["cls"], run(model, x, layer=1)["cls"])
    with pytest.raises(DinoError, match="has 3 blocks"):
        load(f"transformers:{tmp_path / 'theirs'},layer=3")
    with pytest.raises(UnknownName, match="did you mean 'layer'"):
        load(f"transformers:{tmp_path / 'theirs'},layr=3")


def test_a_timm_model_is_a_backbone(tmp_path: Path, oracles: None) -> None:
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    from dinov3 import load
    from dinov3.features import run

    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    model = load(f"timm:vit_tiny_patch16_224,checkpoint={tmp_path / 'theirs.safetensors'},layer=2")
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        (expected,) = theirs.get_intermediate_layers(x, n=[2], norm=True)
    torch.testing.assert_close(run(model, x)["patches"].flatten(1, 2), expected, atol=1e-5, rtol=1e-5)


# ---- few shots ------------------------------------------------------------------------------------------------------


def test_few_shots_are_the_recorded_ones() -> None:
    labels = np.array([0, 1, 0, 1, 0, 1, 2, 2, 2, 2])
    drawn = {(k, seed): few_shot_subset(labels, k, seed).tolist() for k in (1, 0.5) for seed in (0, 1)}
    assert drawn == {(1, 0): [4, 5, 9], (1, 1): [1, 2, 9], (0.5, 0): [4, 5, 7, 9], (0.5, 1): [1, 2, 8, 9]}


def test_a_share_of_several_labels_is_corrected() -> None:
    labels = np.ones((40, 2), np.int64)  # every image counts twice
    assert len(few_shot_subset(labels, 0.25, 0)) < 0.4 * 40


def test_tries_become_mean_and_unbiased_deviation() -> None:
    summary = over_tries([{"top-1": 1.0}, {"top-1": 3.0}])
    assert summary == {"top-1_mean": 2.0, "top-1_std": pytest.approx(2**0.5)}


# ---- tables, sweeps -------------------------------------------------------------------------------------------------


def test_a_table_is_read_back_as_it_was(tmp_path: Path) -> None:
    rows = [{"b": 1, "a": 0.1 + 0.2, "yes": True, "word": "x,y"}, {"b": 2, "a": None, "word": "z"}]
    common.write_table(tmp_path / "t.csv", rows)
    back = read_table(tmp_path / "t.csv")
    assert list(back[0]) == ["b", "a", "yes", "word"]
    assert back[0] == {"b": 1, "a": 0.1 + 0.2, "yes": "True", "word": "x,y"}
    assert back[1] == {"b": 2, "a": None, "yes": None, "word": "z"}


def test_axes_of_a_sweep() -> None:
    assert common.sweep_axes("layers=0-2,8+11,size=224,256,pool=cls,mean") == {
        "layers": ["0", "1", "2", "8+11"],
        "size": ["224", "256"],
        "pool": ["cls", "mean"],
    }
    for wrong in ("224", "size=", "size=1,size=2"):
        with pytest.raises(DinoError, match="--sweep"):
            common.sweep_axes(wrong)


def test_a_sweep_reads_every_point_before_it_runs_the_first(tmp_path: Path) -> None:
    ran: list[float] = []

    def evaluate(config: ToyConfig, session: Session) -> dict[str, float]:
        ran.append(config.number)
        return {"twice": 2 * config.number}

    session = Session("toy", tmp_path)
    base = ["where=x", f"output_dir={tmp_path}"]
    with pytest.raises(DinoError, match="number"):
        common.sweep(ToyConfig, Arguments(None, base, "number=1,2,none"), evaluate, session)
    with pytest.raises(DinoError, match=r"--sweep has no axis 'lyers'; did you mean 'layers'"):
        common.sweep(ToyConfig, Arguments(None, base, "lyers=1,2"), evaluate, session)
    assert ran == []
    rows = common.sweep(ToyConfig, Arguments(None, base, "number=1,2,size=32,64"), evaluate, session)
    assert [(r["number"], r["size"], r["twice"]) for r in rows] == [
        ("1", "32", 2.0), ("1", "64", 2.0), ("2", "32", 4.0), ("2", "64", 4.0)
    ]  # fmt: skip
    assert len(read_table(tmp_path / "sweep-toy.csv")) == 4
    assert (
        json.loads((tmp_path / "sweep" / "number=2,size=64" / "results-toy.json").read_text())["results"]["twice"] == 4
    )


# ---- the verb, published figures ------------------------------------------------------------------------------------


def test_the_verb_lists_and_dispatches(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from dinov3.cli import app

    shown = CliRunner().invoke(app, ["eval"])
    assert shown.exit_code == 0
    assert "log-regression" in shown.output
    result = CliRunner().invoke(app, ["eval", "knn", "--help"])
    assert "train.temperature=0.07" in result.output
    wrong = CliRunner().invoke(app, ["eval", "kn"])
    assert isinstance(wrong.exception, UnknownName)
    assert "did you mean 'knn'" in str(wrong.exception)


@pytest.mark.parametrize("name", list(EVALUATIONS))
def test_every_evaluation_lists_its_folders_and_keys_with_defaults(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(EVALUATIONS[name][0])
    assert module.main(["--help"]) == 0
    usage, *lines = capsys.readouterr().out.splitlines()
    assert re.match(rf"usage: dinov3 eval {name} (TRAIN (TEST|VAL)|FOLDER|DATASET) \[--model NAME\]", usage)
    assert any(line.startswith("  model.weights=") for line in lines)
    assert "  output_dir=." in lines


def test_folders_need_no_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dinov3.eval import knn

    (tmp_path / "test").mkdir()
    spec = "ImageNet:split=TRAIN:root=/data"
    config, _, arguments = read_arguments(
        knn.KnnConfig, [spec, "--model", "dinov3_vits16", str(tmp_path / "test"), "train.ks=[3]", "--weights=random"]
    )
    assert (config.train.dataset, config.eval.test_dataset) == (spec, str(tmp_path / "test"))
    assert (config.model.name, config.model.weights, config.train.ks) == ("dinov3_vits16", "random", [3])
    assert arguments.file is None
    for given, sentence in (
        (["nofolder", "x"], "no such file or folder: nofolder (write TRAIN TEST"),
        ([f"{tmp_path}/tset", "x"], "tset; did you mean 'test'? (write TRAIN TEST"),
        ([str(tmp_path), str(tmp_path), str(tmp_path)], "is one too many: TRAIN TEST may stand without a key"),
        ([str(tmp_path), "eval.test_dataset"], "no such file or folder: eval.test_dataset"),
        ([str(tmp_path)], "must be given: a second folder or dataset spec, as in dinov3 eval knn TRAIN TEST"),
    ):
        assert knn.main(given) == 1
        printed = capsys.readouterr().err
        assert sentence in printed
        assert printed.startswith("error: ")


@pytest.mark.parametrize("name", ["segmentation", "depth"])
def test_an_evaluation_without_its_folder_says_that_one_is_needed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(EVALUATIONS[name][0]).main
    assert main([]) == 1
    assert capsys.readouterr().err.startswith("error: a folder is needed: FOLDER [--model NAME]")
    (tmp_path / "scenes").mkdir()
    assert main([f"{tmp_path}/scnes"]) == 1
    assert "scnes; did you mean 'scenes'?" in capsys.readouterr().err


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*given: Any) -> Any:
        raise AssertionError("a model was opened")

    monkeypatch.setattr(common, "open_model", opened)


@pytest.mark.parametrize("name", ["knn", "log-regression", "linear"])
def test_data_are_read_before_a_model_is_opened(
    name: str, tmp_path: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "train")
    main = importlib.import_module(EVALUATIONS[name][0]).main
    assert main([f"{folder}", f"Folder:root={tmp_path}/trian", f"--output-dir={tmp_path}/out", "--device=cpu"]) == 1
    assert "trian; did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["segmentation", "depth", "keypoints", "retrieval", "tracking", "geobench"])
def test_a_root_that_does_not_exist_is_noticed_before_a_model_is_opened(
    name: str, tmp_path: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "navi").mkdir()
    given = [f"root={tmp_path}/nvai"]
    if name in ("segmentation", "depth"):
        given = [f"datasets.root={tmp_path}/nvai", "datasets.train=DenseFolder", "datasets.val=DenseFolder"]
        given.append("decoder_head.type=linear")
    main = importlib.import_module(EVALUATIONS[name][0]).main
    assert main([*given, f"--output-dir={tmp_path}/out", "--device=cpu"]) == 1
    assert "nvai; did you mean 'navi'?" in capsys.readouterr().err


def test_the_verb_measures_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from dinov3.cli import app

    make_folder(tmp_path / "train", each=4)
    make_folder(tmp_path / "test", each=2, seed=1)
    weights = str(write_tiny(tmp_path / "tiny.safetensors"))
    monkeypatch.chdir(tmp_path)
    arguments = ["eval", "knn", "train", "test", "--weights", weights, "train.ks=[1,9,20]", "features.cache=none"]
    result = CliRunner().invoke(app, [*arguments, "transform.resize_size=36", "transform.crop_size=32"])
    assert result.exit_code == 0, result.output
    results = read_table(tmp_path / "results-knn.csv")[0]
    assert results["1 Top 1"] == 100
    assert [name.split()[0] for name in results if "Top 1" in name] == ["1", "8"]
    assert "warning: only 8 training images: k = 8 instead of 9, 20" in result.stderr


def test_published_figures_stand_beside_ones_own() -> None:
    known = published("dinov3_vit7b16_lvd1689m", "linear")
    assert known is not None
    assert (known["IN-1k linear"], known["IN-C mCE↓"], known["ObjectNet"]) == (88.4, 19.6, 79.0)
    assert published("dinov3_vits16_lvd1689m", "DAVIS") == {"DAVIS": 72.7}
    assert published("custom", "linear") is None


def test_published_numbers_agree_with_each_other() -> None:
    from dinov3.eval.published import FIGURES

    seven = FIGURES["dinov3_vit7b16_lvd1689m"]
    fine = ("Food-101", "CIFAR-10", "CIFAR-100", "SUN397", "Cars", "Aircraft", "VOC2007 cls", "DTD", "Pets",
            "Caltech-101", "Flowers", "CUB")  # fmt: skip
    assert np.mean([seven[name] for name in fine]) == pytest.approx(seven["Fine-S"], abs=0.05)
    from dinov3.weights import catalog

    scores = next(row for row in catalog.ROWS if row.id == "dinov3_vit7b16_lvd1689m").scores
    for name in set(scores) & set(seven):
        assert scores[name] == seven[name], name


# ---- the page of results --------------------------------------------------------------------------------------------


def results_script() -> Any:
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["results"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_of_results_name_existing_evaluations_and_keys() -> None:
    from dinov3.cli.training import EVALUATIONS
    from dinov3.eval.knn import KnnConfig
    from dinov3.eval.linear import LinearConfig
    from dinov3.eval.log_regression import LogRegressionConfig

    script = results_script()
    configs: dict[str, type[EvalConfig]] = {
        "knn": KnnConfig, "log-regression": LogRegressionConfig, "linear": LinearConfig
    }  # fmt: skip
    assert len({row.id for row in script.ROWS}) == len(script.ROWS)
    for row in script.ROWS:
        for model in script.MODELS:
            if "features.layers" in script.MODELS[model] and not row.layers:
                continue
            words = script.words(row, model, "/data", "/out")
            assert words[:3] == ["-m", "dinov3", "eval"]
            assert words[3] in EVALUATIONS, row.id
            if words[3] in configs:
                read_arguments(configs[words[3]], words[4:])


def test_exceptions_from_the_expected_order_are_named() -> None:
    script = results_script()
    row = script.Row("x", "A score", "", script.csv_cell("", ""))
    fine = {"random": 10.0, "shipped": 20.0, "dinov2-small": 30.0}
    assert script.exceptions(row, fine) == []
    assert script.exceptions(row, fine | {"shipped": 35.0}) == [
        "A score: dinov2-small (30.0) is not better than shipped (35.0)."
    ]
    assert script.exceptions(row, fine | {"shipped": 35.0, "dinov2-small-block11": 40.0}) == []
    falling = dataclasses.replace(row, higher_is_better=False)
    assert len(script.exceptions(falling, fine)) == 2
    assert script.exceptions(row, {"random": None, "shipped": 1.0}) == []
    assert "Exceptions:" in script.table([row], {"x": fine | {"random": 99.0}}, list(script.MODELS))
