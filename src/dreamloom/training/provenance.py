"""Provenance: what a training depends on (fingerprints), and what its file's metadata say."""

from __future__ import annotations

import json

from dreamloom.core.config.aliases import use_earlier_names
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.distributed import Processes
from dreamloom.core.errors import RunFolderError
from dreamloom.core.manifests import ClassImageSet, PhotoSet
from dreamloom.core.run_folder import RunFolder, fingerprint
from dreamloom.lora.adapter import Adapter
from dreamloom.lora.modelspec import make_modelspec
from dreamloom.models.base import Model

# What changes how long a run takes, or what is told of it, but not what comes out.
_FREE = {"checkpointing_steps", "compile"}


def name_inputs(
    model: Model,
    photos: PhotoSet,
    priors: ClassImageSet | None,
    config: LoomConfig,
    processes: Processes,
) -> dict[str, str]:
    """Fingerprint everything that the adapter depends on, by name."""
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
            config.objective.model_dump(),
            config.photos.flip,
            config.validation.held_out_photos,
            *config.memory.changes_results,
        ),
        "seed": str(config.seed),
        "processes": str(processes.count),
    }


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


def sign(adapter: Adapter, model: Model, photos: PhotoSet, config: LoomConfig) -> Adapter:
    """Write into the file how it was made: found alone in a folder, it can still tell."""
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
            "dreamloom.settings": json.dumps(config.train.model_dump(mode="json")),
            # Without paths: they say nothing elsewhere, and much about whose machine it was.
            "dreamloom.config": config.model_dump_json(
                exclude={"base": True, "priors": {"folder"}}
            ),
        }
    )
    words = json.dumps({word: {} for word in adapter.tokens})
    modelspec = make_modelspec({**signed.metadata, "dreamloom.words": words})
    return signed.with_metadata(**modelspec)
