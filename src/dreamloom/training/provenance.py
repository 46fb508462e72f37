"""Provenance: what a training depends on (fingerprints), and what its file's metadata say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from dreamloom.core.config.aliases import use_earlier_names
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.distributed import Processes
from dreamloom.core.errors import RunFolderError
from dreamloom.core.manifests import ClassImageSet, PhotoSet
from dreamloom.core.run_folder import RunFolder, fingerprint
from dreamloom.lora.adapter import Adapter
from dreamloom.lora.folders import hash_adapter
from dreamloom.lora.locating import locate_adapter
from dreamloom.lora.modelspec import describe_base, describe_captions, make_modelspec
from dreamloom.models.base import Model

# What changes how long a run takes, or what is told of it, but not what comes out.
_FREE = {"checkpointing_steps", "compile", "init_adapter", "log_gradient_noise"}
# How a photo's prompt is varied; how photos are cut is part of their own fingerprint.
_CAPTIONS = {"caption_lines", "shuffle_caption", "keep_tokens", "caption_tag_dropout_rate"}
# The name of the adapter that a training began from, among its inputs.
INIT_ADAPTER = "adapter to begin from"


def name_inputs(
    model: Model,
    photos: PhotoSet,
    priors: ClassImageSet | None,
    config: LoomConfig,
    processes: Processes,
) -> dict[str, str]:
    """Fingerprint everything that the adapter depends on, by name."""
    init_adapter = config.train.init_adapter
    captions = use_earlier_names(config.photos.model_dump(include=_CAPTIONS), "photos")
    return {
        "base": model.identity.fingerprint,
        "photos": photos.fingerprint,
        "class images": priors.made_from + f":{len(priors.files)}"
        if priors
        else config.priors.kind,
        "prompts": fingerprint(config.photo_prompt(), config.class_prompt()),
        "settings": fingerprint(
            use_earlier_names(config.train.model_dump(exclude=_FREE), "train"),
            use_earlier_names(config.adapter.model_dump(), "adapter"),
            use_earlier_names(config.objective.model_dump(), "objective"),
            config.photos.flip,
            config.validation.held_out_photos,
            *([captions] if captions else []),
            *config.memory.changes_results,
        ),
        "seed": str(config.seed),
        "processes": str(processes.count),
        # What counts is what is in the file, and not where it lies.
        **({INIT_ADAPTER: hash_adapter(locate_adapter(init_adapter))} if init_adapter else {}),
    }


def name_early_stop(config: LoomConfig) -> dict[str, str]:
    """Fingerprint what decides after how many updates a training ends; nothing where all are done.

    Up to there it is the training that it would be without, so checkpoints do not depend on it.
    """
    settings = config.validation
    if settings.patience is None:
        return {}
    looked_at = settings.every, settings.prompts, settings.images, settings.steps
    return {"early stop": fingerprint(settings.patience, *looked_at)}


def refuse_other_run(run: RunFolder, inputs: dict[str, str]) -> None:
    """Keep a finished adapter from being overwritten by another one.

    Raises:
        RunFolderError: If the run holds an adapter made from other inputs.
    """
    earlier = run.read_record("train")
    if earlier is None or not run.adapter.exists():
        return
    differing = sorted(
        k for k in {*earlier.inputs, *inputs} if earlier.inputs.get(k) != inputs.get(k)
    )
    if differing:
        raise RunFolderError(
            f"{run.path} already holds an adapter made with other {', '.join(differing)}.",
            "Name another --out; the finished run stays as it is.",
        )


def sign(
    model: Model, photos: PhotoSet, config: LoomConfig, inputs: Mapping[str, str], adapter: Adapter
) -> Adapter:
    """Write into the file how it was made: found alone in a folder, it can still tell.

    Args:
        model: The base model.
        photos: What it was taught from.
        config: Resolved settings.
        inputs: As `name_inputs` gives them.
        adapter: What was trained.
    """
    first = inputs.get(INIT_ADAPTER)
    began_from = {"dreamloom.init_adapter_sha256": first} if first else {}
    signed = adapter.with_metadata(
        **{
            "dreamloom.kind": "subject",
            "dreamloom.subject": config.subject.phrase,
            "dreamloom.class_noun": config.subject.class_noun,
            "dreamloom.photo_prompt": config.photo_prompt(),
            "dreamloom.photos": photos.fingerprint,
            "dreamloom.prior": config.priors.kind,
            "dreamloom.base": model.identity.name,
            "dreamloom.base_fingerprint": model.identity.fingerprint,
            "dreamloom.base_revision": model.identity.revision,
            "dreamloom.base_storage": model.memory_options.quantization,
            "dreamloom.resolution_px": str(photos.resolution_px),
            "dreamloom.zero_terminal_snr": str(config.objective.zero_terminal_snr).lower(),
            "dreamloom.seed": str(config.seed),
            "dreamloom.settings": json.dumps(
                config.train.model_dump(mode="json", exclude={"init_adapter"})
            ),
            # Without paths: they say nothing elsewhere, and much about whose machine it was.
            "dreamloom.config": config.model_dump_json(
                exclude={"base": True, "priors": {"folder"}, "train": {"init_adapter"}}
            ),
            **began_from,
            **_describe_for_kohya(model, photos, config),
        }
    )
    words = json.dumps({word: {} for word in adapter.tokens})
    modelspec = make_modelspec({**signed.metadata, "dreamloom.words": words})
    return signed.with_metadata(**modelspec)


def read_final_scale(adapter: Adapter) -> float:
    """Read by what a finished training of ours multiplied its adapter; 1 where nothing says so."""
    try:
        settings = json.loads(adapter.metadata.get("dreamloom.settings", "{}"))
        scale = float(settings.get("final_scale", 1.0))
    except (ValueError, TypeError, AttributeError):
        return 1.0
    is_own = adapter.metadata.get("dreamloom.kind") == "subject"
    return scale if is_own and math.isfinite(scale) and scale > 0 else 1.0


def _describe_for_kohya(model: Model, photos: PhotoSet, config: LoomConfig) -> dict[str, str]:
    """Tell of the training in the header entries of kohya's trainer, by which tools list a file."""
    train, side = config.train, photos.resolution_px
    own = [(photo.caption or config.photo_prompt()).replace("\n", ", ") for photo in photos.photos]
    text_rates = [train.text_learning_rate, train.text_encoder_2_learning_rate]
    if text_rates[0] == text_rates[1]:
        del text_rates[1]
    told = {
        "ss_steps": train.steps,
        "ss_max_train_steps": train.steps,
        "ss_learning_rate": train.learning_rate,
        "ss_unet_lr": train.learning_rate,
        "ss_text_encoder_lr": ", ".join(map(str, text_rates))
        if config.adapter.text_encoders
        else None,
        "ss_optimizer": train.optimizer,
        "ss_lr_scheduler": train.lr_scheduler,
        "ss_lr_warmup_steps": train.warmup_steps,
        "ss_gradient_accumulation_steps": train.gradient_accumulation_steps,
        "ss_max_grad_norm": train.max_grad_norm,
        "ss_prior_loss_weight": train.prior_weight,
        "ss_noise_offset": config.objective.noise_offset,
        "ss_multires_noise_iterations": config.objective.multires_noise_iterations or None,
        "ss_multires_noise_discount": config.objective.multires_noise_discount
        if config.objective.multires_noise_iterations
        else None,
        "ss_shuffle_caption": config.photos.shuffle_caption,
        "ss_keep_tokens": config.photos.keep_tokens,
        "ss_caption_tag_dropout_rate": config.photos.caption_tag_dropout_rate,
        "ss_zero_terminal_snr": config.objective.zero_terminal_snr,
        "ss_mixed_precision": model.runtime.name.rpartition(" ")[2],
        "ss_resolution": f"({side}, {side})",
        "ss_seed": config.seed,
    }
    return {
        **describe_base(model.identity.name),
        **describe_captions(config.subject.phrase, own),
        **{name: str(value) for name, value in told.items()},
    }
