"""What each set of pictures is for: its manifest says it, or in older folders its name."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from dreamloom.core.manifests import ImageSet, SetPurpose, SetRole

TABLE = "table"
"""Older sets whose names begin so fill the table of schedulers and steps."""

_KINDS: dict[SetRole | None, str] = {
    "base": "base",
    "subject": "other",
    "subject without class images": "without",
    "subject with class images": "with",
    "style": "style",
    "merged": "merged",
}

_NAMED: dict[str, SetRole] = {
    "base": "base",
    "without": "subject without class images",
    "with": "subject with class images",
    "style": "style",
    "merged": "merged",
}


class Place(NamedTuple):
    """Who drew a set, and what for."""

    role: SetRole
    purpose: SetPurpose = "main"

    @property
    def kind(self) -> str:
        """The colour of the set on the page."""
        return _KINDS[self.role]

    @property
    def is_subject(self) -> bool:
        """Whether an adapter of the subject alone drew it."""
        return self.role.startswith("subject")


def place_of(name: str, images: ImageSet | None = None) -> Place:
    """Say who drew a set and what for.

    Args:
        name: The set's name, with its run's where it lies in one.
        images: Its manifest, if there is one. What was drawn before manifests told roles is known
            by how its name begins or ends.
    """
    if images is not None and images.role is not None:
        return Place(images.role, images.purpose)
    own = name.rpartition("/")[2]
    purpose: SetPurpose = "main"
    if own.startswith(TABLE):
        purpose, own = "table", own.removeprefix(f"{TABLE}_")
    role = _NAMED.get(own.split("_")[0], "subject")
    if role == "subject" and own.endswith("_base"):
        return Place("base", purpose)  # drawn with --floor
    is_beside = role in {"style", "merged"} or own.startswith("base_") or own.endswith("_alone")
    return Place(role, "merge" if purpose == "main" and is_beside else purpose)


Places: TypeAlias = dict[str, Place]
"""Who drew each set, by its name."""
