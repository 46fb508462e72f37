"""What it costs to fuse an adapter into a full-size SDXL.

The base is a folder in diffusers' layout with every tensor of SDXL's denoiser and text encoders, in
half precision and all zeros: the file has holes for contents, so that only what is fused takes
room on the disk. The adapter has rank 32 in the 722 linear layers within the transformers; its
factors are normal. Memory is the peak of the resident set while `fuse_into_checkpoint` runs, above
what the process held before, the adapter's factors in float32 included; Linux only.

    OMP_NUM_THREADS=1 python benchmarks/fuse_memory.py [--folder DIR]
"""

import argparse
import json
import re
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from merge_vs_peft import forget_peak, make_layer, read_memory_mib
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dreamloom.lora.adapter import Adapter
from dreamloom.lora.writing import write_adapter
from dreamloom.merging.files.fuse import fuse_into_checkpoint
from dreamloom.merging.files.recipe import AdapterPart

CONFIGS = Path("src/dreamloom/models/sdxl_configs")
LINEAR = re.compile(r"\.(to_[qkv]|to_out\.0|net\.0\.proj|net\.2|proj_in|proj_out)$")


def make_models() -> dict[str, nn.Module]:
    """Make SDXL's parts without memory for their weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / "unet"))
        first = CLIPTextModel(CLIPTextConfig.from_pretrained(CONFIGS / "text_encoder"))
        second = CLIPTextModelWithProjection(
            CLIPTextConfig.from_pretrained(CONFIGS / "text_encoder_2")
        )
    return {"unet": unet, "text_encoder": first, "text_encoder_2": second}


def write_hollow(file: Path, model: nn.Module) -> None:
    """Write a safetensors file of a model's tensors in half precision, all zeros."""
    header, stop = {}, 0
    for name, tensor in model.state_dict().items():
        start, stop = stop, stop + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text = text.ljust((len(text) + 7) // 8 * 8)
    file.parent.mkdir(parents=True)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + stop)


def make_adapter(unet: nn.Module) -> Adapter:
    """Make an adapter of the linear layers within the denoiser's transformers."""
    rng = torch.Generator().manual_seed(0)
    return Adapter(
        {
            f"unet.{name}": make_layer(tuple(layer.weight.shape), rng)
            for name, layer in unet.named_modules()
            if isinstance(layer, nn.Linear) and ".attentions." in name and LINEAR.search(name)
        }
    )


def bake(file: Path, base: Path, out: Path) -> tuple[float, float]:
    """Bake, and tell seconds and the peak in MiB above what was held before."""
    forget_peak()
    before, begun = read_memory_mib("VmRSS"), time.perf_counter()
    fuse_into_checkpoint([AdapterPart(file)], str(base), out)
    return time.perf_counter() - begun, read_memory_mib("VmHWM") - before


def main() -> None:
    """Make a base and an adapter, bake, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="Where there is room for 7 GB.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        base, file = Path(place) / "sdxl", Path(place) / "adapter.safetensors"
        models = make_models()
        for name, model in models.items():
            names = "diffusion_pytorch_model" if name == "unet" else "model"
            write_hollow(base / name / f"{names}.safetensors", model)
        (base / "model_index.json").write_text("{}")
        adapter = make_adapter(models["unet"])
        layers = len(adapter.layers)
        write_adapter(file, adapter, torch.float16)
        factors = 4 * adapter.parameters
        size = sum(path.stat().st_size for path in base.rglob("*.safetensors"))
        # In a fresh process, which holds no memory that was used and given back.
        with get_context("spawn").Pool(1) as fresh:
            seconds, peak = fresh.apply(bake, (file, base, Path(place) / "baked"))
    print(f"base: {size / 2**20:.0f} MiB; {layers} layers of rank 32: {factors / 2**20:.0f} MiB")
    print(f"baked in {seconds:.1f} s, {peak:.0f} MiB at most above what was held before")


if __name__ == "__main__":
    main()
