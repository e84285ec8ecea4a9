"""dino.txt's towers against recorded numbers and its published key list; the hub function with files made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_cases import HERE as GOLDEN
from golden_cases import Case
from paths import KEYS, ROOT

from dinov3.data.tokenizer import Tokenizer
from dinov3.errors import DinoError, UnknownName, WeightsMismatch
from dinov3.heads.dinotxt import LOGIT_SCALE, DinoTxt, DinoTxtConfig, TextConfig, build
from dinov3.losses import image_text_loss
from dinov3.models.architectures import ViTConfig
from dinov3.models.vit import VisionTransformer

KEYS = KEYS / "head_vitl16_dinotxt.json"

TINY_TEXT = {"context_length": 8, "vocab_size": 40, "dim": 16, "num_heads": 2, "num_layers": 2}
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 48).view(2, 3, 32, 48)
TOKENS = torch.tensor([[38, 5, 7, 39, 0, 0], [38, 3, 39, 0, 0, 0]])


def tiny(text: dict | None = None, **options) -> DinoTxt:
    torch.manual_seed(0)
    backbone = VisionTransformer(ViTConfig(embed_dim=32, depth=3, num_heads=2, n_storage_tokens=2))
    backbone.init_weights()
    model = build(backbone, TextConfig.of(**TINY_TEXT | (text or {})), DinoTxtConfig.of(**{"embed_dim": 64} | options))
    model.init_weights()
    return model.eval()


@torch.no_grad()
def test_both_towers_give_the_recorded_numbers() -> None:
    case = Case("dinotxt")
    c = case.config
    backbone = VisionTransformer(ViTConfig.of(**c["backbone"]))
    model = build(backbone, TextConfig.of(**c["text"]), DinoTxtConfig.of(**c["dinotxt"])).eval()
    case.fill(model)
    tokenizer = Tokenizer.from_file(GOLDEN / "tiny_bpe.txt.gz")
    assert tokenizer.vocab_size == c["tokenizer_vocab_size"]
    tokens = tokenizer.tokenize(case.spec["inputs"]["texts"], case.spec["inputs"]["context_length"], too_long="cut")
    case.compare("token_ids", tokens)
    x = case.input("x")
    case.compare("image_features", model.encode_image(x))
    case.compare("text_features", model.encode_text(tokens))
    case.compare("text_tokens", model.text_model.backbone(tokens))
    features, patches, backbone_patches = model.encode_image_with_patch_tokens(x, normalize=True)
    case.compare("image_features_norm", features)
    case.compare("patch_tokens", patches)
    case.compare("backbone_patch_tokens", backbone_patches)
    per_image, per_text = model.get_logits(x, tokens)
    case.compare("logits_per_image", per_image)
    case.compare("logits_per_text", per_text)
    out = model(x, tokens)
    case.compare("image_features_norm", out[0])
    case.compare("logit_scale_exp", out[2])
    torch.testing.assert_close(out[2] * out[0] @ out[1].T, per_image)
    cls, patches, _ = model.visual_model.get_class_and_patch_tokens(x)
    case.compare("image_features", torch.cat([cls, patches.mean(1)], dim=-1))
    case.all_checked()


def test_the_released_model_has_the_published_keys() -> None:
    published = json.loads(KEYS.read_text())
    with torch.device("meta"):
        backbone = VisionTransformer(ViTConfig(embed_dim=1024, depth=24, num_heads=16, n_storage_tokens=4))
        state = build(backbone).state_dict()
    head = {k: v for k, v in state.items() if not k.startswith("visual_model.backbone.")}
    assert {k: [list(v.shape), "float32"] for k, v in head.items()} == published["state_dict"]
    assert sum(v.numel() for v in head.values()) == published["n_parameters"]


def test_fresh_weights_leave_nothing_as_the_allocator_found_it() -> None:
    """Text MLP biases once began as whatever memory held: everything is NaN before, nothing after."""
    model = tiny(text={"ls_init_value": 0.1}, text_model_num_head_blocks=1, vision_model_use_linear_projection=True)
    new = {k: p for k, p in model.named_parameters() if not k.startswith("visual_model.backbone.")}
    with torch.no_grad():
        for p in new.values():
            p.fill_(float("nan"))
    model.init_weights()
    assert [k for k, p in new.items() if not p.isfinite().all()] == []
    biases = [p for k, p in new.items() if k.startswith("text_model.") and "feed_forward" in k and k.endswith("bias")]
    assert len(biases) == 6
    assert not torch.cat(biases).any()
    assert model.logit_scale.item() == pytest.approx(LOGIT_SCALE)
    text = tiny(text={"dim": 256, "num_layers": 8, "vocab_size": 500}).text_model
    block = text.backbone.blocks[0]
    for p, std in (
        (text.backbone.token_embedding.weight, 0.02),
        (text.backbone.positional_embedding, 0.01),
        (block.attention.qkv.weight, 256**-0.5),
        (block.attention.proj.weight, 256**-0.5 / 4),
        (block.feed_forward.fc1.weight, 512**-0.5),
        (block.feed_forward.fc2.weight, 256**-0.5 / 4),
        (text.head.linear_projection.weight, 256**-0.5),
    ):
        assert p.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vision_model_use_class_token": False},
        {"vision_model_patch_tokens_pooler_type": "max", "vision_model_patch_token_layer": 2},
        {"text_model_num_head_blocks": 1, "vision_model_use_linear_projection": True},
    ],
)
def test_every_head_parameter_learns_and_the_frozen_backbone_does_not(options: dict) -> None:
    model = tiny(text={"dropout_prob": 0.1, "ls_init_value": 0.1}, vision_model_head_blocks_drop_path=0.5, **options)
    model.train()
    assert not model.visual_model.backbone.training
    assert model.visual_model.head.blocks[0].training
    image, text, scale, _, _ = model(IMAGES, TOKENS)
    image_text_loss(image, text, scale).backward()
    learning = {k: p for k, p in model.named_parameters() if not k.startswith("visual_model.backbone.")}
    assert [k for k, p in learning.items() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None and not p.requires_grad for p in model.visual_model.backbone.parameters())


def test_an_unfrozen_backbone_learns_and_a_frozen_text_tower_does_not() -> None:
    model = tiny(vision_model_freeze_backbone=False, text_model_freeze_backbone=True, freeze_logit_scale=True).train()
    assert model.visual_model.backbone.training
    assert not model.text_model.backbone.training
    image, text, scale, _, _ = model(IMAGES, TOKENS)
    image_text_loss(image, text, scale).backward()
    assert model.visual_model.backbone.blocks[0].attn.qkv.weight.grad is not None
    assert model.text_model.backbone.token_embedding.weight.grad is None
    assert model.text_model.head.linear_projection.weight.grad is not None
    assert model.logit_scale.grad is None


@torch.no_grad()
def test_what_follows_the_end_token_does_not_matter_and_the_first_largest_id_counts() -> None:
    model = tiny()
    other = TOKENS.clone()
    other[0, 4:] = torch.tensor([39, 11])
    short = TOKENS[:, :4]
    for tokens in (other, short):
        torch.testing.assert_close(model.encode_text(tokens), model.encode_text(TOKENS))
    seen = {p: tiny(text_model_tokens_pooler_type=p).encode_text(TOKENS) for p in ("first", "last", "argmax")}
    assert torch.equal(seen["first"][0], seen["first"][1])  # position 0 sees only the start token
    assert not torch.equal(seen["last"], seen["argmax"])


@torch.no_grad()
def test_patches_of_an_earlier_block_meet_the_last_class_token() -> None:
    model = tiny(vision_model_patch_token_layer=2)
    backbone = model.visual_model.backbone
    before, last = backbone.get_intermediate_layers(IMAGES, n=2, return_class_token=True, return_extra_tokens=True)
    tokens = model.visual_model.backbone_tokens(IMAGES)
    assert torch.equal(tokens[:, 0], last[1])
    assert torch.equal(tokens[:, 1:3], before[2])
    assert torch.equal(tokens[:, 3:], before[0])


def test_nothing_casts_behind_the_callers_back() -> None:
    model = tiny().double()
    out = model(IMAGES.double(), TOKENS)
    assert {t.dtype for t in out} == {torch.float64}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tiny().visual_model.get_class_and_patch_tokens(IMAGES)[0].isfinite().all()


def test_the_temperature_stays_between_one_and_a_hundred() -> None:
    model = tiny()
    for value, expected in ((9.0, 100.0), (-1.0, 1.0)):
        torch.nn.init.constant_(model.logit_scale, value)
        model.clamp_logit_scale()
        assert model.logit_scale.exp().item() == pytest.approx(expected)


def test_errors_are_one_sentence() -> None:
    model = tiny()
    for tokens, words in (
        (torch.zeros(1, 9, dtype=torch.long), "longer than the context of 8"),
        (torch.full((1, 4), 40), "beyond this model's vocabulary of 40"),
        (torch.zeros(1, 4), "tokenize first"),
        (torch.zeros(4, dtype=torch.long), "tokenize first"),
    ):
        with pytest.raises(DinoError, match=words):
            model.encode_text(tokens)
    with pytest.raises(UnknownName, match="did you mean 'mean'"):
        tiny(vision_model_patch_tokens_pooler_type="meen")
    with pytest.raises(UnknownName, match="did you mean 'embed_dim'"):
        DinoTxtConfig.of(embed_dims=3)
    with pytest.raises(DinoError, match="neither was requested"):
        tiny(vision_model_use_class_token=False, vision_model_use_patch_tokens=False)
    with pytest.raises(DinoError, match="3 blocks"):
        tiny(vision_model_patch_token_layer=4)


# ---- the hub -------------------------------------------------------------------------------------------------------

NAME = "dinov3_vitl16_dinotxt_tet1280d20h24l"


def released_keys() -> dict[str, torch.Tensor]:
    """The published head file's keys and shapes over one small storage: no gigabyte is written."""
    published = json.loads(KEYS.read_text())["state_dict"]
    return {k: torch.zeros(1).expand(shape) for k, (shape, _) in published.items()}


