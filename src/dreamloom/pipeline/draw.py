"""Draw what the user asks for: prompts and packs, with adapters and the base they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import Runtime
from dreamloom.core.errors import ConfigError
from dreamloom.core.events import Observer, silent, tee
from dreamloom.core.run_folder import RunFolder
from dreamloom.core.toml_files import offer
from dreamloom.data.prompts.packs import PACK_NAMES, Pack, read_pack
from dreamloom.inference.generate import (
    Prompt,
    check_request,
    check_set_name,
    generate_images,
    parse_active_adapter,
    read_composition,
    refuse_other_set,
    settle_composition,
)
from dreamloom.lora.reading import read_adapter
from dreamloom.pipeline.session import check_names, choose_base, open_session
from dreamloom.pipeline.subject import fill_subject, name_subject


def pack_prompts(pack: str, subject: str, class_noun: str | None = None) -> list[Prompt]:
    """Fill a prompt pack with the subject's phrase and class noun.

    Prompts that make no sense for that class are left out; see `prompts.PackPrompt.suits`.

    Args:
        pack: The pack's name.
        subject: The phrase that names the subject.
        class_noun: What the subject is one of; None takes the phrase's last word.

    Raises:
        ConfigError: If there is no pack of that name.
    """
    noun = class_noun or subject.split()[-1]
    filled = [
        Prompt(p.fill(subject, noun), p.category, p.style, p.face, p.may_change, p.check)
        for p in find_pack(pack).select(noun)
    ]
    return _drop_repeats(filled)


def find_pack(name: str) -> Pack:
    """Read a prompt pack.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in PACK_NAMES:
        raise ConfigError(f"There is no prompt pack {name!r}.", offer(name, PACK_NAMES))
    return read_pack(name)


def _drop_repeats(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Keep one of the prompts with the same words: they would give the same pictures.

    It is the last of them, for packs come last and know more of their prompts.
    """
    return list({prompt.text: prompt for prompt in prompts}.values())


@dataclass(frozen=True)
class GenerateRequest:
    """What the user wants drawn.

    Args:
        adapters: ``FILE``, ``FILE:WEIGHT`` or ``FILE:WEIGHT@PROGRESS,…``.
        prompts: Texts; {subject} stands for the subject's phrase.
        packs: The names of prompt packs.
        subject: The phrase; None takes what the first adapter says of itself.
        floor: Whether the base model draws the same, too.
        name: The set's name.
        out: A run's folder, or a new one.
        class_noun: What the subject is one of; None takes what that adapter says, or else the
            phrase's last word.
        compose: How the adapters are worn together; see `lora_schedule.COMPOSITIONS`.
        conditional_only: Whether the unconditional half of guidance sees the base model.
    """

    adapters: tuple[str, ...]
    prompts: tuple[str, ...]
    packs: tuple[str, ...]
    subject: str | None
    floor: bool
    name: str
    out: Path
    class_noun: str | None = None
    compose: str = "sum"
    conditional_only: bool = False


def draw(
    request: GenerateRequest, config: LoomConfig, runtime: Runtime, observe: Observer = silent
) -> list[Path]:
    """Draw what is wished into ``out/images``; return the folders of the sets.

    The base model is the one that the adapters were made for, unless the settings name another.

    Raises:
        AdapterError: If an adapter cannot be read or does not fit the base.
        ConfigError: If nothing is to be drawn, a name or a blank in a prompt is unknown, or it
            cannot be drawn so.
        RunFolderError: If ``out`` holds other files, or a set of that name drawn otherwise.
    """
    active = [parse_active_adapter(text) for text in request.adapters]
    composition = settle_composition(
        read_composition(request.compose, request.conditional_only), active, config.generate
    )
    check_set_name(request.name)
    check_names(config)
    headers = [read_adapter(part.path).metadata for part in active]
    prompts = fill_prompts(request, config, headers)
    run = RunFolder(request.out)
    run.refuse_other_folders()
    refuse_other_set(run, request.name, prompts, active, composition)
    if request.floor and active:
        refuse_other_set(run, f"{request.name}_base", prompts, ())
    config = choose_base(config, headers)
    model, config = open_session(config, runtime, work="drawing", observe=observe)
    settings, name = config.generate, request.name
    check_request(model, prompts, settings, active, name, composition)
    run.claim()
    observe = tee(observe, run.observer())
    sets = [generate_images(run, model, prompts, settings, active, name, observe, composition)]
    if request.floor and active:
        sets.append(generate_images(run, model, prompts, settings, (), f"{name}_base", observe))
    return [images.folder for images in sets]


def fill_prompts(
    request: GenerateRequest, config: LoomConfig, headers: Sequence[Mapping[str, str]]
) -> list[Prompt]:
    """Put the subject's words into the prompts and packs that were asked for.

    Args:
        request: What is asked for.
        config: Names the subject where neither the request nor an adapter does.
        headers: What the adapters say of themselves; the first that knows a subject tells.

    Raises:
        ConfigError: If there is no prompt, a pack is unknown, or a blank in a prompt is.
    """
    header = next((header for header in headers if "dreamloom.subject" in header), {})
    subject = header.get("dreamloom.subject") if request.subject is None else request.subject
    noun = request.class_noun
    if not subject:
        noun = noun or config.subject.class_noun
    elif subject == header.get("dreamloom.subject"):
        noun = noun or header.get("dreamloom.class_noun")
    if request.subject is not None or (subject and request.packs):
        noun = name_subject(subject or "", noun).class_noun
    prompts = [Prompt(fill_subject(text, subject or "")) for text in request.prompts]
    for pack in request.packs:
        prompts += pack_prompts(pack, subject or config.subject.phrase, noun)
    if not prompts:
        raise ConfigError("There is nothing to draw.", "Give --prompt or --pack.")
    return _drop_repeats(prompts)
