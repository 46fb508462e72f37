"""Push a run's adapter to the hub: all files in one commit, or none."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelInfo,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from dreamloom.core.errors import HubError
from dreamloom.core.events import Note, Observer, silent
from dreamloom.hub.samples import FOLDER
from dreamloom.hub.upload import CARD, Upload, UploadRequest, check_name, fill_upload
from dreamloom.lora.locating import DIFFUSERS_NAME, network_errors
from dreamloom.lora.token_embeddings import tokens_folder

Ask = Callable[[str], bool]
"""Asks the user whether what the sentence says may be done."""

STAGE = "push"
_TOKENS_PAGE = "https://huggingface.co/settings/tokens"
_OWN = re.compile(
    rf"{FOLDER}/\d+\.png|{re.escape(tokens_folder(Path(DIFFUSERS_NAME)).name)}/[^/]+\.safetensors"
)
"""Files that an earlier push may have written and this one does not."""
_GIT = ".gitattributes"
"""The hub's own, which every repository has."""


@dataclass(frozen=True)
class Pushed:
    """What is on the hub now."""

    repository: str
    url: str
    commit: str
    private: bool
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


def refuse(sentence: str) -> bool:
    """Say no to whatever is asked."""
    return False


def push_run(
    request: UploadRequest, public: bool = False, ask: Ask = refuse, observe: Observer = silent
) -> Pushed:
    """Push a run's adapter with its card and pictures, and nothing else of the run.

    A repository that is made for it is removed again where the upload fails. In one that is there,
    files of the same names are replaced, and those deleted that an earlier push wrote and this one
    does not, after asking. All of it is one commit, made only if the repository is still as it was
    when that was asked.

    Args:
        request: What is pushed, and where to.
        public: Whether everybody may see it.
        ask: Asked before anything that is on the hub is replaced, or made public.
        observe: Told of what the user should know.

    Raises:
        HubError: If there is no token, the hub cannot be reached or refuses, the user does, or the
            run has nothing to push.
        ConfigError: If the run's settings cannot be read.
    """
    check_name(request.name)
    if get_token() is None:
        raise HubError(
            "There is no token to push with.",
            f"Make one with write access at {_TOKENS_PAGE} and run `hf auth login`, or set "
            "HF_TOKEN; --out FOLDER writes the same files here instead.",
        )
    api = HfApi()
    with _explain(request.name):
        repository = request.name
        if "/" not in repository:
            repository = f"{api.whoami()['name']}/{repository}"
        there = _find(api, repository)
    with tempfile.TemporaryDirectory() as folder:
        upload = fill_upload(request, repository, Path(folder))
        for text in upload.notes:
            observe(Note(STAGE, text, warning=True))
        stale = _agree(there, upload, public, ask) if there else []
        with _explain(repository):
            _check_card(upload)
            if there is None:
                commit = _push_new(api, repository, upload, public)
            else:
                commit = _commit(api, repository, upload, stale, there.sha)
            if there is not None and there.private and public:
                _publish(api, repository)
    url = f"{api.endpoint}/{repository}"
    return Pushed(repository, url, commit, not public, upload.files, upload.notes)


def _publish(api: HfApi, repository: str) -> None:
    """Let everybody see a repository."""
    try:
        api.update_repo_settings(repository, private=False)
    except network_errors() as error:
        raise HubError(
            f"{repository} was pushed, but only you can see it still: {_first_line(error)}.",
            f"Make it public on its page, {api.endpoint}/{repository}/settings.",
        ) from error


def _find(api: HfApi, repository: str) -> ModelInfo | None:
    try:
        return api.model_info(repository)
    except RepositoryNotFoundError:
        return None


def _check_card(upload: Upload) -> None:
    """Let the hub look at the card before anything is made there."""
    try:
        ModelCard.load(upload.folder / CARD).validate()
    except HfHubHTTPError:
        raise
    except ValueError as error:
        raise HubError(
            f"The hub does not take the card: {_first_line(error)}.",
            "Give --licence a name that the hub knows, such as openrail++, apache-2.0, "
            "cc-by-nc-4.0 or other.",
        ) from error


