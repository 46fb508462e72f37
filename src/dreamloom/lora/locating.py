"""Locate an adapter by what a user calls it: a file, PEFT's folder, or one fetched from the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dreamloom.core.errors import AdapterError
from dreamloom.lora.folders import CONFIG, WEIGHTS
from dreamloom.lora.tensors import PICKLES
from dreamloom.lora.token_embeddings import tokens_folder

SAFETENSORS = ".safetensors"
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
"""What diffusers calls every adapter that it saves, and looks for on the hub."""

_HUB_NAME = re.compile(
    r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^:\s]+))?(?::(?P<file>[^:]+))?",
    re.ASCII,
)
_MOST_LISTED = 8


def split_weight(text: str) -> tuple[str, str | None]:
    """Split ``ADAPTER:WEIGHT`` as it was typed into the two; None where there is no weight.

    Example:
        >>> split_weight("me.safetensors:0.8"), split_weight("user/name:me.safetensors")
        (('me.safetensors', '0.8'), ('user/name:me.safetensors', None))
    """
    adapter, colon, weight = text.rpartition(":")
    is_path = "/" in weight or "\\" in weight
    is_file = weight.lower().endswith((SAFETENSORS, *PICKLES)) and _HUB_NAME.fullmatch(text)
    if not colon or is_path or is_file or Path(text).is_file():
        return text, None
    return adapter, weight


def locate_adapter(text: str) -> Path:
    """Find the adapter that was named; one on the hub is fetched into the hub's cache.

    What lies here goes first. ``user/name``, ``user/name@revision``, ``user/name:file.safetensors``
    and ``user/name@revision:file.safetensors`` are of the hub, unless that is no name that the hub
    allows, ends like a file, or begins with a folder that is here. Nothing but safetensors is
    fetched, and ``adapter_config.json`` beside PEFT's. Without network, what the cache holds is
    taken.

    Args:
        text: As typed, without a weight.

    Returns:
        Its path; one that leads nowhere, where a file was meant that is not here.

    Raises:
        AdapterError: If the hub has none of that name, it cannot be reached or read, or the
            repository holds no adapter, or several of which none was named.
    """
    path, named = Path(text), _HUB_NAME.fullmatch(text)
    if path.exists() or named is None or not is_hub_name(named["repository"]):
        return path
    repository, revision, file = named.group("repository", "revision", "file")
    if revision is None and file is None:
        if repository.lower().endswith((SAFETENSORS, *PICKLES)):
            return path
        if path.parent.exists():
            # A mistyped path is nobody's business but the user's: the hub is not asked for it.
            raise AdapterError(
                f"There is no adapter at {text}.",
                f"Check the path; for the hub's repository of that name, write {text}@main.",
            )
    if file is not None and not file.lower().endswith(SAFETENSORS):
        raise AdapterError(
            f"{file} of {repository} is not fetched: DreamLoom reads .safetensors only.",
            f"Name another file, as in {repository}:{DIFFUSERS_NAME}; a pickle could run code.",
        )
    return _fetch(repository, revision, file)


def is_hub_name(repository: str) -> bool:
    """Say whether the hub allows a repository of that name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError:
        return False
    return True


def network_errors() -> tuple[type[Exception], ...]:
    """Name what is raised where the hub cannot be reached, or nothing may be asked of it."""
    from huggingface_hub import errors

    # Versions of the client differ in their HTTP library; its errors are taken from where they do.
    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    return (http_error, ConnectionError, errors.LocalEntryNotFoundError)


def _fetch(repository: str, revision: str | None, file: str | None) -> Path:
    """Fetch an adapter with what it needs beside it, all of one commit."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        files = _list_files(repository, revision)
        chosen = _choose_file(repository, files, file)
        path = Path(hf_hub_download(repository, chosen, revision=revision))
        # The hub's cache names the folder of a snapshot by its commit.
        commit = path.parents[chosen.count("/")].name
        for name in _list_companions(chosen, files):
            hf_hub_download(repository, name, revision=commit)
    except GatedRepoError as error:
        raise AdapterError(
            f"{repository} is behind a licence that must be accepted first.",
            "Accept it on its page on the hub, run `hf auth login`, and try again.",
        ) from error
    except RevisionNotFoundError as error:
        raise AdapterError(
            f"{repository} on the hub has no revision {revision}.",
            "Name one of its branches, tags or commits, or leave @ and the revision out.",
        ) from error
    except RepositoryNotFoundError as error:
        raise AdapterError(
            f"There is no adapter at {repository}, neither here nor on the hub.",
            "Check the name; if it is private, run `hf auth login` first.",
        ) from error
    except HfHubHTTPError as error:
        said = " ".join(str(error).split("\n", maxsplit=1)[0].split())
        raise AdapterError(
            f"The hub does not give {repository}: {said}.", "Try again later."
        ) from error
    except network_errors() as error:
        raise AdapterError(
            f"There is no adapter at {repository}, it is not in the hub's cache, and the hub "
            "cannot be reached.",
            "Check the path; or connect to the internet, unset HF_HUB_OFFLINE, and try again.",
        ) from error
    return path


def _list_files(repository: str, revision: str | None) -> list[str]:
    """List what a repository holds; without network, what the cache holds of it."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        siblings = HfApi().model_info(repository, revision=revision).siblings
    except HfHubHTTPError:
        raise
    except network_errors():
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        paths = (path for path in folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(folder).as_posix() for path in paths)
    return [one.rfilename for one in siblings or ()]


def _choose_file(repository: str, files: Sequence[str], file: str | None) -> str:
    """Choose the file that was named, or else the only one, or the only one of a usual name."""
    words = tuple(f"{tokens_folder(Path(name)).as_posix()}/" for name in files)
    weights = [name for name in files if name.endswith(SAFETENSORS) and not name.startswith(words)]
    usual = [name for name in (DIFFUSERS_NAME, WEIGHTS) if name in weights]
    shown = ", ".join(weights[:_MOST_LISTED]) + (" …" if len(weights) > _MOST_LISTED else "")
    if file is not None and file in files:
        return file
    if not weights:
        pickles = any(name.lower().endswith(PICKLES) for name in files)
        raise AdapterError(
            f"{repository} on the hub holds no {SAFETENSORS} file"
            + (", but pickles, which could run code." if pickles else "."),
            "DreamLoom fetches nothing else; ask its author for that format.",
        )
    if file is not None:
        raise AdapterError(
            f"{repository} on the hub holds no {file}.", f"Name one of these: {shown}."
        )
    if len(usual) == 1 or len(weights) == 1:
        return (usual or weights)[0]
    raise AdapterError(
        f"{repository} on the hub holds several adapters: {shown}.",
        f"Name one, as in {repository}:{weights[0]}.",
    )


def _list_companions(file: str, files: Sequence[str]) -> list[str]:
    """List what an adapter cannot be read without: PEFT's configuration, and its new words."""
    path = Path(file)
    beside = [path.with_name(CONFIG).as_posix()] if path.name == WEIGHTS else []
    words = f"{tokens_folder(path).as_posix()}/"
    listed = [name for name in files if name.startswith(words) and name.endswith(SAFETENSORS)]
    return [name for name in beside if name in files] + listed
