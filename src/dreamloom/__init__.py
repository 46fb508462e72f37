"""DreamLoom: teach Stable Diffusion XL a subject, draw it, measure it, merge it.

The names below are the promised ones; each is loaded on first use, so that importing the package
costs nothing. Their results print as tables and show themselves in notebooks.

Example:
    >>> import dreamloom as dl
    >>> me = dl.train("my-photos", "rraj person", base="sdxl")  # doctest: +SKIP
    >>> dl.generate("a photo of {subject} in Rome", adapters=me, out=me.run)  # doctest: +SKIP
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dreamloom.core.lazy_names import offer_names

# The libraries below us greet every import with advice that is not for our users.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
# Tensors of 2 MiB and more in Linux's large pages, which torch leaves off: on a processor a
# full-size model drew in 9 % and learned in 8 % less time. torch reads it with its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from dreamloom.api.drawing import generate as generate
    from dreamloom.api.drawing import side_by_side as side_by_side
    from dreamloom.api.merging import diagnose as diagnose
    from dreamloom.api.merging import merge as merge
    from dreamloom.api.scoring import audit as audit
    from dreamloom.api.scoring import compare as compare
    from dreamloom.api.scoring import evaluate as evaluate
    from dreamloom.api.scoring import retention as retention
    from dreamloom.api.studies import plan as plan
    from dreamloom.api.studies import study as study
    from dreamloom.api.studies import write_report as write_report
    from dreamloom.api.training import check_photos as check_photos
    from dreamloom.api.training import example as example
    from dreamloom.api.training import train as train
    from dreamloom.core.errors import DreamLoomError as DreamLoomError
else:
    __all__, __getattr__ = offer_names(
        __name__,
        {
            "DreamLoomError": "core.errors",
            "audit": "api.scoring",
            "check_photos": "api.training",
            "compare": "api.scoring",
            "diagnose": "api.merging",
            "evaluate": "api.scoring",
            "example": "api.training",
            "generate": "api.drawing",
            "merge": "api.merging",
            "plan": "api.studies",
            "retention": "api.scoring",
            "side_by_side": "api.drawing",
            "study": "api.studies",
            "train": "api.training",
            "write_report": "api.studies",
        },
    )

    def __dir__() -> list[str]:
        return __all__
