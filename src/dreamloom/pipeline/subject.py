"""The subject in words: that it is named, what its prompts say, how text encoders read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from dreamloom.core.config.settings import LoomConfig, SubjectConfig
from dreamloom.core.errors import ConfigError, PhotoError
from dreamloom.core.events import Note
from dreamloom.core.run_folder import RunFolder
from dreamloom.core.toml_files import check_section, suggest
from dreamloom.data.class_images import load_class_images
from dreamloom.data.image_io import crop_centre, open_upright
from dreamloom.data.photos.listing import count, hash_file, list_class_images, list_photos
from dreamloom.models.base import Model
from dreamloom.models.tokenizers import tell_reading

_BLANK = re.compile(r"\{\s*([^{}]*?)\s*\}")
# As many photos as tell whether a set was drawn or photographed.
_LOOKED_AT = 8
_GLANCE_PX = 32


def require_subject(config: LoomConfig) -> None:
    """Refuse to teach one's own photos under a name that nobody gave them.

    Raises:
        ConfigError: If the settings do not say whom the photos show, or not what it is one of.
    """
    if "subject" not in config.model_fields_set or "phrase" not in config.subject.model_fields_set:
        raise ConfigError(
            "Nobody says whom or what the photos show.",
            'Give --subject, a rare word and what it is one of: --subject "rraj person", or '
            '--subject "sks dog".',
        )
    require_noun(config.subject)


def require_noun(subject: SubjectConfig) -> None:
    """Refuse a subject of which nobody said what it is one of.

    Raises:
        ConfigError: If its phrase is one word, which would be its own class.
    """
    if subject.lacks_noun:
        raise ConfigError(
            f"The subject {subject.phrase!r} does not say what it is one of, so its class would "
            f"be “a {subject.class_noun}”.",
            f'Give --class-noun, such as person, or say it in the phrase: "{subject.phrase} '
            'person".',
        )


def name_subject(phrase: str, noun: str | None) -> SubjectConfig:
    """Name the subject of a drawing as it was typed; without a noun, the phrase's last word.

    Raises:
        ConfigError: If either says nothing, or the phrase is one word and its own noun.
    """
    given = {"phrase": phrase} | ({"class_noun": noun} if noun is not None else {})
    subject = check_section(SubjectConfig, given)
    require_noun(subject)
    return subject


def fill_subject(text: str, phrase: str) -> str:
    """Put the subject's phrase into a prompt that was typed.

    Raises:
        ConfigError: If another word stands in braces, or nobody is named.
    """
    for blank in _BLANK.finditer(text):
        if blank.group() != "{subject}":
            near = suggest(blank.group(1), ["subject"])
            hint = "Did you mean {subject}?" if near.startswith("Did") else ""
            hint = "Give one --prompt for each choice." if "|" in blank.group() else hint
            raise ConfigError(
                f"The prompt {text!r} has {blank.group()}, which means nothing here.",
                f"{hint} The only word in braces may be {{subject}}.".strip(),
            )
    if "{subject}" in text and not phrase:
        raise ConfigError("A prompt says {subject}, but nobody is named.", "Give --subject.")
    return text.replace("{subject}", phrase)


def check_class_images(photos: Path, config: LoomConfig) -> None:
    """Read the user's class images through, and refuse those that are the subject's own photos.

    Raises:
        ConfigError: If no folder is named, or class images have the same bytes as photos.
        PhotoError: If one cannot be read.
    """
    if config.priors.kind != "folder":
        return
    if not config.priors.folder:
        raise ConfigError("priors.kind is 'folder' but no folder is named.", "Use --prior DIR.")
    folder = Path(config.priors.folder)
    refuse_shared_files(photos, list_class_images(folder).pictures, folder)
    with TemporaryDirectory() as scratch:
        load_class_images(folder, RunFolder(scratch), _GLANCE_PX, "")


def refuse_shared_files(photos: Path, others: Iterable[Path], folder: Path) -> None:
    """Refuse pictures of other members of the class that are photos of the subject.

    Args:
        photos: The folder of the subject's photos.
        others: The pictures.
        folder: Where they lie, for the message.

    Raises:
        ConfigError: If some have the same bytes as a photo.
    """
    if not photos.is_dir():
        return
    known = {hash_file(path) for path in list_photos(photos).pictures}
    shared = [path for path in others if hash_file(path) in known]
    if shared:
        verb = "is also a photo" if len(shared) == 1 else "are also photos"
        raise ConfigError(
            f"{count(shared, 'picture')} in {folder} {verb} of the subject in {photos}, such as "
            f"{shared[0].name}.",
            "Name a folder of others of the class; pictures of the subject are no class images.",
        )


def check_held_out(photos: Path, config: LoomConfig) -> None:
    """Refuse to validate with photos that are taught, too, as files of the same bytes.

    Raises:
        ConfigError: If some are.
        PhotoError: If one cannot be read.
    """
    held = config.validation.held_out_photos
    if not held or not photos.is_dir():
        return
    listed = list_photos(photos).pictures
    taught = {hash_file(path): path for path in listed[:-held]}
    for path in listed[-held:]:
        if same := taught.get(hash_file(path)):
            raise ConfigError(
                f"The photo {path.name} is held out to validate with, but is the same file as "
                f"{same.name}, which is taught.",
                "Remove one of the two, or hold out other photos.",
            )


def describe_words(config: LoomConfig) -> Iterator[Note]:
    """Say what will be taught, in the words that it is taught with."""
    subject = config.subject
    yield Note("train", f"teaches {config.base} the subject “{subject.phrase}”")
    yield Note("train", f"one of its class: {subject.class_noun}")
    yield Note("train", f"photos are called “{config.photo_prompt()}”")
    used = config.priors.kind != "none" and config.train.prior_weight > 0
    unused = "" if used else " (not used: there are no class images)"
    yield Note("train", f"the class is called “{config.class_prompt()}”{unused}")


def describe_reading(model: Model, config: LoomConfig) -> Iterator[Note]:
    """Say how large pictures are, and what each text encoder makes of the subject's phrase."""
    side = config.photos.resolution_px
    yield Note("train", f"{model.identity.name} learns at {side} × {side} pixels")
    phrase = config.subject.phrase
    for text in tell_reading(phrase, model.tokenize(phrase)):
        yield Note("train", text)


def warn_of_photographs(model: Model, photos: Path) -> Iterator[Note]:
    """Say that photographs are nothing that picturebook knows, if it is to learn them."""
    if model.identity.name != "picturebook" or not photos.is_dir():
        return
    from dreamloom.evaluation.encoders.loading import load_encoders

    familiar = load_encoders("picturebook", model.runtime.device).familiar
    try:
        paths = list_photos(photos).pictures[:_LOOKED_AT]
        known = familiar([crop_centre(open_upright(path)) for path in paths]) if familiar else []
    except PhotoError:
        return  # whoever reads all of them says what is wrong
    if 2 * known.count(False) > len(known):
        yield Note(
            "train",
            "these are photographs, and picturebook has seen nothing but drawings: it cannot "
            "learn a likeness; --base sdxl can",
            warning=True,
        )
