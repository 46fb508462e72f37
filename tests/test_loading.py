"""Base models found by path and by name without a network: checkpoints, folders, the cache."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from dreamloom.core.device import Runtime
from dreamloom.core.errors import BaseModelError
from dreamloom.models import loading as sources
from dreamloom.models import sdxl_configs, single_files
from dreamloom.models.loading import (
    FIXED_VAE_ID,
    FIXED_VAE_REVISION,
    fingerprint_weights,
    load_source,
)
from dreamloom.models.weight_files import SDXL_ID, SDXL_REVISION
from original_layout import State, original_layout

CPU = torch.device("cpu")
FULL, HALF, BRAIN = (Runtime(CPU, d) for d in (torch.float32, torch.float16, torch.bfloat16))
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")

# ------------------------------------------------------------------------- fixtures and small tools


@pytest.fixture(scope="module")
def tiny(tiny_sdxl: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(
        tiny_sdxl, local_files_only=True, add_watermarker=False
    )


@pytest.fixture(scope="module")
def tiny_original(tiny: StableDiffusionXLPipeline) -> State:
    parts = (tiny.unet, tiny.vae, tiny.text_encoder, tiny.text_encoder_2)
    return {name: weight.contiguous() for name, weight in original_layout(*parts).items()}


@pytest.fixture(scope="module")
def tiny_configs(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's configuration and tokenizers without a single weight."""
    folder = tmp_path_factory.mktemp("configs") / "tiny"
    shutil.copytree(tiny_sdxl, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(state: State, name: str = "model.safetensors", **metadata: str) -> Path:
        save_file(state, tmp_path / name, metadata or None)
        return tmp_path / name

    return write_file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Path], Path]:
    """An empty hub cache, and a function that puts a folder into it as a model's snapshot."""
    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))

    def put(name: str, revision: str, folder: Path) -> Path:
        home = root / f"models--{name.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text(revision)
        shutil.copytree(folder, home / "snapshots" / revision)
        return home / "snapshots" / revision

    return put


def keep_half(folder: Path, to: Path) -> Path:
    """Copy a pipeline so that it holds fp16 variants only, as the hub's SDXL offers them."""
    shutil.copytree(folder, to)
    for file in to.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    return to


def same_weights(first: Any, second: Any) -> bool:
    for part in PARTS:
        found, expected = (getattr(pipeline, part).state_dict() for pipeline in (first, second))
        if not all(torch.equal(found[name], weight) for name, weight in expected.items()):
            return False
    return True


def draw(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(3)
    size = {"height": 64, "width": 64, "num_inference_steps": 1, "guidance_scale": 1.0}
    return np.asarray(pipeline("a dog", generator=rng, output_type="np", **size).images[0])


def refusal(base: object, configs: Path | None = None) -> str:
    with pytest.raises(BaseModelError) as caught:
        load_source(str(base), FULL, configs)
    assert caught.value.hint
    return str(caught.value)


# --------------------------------------------------------------------------- a checkpoint is loaded


def test_a_checkpoint_in_the_original_layout_loads_as_the_same_model(
    tiny: Any, tiny_original: State, tiny_configs: Path, write: Write
) -> None:
    path = write(tiny_original)
    source = load_source(str(path), FULL, tiny_configs)
    assert same_weights(source.pipeline, tiny)
    np.testing.assert_allclose(draw(source.pipeline), draw(tiny), atol=1e-5)
    assert source.fingerprint == fingerprint_weights(path)
    assert (source.revision, source.vae_float32, source.notes) == ("", False, ())


def test_a_checkpoints_schedule_is_that_of_sdxl_unless_it_says_otherwise(
    tiny_original: State, tiny_configs: Path, write: Write
) -> None:
    plain = load_source(str(write(tiny_original)), FULL, tiny_configs).pipeline.scheduler.config
    assert plain["prediction_type"] == "epsilon"
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    path = write(tiny_original | marks, "v.safetensors")
    marked = load_source(str(path), FULL, tiny_configs).pipeline.scheduler.config
    assert marked["prediction_type"] == "v_prediction"
    assert marked["rescale_betas_zero_snr"] is True
    assert marked["timestep_spacing"] == "trailing"
    assert marked["beta_end"] == plain["beta_end"]


@pytest.mark.parametrize(
    ("said", "changes"),
    [("v", {"prediction_type": "v_prediction"}), ("epsilon", {}), ("", {})],
)
def test_the_metadata_may_tell_the_prediction(said: str, changes: dict[str, Any]) -> None:
    header = single_files.Header({}, {"modelspec.prediction_type": said})
    assert single_files.read_schedule_changes(header) == changes


# ------------------------------------------------------------------- the shipped configuration


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    """SDXL base 1.0 as the shipped files describe it, without memory for its weights."""
    folder = sdxl_configs.FOLDER
    with init_empty_weights():
        return {
            "unet": UNet2DConditionModel.from_config(
                UNet2DConditionModel.load_config(folder, subfolder="unet")
            ),
            "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae")),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder")
            ),
            "text_encoder_2": CLIPTextModelWithProjection(
                CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder_2")
            ),
        }


