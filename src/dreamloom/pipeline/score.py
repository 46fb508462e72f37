"""Score a folder of pictures against a folder of photos."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from dreamloom.core.config.settings import LoomConfig, SubjectConfig
from dreamloom.core.events import Observer, silent, tee
from dreamloom.core.manifests import MANIFEST, ImageSet, read_class_image_set
from dreamloom.core.run_folder import RunFolder
from dreamloom.data.photos.prepare import load_photos
from dreamloom.evaluation.metrics.measures import SubjectWords
from dreamloom.evaluation.metrics.scorecard import Scorecard
from dreamloom.evaluation.scoring import (
    Floor,
    PartedPhotos,
    evaluate_images,
    list_pictures,
    pick_encoders,
    read_pictures,
    refuse_drawn_photos,
)
from dreamloom.pipeline.score_set import evaluate_run, evaluation_options, name_held_out
from dreamloom.pipeline.subject import refuse_shared_files, require_noun

# Pictures of unknown size are compared with photos of this size.
PHOTO_SIDE_PX = 512


def score(
    images: Path,
    photos_folder: Path,
    config: LoomConfig,
    floor: Path | None = None,
    impostors: Path | None = None,
    observe: Observer = silent,
) -> Scorecard:
    """Score a folder of pictures against a folder of photos.

    Strangers are others of the class; a run's own class images if no folder is named. The scores of
    a set that lies in a run are kept there, for its report. Where the settings do not name the
    subject, the pictures' own manifest does.

    Raises:
        ConfigError: If strangers are photos of the subject.
        EvaluationError: If a folder holds no picture.
        PhotoError: If a photo cannot be read or there is none.
    """
    refuse_drawn_photos(photos_folder)
    pictures = read_pictures(images)
    subject = find_subject(config, pictures)
    settings = config.evaluate
    encoders = pick_encoders(settings.encoders, pictures.base_name, config.device)
    # Also where the set is named from inside the run, as in ``pictures`` or ``.``.
    place = Path(os.path.abspath(images))
    run = RunFolder(place.parent.parent)
    in_run = place.parent == run.images and run.is_run()
    if impostors:
        others = list_pictures(impostors).paths()
        refuse_shared_files(photos_folder, others, impostors)
    else:
        others = _list_class_images(run) if in_run else []
    beneath = Floor(read_pictures(floor), others) if floor else None
    with TemporaryDirectory() as scratch:
        side = pictures.resolution_px or PHOTO_SIDE_PX
        photos = load_photos(photos_folder, RunFolder(scratch), side, observe)
        if in_run:
            return evaluate_run(
                run,
                pictures.model_copy(update={"folder": place}),
                photos,
                floor=beneath,
                config=settings,
                subject=subject,
                encoders=encoders,
                observe=tee(observe, run.observer()),
            )
        # Outside a run only the settings can say it.
        held_out = name_held_out(photos, config.validation.held_out_photos)
        return evaluate_images(
            pictures,
            PartedPhotos(photos, held_out),
            subject=SubjectWords(subject.phrase, subject.class_noun),
            floor=beneath,
            options=evaluation_options(settings),
            encoders=encoders,
            observe=observe,
        )


def _list_class_images(run: RunFolder) -> list[Path]:
    """List a run's class images: they show as many strangers; none where it has none."""
    if not (run.priors / MANIFEST).is_file():
        return []
    return read_class_image_set(run.priors).paths()


def find_subject(config: LoomConfig, pictures: ImageSet) -> SubjectConfig:
    """Name the subject: as the settings do, or else as the pictures' manifest does."""
    given = config.subject if "subject" in config.model_fields_set else None
    if pictures.subject and (
        given is None or (given.lacks_noun and given.phrase == pictures.subject)
    ):
        named = {"phrase": pictures.subject, "class_noun": pictures.class_noun}
        return SubjectConfig.model_validate({name: text for name, text in named.items() if text})
    if given:
        require_noun(given)
    return config.subject
