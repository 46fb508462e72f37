"""Train an adapter (stage 3): photos and class images in, a LoRA file out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import Effort, measure_effort, seed_for
from dreamloom.core.distributed import join_processes
from dreamloom.core.errors import ConfigError, RunFolderError, TrainingError
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
from dreamloom.core.requests import announce_training
from dreamloom.core.run_folder import Record, RunFolder, explain_write_errors
from dreamloom.lora.adapter import Adapter
from dreamloom.lora.locating import locate_adapter
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.token_embeddings import list_token_files
from dreamloom.lora.writing import write_adapter
from dreamloom.models.base import AdapterSpec, Model, WeightGroup
from dreamloom.models.session import refuse_other_base
from dreamloom.training.batches import BatchPlan, prepare_batches
from dreamloom.training.caption_variants import CaptionPlan
from dreamloom.training.checkpoints import Checkpoints
from dreamloom.training.latent_cache import LatentStore
from dreamloom.training.loop import (
    LoopResult,
    TrainContext,
    describe_noise,
    list_samples,
    run_training_loop,
    tail_mean,
)
from dreamloom.training.optimizers import doubt_rates
from dreamloom.training.provenance import (
    name_early_stop,
    name_inputs,
    read_final_scale,
    refuse_other_run,
    sign,
)
from dreamloom.training.trainable_adapter import TrainableAdapter
from dreamloom.training.update_norms import refuse_unfit_norms
from dreamloom.training.validation_samples import ScoreImages, ValidationSampler

_LEAST_COMPILED = 500
# Weights of SDXL are some hundredths, of which half precision keeps about 1e-5.
_IDLE = 1e-7
_INIT = {"init_adapter"}
# With fewer photos there is no lift of identity.
_LEAST_SCORED = 3


def train_adapter(
    run: RunFolder,
    model: Model,
    photos: PhotoSet,
    priors: ClassImageSet | None,
    config: LoomConfig,
    observe: Observer = silent,
    judge: ScoreImages | None = None,
) -> Record:
    """Train an adapter on one subject and write ``adapter.safetensors``.

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
    # What ends a training early changes nothing of an unfinished one.
    results_from = {**inputs, **name_early_stop(config)}
    finished = run.finished("train", results_from)
    if finished:
        observe(StageSkipped("train", "already trained"))
        return finished
    refuse_other_run(run, results_from)
    _check_patience(config, len(photos.photos), is_judged=judge is not None)
    _announce(config, observe)
    with measure_effort(model.runtime) as effort, announce_training(run, processes.is_main):
        model.set_zero_terminal_snr(config.objective.zero_terminal_snr)
        store = LatentStore(
            run.latents,
            (model.identity.fingerprint, model.runtime.name),
            lambda text: observe(Note("train", text, warning=True)),
        )
        _check_held_out(config, len(photos.photos))
        batches = prepare_batches(
            model,
            photos,
            priors,
            (config.photo_prompt(), config.class_prompt()),
            plan_batches(config),
            lambda done, total: observe(Progress("train", "encoding pictures", done, total)),
            store,
        )
        context = TrainContext(model, batches, config, processes, observe)
        if model.memory_options.cpu_offload:
            # The autoencoder and the denoiser have no room beside each other, so every crop that
            # will be drawn is encoded now.
            batches.encode(list_samples(context))
        weights = _attach(model, config)
        try:
            _note_prompts(context)
            if not model.trains_text:
                batches.conditioning(batches.texts)
            model.release_encoders()
            trainable = TrainableAdapter(weights, config, model.runtime, observe)
            signed = partial(sign, model, photos, config, inputs)
            validation = ValidationSampler(
                run, model, config, signed, judge if config.validation.scores else None, observe
            )
            checkpoints = Checkpoints(
                run.checkpoints, trainable.parameters, trainable.optimizer, inputs, trainable.others
            )
            resumed = checkpoints.resume()
            if resumed.note:
                observe(Note("train", resumed.note))
            result = run_training_loop(
                context, trainable, checkpoints, validation, resumed.updates_done, resumed.losses
            )
            with trainable.finished():
                adapter = model.read_adapter()
        finally:
            model.detach_adapter()
        _note_idle(adapter, config, observe)
        adapter = _tell_stop(signed(adapter), result, config, observe)
        if processes.is_main:
            _write(run, adapter, config)
        processes.wait()
    record = _make_record(context, validation, results_from, adapter, result, effort)
    if processes.is_main:
        run.write_record(record)
        checkpoints.clear()
        store.clear()
    processes.wait()
    observe(StageDone("train", effort.seconds, str(run.adapter)))
    return record


def plan_batches(config: LoomConfig) -> BatchPlan:
    """Read from resolved settings how pictures are drawn and cropped."""
    photos = config.photos
    captions = CaptionPlan(
        choose_line=photos.chooses_lines,
        shuffle=photos.shuffle_caption,
        keep_tokens=photos.keep_tokens,
        tag_dropout=photos.caption_tag_dropout_rate,
        words=tuple(config.taught_words()),
    )
    held_out, dropout = config.validation.held_out_photos, float(config.train.caption_dropout)
    return BatchPlan(config.seed, photos.flip, held_out, dropout, captions)


