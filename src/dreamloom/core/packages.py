"""Packages that DreamLoom needs and that the Python which runs does not have."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

from dreamloom.core.errors import PackageError

_CHECKOUT = Path(__file__).resolve().parents[3]
_FEW = 4  # more packages are not listed where one word brings them all


def explain_missing(error: ModuleNotFoundError) -> PackageError | None:
    """Say which package is missing from which Python, and the command that installs it.

    Notebooks meet this most: their kernel often is another Python than the one in which
    DreamLoom was installed.

    Returns:
        What to raise instead; None for a fault of ours or an extra, which installing what is
        needed would not mend.
    """
    module = (error.name or "").partition(".")[0]
    wanted = _find_wanted()
    if module in ("", "dreamloom") or not wanted:
        return None
    return PackageError(
        f"The Python that runs here, {sys.executable}, has no {module}, which DreamLoom needs:",
        f"install what is missing with '{_quote(sys.executable)} -m pip install "
        f"{' '.join(map(_quote, wanted))}', or choose the Python (in a notebook: the kernel) in "
        "which DreamLoom was installed.",
    )


def _quote(word: str) -> str:
    return word if re.fullmatch(r"[\w./:\\-]+", word) else f'"{word}"'


def _find_wanted() -> list[str]:
    """Find what pip has to install: the needed packages that are not there, or all of DreamLoom."""
    try:
        needed = metadata.requires("dreamloom") or []
    except metadata.PackageNotFoundError:
        return ["-e", str(_CHECKOUT)] if _is_checkout() else ["dreamloom"]
    # Read by hand, for the package that reads requirements may be missing, too.
    plain = [one.partition(";")[0].strip() for one in needed if "extra ==" not in one]
    missing = [one for one in plain if not _is_here(re.split(r"[^\w.-]", one)[0])]
    return ["-e", str(_CHECKOUT)] if len(missing) > _FEW and _is_checkout() else missing


def _is_checkout() -> bool:
    return (_CHECKOUT / "pyproject.toml").is_file()


def _is_here(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
