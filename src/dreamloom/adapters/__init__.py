"""The one in-memory form of an adapter, and the files it is read from and written to."""

from dreamloom.adapters.adapter import (
    Adapter,
    AdapterKind,
    Layer,
    PeftState,
    refuse_other_kinds,
)
from dreamloom.adapters.conversion import approximate_dora, as_lora, convert_adapter
from dreamloom.adapters.dora import make_dora
from dreamloom.adapters.modelspec import make_modelspec
from dreamloom.adapters.reading import AdapterFile, read_adapter, read_adapter_file
from dreamloom.adapters.summary import describe_adapter
from dreamloom.adapters.words import gather_words, words_file
from dreamloom.adapters.writing import FileFormat, write_adapter

__all__ = [
    "Adapter",
    "AdapterFile",
    "AdapterKind",
    "FileFormat",
    "Layer",
    "PeftState",
    "approximate_dora",
    "as_lora",
    "convert_adapter",
    "describe_adapter",
    "gather_words",
    "make_dora",
    "make_modelspec",
    "read_adapter",
    "read_adapter_file",
    "refuse_other_kinds",
    "words_file",
    "write_adapter",
]
