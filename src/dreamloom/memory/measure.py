"""Make the table of one base model by counting a dozen cases."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dreamloom.memory.phases import Case, Run, counted_run
from dreamloom.memory.table import MemoryTable
from dreamloom.memory.tensor_counter import tensors_of
from dreamloom.models import sdxl_configs
from dreamloom.models.base import AdapterSpec, Checkpointing, MemoryOptions, TargetModules
from dreamloom.models.quantization import Quantization

_RANK = 16
_QUANTIZED: tuple[Quantization, ...] = ("fp8", "int8", "nf4")
_OnCase = Callable[[str], None]
_PIXELS_PER_LATENT = 8
# What makes two denoisers of one size.
_SIZES = (
    "block_out_channels",
    "cross_attention_dim",
    "down_block_types",
    "layers_per_block",
    "transformer_layers_per_block",
)
_counted: dict[Path, MemoryTable] = {}


def count_table(
    made_by: str,
    resolution_px: int = 1024,
    folder: Path | None = None,
    on_case: _OnCase = lambda case: None,
) -> MemoryTable:
    """Count what a base model needs in a dozen cases: some minutes for a full-size SDXL.

    Args:
        made_by: The command that asks, for the table.
        resolution_px: Side of the pictures.
        folder: The base model's configuration; None is SDXL's published size.
        on_case: Told what is counted.
    """
    plain = Case(
        resolution_px,
        AdapterSpec(_RANK, float(_RANK), "attention", 0),
        passes=1,
        folder=folder,
    )
    on_case("weights and drawing")
    served = _serve(plain)
    training: dict[str, int] = {}
    flops: dict[str, float] = dict(served.pop("flops"))
    for levels in get_args(Checkpointing):
        on_case(f"training, recomputing {levels}")
        found = _train(replace(plain, gradient_checkpointing=levels), with_flops=True)
        training[levels], flops[levels] = found["passes"], found["flops"]
    base = training["none"]
    adapter, target_modules = {"attention": found["parameters"] // _RANK}, {"attention": 0}
    text_adapter: dict[str, int] = {}
    text_training: dict[str, int] = {}
    for name in get_args(TargetModules):
        spec = replace(plain.spec, target_modules=name)
        if name != "attention":
            on_case(f"training, reach {name}")
            found = _train(replace(plain, spec=spec))
            target_modules[name] = found["passes"] - base
            adapter[name] = found["parameters"] // _RANK
        on_case(f"training, reach {name}, text encoders too")
        texts = _train(replace(plain, spec=replace(spec, text_encoders=True)))
        text_adapter[name] = texts["parameters"] // _RANK - adapter[name]
        text_training[name] = max(0, texts["passes"] - base - target_modules[name])
    on_case("training, rank 64")
    higher = _train(replace(plain, spec=replace(plain.spec, rank=64, alpha=64.0)))["passes"]
    stored: dict[str, int] = {}
    for kind in _QUANTIZED:
        on_case(f"training on {kind}")
        found = _train(
            replace(plain, gradient_checkpointing="full", memory_options=MemoryOptions(kind))
        )
        served["unet"][kind] = found["unet"]
        served["text"]["int8"] = found["text"]
        stored[kind] = max(0, found["passes"] - training["full"])
    return MemoryTable(
        made_by=made_by,
        resolution_px=resolution_px,
        adapter=adapter,
        text_adapter=text_adapter,
        training=training,
        target_modules=target_modules,
        rank=round((higher - base) / (64 - _RANK)),
        text_training=text_training,
        stored=stored,
        flops=flops,
        **served,
    )


def count_folder(folder: Path, on_case: _OnCase = lambda case: None) -> MemoryTable | None:
    """Count a base model in a folder; None if it is of SDXL's published size.

    Counts are remembered while the process lives.
    """
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    published = json.loads((sdxl_configs.FOLDER / "unet" / "config.json").read_text("utf-8"))
    if all(config.get(name) == published[name] for name in _SIZES):
        return None
    if folder not in _counted:
        side = int(config["sample_size"]) * _PIXELS_PER_LATENT
        _counted[folder] = count_table(str(folder), side, folder, on_case)
    return _counted[folder]


def _weigh(run: Run) -> dict[str, int]:
    sizes = {
        name: sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(part))
        for name, part in run.parts.items()
    }
    return {"unet": sizes["unet"], "text": sizes["text_encoder"] + sizes["text_encoder_2"]}


def _serve(case: Case) -> dict[str, Any]:
    """Weigh the parts, and count what works without gradients."""
    with counted_run(case) as run:
        weights = _weigh(run)
        found: dict[str, Any] = {
            "unet": {"whole": weights["unet"]},
            "text": {"whole": weights["text"]},
            "vae": run.counter.held_bytes - weights["unet"] - weights["text"],
            "denoise": run.needs(lambda: run.predict(2)) // 2,
            "decode": run.needs(run.decode),
            "encode": run.needs(run.encode),
            "prompts": run.needs(run.encode_prompts),
        }
        found["flops"] = {
            # Both encode the same prompt.
            "forward": _flops(lambda: run.predict(2)) - _flops(lambda: run.predict(1)),
            "decode": _flops(run.decode),
            "encode": _flops(run.encode),
        }
    return found


def _train(case: Case, with_flops: bool = False) -> dict[str, Any]:
    """Count what a pass holds beside weights and adapter, and the operations that it does."""
    with counted_run(case) as run:
        sizes = _weigh(run)
        weights = run.attach()
        passes = run.needs(run.forward_backward)
        run.forget_gradients()
        return {
            "passes": passes,
            "flops": _flops(run.forward_backward) if with_flops else 0.0,
            "parameters": sum(p.numel() for one in weights for p in one.parameters),
            **sizes,
        }


# Fake tensors stand on the processor, whose fused attention torch's counter does not know.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: int(sdpa_flop_count(query, key, value))
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *_, **__: int(
            sdpa_backward_flop_count(gradient, query, key, value)
        )
    ),
}


def _flops(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        work()
    return float(counter.get_total_flops())
