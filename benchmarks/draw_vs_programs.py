"""One picture of a full-size SDXL on a processor, drawn by three programs: seconds, memory.

    OMP_NUM_THREADS=1 python benchmarks/draw_vs_programs.py --work FOLDER
        [--comfyui CHECKOUT --python VENV/bin/python] [--px 512] [--steps 4] [--rounds 1]

FOLDER is that of `sdxl_real_size.py`: the random base model in it is made if it is not there, and
written once more as a single file, 6.5 GiB, which ComfyUI reads. ComfyUI is run from a checkout
that you download, with the Python that has what it requires; its nodes' functions are called, not
its server. All draw the same prompt at the same guidance in float32, with as many steps of DDIM,
by turns, each time in a process of its own. A first picture of 256 px and one step warms up and is
not counted; neither is loading, which stands beside. Seconds are of processor time. Our picture is
compared with that of diffusers, which takes the same steps from the same noise; ComfyUI's steps
lie elsewhere. With random weights the pictures are noise.

The share of the limit is the operations of the U-Net and the autoencoder, counted by torch, over
what a large product of matrices does in that time, by the faster of torch's two libraries.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT, GUIDANCE, SEED = "a photo of a person", 5.0, 0
HERE = Path(__file__).resolve().parent
Draw = Callable[[int, int], Any]
"""Draws a picture of that many pixels a side in that many steps."""


# ------------------------------------------------------------------ a process of its own


def load_dreamloom(given: argparse.Namespace) -> Draw:
    """Load our model."""
    from dreamloom.core.device import pick_runtime
    from dreamloom.models.base import Sampler, Shot
    from dreamloom.models.families import load_model

    model = load_model(str(given.base), pick_runtime("cpu", "fp32"))
    return lambda px, steps: model.sample(
        [Shot(PROMPT, SEED)], Sampler("ddim", steps, GUIDANCE, size_px=(px, px))
    )[0]


def load_diffusers(given: argparse.Namespace) -> Draw:
    """Load diffusers' pipeline."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(
        given.base, torch_dtype=torch.float32, add_watermarker=False
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return lambda px, steps: pipeline(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        height=px,
        width=px,
        generator=torch.Generator("cpu").manual_seed(SEED),
    ).images[0]