def _announce(config: LoomConfig, observe: Observer) -> None:
    """Say that training begins, and where its learning rate leaves little to learn."""
    observe(StageStarted("train", f"{config.train.steps} updates"))
    given = config.train
    rate = float(given.learning_rate)
    for text in doubt_rates(given.optimizer, rate, given.warmup_steps, given.steps):
        observe(Note("train", text, warning=True))


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
    _check_patience(config, len(captions))
    if config.train.log_gradient_noise and config.train.update_penalty:
        raise ConfigError(
            "train.log_gradient_noise measures how much pictures' gradients differ, and "
            "train.update_penalty adds one of its own to them.",
            "Set one of the two off: log_gradient_noise=false, or update_penalty=0.",
        )
    objective, side = config.objective, config.photos.resolution_px
    low, high = (round(model.train_timesteps * share) for share in objective.timestep_range)
    if low >= high:
        raise ConfigError(
            f"objective.timestep_range = {list(objective.timestep_range)} holds none of "
            f"the {model.train_timesteps} timesteps.",
            "Make it wider.",
        )
    if side == "auto" or side % model.pixels_per_latent:
        raise ConfigError(
            f"photos.resolution_px = {side} does not fit {model.identity.name}.",
            f"Take a multiple of {model.pixels_per_latent}.",
        )
    prompts = [text or config.photo_prompt() for text in captions]
    for word in config.adapter.placeholder_tokens:
        if not any(word in text for text in prompts):
            raise ConfigError(
                f"The new word {word} stands in no photo's prompt, so nothing would teach it.",
                f'Say it in --subject, such as "{word} {config.subject.class_noun}", or in a '
                "caption.",
            )
    if objective.zero_terminal_snr and model.prediction == "noise":
        model.set_zero_terminal_snr(True)  # refuses, and says why
    quantization = model.memory_options.quantization
    if quantization != "whole" and config.adapter.splits_base:
        raise ConfigError(
            f"adapter.init_lora_weights = {config.adapter.init_lora_weights} takes a part of the "
            f"base's weights, which a base kept in {quantization} cannot give.",
            "Set memory.base_quantization=whole, or adapter.init_lora_weights=default.",
        )
    weights = _attach(model, config)
    try:
        TrainableAdapter(weights, config, model.runtime, silent)
        if config.adapter.format != "auto":
            # Before the training, not after it: whether the file can be written.
            with TemporaryDirectory() as scratch:
                file = Path(scratch) / "try.safetensors"
                write_adapter(file, model.read_adapter(), format=config.adapter.format)
    finally:
        model.detach_adapter()


def _attach(model: Model, config: LoomConfig) -> list[WeightGroup]:
    """Put a new adapter on the model, as the settings say; return its weights to train.

    Raises:
        ConfigError: If it cannot be attached, or not compiled.
    """
    settings, kind = config.train, config.adapter
    if settings.target_modules == "auto" or settings.alpha == "auto":
        raise ValueError("settings must be resolved before training")
    spec = AdapterSpec(
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
        dropout=kind.dropout,
        rank_dropout=kind.rank_dropout,
        module_dropout=kind.module_dropout,
        t_lora_min_rank=kind.t_lora_min_rank,
    )
    on_gpu = model.runtime.device.type == "cuda"
    levels = config.memory.gradient_checkpointing
    if levels == "auto":
        # Nobody planned, so this must fit wherever it can.
        levels = "full" if on_gpu else "none"
    if settings.compile == "blocks" and kind.kind != "lora":
        raise ConfigError(
            f"train.compile = blocks is for adapters of kind lora, not {kind.kind}.",
            "Set train.compile=off, or adapter.kind=lora.",
        )
    refuse_unfit_norms(config)
    compiled = settings.compile == "blocks"
    if settings.compile == "auto":
        # Below that, compiling takes longer than it saves.
        can_be = kind.kind == "lora" and not spec.has_masks
        compiled = can_be and settings.steps >= _LEAST_COMPILED and on_gpu
    weights = model.attach_adapter(spec, levels, compiled)
    if settings.init_adapter:
        try:
            _begin_from(settings.init_adapter, model, config)
        except Exception:
            model.detach_adapter()
            raise
    return weights


def _begin_from(file: str, model: Model, config: LoomConfig) -> None:
    """Load a finished LoRA into the one that was attached, if it fits."""
    adapter = read_adapter(locate_adapter(file))
    refuse_other_base(file, adapter, model)
    known = adapter.metadata.get("dreamloom.zero_terminal_snr", "")
    wanted = str(config.objective.zero_terminal_snr).lower()
    if known and known != wanted:
        raise ConfigError(
            f"{file} was trained with objective.zero_terminal_snr={known}, this would be with "
            f"{wanted}.",
            f"Set objective.zero_terminal_snr={known}, or leave --from out.",
        )
    scale = read_final_scale(adapter)
    layers = {
        name: replace(layer, up=layer.up / scale) if scale != 1 else layer
        for name, layer in adapter.layers.items()
    }
    model.load_adapter(replace(adapter, layers=layers))


