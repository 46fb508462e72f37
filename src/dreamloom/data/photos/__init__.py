"""The photos stage: a folder of photos in, upright copies and what is not ideal about them out.

Beside a photo may lie its caption (IMG_1.txt) and its mask (IMG_1.mask.png, white where the
subject is); metadata.jsonl may tell the same of all, and the subject's box. `listing` reads the
folder, `check` judges the photos, `prepare` writes the copies.
"""

from __future__ import annotations

from dreamloom.data.photos.check import CheckedPhoto, PhotoCheck, check_photos
from dreamloom.data.photos.class_images import load_class_images
from dreamloom.data.photos.prepare import fingerprint_photos, load_photos

__all__ = [
    "CheckedPhoto",
    "PhotoCheck",
    "check_photos",
    "fingerprint_photos",
    "load_class_images",
    "load_photos",
]
