"""Teach: the form of a training, what it will take, and the chain of jobs that it becomes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dreamloom.core.config.loading import PRESETS, load_config
from dreamloom.core.errors import ConfigError
from dreamloom.studio.context import Studio, go_to, read_form, render, studio_of
from dreamloom.studio.drawing import DEVICES
from dreamloom.studio.forms import find_faults, list_controls, name_changes, read_given
from dreamloom.studio.photo_sets import PhotoSetFolder
from dreamloom.studio.words import say

BASES = ("picturebook", "sdxl")
PRIORS = ("generated", "base", "none")
_LOOKS = 5
"""How often a training is looked at, unless told otherwise."""
_PACKS = {"picturebook": "picturebook-v1"}
HERE = "here"
_GPU_MEMORY = (HERE, "12GiB", "16GiB", "24GiB", "48GiB", "80GiB")


@dataclass(frozen=True)
class Wanted:
    """What the form above the settings asks for.

    Args:
        photos: The set of photos; empty where none is chosen.
        subject: The phrase that names the subject.
        class_noun: What it is one of; empty for its last word.
        base: The base model.
        preset: The preset.
        prior: Where class images come from.
        device: Where it computes.
        looks: Whether the training draws pictures on its way.
        then: Whether it is drawn with, scored and reported afterwards.
        minutes: In how many minutes it begins.
        gpu_memory: The GPU that is planned for; `HERE` plans for what this machine has.
    """

    photos: str = ""
    subject: str = "rraj person"
    class_noun: str = ""
    base: str = "picturebook"
    preset: str = "quick"
    prior: str = "generated"
    device: str = "auto"
    looks: bool = True
    then: bool = True
    minutes: float = 0.0
    gpu_memory: str = HERE

    def faults(self, photos: PhotoSetFolder | None) -> dict[str, str]:
        """Say what is wrong, by the control's name."""
        found = {}
        if photos is None or not photos.names():
            found["photos"] = say("teach.no_photos")
        if self.preset not in PRESETS:
            found["preset"] = say("teach.no_preset", preset=self.preset)
        if self.prior not in PRIORS:
            found["prior"] = say("teach.no_prior", prior=self.prior)
        words = {"subject.phrase": self.subject, "subject.class_noun": self.class_noun or None}
        for name, overrides in (("subject", words), ("base", {"base": self.base})):
            try:
                config = load_config("standard", overrides=overrides)
            except ConfigError as error:
                found[name] = str(error)
            else:
                if name == "subject" and config.subject.lacks_noun:
                    found["class_noun"] = say("teach.no_noun")
        return found


def read_wanted(form: Mapping[str, str]) -> Wanted:
    """Read the upper part of the form."""
    plain = Wanted()
    sent = "sent" in form
    try:
        minutes = min(max(0.0, float(form.get("minutes") or 0)), 7 * 24 * 60)
    except ValueError:
        minutes = 0.0
    memory = form.get("gpu_memory", plain.gpu_memory)
    return Wanted(
        photos=form.get("photos", ""),
        subject=form.get("subject", plain.subject).strip(),
        class_noun=form.get("class_noun", "").strip(),
        base=form.get("base", plain.base).strip(),
        preset=form.get("preset", plain.preset),
        prior=form.get("prior", plain.prior),
        device=form.get("device", plain.device),
        looks="looks" in form if sent else True,
        then="then" in form if sent else True,
        minutes=minutes,
        gpu_memory=memory if memory in _GPU_MEMORY else plain.gpu_memory,
    )


