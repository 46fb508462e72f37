"""DreamLoom: teach Stable Diffusion XL a subject, draw it, measure it, merge it.

The names below are the promised ones; each is loaded on first use, so that importing the package
costs nothing.
"""

from __future__ import annotations

from dreamloom.core.lazy_names import offer_names

__all__, __getattr__ = offer_names(
    __name__,
    {
        "Adapter": "lora.adapter",
        "DreamLoomError": "core.errors",
        "LoomConfig": "core.config.settings",
        "RunFolder": "core.run_folder",
        "evaluate_images": "evaluation.scoring",
        "generate_images": "inference.generate",
        "load_config": "core.config.loading",
        "load_model": "models.families",
        "load_photos": "data.photos.prepare",
        "make_class_images": "data.class_images",
        "merge_adapters": "merging.files.merge",
        "pick_runtime": "core.device",
        "read_adapter": "lora.reading",
        "train_adapter": "training.train",
        "write_adapter": "lora.writing",
        "write_report": "report.render",
    },
)


def __dir__() -> list[str]:
    return __all__
