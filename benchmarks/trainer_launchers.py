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
)


def launch_ours(given: argparse.Namespace) -> Path:
    """Train by our own stage."""
    run_ours(given)
    return given.out / "ours" / "adapter.safetensors"


# ------------------------------------------------------------------ diffusers' scripts


def launch_diffusers(given: argparse.Namespace) -> Path:
    """Run diffusers' basic script."""
    given.script = given.checkout / "examples/dreambooth/train_dreambooth_lora_sdxl.py"
    run_script(given, [])
    return given.out / "script" / "pytorch_lora_weights.safetensors"


def launch_advanced(given: argparse.Namespace) -> Path:
    """Run diffusers' advanced script, with latents cached."""
    name = "train_dreambooth_lora_sdxl_advanced.py"
    given.script = given.checkout / "examples/advanced_diffusion_training" / name
    run_script(given, ["--cache_latents"])
    return given.out / "script" / "pytorch_lora_weights.safetensors"


# ------------------------------------------------------------------ kohya


def launch_kohya(given: argparse.Namespace, attention_only: bool = True) -> Path:
    """Run kohya's script for SDXL, with its sizes set to those of the base."""
    sys.path.insert(0, str(given.checkout))
    os.chdir(given.checkout)
    _fit_kohya(given.model)
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


LAUNCHERS: dict[str, Callable[[argparse.Namespace], Path]] = {
    "ours": launch_ours,
    "diffusers": launch_diffusers,
    "advanced": launch_advanced,
    "kohya": launch_kohya,
    "kohya-all": launch_kohya_all,
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
    clock = Clock(given.updates)
    adapter = LAUNCHERS[given.trainer](given)
    if len(clock.times) < given.updates + 1 or math.isnan(clock.times[0][0]):
        raise RuntimeError(f"only {len(clock.times)} optimizer steps were seen")
    clock.write(given.result)
    told = json.loads(given.result.read_text())
    given.result.write_text(json.dumps({**told, "adapter": str(adapter)}))


if __name__ == "__main__":
    main()