@pytest.mark.parametrize(
    ("part", "parameters"),
    [
        ("unet", 2_567_463_684),
        ("vae", 83_653_863),
        ("text_encoder", 123_060_480),
        ("text_encoder_2", 694_659_840),
    ],
)
def test_the_shipped_configuration_has_sdxls_size(
    published: dict[str, Any], part: str, parameters: int
) -> None:
    assert sum(weight.numel() for weight in published[part].parameters()) == parameters


@pytest.fixture(scope="module")
def published_original(published: dict[str, Any]) -> State:
    with torch.device("meta"):
        return original_layout(*(published[part] for part in PARTS))


def test_the_original_layout_is_that_of_the_published_checkpoint(published_original: State) -> None:
    # sd_xl_base_1.0.safetensors holds 2,515 tensors; names and shapes as ComfyUI and kohya read.
    shapes = {name: tuple(weight.shape) for name, weight in published_original.items()}
    assert len(shapes) == 2515
    unet = "model.diffusion_model"
    for name, shape in {
        f"{unet}.input_blocks.0.0.weight": (320, 4, 3, 3),
        f"{unet}.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        f"{unet}.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        f"{unet}.input_blocks.8.1.transformer_blocks.9.attn1.to_q.weight": (1280, 1280),
        f"{unet}.middle_block.1.proj_in.weight": (1280, 1280),
        f"{unet}.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        f"{unet}.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        f"{unet}.label_emb.0.0.weight": (1280, 2816),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": (1, 77),
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
    }.items():
        assert shapes[name] == shape
    entries = {name: single_files.Entry("F16", shape, 0, 0) for name, shape in shapes.items()}
    single_files.check_is_sdxl(Path("model.safetensors"), single_files.Header(entries, {}))


@pytest.mark.parametrize("part", PARTS)
def test_every_weight_of_the_published_layout_finds_its_place(
    published: dict[str, Any], published_original: State, part: str
) -> None:
    module = published[part]
    with torch.device("meta"):
        if part == "unet":
            found = convert_ldm_unet_checkpoint(dict(published_original), dict(module.config))
        elif part == "vae":
            found = convert_ldm_vae_checkpoint(dict(published_original), dict(module.config))
        elif part == "text_encoder":
            found = convert_ldm_clip_checkpoint(dict(published_original))
            found = {name.removeprefix("text_model."): weight for name, weight in found.items()}
            del found["embeddings.position_ids"]
        else:
            found = convert_open_clip_checkpoint(
                module, dict(published_original), "conditioner.embedders.1.model."
            )
    expected = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    assert {name: tuple(weight.shape) for name, weight in found.items()} == expected


@pytest.mark.slow
def test_a_checkpoint_of_the_published_size_loads_with_what_is_shipped(
    published_original: State, tmp_path: Path
) -> None:
    """All 6.9 GB of it, as zeros that take no room where files may have holes."""
    entries, end = {}, 0
    for name, weight in published_original.items():
        start, end = end, end + 2 * weight.numel()
        entries[name] = {"dtype": "F16", "shape": [*weight.shape], "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / "xl.safetensors"
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + end)
    if getattr(path.stat(), "st_blocks", 2**30) * 512 > 2**30:
        pytest.skip("files have no holes here")
    pipeline = load_source(str(path), HALF).pipeline
    tokens, _, pooled, _ = pipeline.encode_prompt(
        "a cat", device="cpu", do_classifier_free_guidance=False
    )
    assert (tokens.shape, pooled.shape) == ((1, 77, 2048), (1, 1280))
    assert pipeline.unet.dtype == torch.float16


