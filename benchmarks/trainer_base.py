"""What all trainers are given, and the same questions to what each of them wrote.

The base is that of `small_sdxl.py` with a first text encoder of 12 layers, for kohya's code takes
the eleventh; or SDXL at its real size. It is spelled as older libraries read it, too.
"""

import argparse
import json
from pathlib import Path

import torch
from run_training import RANK, make_config, prepare_ours
from safetensors.torch import load_file, save_file
from small_sdxl import make_real_sdxl, make_small_sdxl
from torch.utils.flop_counter import FlopCounterMode

DRAWS = tuple(range(-1, -17, -1))
"""Updates whose noise and timesteps the loss is measured with: no training draws them."""
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def make_base(folder: Path, full_size: bool) -> Path:
    """Make the base model, unless it is there; return its folder."""
    if (folder / "spelled").exists():
        return folder
    if full_size:
        make_real_sdxl(folder)
    else:
        make_small_sdxl(folder, text_layers=12)
    _spell_for_older_libraries(folder)
    (folder / "spelled").touch()
    return folder


def _spell_for_older_libraries(folder: Path) -> None:
    """Name the first text encoder's weights, and write the tokenizers, as SDXL was published."""
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    weights = {
        name if name.startswith("text_model.") else f"text_model.{name}": weight
        for name, weight in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    for name in ("tokenizer", "tokenizer_2"):
        told = json.loads((folder / name / "tokenizer.json").read_text())
        added = {one["content"]: one["id"] for one in told["added_tokens"]}
        vocabulary = {**told["model"]["vocab"], **added}
        (folder / name / "vocab.json").write_text(json.dumps(vocabulary))
        merges = [" ".join(pair) for pair in told["model"]["merges"]]
        (folder / name / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def count_update(model: Path, px: int) -> dict[str, float]:
    """Count the operations of one update of two images by phase: forward and backward.

    It is that of the U-Net alone, as diffusers computes it, with a LoRA in its attention layers.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from peft import LoraConfig

    sizes = UNet2DConditionModel.load_config(model, subfolder="unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(sizes).requires_grad_(False)
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ATTENTION))
        # Of scaled_dot_product_attention not every kernel is counted.
        unet.set_attn_processor(AttnProcessor())
        pooled = sizes["projection_class_embeddings_input_dim"]
        pooled -= 6 * sizes["addition_time_embed_dim"]
        beside = {"text_embeds": torch.randn(2, pooled), "time_ids": torch.randn(2, 6)}
        with FlopCounterMode(display=False) as counter:
            predicted = unet(
                torch.randn(2, 4, px // 8, px // 8),
                torch.zeros(2),
                torch.randn(2, 77, sizes["cross_attention_dim"]),
                added_cond_kwargs=beside,
            ).sample
            forward = float(counter.get_total_flops())
            predicted.square().mean().backward()
    return {"forward": forward, "backward": counter.get_total_flops() - forward}


# ------------------------------------------------------------------ a process of its own


def measure_losses(given: argparse.Namespace) -> dict[str, float | str]:
    """Measure the loss of the base, as ``base``, and with each adapter; or say why not."""
    from dreamloom.core.errors import DreamLoomError
    from dreamloom.lora.reading import read_adapter
    from dreamloom.training.batches import prepare_batches
    from dreamloom.training.step import measure_batch
    from dreamloom.training.train import plan_batches

    config = make_config(given)
    _, model, photos, priors = prepare_ours(given)
    prompts = (config.photo_prompt(), config.class_prompt())
    batches = prepare_batches(model, photos, priors, prompts, plan_batches(config))

    def measure(file: Path | None) -> float | str:
        try:
            parts = [] if file is None else [(read_adapter(file), 1.0)]
            with torch.no_grad(), model.apply_adapters(parts):
                values = [
                    measure_batch(model, batches, batch, draw, config).values
                    for draw in DRAWS
                    for batch in batches.validation()
                ]
        except DreamLoomError as error:
            return str(error).splitlines()[0]
        return float(torch.cat(values).mean())

    return {"base": measure(None), **{file.stem: measure(file) for file in given.adapters}}


def main() -> None:
    """Measure losses, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapters", type=Path, nargs="*")
    for name in ("model", "pictures", "out", "result"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--px", type=int, required=True)
    common = {"updates": 1, "text": False, "gradient_checkpointing": False, "set": []}
    given = parser.parse_args(namespace=argparse.Namespace(**common))
    torch.set_num_threads(1)
    given.result.write_text(json.dumps(measure_losses(given)))


if __name__ == "__main__":
    main()