def _note_prompts(context: TrainContext) -> None:
    """Tell of prompts and captions that are long, or written for other programs."""
    config = context.config
    prompts = [*context.batches.written_texts]
    if config.validation.every:
        phrase = config.subject.phrase
        prompts += [text.replace("{subject}", phrase) for text in config.validation.prompts]
    for text in context.model.note_prompts(prompts):
        context.observe(Note("train", text))


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


def _check_patience(config: LoomConfig, photos: int, *, is_judged: bool = True) -> None:
    """Refuse to wait for better scores where there will be none.

    Raises:
        ConfigError: If so.
    """
    settings = config.validation
    if settings.patience is None:
        return
    given = f"validation.patience = {settings.patience} ends a training by the scores"
    if settings.every is None:
        raise ConfigError(
            f"{given}, but nothing is ever validated.",
            "Set validation.every, such as 50, or validation.patience=none.",
        )
    if not (settings.scores and is_judged):
        raise ConfigError(
            f"{given}, but nothing is scored while it runs.",
            "Set validation.scores=true, or validation.patience=none.",
        )
    if settings.keep is not None:
        raise ConfigError(
            f"{given} of all of them, but validation.keep = {settings.keep} lets some go.",
            "Set validation.keep=none, or validation.patience=none.",
        )
    if photos < _LEAST_SCORED:
        raise ConfigError(
            f"{given}, which take {_LEAST_SCORED} photos or more; there are {photos}.",
            "Add photos, or set validation.patience=none.",
        )


def _tell_stop(
    adapter: Adapter, result: LoopResult, config: LoomConfig, observe: Observer
) -> Adapter:
    """Say that a training ended early, where it did, in its adapter's header too."""
    if not result.why_stopped:
        return adapter
    text = (
        f"ended after update {result.updates_done} of {config.train.steps}: {result.why_stopped}, "
        f"and validation.patience is {config.validation.patience}"
    )
    observe(Note("train", text))
    return adapter.with_metadata(ss_steps=str(result.updates_done))


def _note_idle(adapter: Adapter, config: LoomConfig, observe: Observer) -> None:
    """Say so where an adapter hardly changes anything: that is no success."""
    # Other kinds than LoRA have no norm without the base.
    if adapter.peft is not None or not adapter.layers:
        return
    numbers = sum(
        layer.up.shape[0] * math.prod(layer.down.shape[1:]) for layer in adapter.layers.values()
    )
    mean = adapter.norm() / math.sqrt(numbers)
    if mean < _IDLE:
        text = (
            f"the adapter changed hardly anything: its weights move the model's by {mean:.1g} in "
            f"root mean square, with train.learning_rate = {float(config.train.learning_rate):g} "
            f"for {config.train.steps} updates; raise either (auto is the base model's own rate)"
        )
        observe(Note("train", text, warning=True))


def _write(run: RunFolder, adapter: Adapter, config: LoomConfig) -> None:
    try:
        with explain_write_errors(run.adapter):
            write_adapter(run.adapter, adapter, format=config.adapter.format)
    except RunFolderError as error:
        raise TrainingError(
            f"{error.problem} The last checkpoint holds all of the training.",
            "Make room on the disk and run the same command again; nothing is trained twice.",
        ) from error


def _make_record(
    context: TrainContext,
    validation: ValidationSampler,
    inputs: dict[str, str],
    adapter: Adapter,
    result: LoopResult,
    effort: Effort,
) -> Record:
    model, config, run = context.model, context.config, validation.run
    settings, processes = config.train, context.processes.count
    per_update = settings.batch_photos * settings.gradient_accumulation_steps * processes
    results: dict[str, object] = {
        "updates": result.updates_done,
        "photo_exposures": result.updates_done * per_update,
        "class_images": len(context.batches.priors),
        "parameters": adapter.parameters,
        "processes": processes,
        "mean_loss_last_tenth": tail_mean(result.losses),
    }
    if result.why_stopped:
        results["stopped"] = {"update": result.updates_done, "why": result.why_stopped}
    if result.noise:
        batches = settings.gradient_accumulation_steps * processes
        told = describe_noise(result.noise, batches, config)
        names = ("signal_to_noise", "noise_scale_photos")
        results["gradient_noise"] = dict(zip(names, told, strict=True))
    recommended = validation.recommend()
    if recommended:
        results["recommended"] = {"update": recommended.update, "why": recommended.why}
        where = validation.adapter_of(recommended.update)
        context.observe(Note("train", f"recommended: {where} ({recommended.why})"))
    return Record(
        stage="train",
        inputs=inputs,
        settings={
            **settings.model_dump(mode="json", exclude=set() if settings.init_adapter else _INIT),
            "adapter": config.adapter.model_dump(mode="json"),
            "memory": config.memory.model_dump(mode="json"),
            "objective": config.objective.model_dump(mode="json"),
        },
        outputs=run.hash_outputs(run.adapter, *list_token_files(run.adapter)),
        results=results,
        base=model.identity.as_dict(),
        seed=config.seed,
        runtime=model.runtime.name,
        seconds=effort.seconds,
        peak_mib=effort.peak_mib,
    )
