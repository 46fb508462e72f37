"""Stage 2: class images drawn by the same base model, so that it keeps its idea of the class."""

from __future__ import annotations

import shutil

from dreamloom.config import PriorsConfig
from dreamloom.errors import ConfigError
from dreamloom.events import Observer, Progress, StageDone, StageSkipped, StageStarted, silent
from dreamloom.families.base import Model, Sampler, Shot
from dreamloom.pictures import PriorSet, read_prior_set, write_manifest
from dreamloom.rundir import Record, RunDir, atomic_path, fingerprint
from dreamloom.runtime import measure_effort, seed_for

BATCH = 8


def make_priors(
    run: RunDir,
    model: Model,
    prompt: str,
    config: PriorsConfig,
    seed: int,
    resolution_px: int,
    observe: Observer = silent,
) -> PriorSet:
    """Draw the class images into ``priors/``, or keep those that were drawn just so before.

    Each image has a seed of its own, derived from the run's seed and its number, so the set does
    not depend on the batch, and a larger set begins with the smaller one.

    Args:
        run: Where the images and the record go.
        model: The base model that will be taught; nothing must be worn or attached.
        prompt: The class prompt, such as ``a photo of a person``.
        config: Resolved settings: nothing is ``auto`` any more.
        seed: The run's seed.
        resolution_px: Side of the images: what will be trained on.
        observe: Told of progress.

    Raises:
        ConfigError: If the scheduler is unknown.
    """
    if config.scheduler not in model.schedulers:
        raise ConfigError(
            f"priors.scheduler = {config.scheduler!r} is unknown.",
            f"Choose from: {', '.join(model.schedulers)}.",
        )
    sampler = Sampler(config.scheduler, config.steps, float(config.guidance))
    recipe = fingerprint(model.identity.fingerprint, prompt, sampler, seed, resolution_px)
    inputs = {"recipe": recipe, "count": str(config.count)}
    if run.finished("priors", inputs):
        observe(StageSkipped("priors", "already drawn"))
        return read_prior_set(run.priors)
    observe(StageStarted("priors", f"{config.count} pictures of “{prompt}”"))
    with measure_effort(model.runtime) as effort:
        shutil.rmtree(run.priors, ignore_errors=True)
        run.priors.mkdir(parents=True)
        files = tuple(f"{index:04d}.png" for index in range(config.count))
        observe(Progress("priors", "drawing class images", 0, config.count))
        for start in range(0, config.count, BATCH):
            numbers = range(start, min(start + BATCH, config.count))
            shots = [Shot(prompt, seed_for(seed, "prior", number)) for number in numbers]
            drawn = model.sample(shots, sampler, resolution_px, batch=BATCH)
            for number, image in zip(numbers, drawn, strict=True):
                with atomic_path(run.priors / files[number]) as temporary:
                    image.save(temporary)
            observe(Progress("priors", "drawing class images", numbers.stop, config.count))
        priors = PriorSet(
            folder=run.priors,
            prompt=prompt,
            resolution_px=resolution_px,
            files=files,
            made_from=recipe,
        )
        manifest = write_manifest(priors)
    run.write_record(
        Record(
            stage="priors",
            inputs=inputs,
            settings=config.model_dump(mode="json"),
            outputs=run.hash_outputs(manifest, *priors.paths()),
            results={"count": config.count, "prompt": prompt},
            base=model.identity.as_dict(),
            seed=seed,
            runtime=model.runtime.name,
            seconds=effort.seconds,
            peak_mib=effort.peak_mib,
        )
    )
    observe(StageDone("priors", effort.seconds, str(run.priors)))
    return priors
