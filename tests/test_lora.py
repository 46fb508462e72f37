"""Adapter files: what is read is what was written, and what others apply is what we say."""

import json
import pickle
import re
import warnings

import jaxtyping
import peft
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dreamloom.core.errors import AdapterError
from dreamloom.core.run_folder import file_sha256
from dreamloom.lora.adapter import Adapter, Layer, PeftState
from dreamloom.lora.peftconfig import make_dora
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.summary import describe_adapter
from dreamloom.lora.token_embeddings import list_token_files
from dreamloom.lora.writing import write_adapter

CONFIG_KEY = "lora_adapter_metadata"


def random_layer(weight, rank, rng, scale=0.1):
    """A random update for a layer whose weight is this one."""
    ones = (1,) * (weight.ndim - 2)
    return Layer(
        scale * torch.randn(rank, *weight.shape[1:], generator=rng),
        scale * torch.randn(weight.shape[0], rank, *ones, generator=rng),
    )


@pytest.fixture
def small():
    """Three layers of two components, linear and convolutional, of different ranks."""
    rng = torch.Generator().manual_seed(1)
    shapes = {
        "unet.mid.to_q": ((6, 4), 2),
        "unet.mid.conv1": ((5, 3, 3, 3), 3),
        "text_encoder.layers.0.q_proj": ((4, 4), 2),
    }
    layers = {name: random_layer(torch.empty(s), rank, rng) for name, (s, rank) in shapes.items()}
    return Adapter(layers, {"dreamloom.subject": "rraj person", "note": "ü 🐶"})


def assert_equal(one, other):
    assert one.layers.keys() == other.layers.keys()
    for name, layer in one.layers.items():
        assert torch.equal(layer.down, other.layers[name].down)
        assert torch.equal(layer.up, other.layers[name].up)
    assert one.metadata == other.metadata


# ------------------------------------------------------------------ in memory