def load_comfyui(given: argparse.Namespace) -> Draw:
    """Load ComfyUI's model from the single file."""
    sys.path.insert(0, str(given.comfyui))
    # It reads the command line by itself.
    sys.argv = ["main.py", "--cpu", "--force-fp32"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sample
    import comfy.sd
    import torch
    from PIL import Image

    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(given.file))

    def draw(px: int, steps: int) -> Any:
        with torch.inference_mode():
            asked, empty = (
                clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, "")
            )
            latent = torch.zeros(1, 4, px // 8, px // 8)
            noise = comfy.sample.prepare_noise(latent, SEED)
            options = {"seed": SEED, "disable_pbar": True}
            latent = comfy.sample.sample(
                *(model, noise, steps, GUIDANCE, "ddim", "ddim_uniform", asked, empty, latent),
                **options,
            )
            pixels = vae.decode(latent)[0].clamp(0, 1).mul(255).round().to(torch.uint8)
        return Image.fromarray(pixels.numpy())

    return draw


LOADERS = {"dreamloom": load_dreamloom, "diffusers": load_diffusers, "comfyui": load_comfyui}


def draw_here(given: argparse.Namespace) -> None:
    """Draw with one program; write its picture and what it took."""
    import torch
    from run_training import read_peak_mib

    torch.set_num_threads(1)
    clock = time.process_time
    began = clock()
    draw = LOADERS[given.who](given)
    loaded = clock() - began
    draw(256, 1)
    began = clock()
    picture = draw(given.px, given.steps)
    took = clock() - began
    picture.save(given.result.with_suffix(".png"))
    told = {"seconds": took, "loading": loaded, "peak_mib": read_peak_mib()}
    given.result.write_text(json.dumps({**told, "torch": torch.__version__}))


# ------------------------------------------------------------------ all of them


def count_picture(base: Path, px: int, steps: int) -> float:
    """Count the operations of one guided picture: the U-Net's and the decoder's."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from torch.utils.flop_counter import FlopCounterMode

    sizes = UNet2DConditionModel.load_config(base, subfolder="unet")
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel.from_config(sizes)
        decoder = AutoencoderKL.from_config(AutoencoderKL.load_config(base, subfolder="vae"))
        # Of scaled_dot_product_attention not every kernel is counted.
        for part in (unet, decoder):
            part.set_attn_processor(AttnProcessor())
        pooled = sizes["projection_class_embeddings_input_dim"]
        pooled -= 6 * sizes["addition_time_embed_dim"]
        latents = torch.randn(2, 4, px // 8, px // 8)
        context = torch.randn(2, 77, sizes["cross_attention_dim"])
        beside = {"text_embeds": torch.randn(2, pooled), "time_ids": torch.randn(2, 6)}
        with FlopCounterMode(display=False) as one_step:
            unet(latents, torch.zeros(2), context, added_cond_kwargs=beside)
        with FlopCounterMode(display=False) as decoding:
            decoder.decode(latents[:1])
    return steps * one_step.get_total_flops() + decoding.get_total_flops()


def draw_apart(who: str, given: argparse.Namespace) -> dict[str, Any]:
    """Draw by one program in a process of its own."""
    from train_vs_diffusers import quiet_environment

    result = given.work / f"{who}.json"
    result.unlink(missing_ok=True)
    command = [
        given.python if who == "comfyui" else sys.executable,
        *(__file__, "--who", who, "--work", str(given.work), "--result", str(result)),
        *("--px", str(given.px), "--steps", str(given.steps)),
        *(["--comfyui", str(given.comfyui)] if given.comfyui else []),
    ]
    done = subprocess.run(
        command, env=quiet_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode or not result.is_file():
        raise SystemExit(f"{who} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(result.read_text()))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=lambda text: Path(text).resolve(), required=True)
    parser.add_argument("--comfyui", type=lambda text: Path(text).resolve(), help="its checkout")
    parser.add_argument("--python", type=os.path.abspath, default=sys.executable)
    parser.add_argument("--px", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--who", choices=list(LOADERS), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.base, given.file = given.work / "base", given.work / "base.safetensors"
    return given


def main() -> None:
    """Draw by turns, and print a table."""
    given = parse()
    if given.who:
        draw_here(given)
        return
    import torch
    from draw_vs_diffusers import measure_decibels
    from PIL import Image
    from small_sdxl import make_real_sdxl, write_single_file
    from train_vs_diffusers import describe_machine

    from dreamloom.models.matrix_products import measure_matrix_rate

    torch.set_num_threads(1)
    make_real_sdxl(given.base)
    if given.comfyui and not given.file.is_file():
        write_single_file(given.base, given.file)
    names = [name for name in LOADERS if name != "comfyui" or given.comfyui]
    flop = count_picture(given.base, given.px, given.steps)
    device = torch.device("cpu")
    rate = 1e12 * measure_matrix_rate(device, torch.float32, clock=time.process_time)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(given.rounds):
        for name in names:
            rows[name].append(draw_apart(name, given))
            print(f"  round {number + 1}, {name}: {rows[name][-1]['seconds']:.1f} s", flush=True)
    seconds = {
        name: statistics.median(row["seconds"] for row in found) for name, found in rows.items()
    }
    decibels = measure_decibels(
        *(Image.open(given.work / f"{name}.png") for name in ("dreamloom", "diffusers"))
    )
    told = {
        **describe_machine(),
        **{"px": given.px, "steps": given.steps, "flop": flop, "matrix_flop_per_second": rate},
        **{"rounds": rows, "seconds": seconds, "decibels": decibels},
    }
    print(f"\n{flop / 1e12:.2f} TFLOP a picture, matrix rate {rate / 1e9:.0f} GFLOP/s, ours and")
    print(f"diffusers' picture: PSNR {decibels:.1f} dB\n")
    print("| program | s/picture | times ours | share of the limit | loading, s | peak GiB |")
    print("|---|---|---|---|---|---|")
    for name, found in rows.items():
        took, last = seconds[name], found[-1]
        print(
            f"| {name} | {took:.1f} | {took / seconds['dreamloom']:.2f} "
            f"| {flop / took / rate:.0%} | {last['loading']:.0f} | {last['peak_mib'] / 1024:.1f} |"
        )
    if given.json:
        given.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
