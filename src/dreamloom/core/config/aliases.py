"""Aliases: the earlier names of settings, which files and commands of before still use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RENAMED = {
    "train.updates": "train.steps",
    "train.accumulate": "train.gradient_accumulation_steps",
    "train.reach": "train.target_modules",
    "train.warmup_updates": "train.warmup_steps",
    "train.schedule": "train.lr_scheduler",
    "train.clip_norm": "train.max_grad_norm",
    "train.average_decay": "train.ema_decay",
    "train.checkpoint_every": "train.checkpointing_steps",
    "train.save_memory": "memory.gradient_checkpointing",
    "memory.checkpointing": "memory.gradient_checkpointing",
    "memory.base": "memory.base_quantization",
    "memory.images_per_pass": "memory.micro_batch_size",
    "memory.one_at_a_time": "memory.cpu_offload",
    "adapter.ranks": "adapter.rank_pattern",
    "adapter.alphas": "adapter.alpha_pattern",
    "adapter.rank_stabilised": "adapter.use_rslora",
    "adapter.initial": "adapter.init_lora_weights",
    "adapter.up_rate_ratio": "adapter.loraplus_lr_ratio",
    "adapter.new_words": "adapter.placeholder_tokens",
    "watch.every": "validation.every",
    "watch.prompts": "validation.prompts",
    "watch.images": "validation.images",
    "watch.steps": "validation.steps",
    "watch.held_out_photos": "validation.held_out_photos",
    "watch.scores": "validation.scores",
    "watch.tracker": "validation.tracker",
}
"""Each earlier name of a setting, with today's."""

_EARLIER = {today: earlier for earlier, today in RENAMED.items()}

# Settings that earlier versions had not, with the values that mean what was done without them;
# auto is settled before anything is made.
_LATER: Mapping[str, Sequence[Any]] = {
    "train.caption_dropout": (0.0, "auto"),
    "train.prior_target": ("images", "auto"),
    "train.final_scale": (1.0, "auto"),
    "train.text_encoder_2_learning_rate": ("auto",),
    "train.learning_rate_pattern": ({},),
    "train.lr_num_cycles": (3,),
    "train.lr_power": (2.0,),
    "priors.prompts": ((), [], "auto"),
    "photos.caption_lines": ("join",),
    "photos.shuffle_caption": (False,),
    "photos.keep_tokens": (0,),
    "photos.caption_tag_dropout_rate": (0.0,),
    "objective.multires_noise_iterations": (0,),
    "objective.multires_noise_discount": (0.3,),
    "train.scale_weight_norms": (None,),
    "train.update_penalty": (0.0,),
    "adapter.dropout": (0.0,),
    "adapter.rank_dropout": (0.0,),
    "adapter.module_dropout": (0.0,),
    "adapter.t_lora_min_rank": (None,),
    "train.log_gradient_noise": (False,),
    "validation.patience": (None,),
    "generate.guidance_rescale": (0.0,),
    "generate.cfg_zero_star": (False,),
    "generate.conditional_only": (False,),
}
# Settings that came later, with those that did for both until then: alike, they say nothing new.
_PARTED = {"train.text_encoder_2_learning_rate": "train.text_learning_rate"}

_EARLIER_VALUES = {"train.save_memory": {True: "full", False: "none"}}


def list_earlier_names(given: Mapping[str, Any]) -> list[str]:
    """List the earlier names in nested settings, such as ``train.updates``, in their order."""
    return [
        f"{group}.{name}"
        for group, values in given.items()
        if isinstance(values, Mapping)
        for name in values
        if f"{group}.{name}" in RENAMED
    ]


def use_current_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """Give nested settings today's names.

    Raises:
        ValueError: If a setting is given under both of its names.
    """
    current: dict[str, Any] = {
        group: dict(values) if isinstance(values, Mapping) else values
        for group, values in given.items()
    }
    for earlier in list_earlier_names(given):
        group, name = earlier.split(".")
        new_group, new_name = RENAMED[earlier].split(".")
        value = current[group].pop(name)
        if not current[group]:
            del current[group]
        section = current.setdefault(new_group, {})
        if new_name in section:
            raise ValueError(f"{earlier} is now {RENAMED[earlier]}; give it once")
        meant = _EARLIER_VALUES.get(earlier, {})
        section[new_name] = meant.get(value, value) if isinstance(value, bool) else value
    return current


def use_earlier_names(values: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """Give settings their earlier names, so that fingerprints stay what they were.

    How a file names its layers changes nothing of what is learned, so every format has the value of
    the earlier default. Settings that came later are left out while they change nothing.

    Args:
        values: By dotted name, or by a group's own names.
        group: That group, such as ``train``.
    """
    within = f"{group}." if group else ""
    by_full_name = {within + name: value for name, value in values.items()}
    return {
        _EARLIER.get(within + name, name).removeprefix(within): (
            "peft" if within + name == "adapter.format" else value
        )
        for name, value in values.items()
        if not is_as_before(within + name, by_full_name)
    }


def values_of_before() -> dict[str, Any]:
    """Give the settings that came later the values that mean what was done without them."""
    return {name: values[0] for name, values in _LATER.items()}


def is_as_before(name: str, values: Mapping[str, Any]) -> bool:
    """Say whether a setting came later and means what was done without it.

    Args:
        name: Its dotted name.
        values: Settings by dotted name, this one among them.
    """
    return values[name] in _LATER.get(name, ()) or (
        name in _PARTED and values[name] == values.get(_PARTED[name])
    )
