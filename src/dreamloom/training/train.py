"""Stage 3: photos (and class images) in, an adapter out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import Effort, measure_effort, seed_for
from dreamloom.core.distributed import Processes, join_processes
from dreamloom.core.errors import ConfigError, TrainingError
from dreamloom.core.events import (
    Note,
    Observer,
    Progress,
    StageDone,
    StageSkipped,
    StageStarted,
    silent,
)
from dreamloom.core.manifests import ClassImageSet, PhotoSet
from dreamloom.core.run_folder import Record, RunFolder
from dreamloom.lora.adapter import Adapter
from dreamloom.lora.token_embeddings import token_embeddings_file
from dreamloom.lora.writing import write_adapter
from dreamloom.models.base import AdapterSpec, Checkpointing, Model
from dreamloom.training.batches import BatchPlan, TrainingBatches, prepare_batches
from dreamloom.training.checkpoints import Checkpoints
from dreamloom.training.latent_cache import LatentStore
from dreamloom.training.loop import (
    TrainContext,
    TrainHooks,
    list_samples,
    run_training_loop,
    tail_mean,
    validate,
)
from dreamloom.training.optimization import TrainableAdapter
from dreamloom.training.provenance import name_inputs, refuse_other_run, sign
from dreamloom.training.validation_samples import ScoreImages, ValidationSampler

_LEAST_COMPILED = 500


def train_adapter(
    run: RunFolder,
    model: Model,
    photos: PhotoSet,
    priors: ClassImageSet | None,
    config: LoomConfig,
    observe: Observer = silent,
    judge: ScoreImages | None = None,
) -> Record:
    """Teach the model one subject and write ``adapter.safetensors``.

    Every random draw is a function of the seed, its purpose and the update, so photos meet the
    same noise with and without class images, and a resumed run repeats the uninterrupted one.
    Ctrl-C and SIGTERM leave a checkpoint that the same call goes on from. Started by ``accelerate
    launch``, several processes share each update, and the first alone writes.

    Args:
        run: Where the adapter, the checkpoints and the record go.
        model: A loaded base model with nothing attached.
        photos: The prepared photos.
        priors: Class images, or None for prior kinds ``base`` and ``none``.
        config: Resolved settings: nothing is ``auto`` any more.
        observe: Told of progress and of every loss.
        judge: Scores the pictures drawn while training runs; None only draws them.

    Raises:
        ConfigError: If settings contradict each other or ask for a library that is not here.
        TrainingError: If a loss is not finite, the run was stopped, or the checkpoint was made
            from other inputs.
    """
    processes = join_processes()
    inputs = name_inputs(model, photos, priors, config, processes)
    finished = run.finished("train", inputs)
    if finished:
        observe(StageSkipped("train", "already trained"))
        return finished
    refuse_other_run(run, inputs)
    observe(StageStarted("train", f"{config.train.steps} updates"))
    with measure_effort(model.runtime) as effort:
        if config.objective.zero_terminal_snr:
            model.rescale_to_zero_terminal_snr()
        store = LatentStore(
            run.latents,
            (model.identity.fingerprint, model.runtime.name),
            lambda text: observe(Note("train", text, warning=True)),
        )
        batches = _prepare_batches(model, photos, priors, config, processes, observe, store)
        weights = model.attach_adapter(
            _spec(config), _choose_gradient_checkpointing(config, model), _compiles(config, model)
        )
        try:
            if not model.trains_text:
                batches.conditioning(batches.texts)
            model.release_encoders()
            trainable = TrainableAdapter(weights, config, model.runtime, observe)
            validation = ValidationSampler(
                run,
                model,
                config,
                partial(sign, model=model, photos=photos, config=config),
                judge if config.validation.scores else None,
                observe,
            )
            checkpoints = Checkpoints(
                run.checkpoints, trainable.parameters, trainable.optimizer, inputs, trainable.others
            )
            context = TrainContext(model, batches, config, processes, observe)
            losses = _go_on(context, trainable, validation, checkpoints)
            with trainable.finished():
                adapter = model.read_adapter()
        finally:
            model.detach_adapter()
        adapter = sign(adapter, model, photos, config)
        if processes.is_main:
            _write(run, adapter, config)
        processes.wait()
    results = _tell_results(config, processes, priors, adapter, losses, validation, observe)
    record = _record(run, model, config, inputs, effort, results)
    if processes.is_main:
        run.write_record(record)
        checkpoints.clear()
        store.clear()
    processes.wait()
    observe(StageDone("train", effort.seconds, str(run.adapter)))
    return record


def check_training(model: Model, captions: Sequence[str], config: LoomConfig) -> None:
    """Find out whether these settings can train at all, before anything is made.

    Args:
        model: The base model, with nothing attached.
        captions: Each photo's own caption, empty where it has none.
        config: Resolved settings.

    Raises:
        ConfigError: If settings contradict each other or the base model, or ask for a library
            that is not here.
        AdapterError: If the adapter could not be written as asked.
    """
    _check_held_out(config, len(captions))
    _check_range(config, model)
    _check_placeholder_tokens(config, captions)
    if config.objective.zero_terminal_snr and model.prediction == "noise":
        model.rescale_to_zero_terminal_snr()  # refuses, and says why
    _check_quantization(config, model)
    weights = model.attach_adapter(_spec(config), compiled=_compiles(config, model))
    try:
        TrainableAdapter(weights, config, model.runtime, silent)
        if config.adapter.format == "kohya":
            _try_kohya(model)
    finally:
        model.detach_adapter()


def _check_range(config: LoomConfig, model: Model) -> None:
    low, high = (round(model.train_timesteps * s) for s in config.objective.timestep_range)
    if low >= high:
        raise ConfigError(
            f"objective.timestep_range = {list(config.objective.timestep_range)} holds none of "
            f"the {model.train_timesteps} timesteps.",
            "Make it wider.",
        )
    side = config.photos.resolution_px
    if side == "auto" or side % model.pixels_per_latent:
        raise ConfigError(
            f"photos.resolution_px = {side} does not fit {model.identity.name}.",
            f"Take a multiple of {model.pixels_per_latent}.",
        )


def _check_quantization(config: LoomConfig, model: Model) -> None:
    initial, quantization = config.adapter.init_lora_weights, model.memory_options.quantization
    if quantization != "whole" and config.adapter.splits_base:
        raise ConfigError(
            f"adapter.init_lora_weights = {initial} takes a part of the base's weights, which a "
            f"base kept in {quantization} cannot give.",
            "Set memory.base_quantization=whole, or adapter.init_lora_weights=default.",
        )


def _check_placeholder_tokens(config: LoomConfig, captions: Sequence[str]) -> None:
    said = [text or config.photo_prompt() for text in captions]
    for word in config.adapter.placeholder_tokens:
        if not any(word in text for text in said):
            raise ConfigError(
                f"The new word {word} stands in no photo's prompt, so nothing would teach it.",
                f'Say it in --subject, such as "{word} {config.subject.class_noun}", or in a '
                "caption.",
            )


def _check_held_out(config: LoomConfig, photos: int) -> None:
    if config.validation.held_out_photos and config.validation.every is None:
        raise ConfigError(
            "validation.held_out_photos keeps photos back, but nothing is ever validated.",
            "Set validation.every, such as 50, or hold out none.",
        )
    if config.validation.held_out_photos >= photos:
        raise ConfigError(
            f"validation.held_out_photos = {config.validation.held_out_photos} leaves none of "
            f"{photos} photos to train on.",
            "Hold out fewer, or add photos.",
        )


def _prepare_batches(
    model: Model,
    photos: PhotoSet,
    priors: ClassImageSet | None,
    config: LoomConfig,
    processes: Processes,
    observe: Observer,
    store: LatentStore,
) -> TrainingBatches:
    _check_held_out(config, len(photos.photos))
    batches = prepare_batches(
        model,
        photos,
        priors,
        (config.photo_prompt(), config.class_prompt()),
        BatchPlan(config.seed, config.photos.flip, config.validation.held_out_photos),
        lambda done, total: observe(Progress("train", "encoding pictures", done, total)),
        store,
    )
    if model.memory_options.cpu_offload:
        # The autoencoder and the denoiser have no room beside each other, so every crop that will
        # be dealt is encoded now.
        context = TrainContext(model, batches, config, processes, observe)
        batches.encode(list_samples(context))
    return batches


def _go_on(
    context: TrainContext,
    trainable: TrainableAdapter,
    validation: ValidationSampler,
    checkpoints: Checkpoints,
) -> list[float]:
    """Go on from the newest checkpoint to the last update; return the losses."""
    resumed = checkpoints.resume()
    if resumed.note:
        context.observe(Note("train", resumed.note))

    def run_validation(updates_done: int) -> None:
        with trainable.finished():
            validate(context, updates_done)
            if context.processes.is_main:
                validation.run_validation(updates_done)
        context.model.release_encoders()
        context.processes.wait()

    def save(updates_done: int) -> None:
        if context.processes.is_main:
            checkpoints.save(updates_done)
        context.processes.wait()

    last = context.config.train.steps
    hooks = TrainHooks(save, run_validation, validation.is_due)
    losses = run_training_loop(context, trainable, range(resumed.updates_done, last), hooks)
    if validation.is_due(last):
        run_validation(last)
    return losses


def _spec(config: LoomConfig) -> AdapterSpec:
    settings, kind = config.train, config.adapter
    if settings.target_modules == "auto" or settings.alpha == "auto":
        raise ValueError("settings must be resolved before training")
    return AdapterSpec(
        rank=settings.rank,
        alpha=settings.alpha,
        target_modules=settings.target_modules,
        seed=seed_for(config.seed, "adapter"),
        kind=kind.kind,
        blocks=kind.blocks,
        ranks=kind.rank_pattern,
        alphas=kind.alpha_pattern,
        use_rslora=kind.use_rslora,
        init=kind.init_lora_weights,
        text_encoders=kind.text_encoders,
        tokens=kind.placeholder_tokens,
    )


def _try_kohya(model: Model) -> None:
    """Find out before the training, not after it, whether the file can be written."""
    with TemporaryDirectory() as scratch:
        write_adapter(Path(scratch) / "try.safetensors", model.read_adapter(), format="kohya")


def _write(run: RunFolder, adapter: Adapter, config: LoomConfig) -> None:
    try:
        write_adapter(run.adapter, adapter)
        if config.adapter.format == "kohya":
            write_adapter(run.kohya_adapter, adapter, format="kohya")
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"The adapter {run.adapter} cannot be written: {error}. The last checkpoint holds all "
            "of the training.",
            "Make room on the disk and run the same command again; nothing is trained twice.",
        ) from error


def _list_outputs(run: RunFolder) -> list[Path]:
    """List the adapter's files: with new words, and for other programs, there are more than one."""
    adapters = (run.adapter, run.kohya_adapter)
    return [
        path for file in adapters for path in (file, token_embeddings_file(file)) if path.is_file()
    ]


