"""Build tools: the compiler and ninja that native blocks need, and where what they make is kept."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

GET_TOOLS = 'Install a C++ compiler and `pip install "dreamloom[native]"`'
"""What to do where a tool is missing."""


def search_path() -> str:
    """Give the folders in which tools are looked for, as PATH has them.

    Python's own comes first: it may run in an environment that the shell does not know.
    """
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def list_missing_tools() -> list[str]:
    """List which of a C++ compiler and ninja are not here."""
    tools = (os.environ.get("CXX", "cl" if sys.platform == "win32" else "c++"), "ninja")
    return [tool for tool in tools if not shutil.which(tool, path=search_path())]


def build_folder() -> Path:
    """Give the folder in which compiled blocks are kept, within torch's for such things."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()) / "dreamloom"
