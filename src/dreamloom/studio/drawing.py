"""What the forms of drawing ask for: adapters with weights, prompts, and how pictures are made.

What a form sends becomes words of a command here, and nowhere else: each value stands behind its
option's equals sign, so that none can be another option, and files are those that were listed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from dreamloom.core.config.loading import PRESETS
from dreamloom.data.prompts.packs import PACK_NAMES
from dreamloom.studio.adapters import Adapter, list_adapters
from dreamloom.studio.context import Studio
from dreamloom.studio.forms import find_faults
from dreamloom.studio.runs import Run
from dreamloom.studio.words import say

MOST_ADAPTERS = 4
MOST_PROMPTS = 100
MOST_PROMPT_LETTERS = 2000
DEVICES = ("auto", "cpu", "cuda", "cuda:1", "mps")
SCHEDULERS = ("ddim", "ddpm", "pndm", "euler", "euler_a", "dpm++", "dpm++karras", "unipc", "heun")
"""Written out, for reading them where they are made would load torch; a test compares."""

_SETTINGS = {
    "steps": "generate.steps",
    "seeds": "generate.images_per_prompt",
    "first_seed": "generate.first_seed",
    "guidance": "generate.guidance",
    "width": "generate.width_px",
    "height": "generate.height_px",
}
"""Numbers of the form, by the settings that they are."""
_WHOLE = re.compile(r"\d{1,18}", re.ASCII)
_DECIMAL = re.compile(r"-?(\d{1,9}(\.\d{0,9})?|\.\d{1,9})", re.ASCII)
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?", re.ASCII)


@dataclass(frozen=True)
class Drawing:
    """What a form of drawing asks for, as it was typed.

    Args:
        run: Into which run is drawn; empty for a new folder.
        adapters: Pairs of an adapter's name in forms and its weight.
        prompts: Texts.
        packs: Names of lists of prompts.
        subject: The subject in prompts; empty for the adapter's own.
        negative: What guidance leads away from.
        scheduler: The scheduler; empty for the usual one.
        numbers: Steps, seeds, first_seed, guidance, width and height; empty for the usual ones.
        floor: Whether the base model draws the same.
        preset: What the rest is by default.
        device: Where it computes.
    """

    run: str = ""
    adapters: tuple[tuple[str, str], ...] = ()
    prompts: tuple[str, ...] = ()
    packs: tuple[str, ...] = ()
    subject: str = ""
    negative: str = ""
    scheduler: str = ""
    numbers: Mapping[str, str] = field(default_factory=dict)
    floor: bool = True
    preset: str = "standard"
    device: str = "auto"

    def find_faults(self, studio: Studio, without: Collection[str] = ()) -> dict[str, str]:
        """Say what is wrong, by the control's name.

        Args:
            studio: Where it would be drawn.
            without: Controls that count for nothing, because an axis changes the same.
        """
        found = dict(self._find_adapter_faults(studio)) if "adapters" not in without else {}
        if self.run and studio.find_run(self.run) is None:
            found["run"] = say("draw.no_run")
        if "prompts" not in without:
            found |= self._find_prompt_faults()
        for name, text in (("subject", self.subject), ("negative", self.negative)):
            if len(text) > MOST_PROMPT_LETTERS:
                found[name] = say("draw.long", most=MOST_PROMPT_LETTERS)
        if self.scheduler and self.scheduler not in SCHEDULERS and "scheduler" not in without:
            found["scheduler"] = say("draw.no_scheduler", scheduler=self.scheduler)
        if self.preset not in PRESETS:
            found["preset"] = say("teach.no_preset", preset=self.preset)
        if not _DEVICE.fullmatch(self.device):
            found["device"] = say("draw.no_device", device=self.device)
        return found | self._find_number_faults(without)

    def _find_adapter_faults(self, studio: Studio) -> Iterator[tuple[str, str]]:
        known = {adapter.id for adapter in list_adapters(studio.root)}
        if not self.adapters:
            yield "adapter1", say("draw.no_adapter")
        for place, (one, weight) in enumerate(self.adapters, start=1):
            if one not in known:
                yield f"adapter{place}", say("draw.adapter_gone")
            elif one in [before for before, _ in self.adapters[: place - 1]]:
                yield f"adapter{place}", say("draw.adapter_twice")
            if not _DECIMAL.fullmatch(weight):
                yield f"weight{place}", say("draw.no_weight", weight=weight)

    def _find_prompt_faults(self) -> dict[str, str]:
        unknown = [name for name in self.packs if name not in PACK_NAMES]
        if not self.prompts and not self.packs:
            return {"prompts": say("draw.no_prompt")}
        if unknown:
            return {"prompts": say("draw.no_pack", pack=unknown[0])}
        if len(self.prompts) > MOST_PROMPTS:
            return {"prompts": say("draw.many_prompts", most=MOST_PROMPTS)}
        if any(len(prompt) > MOST_PROMPT_LETTERS for prompt in self.prompts):
            return {"prompts": say("draw.long", most=MOST_PROMPT_LETTERS)}
        return {}

    def _find_number_faults(self, without: Collection[str]) -> dict[str, str]:
        found, given = {}, {}
        for name, value in self.numbers.items():
            if not value or name in without:
                continue
            shape = _DECIMAL if name == "guidance" else _WHOLE
            if shape.fullmatch(value):
                given[_SETTINGS[name]] = value
            else:
                text = "draw.no_number" if name == "guidance" else "draw.no_whole"
                found[name] = say(text, value=value)
        if bool(self.numbers.get("width")) != bool(self.numbers.get("height")):
            found["width"] = say("draw.both_sides")
        names = {setting: name for name, setting in _SETTINGS.items()}
        preset = self.preset if self.preset in PRESETS else "standard"
        told = find_faults(preset, given)
        return {names.get(setting, "seeds"): text for setting, text in told.items()} | found

    def find_adapters(self, studio: Studio) -> list[tuple[Adapter, str]]:
        """Find the files of the adapters, each with its weight."""
        known = {adapter.id: adapter for adapter in list_adapters(studio.root)}
        return [(known[one], weight) for one, weight in self.adapters if one in known]

    def spell_adapters(self, studio: Studio, weighed: Collection[int] = ()) -> list[str]:
        """Write the options of the adapters.

        Args:
            studio: Where they lie.
            weighed: Places, from 1, whose weight something else sets.
        """
        return [
            f"--adapter={studio.path_of(adapter.name)}"
            + (f":{weight}" if place not in weighed else "")
            for place, (adapter, weight) in enumerate(self.find_adapters(studio), start=1)
        ]

    def spell_prompts(self) -> list[str]:
        """Write the options of prompts and packs."""
        prompts = [f"--prompt={prompt}" for prompt in self.prompts]
        return prompts + [f"--pack={pack}" for pack in self.packs]

    def spell_rest(self, without: Collection[str] = ()) -> list[str]:
        """Write the options that say how pictures are made, but for some."""
        words = [f"--subject={self.subject}"] if self.subject else []
        words += [f"--negative-prompt={self.negative}"] if self.negative else []
        options = {"scheduler": self.scheduler, **self.numbers}
        for name in ("scheduler", "steps", "seeds", "guidance"):
            if options.get(name) and name not in without:
                words.append(f"--{name}={options[name]}")
        for name in ("first_seed", "width", "height"):
            if options.get(name):
                words.append(f"--set={_SETTINGS[name]}={options[name]}")
        return [*words, f"--preset={self.preset}", f"--device={self.device}"]

    def find_folder(self, studio: Studio, wanted: str) -> str:
        """Name the run's folder that is drawn into, below the root: a new one where none is."""
        run = studio.find_run(self.run) if self.run else None
        return run.name if run else studio.new_run_folder(wanted)


