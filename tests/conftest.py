"""What every test may rely on: no network, one thread, checked shapes, and a tiny base model."""

import os

# Before torch and the hub's client are first imported: they read these once.
os.environ.update(
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    MKL_NUM_THREADS="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)

import ipaddress
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import pytest

# Before dreamloom is first imported: annotations of these rooms are checked at each call, shapes
# included. Families and the rooms above them name protocols that only mypy can check.
_CHECKED = (
    "core",
    *("lora", "models.lora_schedule", "models.quantization"),
    *("data.image_io", "data.tensors"),
    *("evaluation.compare", "evaluation.detectors", "evaluation.encoders", "evaluation.metrics"),
    *("evaluation.recommend", "evaluation.retention", "evaluation.scorecard_files"),
    *("evaluation.stats", "merging.diagnose", "merging.methods"),
    *("report.plots", "report.verdicts"),
    *("training.checkpoints", "training.losses", "training.noise", "training.optimizers"),
)
jaxtyping.install_import_hook([f"dreamloom.{room}" for room in _CHECKED], "beartype.beartype")

# A busy machine is no failure, and a test that passed passes again.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")

_ON_REQUEST = ("slow", "gpu", "clients", "web")


def pytest_addoption(parser: pytest.Parser) -> None:
    for mark in _ON_REQUEST:
        parser.addoption(f"--{mark}", action="store_true", help=f"also run tests marked {mark}")


# Files that take longest, longest first: what begins late leaves one of two processes idle.
_LONG = (
    "test_notebooks",
    "test_train",
    "test_evaluate",
    "test_study",
    "test_demo",
    "test_snippets",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    place = {f"{name}.py": number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(_LONG)))
    for mark in _ON_REQUEST:
        if config.getoption(f"--{mark}"):
            continue
        skip = pytest.mark.skip(reason=f"marked {mark}: runs with --{mark}")
        for item in items:
            if mark in item.keywords:
                item.add_marker(skip)


class NetworkBlockedError(RuntimeError):
    """A test tried to reach another machine. Not an OSError, which clients catch and retry."""


def _refuse_far_hosts(host: object) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return
    try:
        near = ipaddress.ip_address(str(name).partition("%")[0]).is_loopback
    except ValueError:
        near = False
    if not near:
        raise NetworkBlockedError(f"tests must not use the network, but one asked for {name!r}")


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Let sockets reach this machine only, and names of other machines stay unresolved."""
    real = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex")}
    real_lookup = socket.getaddrinfo

    def guard(name: str) -> Any:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                _refuse_far_hosts(address[0])
            return real[name](self, address)

        return connect

    def look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_far_hosts(host)
        return real_lookup(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(socket.socket, name, guard(name))
        patch.setattr(socket, "getaddrinfo", look_up)
        yield


@pytest.fixture(autouse=True)
def small_numbers_count() -> Iterator[None]:
    """Undo what choosing the processor does to subnormal numbers: hypothesis wants them all."""
    if "torch" in sys.modules:  # a fixture of the module may have chosen it
        sys.modules["torch"].set_flush_denormal(False)
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a randomly initialised SDXL of 64 px; see `tiny.make_tiny_sdxl`."""
    from tiny import make_tiny_sdxl

    return make_tiny_sdxl(tmp_path_factory.mktemp("bases") / "tiny-sdxl")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Any]:
    """An empty hub on this machine, which the hub's client asks; see `hub_server.Hub`."""
    from hub_server import serve_hub

    with serve_hub(str(tmp_path / "hub-cache")) as served:
        yield served


# The rooms are imported late: they must not be loaded before the hook above is in place.


@pytest.fixture(scope="module")
def model(tiny_sdxl: Path) -> Any:
    """The tiny SDXL behind the family contract, on the processor; a module's tests share it."""
    from dreamloom.core.device import pick_runtime
    from dreamloom.models.families import load_model

    return load_model(str(tiny_sdxl), pick_runtime("cpu"))


@pytest.fixture(scope="module")
def sets(model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A few photos and class images, prepared for the model."""
    from studio_set import make_sets

    return make_sets(model, tmp_path_factory.mktemp("sets"))
