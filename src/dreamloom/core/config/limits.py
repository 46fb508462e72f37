"""Limits of values that settings share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from dreamloom.core.toml_files import NONE

Auto = Literal["auto"]
"""A value that is settled later: by the base model's advice, or by the machine."""

AboveZero = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]

OrNone = BeforeValidator(lambda value: None if value == NONE else value)
"""Reads the word that stands for no value where a file cannot say so."""


def _check_order(given: tuple[float, float]) -> tuple[float, float]:
    if given[0] >= given[1]:
        raise ValueError("it must begin below its end, such as [0.2, 0.8]")
    return given


Part = Annotated[tuple[Share, Share], AfterValidator(_check_order)]
"""From a share to a higher one."""
