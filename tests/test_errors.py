"""Errors: each says what is wrong and what to do, and the page on top lists them all."""

import inspect

import pytest

from dreamloom.core import errors
from dreamloom.core.errors import ConfigError, DreamLoomError


def kinds():
    found = [cls for _, cls in inspect.getmembers(errors, inspect.isclass)]
    return [cls for cls in found if issubclass(cls, DreamLoomError)]


def test_an_error_reads_as_problem_and_hint():
    error = DreamLoomError("The folder is empty.", "Put photos into it.")
    assert (error.problem, error.hint) == ("The folder is empty.", "Put photos into it.")
    assert str(error) == "The folder is empty. Put photos into it."
    assert str(DreamLoomError("The folder is empty.")) == "The folder is empty."


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_exit_codes_tell_wrong_usage_from_what_can_be_mended(kind):
    assert kind("problem").exit_code == (2 if kind is ConfigError else 1)


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_the_overview_lists_every_error(kind):
    assert kind.__name__ in errors.__doc__