@given(
    outputs=st.integers(1, 5),
    inputs=st.integers(1, 5),
    rank=st.integers(1, 7),
    kernel=st.sampled_from([(), (1, 1), (3, 3), (1, 3)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_the_norm_is_that_of_the_dense_updates(outputs, inputs, rank, kernel, seed):
    rng = torch.Generator().manual_seed(seed)
    weight = torch.empty(outputs, inputs, *kernel)
    layers = {f"unet.{n}": random_layer(weight, rank, rng, scale=1.0) for n in range(2)}
    updates = [layer.update() for layer in layers.values()]
    assert [update.shape for update in updates] == [weight.shape] * 2
    dense = torch.stack(updates).double().square().sum().sqrt().item()
    assert Adapter(layers).norm() == pytest.approx(dense, rel=1e-5)


def test_an_update_that_cancels_has_no_norm():
    rng = torch.Generator().manual_seed(3)
    layer = random_layer(torch.empty(50, 40), 8, rng, scale=100.0)
    gone = Layer(torch.cat([layer.down, layer.down]), torch.cat([layer.up, -layer.up], dim=1))
    assert (
        Adapter({"unet.time_embedding.linear_1": gone}).norm()
        < 1e-6 * Adapter({"unet.time_embedding.linear_1": layer}).norm()
    )
    assert Adapter({"unet.time_embedding.linear_1": Layer(layer.down, 0 * layer.up)}).norm() == 0.0


def test_the_update_of_a_convolution_is_down_then_up():
    rng = torch.Generator().manual_seed(2)
    layer = random_layer(torch.empty(5, 3, 3, 3), 2, rng, scale=1.0)
    picture = torch.randn(1, 3, 6, 6, generator=rng)
    through = nn.functional.conv2d(nn.functional.conv2d(picture, layer.down), layer.up)
    torch.testing.assert_close(nn.functional.conv2d(picture, layer.update()), through)


def test_factors_of_different_ranks_are_refused():
    with pytest.raises(jaxtyping.TypeCheckError):
        Layer(torch.zeros(2, 4), torch.zeros(5, 3))
    # Outside of tests nothing checks shapes at each call, so the class does it itself.
    layer = Layer(torch.zeros(2, 4), torch.zeros(5, 2))
    object.__setattr__(layer, "up", torch.zeros(5, 3))
    with pytest.raises(ValueError, match="up has 3, down 2"):
        layer.__post_init__()


def test_an_adapter_counts_itself(small):
    assert small.ranks == {
        "unet.mid.to_q": 2,
        "unet.mid.conv1": 3,
        "text_encoder.layers.0.q_proj": 2,
    }
    assert small.parameters == 2 * (6 + 4) + 3 * (5 + 27) + 2 * (4 + 4)


def test_a_story_is_added_to_without_changing_the_old_one(small):
    told = small.with_metadata(note="new", base="picturebook")
    assert told.metadata == {
        "dreamloom.subject": "rraj person",
        "note": "new",
        "base": "picturebook",
    }
    assert small.metadata["note"] == "ü 🐶"
    assert told.layers is small.layers


# ------------------------------------------------------------------ our own files


def header_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_what_is_written_is_read_back(tmp_path, small):
    path = tmp_path / "deep" / "a.safetensors"
    write_adapter(path, small)
    assert_equal(read_adapter(path), small)
    # And once more, so that nothing piles up in the header.
    write_adapter(tmp_path / "again.safetensors", read_adapter(path))
    assert header_of(tmp_path / "again.safetensors") == header_of(path)


def test_half_precision_is_rounded_once(tmp_path, small):
    write_adapter(tmp_path / "half.safetensors", small, torch.float16)
    for name, layer in read_adapter(tmp_path / "half.safetensors").layers.items():
        assert layer.up.dtype == torch.float32
        assert torch.equal(layer.up, small.layers[name].up.half().float())


def with_value(adapter, value):
    broken = {name: Layer(la.down.clone(), la.up.clone()) for name, la in adapter.layers.items()}
    broken["unet.mid.conv1"].down[0, 0, 0, 0] = value
    return Adapter(broken)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (float("nan"), torch.float32),
        (float("inf"), torch.float32),
        (-float("inf"), torch.float32),
        (1e6, torch.float16),  # finite until it is rounded
    ],
)
def test_what_is_not_finite_is_not_written(tmp_path, small, value, dtype):
    path = tmp_path / "a.safetensors"
    with pytest.raises(AdapterError, match=r"update of unet\.mid\.conv1 is not finite") as caught:
        write_adapter(path, with_value(small, value), dtype)
    assert caught.value.hint == "Nothing was written."
    assert list(tmp_path.iterdir()) == []
    write_adapter(path, small)
    before = path.read_bytes()
    with pytest.raises(AdapterError):
        write_adapter(path, with_value(small, value), dtype)
    assert path.read_bytes() == before


def test_nothing_is_not_written(tmp_path):
    with pytest.raises(AdapterError, match="no layer to write"):
        write_adapter(tmp_path / "a.safetensors", Adapter({}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a", "a.safetensors.part"])
def test_only_safetensors_are_written(tmp_path, small, name):
    with pytest.raises(AdapterError, match=re.escape(f"{name} does not end in .safetensors")):
        write_adapter(tmp_path / name, small)
    assert list(tmp_path.iterdir()) == []


def test_a_file_describes_itself_in_plain_values(tmp_path, small):
    path = tmp_path / "a.safetensors"
    write_adapter(path, small)
    text = small.layers["text_encoder.layers.0.q_proj"]
    share = text.update().norm().item() ** 2 / small.norm() ** 2
    assert describe_adapter(path) == {
        "file": str(path),
        "format": "peft",
        "readers": "diffusers, with the same base",
        "stored": {"LoRA": 3},
        "layers": 3,
        "components": {
            "unet": {"layers": 2, "energy": pytest.approx(1 - share)},
            "text_encoder": {"layers": 1, "energy": pytest.approx(share)},
        },
        "ranks": {"2": 2, "3": 1},
        "parameters": small.parameters,
        "norm": pytest.approx(small.norm()),
        "metadata": small.metadata,
    }
    json.dumps(describe_adapter(path))


# ------------------------------------------------------------------ files that are refused


def refusal(path, named=None):
    with pytest.raises(AdapterError) as caught:
        read_adapter(path)
    assert str(named or path) in caught.value.problem
    assert caught.value.hint
    return caught.value


class Bomb:
    """What a pickle can do to whoever opens it."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.ckpt", "a.pth", "a.pkl", "A.PT"])
def test_a_pickle_is_refused_by_name_before_it_is_opened(tmp_path, name):
    path, target = tmp_path / name, tmp_path / "opened"
    path.write_bytes(pickle.dumps(Bomb(target)))
    error = refusal(path)
    assert f"is a pickle ({path.suffix})" in error.problem
    assert ".safetensors" in error.hint
    assert not target.exists()
    path.unlink()
    assert "is a pickle" in refusal(path).problem


def test_a_pickle_under_a_false_name_is_not_opened_as_one(tmp_path):
    path, target = tmp_path / "a.safetensors", tmp_path / "opened"
    path.write_bytes(pickle.dumps(Bomb(target)))
    assert "it is a pickle under another name" in refusal(path).problem
    assert not target.exists()
    torch.save({"a": torch.ones(1)}, path)
    assert "it is a pickle under another name" in refusal(path).problem


def test_a_folder_and_nothing_at_all_are_told_apart(tmp_path):
    assert "is a folder without adapter_config.json" in refusal(tmp_path).problem
    assert "There is no adapter at" in refusal(tmp_path / "a.safetensors").problem


@pytest.mark.parametrize(
    ("length", "reason"),
    [
        (0, "it is empty"),
        (7, "its header claims"),
        (100, "its header claims"),
        (-1, "its header promises"),
    ],
)
def test_a_cut_off_file_is_told_as_such(tmp_path, small, length, reason):
    path = tmp_path / "a.safetensors"
    write_adapter(path, small)
    path.write_bytes(path.read_bytes()[:length])
    error = refusal(path)
    assert f"cannot be read as safetensors: {reason}" in error.problem
    assert "download it again" in error.hint


def rewrite_header(path, change):
    """Change a file's header, and keep its length right."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.dumps(change(json.loads(whole[8 : 8 + length]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])


def stretch(header):
    """Say that the last tensor is longer than it is."""
    entry = max(header.values(), key=lambda e: e.get("data_offsets", [0, 0])[1])
    entry["data_offsets"][1] += 4
    return header


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: p.write_bytes((2**40).to_bytes(8, "little") + p.read_bytes()[8:]), "claims"),
        (lambda p: p.write_bytes((0).to_bytes(8, "little") + p.read_bytes()[8:]), "claims"),
        (lambda p: p.write_bytes((9).to_bytes(8, "little") + p.read_bytes()[8:]), "makes no sense"),
        (lambda p: rewrite_header(p, lambda h: {**h, "more": 1}), "makes no sense"),
        (lambda p: rewrite_header(p, lambda h: [1]), "makes no sense"),
        (lambda p: rewrite_header(p, stretch), "promises"),
        (lambda p: p.write_bytes(p.read_bytes() + b"more"), "promises"),
    ],
)
def test_a_header_that_lies_is_told_as_such(tmp_path, small, damage, reason):
    path = tmp_path / "a.safetensors"
    write_adapter(path, small)
    damage(path)
    error = refusal(path)
    assert "cannot be read as safetensors: its header" in error.problem
    assert reason in error.problem
    assert "again" in error.hint


