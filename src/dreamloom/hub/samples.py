"""Sample pictures of an upload: which are taken, by a rule that looks at none, and how written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dreamloom.core.errors import HubError
from dreamloom.core.manifests import ImageSet, Picture
from dreamloom.core.run_folder import RunFolder, atomic_path, file_sha256
from dreamloom.data.image_io import open_upright
from dreamloom.evaluation.metrics.measures import names
from dreamloom.evaluation.metrics.scorecard import Scorecard
from dreamloom.lora.folders import hash_adapter
from dreamloom.report.gallery import prompts_of
from dreamloom.report.story import read_story, tell_count

FOLDER = "samples"
"""The folder of an upload that holds its pictures."""

_SUMMARY = "summary.json"


@dataclass(frozen=True)
class DrawnSet:
    """A set of pictures that the adapter drew.

    Args:
        name: As it was called when it was drawn.
        images: Its manifest.
        hashes: SHA-256 of each picture as it was drawn, by its file's name.
        card: Its scores; None where it was not scored, or other pictures were.
    """

    name: str
    images: ImageSet
    hashes: dict[str, str]
    card: Scorecard | None


@dataclass(frozen=True)
class Samples:
    """The pictures that were chosen, and the rule by which.

    Args:
        pictures: In the set's order.
        rule: The rule, in one sentence.
        notes: What was left out, each in a sentence.
    """

    pictures: tuple[Picture, ...] = ()
    rule: str = ""
    notes: tuple[str, ...] = ()


def find_drawn_set(run: RunFolder, name: str | None = None) -> DrawnSet | None:
    """Find the set of pictures that stands for a run's adapter.

    It is one that this very adapter drew, alone: by its SHA-256 in the manifest. Of several it is
    none that was drawn to compare schedulers, one that was scored, and the one with most prompts.
    The demo keeps the pictures of its adapters beside their runs.

    Args:
        run: The run.
        name: The set that is asked for; None takes that one.

    Raises:
        HubError: If the set that is asked for is not there, or this adapter did not draw it.
    """
    found = {one.name: one for one in _list_drawn(run)}
    if name is None:
        return max(found.values(), key=_weigh, default=None)
    if name not in found:
        listed = ", ".join(sorted(found))
        raise HubError(
            f"{run.path} has no set of pictures {name} that its adapter alone has drawn.",
            f"Those that were: {listed}."
            if listed
            else f"Draw one: dreamloom generate --adapter {run.adapter} --name {name} "
            f"--out {run.path}.",
        )
    return found[name]


def _weigh(drawn: DrawnSet) -> tuple[bool, bool, int, str]:
    is_main = drawn.images.purpose == "main"
    return is_main, drawn.card is not None, len(prompts_of(drawn.images)), drawn.name


def _list_drawn(run: RunFolder) -> Iterator[DrawnSet]:
    own = hash_adapter(run.adapter)
    above = run.path.parent
    for folder in (run.path, *([above] if (above / _SUMMARY).is_file() else [])):
        story, home = read_story(folder), RunFolder(folder)
        for name, images in story.sets.items():
            record = home.read_record(f"generate-{name}")
            if record is None or [entry.sha256 for entry in images.adapters] != [own]:
                continue
            hashes = {Path(file).name: sha256 for file, sha256 in record.outputs.items()}
            scored = home.read_record(f"evaluate-{name}")
            is_same = scored is not None and scored.inputs.get("images") == _fingerprint(images)
            yield DrawnSet(name, images, hashes, story.cards.get(name) if is_same else None)


def _fingerprint(images: ImageSet) -> str:
    """Fingerprint a set; empty where pictures of it are gone."""
    return images.fingerprint if all(path.is_file() for path in images.paths()) else ""


def choose_samples(drawn: DrawnSet, subject: str, most: int) -> Samples:
    """Choose pictures by a rule that nobody's taste comes into.

    Of each prompt that names the subject it is the first picture; of more prompts than pictures
    are wanted, evenly many between the first and the last. What has changed since it was drawn is
    never taken, nor what was found to repeat a photo.

    Args:
        drawn: The set.
        subject: The phrase that names the subject.
        most: How many pictures at most.
    """
    copied = {one.file for one in drawn.card.pictures if one.copied} if drawn.card else set()
    told = [one for one in drawn.images.pictures if names(one.prompt, subject)]
    wanted = told or list(drawn.images.pictures)
    whole = [one for one in wanted if _is_as_drawn(drawn, one)]
    notes = []
    if len(whole) < len(wanted):
        count = tell_count(len(wanted) - len(whole), "picture")
        notes.append(f"{count} of the set {drawn.name} left out: not as drawn")
    usable = [one for one in whole if one.file not in copied]
    if len(usable) < len(whole):
        count = tell_count(len(whole) - len(usable), "picture")
        notes.append(f"{count} of the set {drawn.name} left out: found to repeat a photo")
    if usable and most and drawn.card is None:
        notes.append(
            f"the set {drawn.name} was not compared with the photos; 'dreamloom evaluate' finds "
            "pictures that repeat one"
        )
    first = list({one.prompt: one for one in reversed(usable)}.values())[::-1]
    rule = "the first picture of each prompt that names the subject"
    if not told:
        rule = "the first picture of each prompt"
    if len(first) > most:
        rule += f", {most} of {len(first)} prompts, evenly spread"
        first = [first[round(i * (len(first) - 1) / max(most - 1, 1))] for i in range(most)]
    return Samples(tuple(first), rule, tuple(notes))


def _is_as_drawn(drawn: DrawnSet, picture: Picture) -> bool:
    path = drawn.images.folder / picture.file
    return path.is_file() and file_sha256(path) == drawn.hashes.get(picture.file)


def write_sample(source: Path, target: Path) -> None:
    """Write a picture anew as PNG: its pixels, and nothing else that its file says."""
    with atomic_path(target) as temporary:
        open_upright(source).save(temporary, "PNG")
