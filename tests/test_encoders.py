"""Encoders see upright 8-bit pictures at the right scale, and say so when they are not here."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

import tiny
from dreamloom.core.errors import EvaluationError
from dreamloom.evaluation.encoders.clip import ClipEncoder
from dreamloom.evaluation.encoders.computing import PixelEncoder
from dreamloom.evaluation.encoders.loading import load_encoders
from dreamloom.evaluation.encoders.preprocessing import Preprocessing
from dreamloom.evaluation.encoders.store import Missing
from dreamloom.evaluation.encoders.vit import DinoEncoder, Dinov2Encoder

SIDE = 32


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A real CLIP of random weights."""
    folder = tmp_path_factory.mktemp("encoders") / "tiny-clip"
    return make_clip(folder)


def make_clip(folder):
    tokenizer = tiny._tokenizer(pad="<|endoftext|>")
    text = tiny._text_config(tokenizer, width=32, layers=2, act="quick_gelu")
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 8,
        "projection_dim": 32,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=32)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    look = {
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(look))
    return folder


@pytest.fixture(scope="session")
def clip(clip_folder):
    return ClipEncoder(clip_folder)


def picture(seed=0, size=(48, 40)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def test_features_are_unit_vectors_of_the_model(clip, clip_folder):
    found = clip.embed([picture(0), picture(1)])
    assert found.dtype == torch.float32
    assert found.norm(dim=1) == pytest.approx(torch.ones(2))
    model = CLIPModel.from_pretrained(clip_folder)
    square = picture(0, (SIDE, SIDE))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=pixels).pooler_output
    assert torch.allclose(
        clip.embed([square]), torch.nn.functional.normalize(expected, dim=1), atol=1e-5
    )


def test_batches_do_not_change_features(clip):
    pictures = [picture(seed, (40 + seed, 50)) for seed in range(5)]
    alone = torch.cat([clip.embed([one]) for one in pictures])
    assert torch.allclose(clip.embed(pictures), alone, atol=1e-5)
    texts = ["a dog", "a photo of a person in the snow"]
    alone = torch.cat([clip.embed_texts([text]) for text in texts])
    assert torch.allclose(clip.embed_texts(texts), alone, atol=1e-5)


def test_nothing_of_the_callers_precision_leaks_in(clip):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = clip.embed([picture()])
    assert torch.equal(inside, clip.embed([picture()]))


def test_only_rgb_pictures_are_looked_at(clip):
    for mode in ("L", "RGBA", "CMYK", "F"):
        with pytest.raises(ValueError, match=f"must be 8-bit RGB, got {mode}"):
            clip.embed([picture().convert("L" if mode == "F" else "RGB").convert(mode)])


def test_too_long_prompts_are_named_and_cut_off(clip):
    long = "a photo of the person in the snow " * 20
    assert clip.too_long(["a dog", long]) == [long]
    assert clip.embed_texts([long]).shape == (1, 32)


def test_keys_name_encoder_weights_and_preprocessing(clip, clip_folder):
    assert clip.key.startswith("tiny-clip@")
    assert "/bicubic-32-crop-32-norm-" in clip.key
    other = ClipEncoder(clip_folder, preprocessing=Preprocessing(40, 32, (0.5,) * 3, (0.5,) * 3))
    named = ClipEncoder(clip_folder, "somebody/clip@123")
    assert len({clip.key, other.key, named.key}) == 3


def test_an_absent_encoder_is_explained(tmp_path):
    with pytest.raises(EvaluationError, match="cannot be read") as caught:
        ClipEncoder(tmp_path / "nowhere")
    assert caught.value.hint == "Fetch it again, or name another one."


def test_missing_weights_are_never_left_at_random(clip_folder, tmp_path):
    broken = make_clip(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(EvaluationError, match="lacks 1 of the model's weights: visual_projection"):
        ClipEncoder(broken)


def test_dino_reads_the_class_token(tmp_path):
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=16,
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path / "vit")
    recipe = Preprocessing(SIDE, SIDE, (0.5,) * 3, (0.5,) * 3)
    found = DinoEncoder(tmp_path / "vit", "vit@1", recipe).embed([picture()])
    with torch.no_grad():
        expected = model(pixel_values=recipe([picture()])).last_hidden_state[:, 0]
    assert torch.allclose(found, torch.nn.functional.normalize(expected, dim=1), atol=1e-5)


def authors_names(model, layers):
    """Give a ViT's weights the names, and the joined projections, of DINO's authors."""
    ours = model.state_dict()
    theirs = {
        "cls_token": ours["embeddings.cls_token"],
        "pos_embed": ours["embeddings.position_embeddings"],
    }
    for kind in ("weight", "bias"):
        theirs[f"patch_embed.proj.{kind}"] = ours[f"embeddings.patch_embeddings.projection.{kind}"]
        theirs[f"norm.{kind}"] = ours[f"layernorm.{kind}"]
        for layer in range(layers):
            block, at = f"blocks.{layer}", f"layers.{layer}"
            theirs[f"{block}.norm1.{kind}"] = ours[f"{at}.layernorm_before.{kind}"]
            theirs[f"{block}.norm2.{kind}"] = ours[f"{at}.layernorm_after.{kind}"]
            theirs[f"{block}.attn.proj.{kind}"] = ours[f"{at}.attention.o_proj.{kind}"]
            theirs[f"{block}.mlp.fc1.{kind}"] = ours[f"{at}.mlp.fc1.{kind}"]
            theirs[f"{block}.mlp.fc2.{kind}"] = ours[f"{at}.mlp.fc2.{kind}"]
            theirs[f"{block}.attn.qkv.{kind}"] = torch.cat(
                [ours[f"{at}.attention.{letter}_proj.{kind}"] for letter in "qkv"]
            )
    return {name: given.clone() for name, given in theirs.items()}