def test_the_shipped_schedule_and_scale_are_sdxls() -> None:
    scheduler = EulerDiscreteScheduler.from_pretrained(sdxl_configs.FOLDER, subfolder="scheduler")
    assert float(scheduler.betas[0]) == pytest.approx(0.00085)
    assert float(scheduler.betas[-1]) == pytest.approx(0.012)
    assert scheduler.init_noise_sigma == pytest.approx((14.6146**2 + 1) ** 0.5, rel=1e-4)
    vae = AutoencoderKL.load_config(sdxl_configs.FOLDER, subfolder="vae")
    assert vae["scaling_factor"] == 0.13025


def test_a_licence_travels_with_the_vocabulary() -> None:
    notice = (sdxl_configs.FOLDER / "NOTICE").read_text()
    assert "MIT License" in notice
    assert "OpenAI" in notice
    size = sum(file.stat().st_size for file in sdxl_configs.FOLDER.rglob("*") if file.is_file())
    assert size < 1_500_000


# ------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    return sdxl_configs.make_tokenizers()


def test_the_vocabulary_is_clips_byte_for_byte() -> None:
    merges = sdxl_configs.read_merges()
    numbers = sdxl_configs.number_tokens(merges)
    assert sorted(numbers.values()) == list(range(49408))
    text = "".join(["#version: 0.2\n", *(f"{left} {right}\n" for left, right in merges)])
    listed = json.dumps(numbers, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    # git's own hashes of tokenizer/merges.txt and tokenizer/vocab.json as SDXL publishes them.
    assert git_blob(text) == "76e821f1b6f0a9709293c3b6b51ed90980b3166b"
    assert git_blob(listed) == "469be27c5c010538f845f518c4f5e8574c78f7c8"


def git_blob(text: str) -> str:
    content = text.encode()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("A  PHOTO of a Cat", [320, 1125, 539, 320, 2368]),
        ("", []),
    ],
)
def test_prompts_become_clips_ids(
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer], prompt: str, ids: list[int]
) -> None:
    for tokenizer in tokenizers:
        assert tokenizer(prompt).input_ids == [49406, *ids, 49407]


def test_the_tokenizers_differ_in_padding(tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> None:
    first, second = (
        tokenizer("a cat", padding="max_length", truncation=True).input_ids
        for tokenizer in tokenizers
    )
    assert first == [49406, 320, 2368, 49407] + [49407] * 73
    assert second == [49406, 320, 2368, 49407] + [0] * 73


def test_the_tokenizers_are_those_of_a_folder_in_the_hubs_form(
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer], tmp_path: Path
) -> None:
    merges = sdxl_configs.read_merges()
    (tmp_path / "vocab.json").write_text(json.dumps(sdxl_configs.number_tokens(merges)))
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")
    prompts = ["a photo of a cat!", "Café naïve 日本語 🙂", "don't <|endoftext|> 1234", "x" * 400]
    for tokenizer, pad in zip(tokenizers, ("<|endoftext|>", "!"), strict=True):
        special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad}
        told = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
        published = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
        for prompt in prompts:
            options = {"padding": "max_length", "truncation": True}
            assert tokenizer(prompt, **options).input_ids == published(prompt, **options).input_ids
        assert tokenizer.model_max_length == published.model_max_length == 77


# ----------------------------------------------------------------- what is not an SDXL is refused

UNET = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1, 4, 1, 1)}
CLIP = {"conditioner.embedders.0.transformer.x": torch.zeros(1)}
OPEN_CLIP = {"conditioner.embedders.1.model.x": torch.zeros(1)}
VAE = {"first_stage_model.x": torch.zeros(1)}


