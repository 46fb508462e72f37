"""Bring a model onto this machine: pinned, compared, read once, and only then put in place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from dreamloom.core.errors import EvaluationError
from dreamloom.core.run_folder import atomic_folder
from dreamloom.evaluation.encoders.catalogue import READABLE, ModelFile, Pinned, find_model
from dreamloom.evaluation.encoders.loading import try_reading
from dreamloom.evaluation.encoders.store import LOCK, damage_of, keep_lock, model_folder


def fetch_model(name: str, source: Path | None = None, endpoint: str | None = None) -> Path:
    """Fetch a model and give the folder that it lies in; an older copy is replaced.

    Nothing is put in place before every file has arrived, its hash is the pinned one, and the
    model could be read.

    Args:
        name: One of the catalogue's.
        source: A folder that holds the model's files, or the one file of a model that has only
            one; None fetches from the hub.
        endpoint: Another address of the hub.

    Raises:
        EvaluationError: If the name is unknown, the hub cannot be reached, a file is absent or
            differs from the pinned one, or the model cannot be read.
    """
    model = find_model(name)
    if source is None and model.source == "converted":
        raise EvaluationError(
            f"{name} cannot be fetched: its authors publish only a pickle, which could run code.",
            f"Convert it as docs/encoders.md tells, then 'models fetch {name} --from FILE'.",
        )
    target = model_folder(model)
    with atomic_folder(target) as fresh:
        revision = _copy(model, source, fresh) if source else _download(model, fresh, endpoint)
        for file in model.files:
            if damage := damage_of(file, fresh / file.name):
                raise EvaluationError(
                    f"{file.name} of {name} {damage}.",
                    "It is not the file that DreamLoom is pinned to; nothing was kept.",
                )
        keep_lock(model, fresh, revision)
        try_reading(model, fresh)
    return target


def _download(model: Pinned, folder: Path, endpoint: str | None) -> str:
    """Download the pinned files; give the commit that they are from."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    hub, commit = folder / ".hub", model.revision
    for file in model.files:
        try:
            path = Path(
                hf_hub_download(
                    model.repository,
                    file.name,
                    revision=commit or "main",
                    cache_dir=hub,
                    endpoint=endpoint,
                )
            )
        except HfHubHTTPError as error:
            raise EvaluationError(
                f"The hub does not give {file.name} of {model.repository}: {error}.",
                "Fetch it again later, or bring the files with --from FOLDER.",
            ) from error
        except OSError as error:
            raise EvaluationError(
                f"{model.name} was not fetched: the hub cannot be reached from here.",
                f"Fetch it on a machine with network, carry the folder {model_folder(model)} "
                f"over, and run 'dreamloom models fetch {model.name} --from FOLDER'.",
            ) from error
        # The hub's cache names the folder of a snapshot by its commit: the files that follow are
        # taken from the same one.
        commit = path.parent.name
        path.resolve().replace(folder / file.name)
    shutil.rmtree(hub)
    assert commit is not None
    return commit


def _copy(model: Pinned, source: Path, folder: Path) -> str | None:
    """Copy the model's files; give the commit that they bear with them, if they do."""
    for file in model.files:
        shutil.copyfile(_find_file(model, file, source), folder / file.name)
    try:
        lock = json.loads((source / LOCK).read_text(encoding="utf-8"))
        return str(lock["revision"]) if lock["revision"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return model.revision


def _find_file(model: Pinned, file: ModelFile, source: Path) -> Path:
    if source.is_file() and source.suffix not in READABLE:
        raise EvaluationError(
            f"{source} is not read: a pickle could run code.",
            f"DreamLoom reads weights from {READABLE[0]} and {READABLE[1]} files only.",
        )
    if source.is_file() and len(model.files) == 1 and source.suffix == Path(file.name).suffix:
        return source
    path = source / file.name
    if path.is_file():
        return path
    names = ", ".join(one.name for one in model.files)
    raise EvaluationError(
        f"{source} does not hold {file.name}, which {model.name} needs.",
        f"Name a folder that holds {names}.",
    )
