"""What tests need that compile native code."""

import os
import shutil

import pytest

NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler here"
)
