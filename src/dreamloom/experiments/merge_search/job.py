"""Everything about a search that is settled before it draws."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamloom.core.config.settings import LoomConfig, SubjectConfig
from dreamloom.core.errors import ConfigError, RunFolderError
from dreamloom.core.events import Event, Note
from dreamloom.core.run_folder import RunFolder, fingerprint
from dreamloom.data.photos.prepare import fingerprint_photos
from dreamloom.evaluation.encoders.base import Encoders
from dreamloom.evaluation.scoring import pick_encoders, refuse_drawn_photos
from dreamloom.experiments.merge_search.candidates import MergeWeights, spread
from dreamloom.experiments.merge_search.embeddings import require_encoders
from dreamloom.experiments.merge_search.plan import SearchPlan, plan_search, split_prompts
from dreamloom.experiments.merge_search.request import (
    SearchRequest,
    compare_settings,
    find_words,
    list_prompts,
    name_class,
    read_parts,
)
from dreamloom.experiments.merge_search.work import SearchWork
from dreamloom.inference.generate import ActiveAdapter, Prompt, check_request
from dreamloom.lora.folders import hash_adapter
from dreamloom.models.base import Model
from dreamloom.pipeline.session import choose_base, open_session

SUM, USUAL = "the plain sum", "0.8 and 1.0"
"""What the winner is compared with, as a sentence calls it."""

_WEIGHTS = {SUM: (1.0, 1.0), USUAL: (0.8, 1.0)}


@dataclass(frozen=True)
class Job:
    """A search, settled.

    Args:
        request: What was asked.
        config: Settled settings.
        plan: How the budget is spent.
        table: What all pieces of work share.
        rivals: What the winner is compared with, by name.
        encoders: Who looks.
        base: The base model.
        side_px: Side of its pictures.
        settings: What the pictures depend on; a folder holds one search.
        notes: What the user should know beforehand.
    """

    request: SearchRequest
    config: LoomConfig
    plan: SearchPlan
    table: SearchWork
    rivals: Mapping[str, MergeWeights]
    encoders: Encoders
    base: Mapping[str, str]
    side_px: int
    settings: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def inputs(self) -> dict[str, str]:
        """What the findings depend on."""
        return {
            "search": fingerprint(self.settings),
            "eyes": self.table.eyes,
            "settings": fingerprint(self.config.evaluate),
        }


def resolve_job(request: SearchRequest, config: LoomConfig, run: RunFolder) -> Job:
    """Read the adapters, plan, load the base model, and refuse what cannot be searched.

    Nothing is written.

    Raises:
        DreamLoomError: See `running.run_search`.
    """
    if config.generate.conditional_only:
        raise ConfigError(
            "generate.conditional_only keeps adapters out of one half of guidance, and a search "
            "draws what one merged file would.",
            "Set generate.conditional_only=false.",
        )
    parts = read_parts(request)
    config = choose_base(config, [part.metadata for part in parts])
    words = find_words(request, config, parts)
    prompts, notes = list_prompts(request, words, config.base)
    searched, held = split_prompts(prompts)
    leaking = name_class(held, words)
    steps, first_seed = config.generate.steps[0], config.generate.first_seed
    plan = plan_search(
        request.budget, (searched, held, leaking), steps, request.parameters, first_seed
    )
    if len(prompts) == 1:
        notes.append("There is one prompt only: its seeds alone are held out.")
    subject = SubjectConfig(phrase=words.phrase, class_noun=words.class_noun)
    heard: list[Event] = []
    model, config = open_session(
        config.model_copy(update={"subject": subject}), work="drawing", observe=heard.append
    )
    active = [ActiveAdapter(path) for path in request.files]
    check_request(model, [Prompt(text) for text in prompts], config.generate, active, "search")
    notes += [event.text for event in heard if isinstance(event, Note)]
    notes += model.note_prompts(prompts, config.generate.prompt_weights)
    encoders = pick_encoders(config.evaluate.encoders, model.identity.name, config.device)
    require_encoders(encoders)
    hashes = hash_adapter(request.subject), hash_adapter(request.style)
    settings = _list_settings(request, config, model, prompts, hashes)
    _refuse_another(run, settings)
    table = SearchWork(
        root=run.path,
        config=config,
        files=(request.subject.absolute(), request.style.absolute()),
        hashes=hashes,
        prompts=(tuple(searched), tuple(held), tuple(leaking)),
        encoders=encoders.kind,
        eyes=fingerprint(encoders.keys()),
        has_style_photos=request.style_photos is not None,
    )
    return Job(
        request=request,
        config=config,
        plan=plan,
        table=table,
        rivals={name: spread(*weights, request.by_block) for name, weights in _WEIGHTS.items()},
        encoders=encoders,
        base=model.identity.as_dict(),
        side_px=model.advice.resolution_px,
        settings=settings,
        notes=tuple(notes),
    )


def _list_settings(
    request: SearchRequest,
    config: LoomConfig,
    model: Model,
    prompts: list[str],
    hashes: tuple[str, str],
) -> dict[str, Any]:
    """List everything that the pictures of a search depend on, in words for a message."""
    side_px, drawn = model.advice.resolution_px, config.generate
    settings = {
        "budget": request.budget,
        "the subject's adapter": hashes[0],
        "the style's adapter": hashes[1],
        "base": model.identity.fingerprint,
        "photos": _fingerprint(request.photos, side_px),
        "style photos": _fingerprint(request.style_photos, side_px) if request.style_photos else "",
        "prompts": prompts,
        "subject": [config.subject.phrase, config.subject.class_noun],
        "between": list(request.between),
        "blocks": request.by_block,
        "scheduler": drawn.schedulers[0],
        "steps": drawn.steps[0],
        "guidance": drawn.guidance,
        **drawn.unusual,
        "first seed": drawn.first_seed,
        "seed": config.seed,
    }
    kept_as = config.memory.changes_results
    return {**settings, "base kept as": kept_as[0]} if kept_as else settings


def settings_file(run: RunFolder) -> Path:
    """Where a search's settings lie."""
    return run.path / "wish.json"


def _fingerprint(folder: Path, side_px: int) -> str:
    refuse_drawn_photos(folder)
    return fingerprint_photos(folder, side_px, "square", 64)


def _refuse_another(run: RunFolder, settings: Mapping[str, Any]) -> None:
    try:
        there = json.loads(settings_file(run).read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = None
    except ValueError:
        there = {}
    if there is None:
        if run.is_run():
            raise RunFolderError(f"{run.path} already holds something else.", "Name another --out.")
        return
    differing = compare_settings(there, json.loads(json.dumps(settings)))
    if differing:
        raise RunFolderError(
            f"{run.path} already holds another search: {'; '.join(differing[:4])}.",
            "Name another --out, or give the same to go on with that search.",
        )
