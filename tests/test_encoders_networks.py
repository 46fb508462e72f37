"""Style, copies and perceptual distance read converted weights; small random ones stand in."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from dreamloom.core.errors import EvaluationError
from dreamloom.evaluation.encoders.base import Extractor, PerceptualDistance
from dreamloom.evaluation.encoders.copies import CopyEncoder, CopyNetwork, generalised_mean
from dreamloom.evaluation.encoders.perceptual import LPIPS_PREPROCESSING, LpipsDistance
from dreamloom.evaluation.encoders.preprocessing import Preprocessing
from dreamloom.evaluation.encoders.style import CsdEncoder

SMALL = Preprocessing(32, 32, (0.5,) * 3, (0.5,) * 3)


def noise(seed, size=(40, 36)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def random_weights(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def openai_names(model):
    """Give a CLIP eye's weights the names and the joined projections of OpenAI and CSD."""
    ours = {name.removeprefix("vision_model."): given for name, given in model.state_dict().items()}
    theirs = {
        "class_embedding": ours["embeddings.class_embedding"],
        "positional_embedding": ours["embeddings.position_embedding.weight"],
        "conv1.weight": ours["embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        theirs[f"ln_pre.{kind}"] = ours[f"pre_layrnorm.{kind}"]
        theirs[f"ln_post.{kind}"] = ours[f"post_layernorm.{kind}"]
        for layer in range(2):
            at, block = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
            theirs[f"{block}.ln_1.{kind}"] = ours[f"{at}.layer_norm1.{kind}"]
            theirs[f"{block}.ln_2.{kind}"] = ours[f"{at}.layer_norm2.{kind}"]
            theirs[f"{block}.attn.out_proj.{kind}"] = ours[f"{at}.self_attn.out_proj.{kind}"]
            theirs[f"{block}.mlp.c_fc.{kind}"] = ours[f"{at}.mlp.fc1.{kind}"]
            theirs[f"{block}.mlp.c_proj.{kind}"] = ours[f"{at}.mlp.fc2.{kind}"]
            theirs[f"{block}.attn.in_proj_{kind}"] = torch.cat(
                [ours[f"{at}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            )
    return {f"backbone.{name}": given.clone() for name, given in theirs.items()}


@pytest.fixture(scope="module")
def eye():
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        hidden_act="quick_gelu",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPVisionModel(config).eval()
        for weight in model.parameters():
            weight.data += 0.2 * torch.randn(weight.shape)
    return model


def test_style_is_the_eyes_view_through_its_own_projection(eye, tmp_path):
    projection = random_weights({"last_layer_style": (128, 24)})
    weights = {**openai_names(eye), **projection, "last_layer_content": torch.zeros(128, 24)}
    save_file(weights, tmp_path / "model.safetensors")
    encoder = CsdEncoder(tmp_path, "csd@1", SMALL)
    found = encoder.embed([noise(0), noise(1)])
    with torch.no_grad():
        seen = eye(pixel_values=SMALL([noise(0), noise(1)])).pooler_output
    expected = nn.functional.normalize(seen @ projection["last_layer_style"], dim=1)
    assert torch.allclose(found, expected, atol=1e-5)
    assert encoder.key == f"csd@1/{SMALL.key}"
    assert isinstance(encoder, Extractor)


def test_style_without_a_projection_is_refused(eye, tmp_path):
    save_file(openai_names(eye), tmp_path / "model.safetensors")
    with pytest.raises(EvaluationError, match="last_layer_style"):
        CsdEncoder(tmp_path)


@pytest.fixture(scope="module")
def copy_network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = CopyNetwork(stem=4, features=16).eval()
        for norm in (one for one in network.modules() if isinstance(one, nn.BatchNorm2d)):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
    return network


@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_copies_are_read_under_their_authors_names(copy_network, tmp_path, prefix):
    weights = {f"{prefix}{name}": given for name, given in copy_network.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    found = CopyEncoder(tmp_path, "sscd@1", SMALL).embed([noise(0), noise(1)])
    with torch.no_grad():
        expected = nn.functional.normalize(copy_network(SMALL([noise(0), noise(1)])), dim=1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_published_network_is_a_resnet_50():
    # ResNet-50 has 25 557 032 weights, 2 049 000 of them in its head of 1000 classes.
    with torch.device("meta"):
        network = CopyNetwork()
    total = sum(weight.numel() for weight in network.parameters())
    assert total == 25_557_032 - 2_049_000 + 2048 * 512 + 512
    names = set(network.state_dict())
    assert {"layer1.0.downsample.0.weight", "layer4.2.conv3.weight", "fc.bias"} <= names


def test_copies_that_lack_a_layer_are_refused(copy_network, tmp_path):
    weights = dict(copy_network.state_dict())
    del weights["layer3.5.bn2.running_var"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(EvaluationError, match=r"layer3\.5\.bn2\.running_var"):
        CopyEncoder(tmp_path)


def test_the_generalised_mean_lies_between_mean_and_maximum():
    features = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) + 0.1
    mean, largest = features.mean(dim=(2, 3)), features.amax(dim=(2, 3))
    assert torch.allclose(generalised_mean(features, 1.0), mean, atol=1e-6)
    cubic = generalised_mean(features)
    assert ((mean < cubic) & (cubic < largest)).all()
    by_hand = (features[0, 0].flatten().double() ** 3).mean() ** (1 / 3)
    assert float(cubic[0, 0]) == pytest.approx(float(by_hand), rel=1e-5)


LPIPS_SHAPES = {
    "net.slice1.0.weight": (6, 3, 11, 11),
    "net.slice1.0.bias": (6,),
    "net.slice2.3.weight": (7, 6, 5, 5),
    "net.slice2.3.bias": (7,),
    "net.slice3.6.weight": (8, 7, 3, 3),
    "net.slice3.6.bias": (8,),
    "net.slice4.8.weight": (5, 8, 3, 3),
    "net.slice4.8.bias": (5,),
    "net.slice5.10.weight": (5, 5, 3, 3),
    "net.slice5.10.bias": (5,),
    **{f"lin{n}.model.1.weight": (1, width, 1, 1) for n, width in enumerate((6, 7, 8, 5, 5))},
}


@pytest.fixture(scope="module")
def lpips_weights():
    weights = random_weights(LPIPS_SHAPES)
    return {name: given.abs() if "lin" in name else given / 5 for name, given in weights.items()}


def slow_lpips(left, right, weights):
    """The same step by step, from modules and with the authors' own two steps of normalising."""
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    seen = []
    for image in (left, right):
        side = LPIPS_PREPROCESSING.resize_px
        pixels = torch.from_numpy(np.array(image.resize((side, side)))).permute(2, 0, 1)[None]
        found, layers = ((pixels / 127.5 - 1) - shift) / scale, []
        for name, stride, padding, halve in (
            ("net.slice1.0", 4, 2, False),
            ("net.slice2.3", 1, 2, True),
            ("net.slice3.6", 1, 1, True),
            ("net.slice4.8", 1, 1, False),
            ("net.slice5.10", 1, 1, False),
        ):
            found = nn.MaxPool2d(3, 2)(found) if halve else found
            kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
            layer = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2], stride, padding)
            layer.weight.data, layer.bias.data = kernel, bias
            found = torch.relu(layer(found))
            layers.append(found / (found.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        seen.append(layers)
    total = 0.0
    for number, (ours, theirs) in enumerate(zip(*seen, strict=True)):
        weight = weights[f"lin{number}.model.1.weight"]
        total += float(((ours - theirs).pow(2) * weight).sum(1).mean())
    return total


def test_perceptual_distance_is_that_of_the_equation(lpips_weights, tmp_path):
    save_file(lpips_weights, tmp_path / "model.safetensors")
    judge = LpipsDistance(tmp_path, "lpips@1")
    judge.batch = 2
    pictures = [noise(seed, (256, 256)) for seed in range(2)] + [Image.new("RGB", (256, 256))]
    found = judge.distances(pictures)
    with torch.no_grad():
        for one, other in ((0, 1), (0, 2), (1, 2)):
            expected = slow_lpips(pictures[one], pictures[other], lpips_weights)
            assert float(found[one, other]) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(found, found.T)
    assert found.diagonal().tolist() == [0, 0, 0]
    assert isinstance(judge, PerceptualDistance)
    assert judge.key == f"lpips@1/{LPIPS_PREPROCESSING.key}"


def test_pictures_of_several_sizes_can_be_compared(lpips_weights, tmp_path):
    save_file(lpips_weights, tmp_path / "model.safetensors")
    found = LpipsDistance(tmp_path).distances([noise(0, (300, 200)), noise(0, (40, 60))])
    assert found.isfinite().all()
    assert found[0, 1] > 0
    assert LpipsDistance(tmp_path).distances([]).shape == (0, 0)


def test_perceptual_weights_that_lack_a_layer_are_refused(lpips_weights, tmp_path):
    weights = {name: given for name, given in lpips_weights.items() if name[:4] != "lin3"}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(EvaluationError, match=r"lin3\.model\.1\.weight"):
        LpipsDistance(tmp_path)