def test_a_header_that_begins_like_a_pickle_is_none(tmp_path, small):
    path = tmp_path / "a.safetensors"
    write_adapter(path, small)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, wanted = whole[8 : 8 + length], 0x010480
    path.write_bytes(wanted.to_bytes(8, "little") + header.ljust(wanted) + whole[8 + length :])
    assert path.read_bytes().startswith(b"\x80\x04")
    assert_equal(read_adapter(path), small)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_finite_is_not_read(tmp_path, value, dtype):
    tensors = {key: tensor.to(dtype, copy=True) for key, tensor in PAIR.items()}
    tensors["unet.time_embedding.linear_1.lora_A.weight"][1, 3] = value
    save_file(tensors, tmp_path / "a.safetensors")
    assert "unet.time_embedding.linear_1 in" in refusal(tmp_path / "a.safetensors").problem
    assert "holds NaN or infinity" in refusal(tmp_path / "a.safetensors").problem


def test_a_file_without_tensors_is_refused(tmp_path):
    save_file({}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert "it holds no layer" in refusal(tmp_path / "a.safetensors").problem


PAIR = {
    "unet.time_embedding.linear_1.lora_A.weight": torch.ones(2, 4),
    "unet.time_embedding.linear_1.lora_B.weight": torch.ones(3, 2),
}


@pytest.mark.parametrize(
    "keys",
    [
        ["lora_unet_mid_block_to_q.lora_down.weight", "lora_unet_mid_block_to_q.lora_up.weight"],
        ["unet.time_embedding.linear_2.lora_magnitude_vector"],
        ["unet.time_embedding.linear_2.lora_A.weight"],
        ["unet.time_embedding.linear_2.alpha"],
        ["vae.y.lora_A.weight", "vae.y.lora_B.weight"],
        ["unet.time_embedding.linear_2.hada_w1_a"],
        ["unet.time_embedding.linear_2.lokr_w1", "unet.time_embedding.linear_2.lokr_t2"],
        ["unet.time_embedding.linear_1.diff"],
    ],
)
def test_unknown_keys_are_listed_and_never_left_out_in_silence(tmp_path, keys):
    save_file({**PAIR, **{key: torch.ones(1) for key in keys}}, tmp_path / "a.safetensors")
    problem = refusal(tmp_path / "a.safetensors").problem
    assert "unknown keys" in problem
    assert all(key in problem for key in keys)


def test_many_unknown_keys_are_shortened(tmp_path):
    save_file({f"model.{n}": torch.ones(1) for n in range(9)}, tmp_path / "a.safetensors")
    problem = refusal(tmp_path / "a.safetensors").problem
    assert "9 unknown keys (model.0, model.1, model.2 …)" in problem


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ((2, 4), (3, 5)),
        ((2, 4), (3, 2, 1, 1)),
        ((2, 4, 3, 3), (3, 2, 3, 3)),
        ((4,), (3, 1)),
        ((0, 4), (3, 0)),
    ],
)
def test_factors_that_do_not_fit_together_are_refused(tmp_path, down, up):
    tensors = {
        "unet.time_embedding.linear_1.lora_A.weight": torch.ones(down),
        "unet.time_embedding.linear_1.lora_B.weight": torch.ones(up),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    problem = refusal(tmp_path / "a.safetensors").problem
    assert "factors of unet.time_embedding.linear_1" in problem
    assert str(down) in problem
    assert str(up) in problem


def test_a_layer_that_is_named_twice_is_refused(tmp_path):
    double = {"unet.time_embedding.linear_1.lora.down.weight": torch.ones(2, 4)}
    save_file({**PAIR, **double}, tmp_path / "a.safetensors")
    assert "names a layer's factors twice" in refusal(tmp_path / "a.safetensors").problem


@pytest.mark.parametrize(
    "header",
    [
        "{half",
        "[1]",
        '{"unet.lora_alpha": "strong"}',
        '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"(": 2}}',
        '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"x": "strong"}}',
        '{"unet.lora_alpha": 4, "unet.alpha_pattern": [1]}',
    ],
)
def test_an_unreadable_configuration_is_not_taken_for_none(tmp_path, header):
    save_file(PAIR, tmp_path / "a.safetensors", metadata={CONFIG_KEY: header})
    error = refusal(tmp_path / "a.safetensors")
    assert "configuration in the header" in error.problem
    assert "strength" in error.hint


# ------------------------------------------------------------------ scales of others' files


@pytest.mark.parametrize(
    ("alphas", "config", "scale"),
    [
        (None, None, 1.0),
        (6.0, None, 3.0),
        (None, {"unet.lora_alpha": 6}, 3.0),
        (None, {"unet.lora_alpha": 6, "unet.use_rslora": True}, 6 / 2**0.5),
        (None, {"text_encoder.lora_alpha": 6}, 1.0),
        (None, {"unet.lora_alpha": None}, 1.0),
        (None, {"unet.lora_alpha": 6, "unet.alpha_pattern": {"linear_1": 1}}, 0.5),
        (None, {"unet.lora_alpha": 6, "unet.alpha_pattern": None}, 3.0),
        (5.0, {"unet.lora_alpha": 6}, 2.5),
    ],
)
def test_scales_are_folded_in(tmp_path, alphas, config, scale):
    tensors = dict(PAIR)
    if alphas is not None:
        tensors["unet.time_embedding.linear_1.alpha"] = torch.tensor(alphas)
    metadata = None if config is None else {CONFIG_KEY: json.dumps(config)}
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    layer = read_adapter(tmp_path / "a.safetensors").layers["unet.time_embedding.linear_1"]
    torch.testing.assert_close(layer.update(), scale * torch.full((3, 4), 2.0))


@pytest.mark.parametrize("spelling", ["lora_linear_layer.{}", "lora.{}"])
def test_the_older_spellings_of_diffusers_are_read(tmp_path, spelling):
    tensors = {
        f"text_encoder_2.text_projection.{spelling.format('down')}.weight": torch.ones(2, 4),
        f"text_encoder_2.text_projection.{spelling.format('up')}.weight": torch.ones(3, 2),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    layer = read_adapter(tmp_path / "a.safetensors").layers["text_encoder_2.text_projection"]
    assert torch.equal(layer.update(), torch.full((3, 4), 2.0))


class Blocks(nn.Module):
    """Names that are ends of other names: PEFT's patterns mean all of them."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.conv1 = nn.Conv2d(2, 3, 3)
        self.deep = nn.ModuleDict({"fc": nn.Linear(4, 3), "conv1": nn.Conv2d(2, 3, 3)})
        self.deeper = nn.ModuleDict({"deep": nn.ModuleDict({"fc": nn.Linear(4, 3)})})


LAYERS = ("fc", "conv1", "deep.fc", "deep.conv1", "deeper.deep.fc")
PATTERNS = ("fc", "^fc", "deep.fc", "^deep.fc", r"deep\..*", "conv1", "^conv1", "f.", ".*", "c")


def peft_updates(model):
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if name in LAYERS
    }


@given(
    ranks=st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 5), max_size=3),
    alphas=st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 9), max_size=3),
    alpha=st.integers(1, 9),
    use_rslora=st.booleans(),
)
@settings(max_examples=25)
def test_patterns_mean_what_they_mean_to_peft(tmp_path_factory, ranks, alphas, alpha, use_rslora):
    path = tmp_path_factory.getbasetemp() / "patterns.safetensors"
    config = LoraConfig(
        r=2,
        lora_alpha=alpha,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=use_rslora,
        target_modules=[*LAYERS],
        init_lora_weights=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a pattern matches no layer
        model = inject_adapter_in_model(config, Blocks())
    state = get_peft_model_state_dict(model)
    header = {
        f"unet.{key}": sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }
    save_file(
        {f"unet.{key}": value.contiguous() for key, value in state.items()},
        path,
        metadata={CONFIG_KEY: json.dumps(header)},
    )
    found = read_adapter(path).layers
    expected = peft_updates(model)
    assert found.keys() == {f"unet.{name}" for name in expected}
    for name, update in expected.items():
        torch.testing.assert_close(found[f"unet.{name}"].update(), update, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("common", LAYERS)
def test_our_own_patterns_mean_one_layer_each(tmp_path, common):
    """The header alone must give PEFT every rank and alpha, whichever names are ends of others."""
    ranks = {name: 2 + number for number, name in enumerate(LAYERS)}
    rng = torch.Generator().manual_seed(4)
    weights = {name: Blocks().get_submodule(name).weight for name in LAYERS}
    layers = {f"unet.{n}": random_layer(weights[n], ranks[n], rng) for n in LAYERS}
    # One more layer of the same rank makes that rank the common one.
    layers[f"unet.{common}"] = random_layer(weights[common], ranks[LAYERS[0]], rng)
    write_adapter(tmp_path / "a.safetensors", Adapter(layers))
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()[CONFIG_KEY])
        state = {k.removeprefix("unet."): file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    config = LoraConfig(**{key.removeprefix("unet."): value for key, value in header.items()})
    model = inject_adapter_in_model(config, Blocks(), state_dict=state)
    peft.set_peft_model_state_dict(model, state)
    updates = peft_updates(model)
    assert updates.keys() == set(LAYERS)
    for name, update in updates.items():
        torch.testing.assert_close(update, layers[f"unet.{name}"].update(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ beside diffusers


@pytest.fixture(scope="module")
def pipeline(tiny_sdxl):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def components(pipeline):
    """The parts that adapters change; every adapter is taken off after the test."""
    yield {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    pipeline.unload_lora_weights()


def pick_layers(components):
    """Linear and convolutional layers of each component, among them names with common ends."""
    wanted = re.compile(
        r"to_q|to_out\.0|ff\.net\.0\.proj|conv1|conv_shortcut|conv_in|[qkv]_proj|out_proj|fc1|fc2"
    )
    return {
        f"{component}.{name}": module.weight
        for component, owner in components.items()
        for name, module in owner.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and wanted.search(name)
    }


@pytest.fixture
def mixed(components):
    """An adapter for the tiny base in which hardly two layers have the same rank."""
    rng = torch.Generator().manual_seed(11)
    return Adapter(
        {
            name: random_layer(weight, 1 + number % 5, rng)
            for number, (name, weight) in enumerate(pick_layers(components).items())
        }
    )


def weights_of(components):
    return {
        f"{component}.{name}".replace(".base_layer", ""): weight.detach().clone()
        for component, owner in components.items()
        for name, weight in owner.named_parameters()
        if "lora_" not in name
    }


def test_diffusers_applies_the_updates_that_we_say(tmp_path, pipeline, components, mixed):
    assert {len(layer.update().shape) for layer in mixed.layers.values()} == {2, 4}
    assert {name.split(".")[0] for name in mixed.layers} == set(components)
    write_adapter(tmp_path / "a.safetensors", mixed)
    weight = -0.5
    before = weights_of(components)
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="a")
    pipeline.set_adapters(["a"], [weight])
    pipeline.fuse_lora(components=[*components])
    after = weights_of(components)
    pipeline.unfuse_lora(components=[*components])
    assert after.keys() == before.keys()
    for name, original in before.items():
        layer = mixed.layers.get(name.removesuffix(".weight"))
        change = 0 if layer is None else weight * layer.update()
        torch.testing.assert_close(after[name], original + change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("convert", [dict, convert_state_dict_to_diffusers])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_files_of_diffusers_are_read_at_their_strength(
    tmp_path, pipeline, components, convert, use_rslora
):
    torch.manual_seed(12)
    config = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "use_rslora": use_rslora}
    components["unet"].add_adapter(
        LoraConfig(
            target_modules=["to_q", "to_out.0", "conv1"],
            rank_pattern={"mid_block.*conv1": 3, "attn2.to_q": 2},
            alpha_pattern={"mid_block.*conv1": 8, "^down_blocks.1.*to_q": 1},
            **config,
        )
    )
    components["text_encoder"].add_adapter(LoraConfig(target_modules=["q_proj"], **config))
    taught = {name: components[name] for name in ("unet", "text_encoder")}
    states = {
        f"{name}_lora_layers": convert(get_peft_model_state_dict(owner))
        for name, owner in taught.items()
    }
    pipeline.save_lora_weights(tmp_path, **states, **_collate_lora_metadata(taught))
    found = read_adapter(tmp_path / "pytorch_lora_weights.safetensors").layers
    expected = {
        f"{component}.{name}": module.get_delta_weight("default").detach()
        for component, owner in taught.items()
        for name, module in owner.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(found[name].update(), update, rtol=1e-5, atol=1e-6)


def test_equal_adapters_are_equal_files(tmp_path):
    layers = {"unet.a": Layer(torch.ones(2, 3), torch.ones(4, 2))}
    story = {f"entry {number}": "ü" * number for number in range(12)}
    names = [tmp_path / f"{number}.safetensors" for number in range(4)]
    for name in names:
        write_adapter(name, Adapter(layers, story))
    assert len({name.read_bytes() for name in names}) == 1
    assert dict(read_adapter(names[0]).metadata) == story


# ------------------------------------------------------------------ new words


def with_words(adapter, seed=0):
    rng = torch.Generator().manual_seed(seed)
    words = {
        word: {
            "text_encoder": torch.randn(count, 4, generator=rng),
            "text_encoder_2": torch.randn(count, 6, generator=rng),
        }
        for word, count in (("<me>", 1), ("ünï", 2))
    }
    return Adapter(adapter.layers, adapter.metadata, words)


def test_new_words_lie_beside_the_adapter_and_are_found_again(tmp_path, small):
    adapter = with_words(small)
    path = tmp_path / "me.safetensors"
    write_adapter(path, adapter)
    files = [tmp_path / "me-tokens" / name for name in ("me.safetensors", "ünï.safetensors")]
    assert list_token_files(path) == files
    # ComfyUI and AUTOMATIC1111 call a word by its file, and look for one word under these names.
    for file, found in zip(files, adapter.tokens.values(), strict=True):
        tensors = load_file(file)
        assert set(tensors) == {"clip_l", "clip_g"}
        assert torch.equal(tensors["clip_g"], found["text_encoder_2"])
    again = read_adapter(path)
    assert_equal(again, adapter)
    assert list(again.tokens) == ["<me>", "ünï"]
    for word, found in adapter.tokens.items():
        for encoder, rows in found.items():
            assert torch.equal(again.tokens[word][encoder], rows)
    assert again.parameters == small.parameters + 3 * (4 + 6)
    assert describe_adapter(path)["words"] == ["<me>", "ünï"]


def test_equal_words_are_equal_files(tmp_path, small):
    for name in ("one", "two"):
        write_adapter(tmp_path / f"{name}.safetensors", with_words(small))
    one, two = (list_token_files(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


def test_words_that_no_file_name_holds_have_files_of_their_own(tmp_path, small):
    row = {"text_encoder": torch.ones(1, 4)}
    adapter = Adapter(small.layers, {}, {"<a/b>": row, "<a:b>": row, "<>": row, "<A_B>": row})
    path = tmp_path / "a.safetensors"
    write_adapter(path, adapter)
    names = {file.name.lower() for file in list_token_files(path)}
    assert names == {f"{n}.safetensors" for n in ("a_b", "a_b_2", "a_b_3", "word")}
    assert set(read_adapter(path).tokens) == set(adapter.tokens)


def test_a_renamed_adapter_finds_its_words(tmp_path, small):
    path = tmp_path / "a.safetensors"
    adapter = with_words(small)
    write_adapter(path, adapter)
    renamed = path.rename(tmp_path / "renamed.safetensors")
    assert read_adapter(renamed).tokens.keys() == adapter.tokens.keys()
    # Or its words lie beside it, as in a folder of embeddings.
    for file in (tmp_path / "a-tokens").iterdir():
        file.rename(tmp_path / file.name)
    assert read_adapter(renamed).tokens.keys() == adapter.tokens.keys()


def test_words_that_earlier_versions_wrote_into_one_file_are_read(tmp_path, small):
    adapter = with_words(small)
    path, beside = tmp_path / "a.safetensors", tmp_path / "a-tokens.safetensors"
    listed = {word: {n: len(r) for n, r in own.items()} for word, own in adapter.tokens.items()}
    tensors = {
        key: torch.cat([own[encoder] for own in adapter.tokens.values()])
        for key, encoder in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2"))
    }
    save_file(tensors, beside, metadata={"dreamloom.words": json.dumps(listed)})
    told = {
        "dreamloom.words": json.dumps(listed),
        "dreamloom.words_sha256": file_sha256(beside),
    }
    write_adapter(path, Adapter(small.layers, told))
    for word, found in adapter.tokens.items():
        for encoder, rows in found.items():
            assert torch.equal(read_adapter(path).tokens[word][encoder], rows)
    write_adapter(path, read_adapter(path))
    beside.unlink()
    assert read_adapter(path).tokens.keys() == adapter.tokens.keys()


def test_words_of_another_adapter_are_not_taken_for_its_own(tmp_path, small):
    path, other = tmp_path / "a.safetensors", tmp_path / "other" / "b.safetensors"
    write_adapter(path, with_words(small))
    write_adapter(other, with_words(small, seed=1))
    own, foreign = list_token_files(path)[0], list_token_files(other)[0]
    own.write_bytes(foreign.read_bytes())
    assert "holds another <me> than" in refusal(path).problem
    own.unlink()
    error = refusal(path)
    assert "needs its new word <me>, and a-tokens/me.safetensors is not beside it" in error.problem


def test_words_that_lie_beside_an_adapter_without_any_are_none_of_its(tmp_path, small):
    path = tmp_path / "a.safetensors"
    write_adapter(path, with_words(small))
    write_adapter(path, small)
    assert read_adapter(path).tokens == {}


def test_words_that_are_not_finite_are_not_written(tmp_path, small):
    adapter = with_words(small)
    adapter.tokens["<me>"]["text_encoder"][0, 0] = float("nan")
    with pytest.raises(AdapterError, match="embedding of <me> is not finite"):
        write_adapter(tmp_path / "a.safetensors", adapter)
    assert list(tmp_path.iterdir()) == []


def test_words_that_are_not_finite_are_not_read(tmp_path, small):
    path = tmp_path / "a.safetensors"
    write_adapter(path, with_words(small))
    file = list_token_files(path)[1]
    tensors = load_file(file)
    tensors["clip_g"][1, 1] = float("inf")
    save_file(tensors, file)

    def tell_hash(header):
        listed = json.loads(header["__metadata__"]["dreamloom.words"])
        listed["ünï"]["sha256"] = file_sha256(file)
        header["__metadata__"]["dreamloom.words"] = json.dumps(listed)
        return header

    rewrite_header(path, tell_hash)
    assert "embedding of ünï" in refusal(path).problem
    assert "holds NaN or infinity" in refusal(path).problem


# ------------------------------------------------------------------ other kinds


def test_an_adapter_is_of_one_kind(small):
    state = make_dora(small.layers, {name: torch.ones(4) for name in small.layers})
    assert state.layer_names == sorted(small.layers, key=lambda name: (name[0] == "t", name))
    assert Adapter({}, peft=state).kind == "dora"
    with pytest.raises(ValueError, match="either a LoRA or a dora"):
        Adapter(small.layers, peft=state)


def test_a_dora_of_peft_is_read_at_its_strength(tmp_path):
    config = LoraConfig(
        r=2, lora_alpha=6, use_dora=True, target_modules=[*LAYERS], init_lora_weights=False
    )
    torch.manual_seed(1)
    model = inject_adapter_in_model(config, Blocks())
    state = get_peft_model_state_dict(model)
    tensors = {f"unet.{key}": value.contiguous() for key, value in state.items()}
    header = {"lora_alpha": 6, "use_dora": True, "peft_type": "LORA", "target_modules": [*LAYERS]}
    header = {f"unet.{key}": value for key, value in header.items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={CONFIG_KEY: json.dumps(header)})
    found = read_adapter(tmp_path / "a.safetensors")
    assert found.kind == "dora"
    up = found.peft.tensors["unet.fc.lora_B.weight"]
    torch.testing.assert_close(up, 3 * state["fc.lora_B.weight"])
    torch.testing.assert_close(
        found.peft.tensors["unet.fc.lora_magnitude_vector"], state["fc.lora_magnitude_vector"]
    )
    summary = describe_adapter(tmp_path / "a.safetensors")
    assert (summary["kind"], summary["norm"], summary["layers"]) == ("DoRA", None, len(LAYERS))


def test_a_dora_of_which_layers_are_missing_is_refused(tmp_path):
    pairs = {
        key.replace("linear_1", f"linear_{n}"): t.clone() for n in "12" for key, t in PAIR.items()
    }
    save_file(
        {**pairs, "unet.time_embedding.linear_1.lora_magnitude_vector": torch.ones(3)},
        tmp_path / "a.safetensors",
    )
    problem = refusal(tmp_path / "a.safetensors").problem
    assert "a DoRA in 1 layers, and not in others, such as unet.time_embedding.linear_2" in problem


def make_loha():
    tensors = {
        f"unet.time_embedding.linear_1.hada_{name}": torch.ones(2, 2)
        for name in ("w1_a", "w1_b", "w2_a", "w2_b")
    }
    config = {
        "peft_type": "LOHA",
        "r": 2,
        "alpha": 2,
        "target_modules": ["time_embedding.linear_1"],
    }
    return PeftState("loha", tensors, {"unet": config})


def test_another_kind_is_written_with_its_configuration(tmp_path):
    adapter = Adapter({}, {"note": "mine"}, peft=make_loha())
    write_adapter(tmp_path / "a.safetensors", adapter, format="peft")
    again = read_adapter(tmp_path / "a.safetensors")
    assert again.metadata == {"note": "mine"}
    assert again.peft.configs == adapter.peft.configs
    assert again.peft.tensors.keys() == adapter.peft.tensors.keys()
    assert again.parameters == 16


@pytest.mark.parametrize(
    ("change", "tensors"),
    [
        ({"target_modules": "time_embedding.linear_1"}, {}),
        ({"target_modules": ["time_embedding.linear_1", "y"]}, {}),
        ({}, {"unet.z.hada_w1_a": torch.ones(2, 2)}),
    ],
    ids=["no list", "a layer without tensors", "tensors without a layer"],
)
def test_a_configuration_that_does_not_describe_its_tensors_is_refused(tmp_path, change, tensors):
    state = make_loha()
    config = {f"unet.{key}": value for key, value in (state.configs["unet"] | change).items()}
    save_file(
        {**state.tensors, **tensors},
        tmp_path / "a.safetensors",
        metadata={CONFIG_KEY: json.dumps(config)},
    )
    assert "does not describe its tensors" in refusal(tmp_path / "a.safetensors").problem