def _read_settings(form: Mapping[str, str], wanted: Wanted) -> dict[str, str]:
    """Take the settings from the form, with looks set where the user set none."""
    given = {
        name: value
        for name, value in read_given(form, _preset_shown(form)).items()
        if name not in {"subject.phrase", "subject.class_noun", "priors.kind"}
    }
    preset = wanted.preset if wanted.preset in PRESETS else "standard"
    standing = load_config(preset)
    if wanted.looks and given.get("validation.every", "none") in {"", "none"}:
        steps = given.get("train.steps", str(standing.train.steps))
        if steps.isdigit() and int(steps):
            given["validation.every"] = str(max(1, -(-int(steps) // _LOOKS)))
    return {name: value for name, value in given.items() if value != ""}


def _preset_shown(form: Mapping[str, str]) -> str:
    """The preset that the form's controls were made for."""
    shown = form.get("shown", "standard")
    return shown if shown in PRESETS else "standard"


def show_form(request: Request) -> Response:
    """The form."""
    form = dict(request.query_params)
    return _render_form(request, form, {})


def _render_form(
    request: Request, form: Mapping[str, str], faults: dict[str, str], status: int = 200
) -> Response:
    studio, wanted = studio_of(request), read_wanted(form)
    sets = [one for one in studio.photo_sets if one.names()]
    if not wanted.photos and sets:
        wanted = Wanted(**{**vars(wanted), "photos": sets[0].id})
    preset = wanted.preset if wanted.preset in PRESETS else "standard"
    return render(
        request,
        "teach.html",
        status,
        wanted=wanted,
        sets=sets,
        presets=tuple(PRESETS),
        priors=PRIORS,
        bases=BASES,
        devices=DEVICES,
        memories=_GPU_MEMORY,
        rooms=list_controls(preset, read_given(form, _preset_shown(form))),
        shown=preset,
        faults=faults,
    )


async def check_form(request: Request) -> Response:
    """What is wrong with the form as it stands, and its command; what takes longer is asked for."""
    form = await read_form(request)
    studio, wanted = studio_of(request), read_wanted(form)
    photos = studio.photo_sets.find(wanted.photos)
    given = _read_settings(form, wanted)
    faults = _find_faults(wanted, given, photos)
    answer = render(
        request,
        "parts/plan.html",
        faults=faults,
        argv=_train_argv(studio, wanted, given, photos, "…") if photos and not faults else [],
    )
    # Places of the page that stay, so that a newer question there takes the place of an older one.
    due = ["words-due"] * ("subject" not in faults) + ["plan-due"] * (not faults)
    answer.headers["HX-Trigger"] = ", ".join(due)
    return answer


def _find_faults(
    wanted: Wanted, given: Mapping[str, str], photos: PhotoSetFolder | None
) -> dict[str, str]:
    faults = wanted.faults(photos)
    return faults | find_faults(wanted.preset, given) if wanted.preset in PRESETS else faults


async def plan_form(request: Request) -> Response:
    """What a training as the form stands takes."""
    form = await read_form(request)
    studio, wanted = studio_of(request), read_wanted(form)
    photos = studio.photo_sets.find(wanted.photos)
    given = _read_settings(form, wanted)
    planned, said = None, ""
    if not _find_faults(wanted, given, photos):
        argv = _plan_argv(wanted, given, photos)
        planned, said = await studio.ask(argv, instead="plan")
    return render(request, "parts/planned.html", wanted=wanted, planned=planned, said=said)


async def read_words(request: Request) -> Response:
    """How the base model reads the subject's words."""
    wanted = read_wanted(await read_form(request))
    words, unread = None, ""
    if wanted.base in BASES:
        argv = ["token", "--base", wanted.base, "--json", "--", wanted.subject]
        words, unread = await studio_of(request).ask(argv, instead="token")
    return render(request, "parts/words.html", words=words, unread=unread)


def _plan_argv(
    wanted: Wanted, given: Mapping[str, str], photos: PhotoSetFolder | None
) -> list[str]:
    count = str(len(photos.names())) if photos else "6"
    return [
        *("plan", "--base", wanted.base, "--photos", count, "--prior", wanted.prior),
        *("--preset", wanted.preset, "--device", wanted.device, "--json"),
        *(() if wanted.gpu_memory == HERE else ("--gpu-memory", wanted.gpu_memory)),
        *_set_options(wanted, given),
    ]


def _set_options(wanted: Wanted, given: Mapping[str, str]) -> list[str]:
    return [word for change in name_changes(wanted.preset, given) for word in ("--set", change)]


def _train_argv(
    studio: Studio,
    wanted: Wanted,
    given: Mapping[str, str],
    photos: PhotoSetFolder,
    run: str,
) -> list[str]:
    folder = str(photos.folder.relative_to(studio.root))
    return [
        *("train", studio.path_of(folder), "--subject", wanted.subject, "--base", wanted.base),
        *(("--class-noun", wanted.class_noun) if wanted.class_noun else ()),
        *("--out", studio.path_of(run), "--prior", wanted.prior, "--preset", wanted.preset),
        *("--device", wanted.device),
        *_set_options(wanted, given),
    ]


async def start(request: Request) -> Response:
    """Put the training into the queue, and what is to follow it."""
    form = await read_form(request)
    studio, wanted = studio_of(request), read_wanted(form)
    photos = studio.photo_sets.find(wanted.photos)
    given = _read_settings(form, wanted)
    faults = _find_faults(wanted, given, photos)
    if faults or photos is None:
        return _render_form(request, form, faults, 422)
    run = studio.new_run_folder(wanted.subject)
    begin = time.time() + 60 * wanted.minutes if wanted.minutes else 0.0
    job = studio.add_job(
        "train",
        _train_argv(studio, wanted, given, photos, run),
        run=run,
        device=wanted.device,
        not_before=begin,
    )
    first = job
    if wanted.then:
        for kind, argv in _follow(studio, wanted, photos, run):
            job = studio.add_job(kind, argv, run=run, device=wanted.device, after=job.id)
    return go_to(f"/jobs/{first.id}/run")


def _follow(
    studio: Studio, wanted: Wanted, photos: PhotoSetFolder, run: str
) -> list[tuple[str, list[str]]]:
    """List what follows a training: draw a pack, score it, write the report."""
    folder = studio.path_of(run)
    pack = _PACKS.get(wanted.base, "person-v1" if "person" in wanted.subject else "object-v1")
    taught_from = studio.path_of(str(photos.folder.relative_to(studio.root)))
    how = ["--preset", wanted.preset, "--device", wanted.device]
    return [
        (
            "generate",
            [
                *("generate", "--adapter", f"{folder}/adapter.safetensors", "--pack", pack),
                *("--floor", "--out", folder, "--name", "pictures", *how),
            ],
        ),
        (
            "evaluate",
            [
                *("evaluate", f"{folder}/images/pictures", "--photos", taught_from),
                *("--floor", f"{folder}/images/pictures_base", *how),
            ],
        ),
        ("report", ["report", folder]),
    ]


async def wait_for_run(request: Request) -> Response:
    """Go on to the run of a training as soon as it is there; until then show its job."""
    studio = studio_of(request)
    job = studio.jobs.find(request.path_params["job"])
    if job is not None:
        name = job.asked.run
        run = next((one for one in studio.runs() if one.name == name), None)
        if run is not None:
            return go_to(f"/runs/{run.id}")
    return go_to(f"/jobs/{request.path_params['job']}")


ROUTES = [
    Route("/teach", show_form),
    Route("/teach", start, methods=["POST"]),
    Route("/teach/check", check_form, methods=["POST"]),
    Route("/teach/plan", plan_form, methods=["POST"]),
    Route("/teach/words", read_words, methods=["POST"]),
    Route("/jobs/{job}/run", wait_for_run),
]
