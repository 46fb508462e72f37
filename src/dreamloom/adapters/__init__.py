"""The one in-memory form of a LoRA, and the files it is read from and written to."""

from dreamloom.adapters.adapter import Adapter, Layer
from dreamloom.adapters.files import describe_adapter, read_adapter, write_adapter

__all__ = ["Adapter", "Layer", "describe_adapter", "read_adapter", "write_adapter"]
