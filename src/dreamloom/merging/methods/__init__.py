"""Merge methods: each module here lists its own in ``METHODS``, and they are all found here."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType

from dreamloom.core.errors import ConfigError
from dreamloom.core.toml_files import offer
from dreamloom.merging.method import MergeMethod


def _gather() -> dict[str, MergeMethod]:
    modules = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
    methods = [method for module in modules for method in module.METHODS]
    return {
        method.name: method for method in sorted(methods, key=lambda m: (m.name != "sum", m.name))
    }


METHODS = MappingProxyType(_gather())
"""Every method by its name: the plain sum first, then by the alphabet."""


def find_method(name: str) -> MergeMethod:
    """Find a method by its name.

    Raises:
        ConfigError: If there is none.
    """
    if name not in METHODS:
        raise ConfigError(f"There is no merge method {name!r}.", offer(name, METHODS))
    return METHODS[name]
