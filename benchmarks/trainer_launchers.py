"""One training by one trainer, in that trainer's own Python: started by `train_vs_trainers.py`.

Nothing of DreamLoom is imported here unless it is the one that trains. Each launcher writes the
options that its trainer is given, runs the trainer's own entry point from a checkout, unchanged,
and says which adapter file came out. What is set from outside, because there is no option for it:

- kohya: its U-Net's sizes and the folders of its tokenizers, which are constants of its modules;
  and the classes whose linear layers get a LoRA, so that they are the attention layers.
"""

import argparse
import json
import math
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from run_training import (
    CLASS_PROMPT,
    DECAY,
    PHOTO_PROMPT,
    RANK,
    RATE,
    Clock,
    run_ours,
    run_script,
    stand_in_for_torchvision,
)


def launch_ours(given: argparse.Namespace) -> Path:
    """Train by our own stage."""
    run_ours(given)
    return given.out / "ours" / "adapter.safetensors"


def launch_ours_all(given: argparse.Namespace) -> Path:
    """Train all linear layers of the transformers, as kohya does by itself."""
    given.set.append("train.target_modules=linear")
    return launch_ours(given)


# ------------------------------------------------------------------ diffusers' scripts


def launch_diffusers(given: argparse.Namespace) -> Path:
    """Run diffusers' basic script."""
    given.script = given.checkout / "examples/dreambooth/train_dreambooth_lora_sdxl.py"
    run_script(given, [])
    return given.out / "script" / "pytorch_lora_weights.safetensors"


def launch_advanced(given: argparse.Namespace) -> Path:
    """Run diffusers' advanced script, with latents cached.

    Its prior preservation ends in a TypeError while text encoders are frozen, so photos and class
    images are all photos here, two an update.
    """
    stand_in_for_torchvision()
    name = "examples/advanced_diffusion_training/train_dreambooth_lora_sdxl_advanced.py"
    script = given.checkout / name
    sys.argv = [
        str(script),
        *("--pretrained_model_name_or_path", str(given.model)),
        *("--instance_data_dir", str(_mix_pictures(given))),
        *("--instance_prompt", PHOTO_PROMPT, "--output_dir", str(given.out / "advanced")),
        *("--resolution", str(given.px), "--train_batch_size", "2", "--center_crop"),
        *("--learning_rate", str(RATE), "--lr_scheduler", "constant", "--lr_warmup_steps", "0"),
        *("--rank", str(RANK), "--adam_weight_decay", str(DECAY), "--cache_latents"),
        *("--max_train_steps", str(given.updates + 1), "--checkpointing_steps", "100000"),
        *("--seed", "0", "--mixed_precision", "no", "--report_to", "tensorboard"),
    ]
    runpy.run_path(str(script), run_name="__main__")
    return given.out / "advanced" / "pytorch_lora_weights.safetensors"


def _mix_pictures(given: argparse.Namespace) -> Path:
    """Put photos and class images into one folder."""
    folder = given.out / "mixed"
    folder.mkdir()
    for kind in ("photos", "priors"):
        for file in sorted((given.pictures / kind).iterdir()):
            shutil.copy(file, folder / f"{kind}-{file.name}")
    return folder


# ------------------------------------------------------------------ kohya


def launch_kohya(given: argparse.Namespace, attention_only: bool = True) -> Path:
    """Run kohya's script for SDXL, with its sizes set to those of the base."""
    sys.path.insert(0, str(given.checkout))
    os.chdir(given.checkout)
    _fit_kohya(given.model)
    from library.sdxl_original_unet import SdxlUNet2DConditionModel

    given.clock.time_phase(SdxlUNet2DConditionModel, "forward", "forward")
    if attention_only:
        from networks.lora import LoRANetwork

        LoRANetwork.UNET_TARGET_REPLACE_MODULE = ["CrossAttention"]
    subsets = (("photos", PHOTO_PROMPT, False), ("priors", CLASS_PROMPT, True))
    rows = [
        f'[[datasets.subsets]]\nimage_dir = "{given.pictures / folder}"\n'
        f'class_tokens = "{prompt}"\nnum_repeats = 1\nis_reg = {str(is_prior).lower()}\n'
        for folder, prompt, is_prior in subsets
    ]
    table = given.out / "dataset.toml"
    table.write_text(f"[[datasets]]\nresolution = {given.px}\nbatch_size = 2\n" + "".join(rows))
    script = given.checkout / "sdxl_train_network.py"
    sys.argv = [
        str(script),
        *("--pretrained_model_name_or_path", str(given.model), "--dataset_config", str(table)),
        *("--output_dir", str(given.out), "--output_name", "kohya", "--seed", "0"),
        *("--network_module", "networks.lora", "--network_dim", str(RANK)),
        *("--network_alpha", str(RANK), "--network_train_unet_only", "--cache_latents"),
        *("--cache_text_encoder_outputs", "--no_half_vae", "--sdpa", "--mixed_precision", "no"),
        *("--optimizer_type", "AdamW", "--optimizer_args", f"weight_decay={DECAY}"),
        *("--learning_rate", str(RATE), "--lr_scheduler", "constant", "--save_precision", "float"),
        *("--max_train_steps", str(given.updates + 1), "--max_data_loader_n_workers", "0"),
        *("--save_model_as", "safetensors", "--prior_loss_weight", "1.0"),
    ]
    runpy.run_path(str(script), run_name="__main__")
    return given.out / "kohya.safetensors"