@pytest.mark.parametrize(
    ("names", "looks"),
    [
        (["cond_stage_model.transformer.text_model.x", *UNET], "Stable Diffusion 1"),
        (["cond_stage_model.model.token_embedding.weight", *UNET], "Stable Diffusion 2"),
        (["conditioner.embedders.0.model.text_projection", *UNET], "refiner"),
        (["unet.down_blocks.0.to_q.lora_A.weight"], "LoRA"),
        (["lora_unet_input_blocks_4_1_proj_in.lora_down.weight"], "LoRA"),
        (["lora_unet_mid_block.lokr_w1"], "LoRA"),
        (["lora_te1_x.hada_w1_a"], "LoRA"),
        (["clip_l", "clip_g"], "textual inversion"),
        (["control_model.input_blocks.0.0.weight"], "ControlNet"),
        (["edm_mean", "edm_std", *UNET, *CLIP, *OPEN_CLIP], "Playground"),
        (["model.diffusion_model.joint_blocks.0.x"], "Stable Diffusion 3"),
        (["model.diffusion_model.double_blocks.0.x"], "Flux"),
        (["down_blocks.0.resnets.0.conv1.weight"], "U-Net alone"),
        (["decoder.conv_in.weight"], "autoencoder"),
        (["text_model.embeddings.token_embedding.weight"], "text encoder alone"),
        ([*UNET, *VAE], "lacks the first text encoder and the second text encoder"),
        ([*UNET, *CLIP, *VAE], "lacks the second text encoder"),
        ([*CLIP, *OPEN_CLIP, *VAE], "lacks the U-Net"),
        (["something.else"], "nothing of an SDXL"),
    ],
)
def test_another_file_is_refused_by_what_it_looks_like(
    write: Write, names: list[str], looks: str
) -> None:
    path = write({name: torch.zeros(1, 4) for name in names})
    told = refusal(path)
    assert looks in told
    assert str(path) in told


def test_a_file_that_says_what_it_is_is_quoted(write: Write) -> None:
    path = write({"x": torch.zeros(1)}, **{"modelspec.architecture": "some-video-model"})
    assert "some-video-model" in refusal(path)


def test_an_inpainting_checkpoint_is_refused(write: Write) -> None:
    wide = {next(iter(UNET)): torch.zeros(1, 9, 1, 1)}
    told = refusal(write(wide | CLIP | OPEN_CLIP | VAE))
    assert "inpainting" in told
    assert "9 channels" in told


def test_a_truncated_checkpoint_is_refused_with_its_size(
    write: Write, tiny_original: State, tiny_configs: Path
) -> None:
    path = write(tiny_original)
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    told = refusal(path, tiny_configs)
    assert "cut short" in told
    assert f"{whole - 1:,} of the {whole:,} bytes" in told
    path.write_bytes(path.read_bytes()[:1000])
    assert "cut short" in refusal(path)
    path.write_bytes(b"")
    assert "cut short" in refusal(path)


@pytest.mark.parametrize(
    ("content", "looks"),
    [
        (b"PK\x03\x04" + bytes(100), "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (b"<!doctype html><html></html>", "web page"),
        (b"\x80\x02}q\x00" + bytes(100), "damaged"),
        ((2).to_bytes(8, "little") + b"[]", "damaged"),
    ],
)
def test_what_only_bears_the_name_is_refused(tmp_path: Path, content: bytes, looks: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert looks in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".CKPT"])
def test_pickles_are_refused_by_name_and_never_opened(tmp_path: Path, suffix: str) -> None:
    assert "pickle" in refusal(tmp_path / f"model{suffix}")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    assert "no checkpoint at" in refusal(tmp_path / "gone.safetensors")


def test_a_checkpoint_without_an_autoencoder_needs_one_from_the_cache(
    tiny: Any, tiny_original: State, tiny_configs: Path, tiny_sdxl: Path, write: Write, cache: Any
) -> None:
    path = write({n: w for n, w in tiny_original.items() if "first_stage" not in n})
    assert "no autoencoder" in refusal(path, tiny_configs)
    cache(FIXED_VAE_ID, FIXED_VAE_REVISION, tiny_sdxl / "vae")
    source = load_source(str(path), FULL, tiny_configs)
    assert same_weights(source.pipeline, tiny)
    assert FIXED_VAE_ID in source.notes[0]


@pytest.mark.parametrize(
    "gone",
    [
        "model.diffusion_model.middle_block.0.in_layers.2.weight",
        "conditioner.embedders.1.model.ln_final.weight",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "first_stage_model.decoder.conv_in.bias",
    ],
)
def test_a_checkpoint_that_lacks_weights_is_refused(
    tiny_original: State, tiny_configs: Path, write: Write, gone: str
) -> None:
    path = write({name: weight for name, weight in tiny_original.items() if name != gone})
    assert "weights are missing" in refusal(path, tiny_configs)


def test_a_checkpoint_of_another_size_is_refused(tiny_original: State, write: Write) -> None:
    assert "cannot be loaded as SDXL" in refusal(write(tiny_original))