def _push_new(api: HfApi, repository: str, upload: Upload, public: bool) -> str:
    """Make a repository and commit to it; if that fails, remove it again."""
    api.create_repo(repository, private=not public)
    try:
        return _commit(api, repository, upload)
    except BaseException as error:
        try:
            api.delete_repo(repository)
        except network_errors() as still_there:
            raise HubError(
                f"{repository} was made on the hub, but nothing could be pushed into it: "
                f"{_first_line(error)}.",
                f"It is empty; remove it on its page, {api.endpoint}/{repository}/settings, or "
                "push again.",
            ) from still_there
        raise


def _agree(there: ModelInfo, upload: Upload, public: bool, ask: Ask) -> list[str]:
    """Ask whether a repository that is there may change so; list what is deleted of it.

    Raises:
        HubError: If it may not, or everybody would see what was not to be shown.
    """
    if not there.private and not public:
        raise HubError(
            f"{there.id} is on the hub already, and everybody can see it.",
            "Add --public to push into it, take another name, or make it private on its page.",
        )
    known = {one.rfilename for one in there.siblings or ()} - {_GIT}
    replaced = sorted(known & set(upload.files))
    stale = sorted(name for name in known - set(upload.files) if _OWN.fullmatch(name))
    changes = [f"replaces {', '.join(replaced)}"] if replaced else []
    changes += [f"deletes {', '.join(stale)}"] if stale else []
    changes += ["lets everybody see it"] if there.private and public else []
    if known or changes:
        told = f"{there.id} is on the hub already; pushing "
        told += " and ".join(changes) or f"adds to the {len(known)} files that it has"
        if not ask(told):
            raise HubError(
                f"Nothing was pushed: {told}.", "Add --yes to let it, or take another name."
            )
    return stale


def _commit(
    api: HfApi,
    repository: str,
    upload: Upload,
    stale: Sequence[str] = (),
    parent: str | None = None,
) -> str:
    """Upload all files and make one commit of them; nothing of it is seen before."""
    added = [CommitOperationAdd(name, upload.folder / name) for name in upload.files]
    deleted = [CommitOperationDelete(name) for name in stale]
    message = "Push the adapter with DreamLoom"
    made = api.create_commit(
        repository, [*added, *deleted], commit_message=message, parent_commit=parent
    )
    return made.oid


@contextmanager
def _explain(name: str) -> Iterator[None]:
    """Turn what the hub's client raises into a sentence with a next step."""
    known: tuple[type[Exception], ...] = (*network_errors(), ValueError, RuntimeError)
    try:
        yield
    except known as error:
        raise _make_error(name, error) from error


def _make_error(name: str, error: BaseException) -> HubError:
    causes = list(_list_causes(error))
    answer = next((one for one in causes if isinstance(one, HfHubHTTPError)), None)
    said = _first_line(answer or causes[-1])
    if answer is None and any(isinstance(one, network_errors()) for one in causes):
        return HubError(
            f"{name} was not pushed: the hub cannot be reached.",
            "Connect to the internet, unset HF_HUB_OFFLINE, and push again; --out FOLDER writes "
            "the same files here instead.",
        )
    status = answer.response.status_code if answer is not None else 0
    if status == 401:
        return HubError(
            f"{name} was not pushed: the hub does not know the token.",
            f"Make one with write access at {_TOKENS_PAGE}, and run `hf auth login` or set "
            "HF_TOKEN to it.",
        )
    if status in (402, 403, 404):
        return HubError(
            f"{name} was not pushed: the hub does not allow it with this token: {said}.",
            f"Take a token with write access ({_TOKENS_PAGE}), or a name of your own.",
        )
    if status in (409, 412):
        return HubError(
            f"{name} was not pushed: it changed on the hub meanwhile: {said}.", "Push again."
        )
    if status == 413 or "LFS batch API returned errors" in str(error):
        return HubError(
            f"{name} was not pushed: the hub does not take a file of this size: {said}.",
            "Train at a lower train.rank; 'dreamloom resize' cuts a file that you upload yourself.",
        )
    return HubError(f"{name} was not pushed: the hub says: {said}.", "Try again later.")


def _list_causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _first_line(error: BaseException) -> str:
    """What an error says, in one line without a full stop."""
    answer = getattr(error, "server_message", None)
    lines = [line.strip() for line in str(answer or error).splitlines() if line.strip()]
    return " ".join(lines[:2]).rstrip(".:") or type(error).__name__