def read_drawing(form: Mapping[str, str]) -> Drawing:
    """Read the fields of a form of drawing."""
    plain = Drawing()
    adapters = [
        (form[f"adapter{place}"], form.get(f"weight{place}", "").strip() or "1")
        for place in range(1, MOST_ADAPTERS + 1)
        if form.get(f"adapter{place}")
    ]
    return Drawing(
        run=form.get("run", ""),
        adapters=tuple(adapters),
        prompts=read_lines(form.get("prompts", "")),
        packs=tuple(name[5:] for name in form if name.startswith("pack-")),
        subject=_one_line(form.get("subject", "")),
        negative=_one_line(form.get("negative", "")),
        scheduler=form.get("scheduler", "").strip(),
        numbers={name: form.get(name, "").strip() for name in _SETTINGS},
        floor="floor" in form,
        preset=form.get("preset", plain.preset),
        device=form.get("device", plain.device).strip(),
    )


def begin_drawing(run: Run | None, adapter: Adapter | None) -> Drawing:
    """Fill the form in for a run: its adapter, its words, a few seeds."""
    config = run.config if run else None
    return Drawing(
        run=run.id if run else "",
        adapters=((adapter.id, "1"),) if adapter else (),
        prompts=("a photo of {subject}",),
        numbers={"seeds": "4"},
        preset=config.preset if config else "standard",
    )


def read_lines(text: str) -> tuple[str, ...]:
    """Read a text field: its lines that say something; what steers a terminal is left out."""
    lines = (_one_line(line) for line in text.splitlines())
    return tuple(line for line in lines if line)


def _one_line(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable()).strip()


def name_anew(studio: Studio, folder: str, prefix: str) -> str:
    """Make a name for a set or a grid that neither a run nor a job has yet."""
    taken = set()
    for part in ("images", "grids"):
        there = studio.root / folder / part
        taken |= {path.stem for path in there.glob(f"{prefix}-*")}
    for job in studio.jobs:
        if job.asked.run == folder:
            taken |= {word.partition("=")[2] for word in job.asked.argv if "--name=" in word[:7]}
    number = 1
    while f"{prefix}-{number}" in taken or f"{prefix}-{number}-x0-y0" in taken:
        number += 1
    return f"{prefix}-{number}"


def read_option(argv: Collection[str], name: str) -> str:
    """Read what an option of a job's command says; empty where it is not there."""
    begin = f"--{name}="
    return next((word.removeprefix(begin) for word in argv if word.startswith(begin)), "")