# ---------------------------------------------------------------------------------------- folders


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "looks"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, "holds a StableDiffusionPipeline"),
        ({"text_encoder": [None, None]}, "refiner"),
        ({"scheduler": ["diffusers", "EDMEulerScheduler"]}, "Playground"),
    ],
)
def test_a_folder_with_another_pipeline_is_refused(
    tiny_configs: Path, tmp_path: Path, changes: dict[str, Any], looks: str
) -> None:
    folder = shutil.copytree(tiny_configs, tmp_path / "base")
    change_json(folder / "model_index.json", **changes)
    assert looks in refusal(folder)


def test_a_folder_without_a_pipeline_points_to_the_checkpoint_in_it(tmp_path: Path) -> None:
    assert "model_index.json" in refusal(tmp_path)
    (tmp_path / "xl.safetensors").touch()
    assert str(tmp_path / "xl.safetensors") in refusal(tmp_path)


def test_a_folder_with_a_damaged_weight_file_is_refused(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sdxl, tmp_path / "base")
    file = next((folder / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    assert "cannot be loaded as SDXL" in refusal(folder)


class _Boom:
    """Pickled, it leaves a file behind wherever it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def shard(tiny: Any, folder: Path) -> Path:
    """Save a base whose U-Net lies in several files, and return their index."""
    tiny.save_pretrained(folder)
    next((folder / "unet").glob("*.safetensors")).unlink()
    tiny.unet.save_pretrained(folder / "unet", max_shard_size="100KB")
    (index,) = (folder / "unet").glob("*.index.json")
    return index


def test_a_folder_of_sharded_weights_loads(tiny: Any, tmp_path: Path) -> None:
    shard(tiny, tmp_path / "base")
    assert same_weights(load_source(str(tmp_path / "base"), FULL).pipeline, tiny)


@pytest.mark.parametrize("name", ["evil.bin", "evil.pt", "evil", "../evil.safetensors", 3])
def test_an_index_that_names_no_safetensors_file_is_refused_before_anything_is_opened(
    tiny: Any, tmp_path: Path, name: object
) -> None:
    index = shard(tiny, tmp_path / "base")
    with (index.parent / str(name)).open("wb") as file:
        pickle.dump(_Boom(tmp_path / "ran"), file)
    shards = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map=shards | {next(iter(shards)): name})
    said = refusal(tmp_path / "base")
    assert f"{index} names {name}, which is no .safetensors file beside it" in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["{half", "[]", '{"weight_map": 3}', "\xff"])
def test_a_damaged_index_is_named(tiny: Any, tmp_path: Path, text: str) -> None:
    index = shard(tiny, tmp_path / "base")
    index.write_text(text, encoding="latin-1")
    assert f"{index} is no index of weight files" in refusal(tmp_path / "base")


def test_a_folder_with_half_precision_files_alone_loads(
    tiny: Any, tiny_sdxl: Path, tmp_path: Path
) -> None:
    folder = keep_half(tiny_sdxl, tmp_path / "base")
    assert same_weights(load_source(str(folder), FULL).pipeline, tiny)


def test_a_prompts_end_is_found_by_its_id(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sdxl, tmp_path / "base")
    for part in ("text_encoder", "text_encoder_2"):
        change_json(folder / part / "config.json", eos_token_id=2)
    pipeline = load_source(str(folder), FULL).pipeline
    tokenizer, encoder = pipeline.tokenizer_2, pipeline.text_encoder_2
    before = encoder(tokenizer("a dog", return_tensors="pt").input_ids).text_embeds
    # A word added behind the last id must not be taken for the end of the prompt: with the
    # embedding of "dog" it changes nothing.
    dog = tokenizer("dog").input_ids[1]
    tokenizer.add_tokens(["<new>"])
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        weights = encoder.get_input_embeddings().weight
        weights[-1] = weights[dog]
    after = encoder(tokenizer("a <new>", return_tensors="pt").input_ids).text_embeds
    torch.testing.assert_close(after, before)


# --------------------------------------------------------- autoencoders that overflow in float16


def test_in_fp16_an_overflowing_autoencoder_stays_in_float32(tiny_sdxl: Path, cache: Any) -> None:
    source = load_source(str(tiny_sdxl), HALF)
    assert source.vae_float32
    assert "float32" in source.notes[0]
    assert source.pipeline.vae.dtype == torch.float32
    assert source.pipeline.unet.dtype == torch.float16
    assert np.isfinite(draw(source.pipeline)).all()


def test_the_autoencoder_in_float32_is_not_rounded_on_the_way(
    tiny: Any, tiny_original: State, tiny_configs: Path, tiny_sdxl: Path, write: Write, cache: Any
) -> None:
    for base, configs in ((tiny_sdxl, None), (write(tiny_original), tiny_configs)):
        vae = load_source(str(base), HALF, configs).pipeline.vae
        for name, weight in tiny.vae.state_dict().items():
            assert torch.equal(vae.state_dict()[name], weight)


def test_in_fp16_the_mended_autoencoder_of_the_cache_takes_its_place(
    tiny_sdxl: Path, tiny_original: State, tiny_configs: Path, write: Write, cache: Any
) -> None:
    mended = cache(FIXED_VAE_ID, FIXED_VAE_REVISION, tiny_sdxl / "vae")
    change_json(mended / "config.json", force_upcast=False)
    for base, configs in ((tiny_sdxl, None), (write(tiny_original), tiny_configs)):
        source = load_source(str(base), HALF, configs)
        assert not source.vae_float32
        assert source.pipeline.vae.dtype == torch.float16
        assert not source.pipeline.vae.config.force_upcast
        assert FIXED_VAE_ID in source.notes[0]


def test_an_autoencoder_of_another_shape_does_not_take_its_place(
    tiny_sdxl: Path, cache: Any
) -> None:
    mended = cache(FIXED_VAE_ID, FIXED_VAE_REVISION, tiny_sdxl / "vae")
    change_json(mended / "config.json", scaling_factor=0.5)
    assert load_source(str(tiny_sdxl), HALF).vae_float32


@pytest.mark.parametrize("runtime", [FULL, BRAIN])
def test_other_precisions_keep_the_models_own_autoencoder(
    tiny_sdxl: Path, cache: Any, runtime: Runtime
) -> None:
    cache(FIXED_VAE_ID, FIXED_VAE_REVISION, tiny_sdxl / "vae")
    source = load_source(str(tiny_sdxl), runtime)
    assert (source.vae_float32, source.notes) == (False, ())
    assert source.pipeline.vae.dtype == runtime.dtype
    assert source.pipeline.vae.config.force_upcast


# ---------------------------------------------------------------------------------- the hub's cache


def test_a_hub_id_loads_from_the_cache_with_its_commit(
    tiny: Any, tiny_sdxl: Path, cache: Any
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = cache("someone/tiny-xl", commit, tiny_sdxl)
    source = load_source("someone/tiny-xl", FULL)
    assert source.revision == commit
    assert source.fingerprint == fingerprint_weights(folder) == fingerprint_weights(tiny_sdxl)
    assert same_weights(source.pipeline, tiny)


def test_sdxl_by_name_comes_with_the_mended_autoencoder(
    tiny_sdxl: Path, tmp_path: Path, cache: Any
) -> None:
    cache(SDXL_ID, SDXL_REVISION, keep_half(tiny_sdxl, tmp_path / "half"))
    alone = load_source("sdxl", FULL)
    assert alone.pipeline.vae.config.force_upcast
    assert FIXED_VAE_ID in alone.notes[0]
    mended = cache(FIXED_VAE_ID, FIXED_VAE_REVISION, tiny_sdxl / "vae")
    change_json(mended / "config.json", force_upcast=False)
    for runtime in (FULL, HALF):
        source = load_source("sdxl", runtime)
        assert (source.revision, source.vae_float32, source.notes) == (SDXL_REVISION, False, ())
        assert not source.pipeline.vae.config.force_upcast


def test_a_base_that_is_not_in_the_cache_is_said_to_be_missing(cache: Any) -> None:
    for base in ("sdxl", "someone/else"):
        told = refusal(base)
        assert base in told
        assert "HF_HUB_OFFLINE" in told
        assert "picturebook" in told


def test_a_licence_that_was_not_accepted_is_told(
    monkeypatch: pytest.MonkeyPatch, cache: Any
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Iterator[None]:
        raise sources.GatedRepoError.__new__(sources.GatedRepoError)

    monkeypatch.setattr("dreamloom.models.weight_files.snapshot_download", refuse)
    assert "licence" in refusal("someone/gated")