def bytes_vocabulary(path: Path, n: int = 48_894) -> Path:
    """A vocabulary file of n merges; CLIP's own is not in this repository."""
    from dinov3.data.tokenizer import byte_characters

    characters = list(byte_characters().values())
    pairs = [f"{a} {b}</w>" for a in characters for b in characters][:n]
    path.write_text("#version: test\n" + "\n".join(pairs))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The published addresses as folders, with files of the published shapes."""
    from dinov3.hub import HEADS
    from dinov3.hub.published_heads import NAME, VOCABULARY_FILE
    from dinov3.weights.catalog import resolve

    root = tmp_path_factory.mktemp("base")
    (row,) = [row for row in resolve("dinov3_vitl16") if row.dataset == "lvd1689m"]
    (root / row.arch).mkdir()
    (root / "thirdparty").mkdir()
    with torch.device("meta"):
        backbone = VisionTransformer(row.config)
    torch.save({k: torch.ones(1).expand(v.shape) for k, v in backbone.state_dict().items()}, root / row.arch / row.file)
    torch.save(released_keys(), root / HEADS[NAME].file)
    bytes_vocabulary(root / VOCABULARY_FILE)
    return root


def test_torch_hub_finds_all_three_files_at_the_published_addresses(base: Path, monkeypatch) -> None:
    monkeypatch.setenv("DINOV3_DOWNLOAD_BASE", base.as_uri())
    model, tokenizer = torch.hub.load(str(ROOT), NAME, source="local")
    assert not any(module.training for module in model.modules())
    assert tokenizer.vocab_size == model.text_config.vocab_size == 49_408
    assert tokenizer.tokenize(["a photo"]).shape == (1, 77)
    assert not model.text_model.head.linear_projection.weight.any()  # the head file's zeros
    assert model.visual_model.backbone.cls_token.all()  # the backbone file's ones
    assert not model.visual_model.backbone.cls_token.requires_grad
    assert model.text_model.head.linear_projection.weight.requires_grad
    assert model.origin.name == NAME
    # what a non-strict loading would pass over in silence: the keys of the model that the file does not have
    (note,) = model.origin.notes
    assert note.startswith(
        f"{len(model.visual_model.backbone.state_dict())} entries of the backbone are not in file://"
    )
    with pytest.raises(DinoError, match="a442d8f5"):
        torch.hub.load(str(ROOT), NAME, source="local", check_hash=True)


def test_a_head_file_is_loaded_whole_or_not_at_all(tmp_path: Path) -> None:
    from dinov3.hub.published_heads import assemble, read

    text, config = TextConfig.of(**TINY_TEXT), DinoTxtConfig(embed_dim=64)
    reference = tiny()
    backbone = reference.visual_model.backbone
    whole = reference.state_dict()
    head = {k: v for k, v in whole.items() if not k.startswith("visual_model.backbone.")}

    def load(state: dict, name: str = "head.pth") -> DinoTxt:
        torch.save(state, tmp_path / name)
        state, notes = read(str(tmp_path / name))
        return assemble(backbone, state, text, config, source=name, notes=notes)

    model = load(head)
    torch.testing.assert_close(model.get_logits(IMAGES, TOKENS), reference.get_logits(IMAGES, TOKENS))
    assert len(model.origin.notes) == 1  # the backbone's entries

    with pytest.warns(UserWarning, match=r"left over in head.pth: optimizer\.step, text_model\.extra"):
        model = load(head | {"text_model.extra": torch.ones(1), "optimizer.step": torch.ones(1)})
    assert model.origin.notes[0].startswith("left over in head.pth")

    assert "taken off" in load({"model": head}).origin.notes[0]
    other = {k: torch.zeros_like(v) for k, v in whole.items()}
    model = load(other)
    assert "holds a backbone of its own" in model.origin.notes[0]
    assert not model.visual_model.backbone.cls_token.any()
    halved = load({k: v.bfloat16() for k, v in head.items()})
    assert {p.dtype for p in halved.parameters()} == {torch.float32}

    short = {k: v for k, v in head.items() if k != "text_model.backbone.blocks.1.feed_forward.fc1.bias"}
    with pytest.raises(WeightsMismatch, match=r"missing in the file: text_model\.backbone\.blocks\.1\.feed_forward"):
        load(short)
    with pytest.raises(WeightsMismatch, match=r"\(8, 16\) in the model"):
        load(head | {"text_model.backbone.positional_embedding": torch.zeros(9, 16)})
    with pytest.raises(WeightsMismatch, match="pass it as backbone_weights") as caught:
        load(tiny().visual_model.backbone.state_dict())
    assert len(str(caught.value).splitlines()) <= 10


def test_the_vocabulary_must_be_the_text_towers(tmp_path: Path, base: Path, monkeypatch) -> None:
    from dinov3.hub.published_heads import dinov3_vitl16_dinotxt_tet1280d20h24l as hub_function

    with pytest.raises(DinoError, match="gives 537 ids, the text tower knows 49408"):
        hub_function(bpe_path_or_url=GOLDEN / "tiny_bpe.txt.gz")
    monkeypatch.setenv("DINOV3_DOWNLOAD_BASE", tmp_path.as_uri())
    with pytest.raises(DinoError, match="bpe_path_or_url=PATH") as caught:
        hub_function(pretrained=False)
    assert len(str(caught.value).splitlines()) == 1


def test_a_fresh_model_is_whole_and_waits_for_training() -> None:
    from dinov3.hub.published_heads import fresh

    model = fresh(tiny().visual_model.backbone, TextConfig.of(**TINY_TEXT), DinoTxtConfig(embed_dim=64))
    assert model.origin.random
    assert not model.training
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert all(t.isfinite().all() for t in model(IMAGES, TOKENS))
