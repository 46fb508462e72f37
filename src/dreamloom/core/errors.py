"""What a user may meet when something cannot be done, each with the next step.

DreamLoomError            anything a user can mend; exit code 1
├── ConfigError           a setting is unknown, out of range, or contradicts another
├── PhotoError            a folder holds no usable photo, or a photo cannot be read
├── BaseModelError        the base model cannot be found or read
├── AdapterError          an adapter file cannot be read, or belongs to another base
├── RunFolderError        the output folder already holds something else
├── EvaluationError       there is nothing that could be scored
├── PackageError          a needed package is not in the Python that runs; an ImportError, too
├── HubError              the hub cannot be reached, or does not take what is pushed
└── TrainingError         training cannot go on: non-finite loss, or a checkpoint of another run
"""

from __future__ import annotations


class DreamLoomError(Exception):
    """A problem in the user's own words, and what to do about it.

    Args:
        problem: What was given and what is wrong with it, in one sentence.
        hint: What to do next, in one sentence.
    """

    exit_code = 1

    def __init__(self, problem: str, hint: str = "") -> None:
        self.problem = problem
        self.hint = hint
        super().__init__(f"{problem} {hint}".strip())


class ConfigError(DreamLoomError):
    """A setting is unknown, out of range, or contradicts another one."""

    exit_code = 2


class PhotoError(DreamLoomError):
    """A folder holds no usable photo, or a photo cannot be read."""


class BaseModelError(DreamLoomError):
    """The base model cannot be found or read."""


class AdapterError(DreamLoomError):
    """An adapter file cannot be read, or it was made for another base model."""


class RunFolderError(DreamLoomError):
    """The output folder already holds something that must not be overwritten."""


class EvaluationError(DreamLoomError):
    """There is nothing that could be scored."""


class PackageError(DreamLoomError, ImportError):
    """A package that DreamLoom needs is not in the Python that runs."""


class HubError(DreamLoomError):
    """The hub cannot be reached, or it does not take what is pushed."""


class TrainingError(DreamLoomError):
    """Training cannot start or go on."""
