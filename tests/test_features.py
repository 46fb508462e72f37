"""Encoders see upright 8-bit pictures at the right scale, and say so when they are not here."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

import tiny
from dreamloom import features
from dreamloom.errors import EvaluationError
from dreamloom.features import (
    CLIP_PREPROCESSING,
    CLIP_VIT_B_32,
    DINO_PREPROCESSING,
    DINO_VIT_S_16,
    ClipEncoder,
    DinoEncoder,
    Missing,
    Pinned,
    PixelEncoder,
    Preprocessing,
    load_encoders,
)

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


@pytest.mark.parametrize("recipe", [CLIP_PREPROCESSING, DINO_PREPROCESSING])
def test_black_and_white_arrive_where_the_recipe_says(recipe):
    for level in (0, 255):
        found = recipe([Image.new("RGB", (300, 400), (level,) * 3)])[0, :, 5, 5].tolist()
        expected = [
            (level / 255 - mean) / deviation
            for mean, deviation in zip(recipe.mean, recipe.deviation, strict=True)
        ]
        assert found == pytest.approx(expected, abs=1e-5)
        assert all(abs(value) < 2.7 for value in found)


def test_pictures_are_cropped_not_squashed():
    wide = Image.new("RGB", (400, 100), "black")
    wide.paste("white", (140, 0, 260, 100))
    shown = Preprocessing(50, 50, (0.0,) * 3, (1.0,) * 3)([wide])
    assert shown.min() == 1.0
    assert Preprocessing(60, 50, (0.0,) * 3, (1.0,) * 3)([wide]).shape == (1, 3, 50, 50)


def test_shrinking_is_smooth():
    stripes = np.zeros((320, 320, 3), np.uint8)
    stripes[::2] = 255
    shown = Preprocessing(32, 32, (0.0,) * 3, (1.0,) * 3)([Image.fromarray(stripes)])
    assert shown[..., 4:-4, :].std() < 0.02  # without smoothing, only black or white lines survive


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ((32, 40, (0.5,) * 3, (0.5,) * 3), "a crop must be 1 px to the resized side, got 40 of 32"),
        ((32, 32, (0.5,) * 3, (0.01, 1.0, 1.0)), "not meant for pixels in"),
        ((32, 32, (123.0, 117.0, 104.0), (58.0, 57.0, 57.0)), None),
        ((32, 32, (0.5,) * 3, (0.0, 1.0, 1.0)), "not meant for pixels in"),
    ],
)
def test_recipes_for_another_scale_are_refused(recipe, message):
    if message is None:
        # A recipe for 0 to 255 stays within bounds, but lets pictures differ by a hundredth only.
        with pytest.raises(ValueError, match="leave hardly any contrast"):
            Preprocessing(*recipe)
        return
    with pytest.raises(ValueError, match=message):
        Preprocessing(*recipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "has no 'size'"),
        ({"size": 32}, "has no 'image_mean'"),
        ({"size": {"height": 32, "width": 40}}, "one number for both sides"),
    ],
)
def test_bad_preprocessor_files_are_explained(tmp_path, settings, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        Preprocessing.read(tmp_path)


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


@pytest.fixture
def empty_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(
        features, "snapshot_download", lambda *_, **options: _look_up(tmp_path, options)
    )
    return tmp_path


def _look_up(folder, options):
    assert options["local_files_only"] is True
    if not any(folder.iterdir()):
        raise FileNotFoundError("no snapshot")
    return str(folder)


def test_standard_encoders_that_are_not_here_are_missing(empty_hub):
    found = load_encoders("standard")
    assert found.identity == Missing("there is no face encoder yet for photographs")
    for encoder, pinned in ((found.clip, CLIP_VIT_B_32), (found.dino, DINO_VIT_S_16)):
        assert isinstance(encoder, Missing)
        assert pinned.name in encoder.reason
        assert f"hf download {pinned.repository} --revision {pinned.revision}" in encoder.reason
    assert all(key.startswith("missing: ") for key in found.keys().values())


def test_pickles_are_refused(empty_hub):
    (empty_hub / "pytorch_model.bin").write_bytes(b"")
    found = Pinned("somebody/encoder", "0" * 40, "MIT").folder()
    assert isinstance(found, Missing)
    assert "reads weights from safetensors only" in found.reason


def test_standard_encoders_that_are_here_are_used(empty_hub, clip_folder, monkeypatch):
    (empty_hub / "model.safetensors").write_bytes(b"")
    tiny_clip = ClipEncoder(clip_folder)
    made = []
    monkeypatch.setattr(features, "ClipEncoder", lambda *given: made.append(given) or tiny_clip)
    monkeypatch.setattr(
        features, "DinoEncoder", lambda *given, device: made.append(given) or tiny_clip
    )
    assert load_encoders("standard").clip is tiny_clip
    assert [given[1] for given in made] == [CLIP_VIT_B_32.name, DINO_VIT_S_16.name]


def test_revisions_are_pinned():
    for pinned in (CLIP_VIT_B_32, DINO_VIT_S_16):
        assert len(pinned.revision) == 40
        int(pinned.revision, 16)


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


def test_picturebooks_judges_are_used(monkeypatch, clip_folder):
    from dreamloom.picturebook import judges

    class Reader:
        def is_familiar(self, pixels):
            return [bool(one.mean() > 0.5) for one in pixels]

    monkeypatch.setattr(judges, "clip_folder", lambda: clip_folder)
    monkeypatch.setattr(judges, "clip_key", lambda: "picturebook-clip@1")
    monkeypatch.setattr(judges, "load_attribute_reader", Reader)
    monkeypatch.setattr(judges, "load_identity_encoder", Judge)
    found = load_encoders("picturebook")
    assert found.clip.key.startswith("picturebook-clip@1/")
    assert found.identity.key.startswith("judge@1/")
    pictures = [Image.new("RGB", (40, 40), colour) for colour in ("black", "white")]
    assert found.familiar(pictures) == [False, True]


def test_the_tokenizer_is_clips(clip_folder):
    assert CLIPTokenizer.from_pretrained(clip_folder).model_max_length == tiny.TOKENS
