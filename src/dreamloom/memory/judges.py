"""What the encoders that score pictures take of a device's memory while a training runs."""

from __future__ import annotations

from dreamloom.core.config.settings import LoomConfig


def weigh_judges(config: LoomConfig) -> int:
    """Weigh the files of the encoders that a training loads to score its pictures, in bytes.

    Nothing where no pictures are drawn or scored on the way. What computing with them holds is
    little beside what drawing holds, and not counted.
    """
    validation = config.validation
    if validation.every is None or not validation.scores:
        return 0
    if config.evaluate.encoders == "picturebook" or config.base == "picturebook":
        return 0
    from dreamloom.evaluation.encoders.store import list_models, model_folder

    here = [listed.model for listed in list_models() if listed.state == "here"]
    files = [model_folder(model) / file.name for model in here for file in model.files]
    return sum(file.stat().st_size for file in files if file.is_file())
