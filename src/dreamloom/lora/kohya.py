"""Layer names of kohya-ss's LoRA files, which ComfyUI and AUTOMATIC1111 read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dreamloom.core.errors import AdapterError
from dreamloom.lora.sdxl_layers import respell_text, sdxl_layers, underscore

LAYOUT_KEY = "dreamloom.layout"
"""Where an adapter's header says whether its base has SDXL's published blocks: ``sdxl`` if so."""

# diffusers splits this layer's name wrongly where it stands with diffusers' blocks.
_MISREAD = "unet.add_embedding."


def name_for_kohya(names: Iterable[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """Translate layers' names, such as ``unet.mid_block.attentions.0.proj_in``.

    Args:
        names: Names as in an `Adapter`.
        metadata: The adapter's; it may say that the base has other blocks than SDXL.

    Returns:
        For each name kohya's, such as ``lora_unet_middle_block_1_proj_in``.

    Raises:
        AdapterError: If the base has not SDXL's published blocks.
    """
    layers = sdxl_layers()
    spelled = {name: respell_text(name) for name in names}
    foreign = [name for name, spelling in spelled.items() if spelling not in layers]
    if foreign or metadata.get(LAYOUT_KEY, "sdxl") != "sdxl":
        example = f" ({foreign[0]})" if foreign else ""
        raise AdapterError(
            "The adapter's base model has other blocks than the published SDXL"
            f"{example}, and kohya's format has names for that one's only.",
            "Write the format kohya-diffusers, which has names for all, or peft.",
        )
    return {name: layers[spelling].kohya for name, spelling in spelled.items()}


def name_for_kohya_diffusers(names: Iterable[str]) -> dict[str, str]:
    """Translate layers' names of any base into those with kohya's endings and diffusers' blocks.

    Raises:
        AdapterError: If diffusers would read a name wrongly, or two names become one.
    """
    spelled = {name: underscore(name) for name in names}
    misread = [name for name in spelled if name.startswith(_MISREAD)]
    if misread:
        raise AdapterError(
            f"diffusers reads {misread[0]} wrongly in the format kohya-diffusers.",
            "Write the format kohya or peft.",
        )
    owners: dict[str, str] = {}
    for name, spelling in spelled.items():
        if owners.setdefault(spelling, name) != name:
            raise AdapterError(
                f"The layers {owners[spelling]} and {name} have one name in kohya's files.",
                "Write the format peft.",
            )
    return spelled