def lively(model):
    """Let every weight matter: zeros and ones would hide one that is put in the wrong place."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.fixture
def vit_folder(tmp_path):
    config = ViTConfig(
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    model = lively(ViTModel(config, add_pooling_layer=False).eval())
    save_file(authors_names(model, 2), tmp_path / "model.safetensors")
    return tmp_path, model


def test_dino_is_read_under_its_authors_names(vit_folder):
    folder, model = vit_folder
    recipe = Preprocessing(SIDE, SIDE, (0.5,) * 3, (0.5,) * 3)
    found = DinoEncoder(folder, None, recipe).embed([picture(0), picture(1)])
    with torch.no_grad():
        pixels = recipe([picture(0), picture(1)])
        expected = model(pixel_values=pixels).last_hidden_state[:, 0]
    assert torch.allclose(found, torch.nn.functional.normalize(expected, dim=1), atol=1e-5)


def test_dino_under_its_authors_names_lacks_nothing(vit_folder):
    folder, _ = vit_folder
    weights = load_file(folder / "model.safetensors")
    del weights["blocks.1.mlp.fc2.bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(EvaluationError, match=r"blocks\.1\.mlp\.fc2\.bias"):
        DinoEncoder(folder)


def test_dinov2_reads_the_class_token_after_its_last_norm(tmp_path):
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    model = lively(Dinov2Model(config).eval())
    model.save_pretrained(tmp_path / "vit")
    recipe = Preprocessing(28, 28, (0.5,) * 3, (0.5,) * 3)  # smaller than it was trained on
    found = Dinov2Encoder(tmp_path / "vit", "vit@1", recipe).embed([picture()])
    with torch.no_grad():
        hidden = model(pixel_values=recipe([picture()])).last_hidden_state[:, 0]
    assert torch.allclose(found, torch.nn.functional.normalize(hidden, dim=1), atol=1e-5)


def test_loading_leaves_the_callers_rng_alone(vit_folder):
    before = torch.get_rng_state()
    DinoEncoder(vit_folder[0])
    assert torch.equal(torch.get_rng_state(), before)


class Judge:
    key = "judge@1"

    def embed(self, pixels):
        assert 0 <= pixels.min() <= pixels.max() <= 1
        return pixels.mean(dim=(2, 3))


def test_a_judge_of_pixels_gets_pixels():
    encoder = PixelEncoder(Judge(), Preprocessing(8, 8, (0.0,) * 3, (1.0,) * 3))
    found = encoder.embed([Image.new("RGB", (30, 20), (255, 255, 255))])
    assert found[0].tolist() == pytest.approx([1 / math.sqrt(3)] * 3)
    assert encoder.key.startswith("judge@1/bicubic-8-crop-8")


def test_picturebooks_judges_are_missing_without_their_weights(monkeypatch, tmp_path):
    from dreamloom.picturebook import judges

    monkeypatch.setattr(judges, "judges_folder", lambda: tmp_path)
    found = load_encoders("picturebook")
    assert found.kind == "picturebook"
    assert isinstance(found.identity, Missing)
    assert "judges are not installed" in found.identity.reason
    assert set(found.named()) == {"identity", "clip", "dino", "dinov2", "style", "copies"}
    assert all(key.startswith("missing: ") for key in found.keys().values())
    assert found.perceptual == Missing("picturebook's judges have no perceptual distance")


def test_picturebooks_judges_are_used(monkeypatch, clip_folder):
    from dreamloom.picturebook import judges

    class Reader:
        key = "picturebook-reader@1"

        def is_familiar(self, pixels):
            return [bool(one.mean() > 0.5) for one in pixels]

    monkeypatch.setattr(judges, "clip_folder", lambda: clip_folder)
    monkeypatch.setattr(judges, "clip_key", lambda: "picturebook-clip@1")
    monkeypatch.setattr(judges, "load_attribute_reader", Reader)
    monkeypatch.setattr(judges, "load_identity_encoder", Judge)
    found = load_encoders("picturebook")
    assert found.clip.key.startswith("picturebook-clip@1/")
    assert found.identity.key.startswith("judge@1/")
    assert found.style.key.startswith("picturebook-style@1/")
    pictures = [Image.new("RGB", (40, 40), colour) for colour in ("black", "white")]
    assert found.familiar(pictures) == [False, True]


def test_the_tokenizer_is_clips(clip_folder):
    assert CLIPTokenizer.from_pretrained(clip_folder).model_max_length == tiny.TOKENS
