"""Adapters: the one in-memory form of a LoRA, and the files it is read from and written to.

What other programs need of it is found here, too, and loaded on first use.
"""

from dreamloom.core.lazy_names import offer_names

__all__, __getattr__ = offer_names(
    __name__,
    {
        "Adapter": "adapter",
        "Layer": "adapter",
        "make_dora": "peftconfig",
        "read_adapter": "reading",
        "write_adapter": "writing",
    },
)
