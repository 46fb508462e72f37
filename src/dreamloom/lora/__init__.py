"""The one in-memory form of an adapter, and the files it is read from and written to."""

from dreamloom.lora.adapter import Adapter, AdapterKind, Layer, PeftState, refuse_other_kinds
from dreamloom.lora.conversion import approximate_dora, as_lora, convert_adapter
from dreamloom.lora.dora import make_dora
from dreamloom.lora.modelspec import make_modelspec
from dreamloom.lora.reading import AdapterFile, read_adapter, read_adapter_file
from dreamloom.lora.summary import describe_adapter
from dreamloom.lora.token_embeddings import gather_words, words_file
from dreamloom.lora.writing import FileFormat, write_adapter

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