def launch_kohya_all(given: argparse.Namespace) -> Path:
    """Run kohya's script with the layers that it teaches by itself: all linear ones."""
    return launch_kohya(given, attention_only=False)


def _fit_kohya(model: Path) -> None:
    """Set the constants of kohya's modules to the sizes and tokenizers of the base."""
    from library import sdxl_original_unet, strategy_sdxl

    sizes = json.loads((model / "unet" / "config.json").read_text())
    module: Any = sdxl_original_unet
    module.MODEL_CHANNELS = sizes["block_out_channels"][0]
    module.TIME_EMBED_DIM = 4 * module.MODEL_CHANNELS
    module.ADM_IN_CHANNELS = sizes["projection_class_embeddings_input_dim"]
    module.CONTEXT_DIM = sizes["cross_attention_dim"]
    begin = module.Transformer2DModel.__init__

    def begin_narrow(block: Any, *args: Any, **options: Any) -> None:
        begin(block, *args, **{**options, "cross_attention_dim": sizes["cross_attention_dim"]})

    module.Transformer2DModel.__init__ = begin_narrow
    for constant, folder in (("TOKENIZER1_PATH", "tokenizer"), ("TOKENIZER2_PATH", "tokenizer_2")):
        setattr(strategy_sdxl, constant, str(model / folder))


# ------------------------------------------------------------------ OneTrainer


