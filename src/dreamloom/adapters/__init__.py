"""The one in-memory form of an adapter, and the files it is read from and written to."""

from dreamloom.adapters.adapter import (
    Adapter,
    AdapterKind,
    Layer,
    PeftState,
    refuse_other_kinds,
)
from dreamloom.adapters.dora import make_dora
from dreamloom.adapters.files import FileFormat, describe_adapter, read_adapter, write_adapter
from dreamloom.adapters.modelspec import make_modelspec
from dreamloom.adapters.words import gather_words, words_file

__all__ = [
    "Adapter",
    "AdapterKind",
    "FileFormat",
    "Layer",
    "PeftState",
    "describe_adapter",
    "gather_words",
    "make_dora",
    "make_modelspec",
    "read_adapter",
    "refuse_other_kinds",
    "words_file",
    "write_adapter",
]
