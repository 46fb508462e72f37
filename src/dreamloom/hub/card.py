"""The model card of an adapter: what it is, how to draw with it, its scores, pictures, settings."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from dreamloom.core.config.settings import NOT_TRAINED, LoomConfig
from dreamloom.core.manifests import Picture
from dreamloom.core.run_folder import Record, library_versions
from dreamloom.core.toml_files import to_toml_value
from dreamloom.evaluation.metrics.measures import MEANINGS, label_of
from dreamloom.evaluation.metrics.scorecard import Score, Scorecard
from dreamloom.lora.base_names import publish_base
from dreamloom.models.weight_files import SDXL_ID

SDXL_LICENCE = "openrail++"
"""What the hub calls the licence of SDXL base 1.0, CreativeML Open RAIL++-M."""

# What says where something lies on somebody's machine, and nothing elsewhere.
_PLACES = ("base", "priors.folder", "train.init_adapter")
_HEADLINES = {
    "train.steps": "Updates",
    "train.rank": "Rank",
    "train.alpha": "Alpha",
    "train.learning_rate": "Learning rate",
    "train.optimizer": "Optimizer",
    "train.target_modules": "Layers",
    "adapter.text_encoders": "Text encoders taught",
    "photos.resolution_px": "Resolution in pixels",
    "seed": "Seed",
}
_TAGS = (
    *("text-to-image", "diffusers", "diffusers-training", "dreambooth", "dreamloom"),
    *("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
    # By these the hub lays a page out for adapters, with its pictures.
    *("template:sd-lora", "template:diffusion-lora"),
)


@dataclass(frozen=True)
class Base:
    """The base model, as others may know it.

    Args:
        name: Its name, without folders.
        hub_id: Its repository on the hub; empty where it has none that is known.
    """

    name: str
    hub_id: str = ""

    @property
    def told(self) -> str:
        """What it is called in a sentence, in Markdown."""
        if self.hub_id:
            return f"[{self.hub_id}](https://huggingface.co/{self.hub_id})"
        if self.name == "picturebook":
            return "picturebook, the small SDXL of drawings that is built into DreamLoom"
        return f"{quote(self.name)}, an SDXL that is not on the hub under a name known here"


def find_base(record: Record, config: LoomConfig) -> Base:
    """Find what a training's base model is called elsewhere.

    Args:
        record: Of the training.
        config: Its settings.
    """
    name = record.base.get("name") or config.base
    if name == "sdxl":
        return Base(name, SDXL_ID)
    # Only a base that came from the hub has a revision.
    return Base(publish_base(name), name if record.base.get("revision") else "")


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card tells.

    Args:
        repository: Where the adapter will be, ``user/name``.
        weights: The adapter's file there.
        config: The run's settings.
        base: The base model.
        photos: How many photos it was taught from.
        class_images: How many class images, 0 for none.
        readers: Which programs load it, in a sentence.
        licence: The hub's name of it; empty where none was given.
        pictures: Each with its file in the repository.
        drawn_as: With which weight and sampler they were drawn, in words; and by which rule chosen.
        card: The scores; None where nothing was measured.
        words: Files of new words in the repository, by word.
    """

    repository: str
    weights: str
    config: LoomConfig
    base: Base
    photos: int
    class_images: int
    readers: str
    licence: str = ""
    pictures: Sequence[tuple[str, Picture]] = ()
    drawn_as: str = ""
    card: Scorecard | None = None
    words: dict[str, str] = field(default_factory=dict)


def make_card(facts: CardFacts) -> ModelCard:
    """Write the card: metadata that the hub's filters and widgets read, and a page for people."""
    parts = [
        _introduce(facts),
        _tell_words(facts),
        _tell_use(facts),
        _tell_scores(facts.card),
        _tell_pictures(facts),
        _tell_settings(facts.config),
        _tell_licence(facts),
    ]
    text = "\n\n".join(part for part in parts if part)
    return ModelCard(f"---\n{_make_metadata(facts).to_yaml()}\n---\n\n{text}\n")


def _make_metadata(facts: CardFacts) -> ModelCardData:
    config, kind = facts.config, facts.config.adapter.kind
    for_diffusers = _is_for_diffusers(facts)
    more: dict[str, Any] = {"instance_prompt": config.photo_prompt()}
    if facts.pictures:
        more["widget"] = [_make_widget(*pair) for pair in facts.pictures]
    return ModelCardData(
        base_model=facts.base.hub_id or None,
        license=facts.licence or None,
        library_name="diffusers" if for_diffusers else None,
        pipeline_tag="text-to-image",
        tags=[*_TAGS[:4], "lora", *([kind] if kind != "lora" else []), *_TAGS[4:]],
        **more,
    )


def _make_widget(file: str, picture: Picture) -> dict[str, Any]:
    shown: dict[str, Any] = {"text": picture.prompt, "output": {"url": file}}
    if picture.negative_prompt:
        shown["parameters"] = {"negative_prompt": picture.negative_prompt}
    return shown


def _is_for_diffusers(facts: CardFacts) -> bool:
    return "diffusers" in facts.readers.partition(";")[0]


def _introduce(facts: CardFacts) -> str:
    config = facts.config
    taught = f"{facts.photos} photo{'s' * (facts.photos != 1)}"
    beside = f" and {facts.class_images} class images" if facts.class_images else ""
    version = library_versions().get("dreamloom", "")
    return (
        f"# {html.escape(config.subject.phrase)}\n\n"
        + "<Gallery />\n\n" * bool(facts.pictures)
        + f"An adapter ({_name_kind(config)}) for {facts.base.told}. It was taught one subject, "
        f"{quote(config.subject.phrase)}, by DreamBooth with DreamLoom {version}, from {taught}"
        f"{beside}; none of them is here."
    )