def _choose_gradient_checkpointing(config: LoomConfig, model: Model) -> Checkpointing:
    if config.memory.gradient_checkpointing == "auto":
        # Nobody planned, so this must fit wherever it can.
        return "full" if model.runtime.device.type == "cuda" else "none"
    return config.memory.gradient_checkpointing


def _compiles(config: LoomConfig, model: Model) -> bool:
    """Say whether to compile; before training, refuse where it cannot be done."""
    asked, kind = config.train.compile, config.adapter.kind
    if asked == "auto":
        # Below that, compiling takes longer than it saves.
        is_long = config.train.steps >= _LEAST_COMPILED
        return kind == "lora" and is_long and model.runtime.device.type == "cuda"
    if asked == "blocks" and kind != "lora":
        raise ConfigError(
            f"train.compile = blocks is for adapters of kind lora, not {kind}.",
            "Set train.compile=off, or adapter.kind=lora.",
        )
    return asked == "blocks"


def _tell_results(
    config: LoomConfig,
    processes: Processes,
    priors: ClassImageSet | None,
    adapter: Adapter,
    losses: list[float],
    validation: ValidationSampler,
    observe: Observer,
) -> dict[str, object]:
    settings = config.train
    per_update = settings.batch_photos * settings.gradient_accumulation_steps * processes.count
    results: dict[str, object] = {
        "updates": settings.steps,
        "photo_exposures": settings.steps * per_update,
        "class_images": len(priors.files) if priors else 0,
        "parameters": adapter.parameters,
        "processes": processes.count,
        "mean_loss_last_tenth": tail_mean(losses),
    }
    recommended = validation.recommend()
    if recommended:
        results["recommended"] = {"update": recommended.update, "why": recommended.why}
        where = validation.adapter_of(recommended.update)
        observe(Note("train", f"recommended: {where} ({recommended.why})"))
    return results


def _record(
    run: RunFolder,
    model: Model,
    config: LoomConfig,
    inputs: dict[str, str],
    effort: Effort,
    results: dict[str, object],
) -> Record:
    return Record(
        stage="train",
        inputs=inputs,
        settings={
            **config.train.model_dump(mode="json"),
            "adapter": config.adapter.model_dump(mode="json"),
            "memory": config.memory.model_dump(mode="json"),
            "objective": config.objective.model_dump(mode="json"),
        },
        outputs=run.hash_outputs(*_list_outputs(run)),
        results=results,
        base=model.identity.as_dict(),
        seed=config.seed,
        runtime=model.runtime.name,
        seconds=effort.seconds,
        peak_mib=effort.peak_mib,
    )