def launch_onetrainer(given: argparse.Namespace) -> Path:
    """Run OneTrainer's command line with a configuration for SDXL LoRA.

    Class images are a second concept, and batches of two are drawn from both.
    """
    os.chdir(given.checkout)
    sys.path[:0] = [str(given.checkout), str(given.checkout / "scripts")]
    # It knows a folder in diffusers' layout by this file.
    (given.model / "meta.json").touch()
    concepts = []
    for folder, prompt in (("photos", PHOTO_PROMPT), ("priors", CLASS_PROMPT)):
        words = given.out / f"{folder}.txt"
        words.write_text(prompt)
        concepts.append(
            {
                "name": folder,
                "path": str(given.pictures / folder),
                "image": {"enable_crop_jitter": False, "enable_random_flip": False},
                "text": {"prompt_source": "concept", "prompt_path": str(words)},
            }
        )
    frozen = {"train": False, "weight_dtype": "FLOAT_32", "gradient_checkpointing": False}
    (given.out / "concepts.json").write_text(json.dumps(concepts))
    (given.out / "samples.json").write_text("[]")
    config = {
        "model_type": "STABLE_DIFFUSION_XL_10_BASE",
        "training_method": "LORA",
        "base_model_name": str(given.model),
        "workspace_dir": str(given.out / "workspace"),
        "cache_dir": str(given.out / "cache"),
        "concept_file_name": str(given.out / "concepts.json"),
        "sample_definition_file_name": str(given.out / "samples.json"),
        "sample_after_unit": "NEVER",
        "backup_after_unit": "NEVER",
        "backup_before_save": False,
        "tensorboard": False,
        "output_model_destination": str(given.out / "onetrainer.safetensors"),
        "output_model_format": "KOHYA_LORA",
        "output_dtype": "FLOAT_32",
        "resolution": str(given.px),
        "batch_size": 2,
        "epochs": math.ceil((given.updates + 1) / 4),
        "learning_rate": RATE,
        "learning_rate_scheduler": "CONSTANT",
        "learning_rate_warmup_steps": 0,
        "layer_filter": "attn1,attn2",
        "lora_rank": RANK,
        "lora_alpha": float(RANK),
        "lora_weight_dtype": "FLOAT_32",
        "train_dtype": "FLOAT_32",
        "fallback_train_dtype": "FLOAT_32",
        "train_device": "cpu",
        "temp_device": "cpu",
        "dataloader_threads": 1,
        "latent_caching": True,
        "optimizer": {
            **{"optimizer": "ADAMW", "beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
            **{"weight_decay": DECAY, "stochastic_rounding": False, "foreach": None},
        },
        "unet": {**frozen, "train": True},
        "text_encoder": frozen,
        "text_encoder_2": frozen,
        "vae": frozen,
    }
    file = given.out / "config.json"
    file.write_text(json.dumps(config))
    script = given.checkout / "scripts" / "train.py"
    preset = given.checkout / "training_presets" / "SDXL" / "#sdxl 1.0 LoRA.json"
    sys.argv = [str(script), "--preset-path", str(preset), "--config-path", str(file)]
    runpy.run_path(str(script), run_name="__main__")
    return given.out / "onetrainer.safetensors"


# ------------------------------------------------------------------ ai-toolkit


def launch_aitoolkit(given: argparse.Namespace) -> Path:
    """Run ai-toolkit's command line; every second batch is of class images."""
    os.chdir(given.checkout)
    sys.path.insert(0, str(given.checkout))
    datasets = [
        {
            "folder_path": str(given.pictures / folder),
            "default_caption": prompt,
            "resolution": [given.px],
            "cache_latents": True,
            "is_reg": is_prior,
            "num_workers": 0,
        }
        for folder, prompt, is_prior in (
            ("photos", PHOTO_PROMPT, False),
            ("priors", CLASS_PROMPT, True),
        )
    ]
    process = {
        "type": "sd_trainer",
        "training_folder": str(given.out),
        "device": "cpu",
        "network": {
            "type": "lora",
            "linear": RANK,
            "linear_alpha": RANK,
            "network_kwargs": {"only_if_contains": ["attn1", "attn2"]},
        },
        "save": {"dtype": "float32", "save_every": 100_000},
        "datasets": datasets,
        "train": {
            "batch_size": 2,
            "steps": given.updates + 1,
            "train_unet": True,
            "train_text_encoder": False,
            "cache_text_embeddings": True,
            "gradient_checkpointing": False,
            "noise_scheduler": "ddpm",
            "optimizer": "adamw",
            "optimizer_params": {"weight_decay": DECAY},
            "lr": RATE,
            "dtype": "fp32",
            "disable_sampling": True,
            "skip_first_sample": True,
        },
        "model": {"name_or_path": str(given.model), "is_xl": True},
    }
    config = {"name": "aitoolkit", "process": [process]}
    file = given.out / "config.json"
    file.write_text(json.dumps({"job": "extension", "config": config, "meta": {"name": "x"}}))
    script = given.checkout / "run.py"
    sys.argv = [str(script), str(file)]
    runpy.run_path(str(script), run_name="__main__")
    return given.out / "aitoolkit" / "aitoolkit.safetensors"


LAUNCHERS: dict[str, Callable[[argparse.Namespace], Path]] = {
    "ours": launch_ours,
    "ours-all": launch_ours_all,
    "diffusers": launch_diffusers,
    "advanced": launch_advanced,
    "kohya": launch_kohya,
    "kohya-all": launch_kohya_all,
    "onetrainer": launch_onetrainer,
    "aitoolkit": launch_aitoolkit,
}
"""The trainers by name."""


def parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trainer", choices=list(LAUNCHERS))
    parser.add_argument("--checkout", type=Path)
    parser.add_argument("--set", action="append", default=[], help="one of our settings")
    for name in ("model", "pictures", "out", "result"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("px", "updates"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args(namespace=argparse.Namespace(text=False, gradient_checkpointing=False))


def main() -> None:
    """Train, write the times, and say where the adapter is."""
    given = parse()
    torch.set_num_threads(1)
    # Some write what they cache beside the pictures.
    given.pictures = shutil.copytree(given.pictures, given.out / "pictures")
    clock = given.clock = Clock(given.updates)
    if not given.trainer.startswith("kohya"):
        from diffusers import UNet2DConditionModel

        clock.time_phase(UNet2DConditionModel, "forward", "forward")
    adapter = LAUNCHERS[given.trainer](given)
    if len(clock.times) < given.updates + 1 or math.isnan(clock.times[0][0]):
        raise RuntimeError(f"only {len(clock.times)} optimizer steps were seen")
    clock.write(given.result)
    told = json.loads(given.result.read_text())
    given.result.write_text(json.dumps({**told, "adapter": str(adapter)}))


if __name__ == "__main__":
    main()