def _name_kind(config: LoomConfig) -> str:
    names = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT"}
    return names[config.adapter.kind]


def _tell_words(facts: CardFacts) -> str:
    subject = facts.config.subject
    told = (
        f"## Trigger words\n\nWrite {quote(subject.phrase)} where the subject stands, as in "
        f"{quote(facts.config.photo_prompt())}."
    )
    if facts.words:
        listed = ", ".join(f"{quote(word)} ({quote(file)})" for word, file in facts.words.items())
        told += f" It needs new words, whose embeddings lie in files of their own: {listed}."
    return told


def _tell_use(facts: CardFacts) -> str:
    prompt = facts.config.photo_prompt()
    is_found = facts.base.hub_id or facts.base.name == "picturebook"
    words = ["dreamloom", "generate", "--adapter", facts.repository, "--prompt", prompt]
    words += [*([] if is_found else ["--base", "BASE"]), "--out", "runs/it"]
    shell = _block("sh", shlex.join(words))
    told = f"## Draw with it\n\nWith DreamLoom:\n\n{shell}\n\n{facts.readers}"
    if not _is_for_diffusers(facts):
        return told
    lines = [
        "import torch",
        "from diffusers import StableDiffusionXLPipeline",
        "",
        f"base = {_literal(facts.base.hub_id or 'BASE')}",
        "pipeline = StableDiffusionXLPipeline.from_pretrained(base, torch_dtype=torch.float16)",
        'pipeline.to("cuda")',
        f"repository, file = {_literal(facts.repository)}, {_literal(facts.weights)}",
        "pipeline.load_lora_weights(repository, weight_name=file)",
        f"image = pipeline({_literal(prompt)}).images[0]",
    ]
    told += f"\n\nWith diffusers:\n\n{_block('python', chr(10).join(lines))}"
    if facts.base.name == "picturebook":
        told += "\n\n`dreamloom models path picturebook` says where BASE lies."
    elif not facts.base.hub_id:
        told += "\n\nBASE stands for the base model: its folder in diffusers' layout."
    if facts.words:
        told += (
            "\n\nBefore drawing, the new words are loaded with `load_textual_inversion`, from "
            "`clip_l` of their file for the first text encoder and `clip_g` for the second."
        )
    return told


def _literal(text: str) -> str:
    """Write a text as Python does, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _tell_scores(card: Scorecard | None) -> str:
    if card is None:
        return "## Scores\n\nNot measured."
    measured = {name: score for name, score in card.all_scores.items() if score.measured}
    rest = [label_of(name) for name in card.all_scores if name not in measured]
    doubts = [text for text in (card.warning, *card.alarms, *card.findings) if text]
    told = ["## Scores"]
    if measured:
        told.append(
            f"Of {len(card.pictures)} pictures beside {card.photos} photos. The interval covers "
            f"{card.confidence:.0%}; the floor is the base model's score for the same prompts and "
            "seeds, the ceiling that of the photos among themselves, and the lift says how far "
            "from the one (0) to the other (1)."
        )
        told.append("\n".join(_tabulate(measured)))
    if rest:
        told.append(f"Not measured: {', '.join(rest)}.")
    if doubts:
        told.append("\n".join(f"- {html.escape(text, quote=False)}" for text in doubts))
    return "\n\n".join(told)


def _tabulate(scores: dict[str, Score]) -> list[str]:
    head = ("score", "what it says", "value", "n", "interval", "floor", "ceiling", "lift", "by")
    rows = [
        (label_of(name), MEANINGS.get(name, ""), *score.cells(), score.key or "")
        for name, score in scores.items()
    ]
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return (
        f"| {' | '.join(html.escape(cell, quote=False).replace('|', '&#124;') for cell in cells)} |"
    )


def _tell_pictures(facts: CardFacts) -> str:
    if not facts.pictures:
        return ""
    listed = [
        f"- {quote(file)}: {quote(picture.prompt)}, seed {picture.seed}, "
        f"{html.escape(picture.sampler, quote=False)}"
        for file, picture in facts.pictures
    ]
    return f"## Pictures\n\n{facts.drawn_as}\n\n" + "\n".join(listed)


def _tell_settings(config: LoomConfig) -> str:
    flat = list_settings(config)
    brief = [f"- {told}: {_say(flat[name])}" for name, told in _HEADLINES.items()]
    whole = "\n".join(f"{name} = {to_toml_value(value)}" for name, value in flat.items())
    return (
        "## Settings\n\n"
        + "\n".join(brief)
        + "\n\n<details><summary>All settings that the training depends on</summary>\n\n"
        + f"{_block('toml', whole)}\n\n</details>"
    )


def _say(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def list_settings(config: LoomConfig) -> dict[str, Any]:
    """List the settings that what was taught depends on, by dotted name; none says a place."""
    return {
        name: value
        for name, value in config.flat().items()
        if name not in _PLACES and not name.startswith(NOT_TRAINED)
    }


def _tell_licence(facts: CardFacts) -> str:
    if not facts.licence:
        return "## Licence\n\nNone was given. The base model's own holds for what is made with it."
    own = facts.base.hub_id == SDXL_ID and facts.licence == SDXL_LICENCE
    return f"## Licence\n\n{quote(facts.licence)}" + (", the base model's own." if own else ".")


def quote(text: str) -> str:
    """Write a text of anybody's as code in Markdown, whatever signs it has."""
    text = " ".join(text.split())
    ticks = "`" * (_longest_ticks(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _block(language: str, text: str) -> str:
    """Write a block of code, its fence longer than any run of the same signs in it."""
    fence = "`" * max(3, _longest_ticks(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
