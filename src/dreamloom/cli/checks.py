"""Checks of an installation: what is here, what it can do, and the command that mends what is not.

Each check is a small function of its own name that returns a `Finding`. Everything is imported
within them, because what they are for is that it may be missing.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from dreamloom.cli.output import command_line

if TYPE_CHECKING:
    from packaging.requirements import Requirement

State: TypeAlias = Literal["ok", "lacking", "broken"]
Check: TypeAlias = Callable[[str], "Finding"]

EXTRAS = {
    "faces": "faces in photographs, found and told apart (yunet, sface)",
    "detectors": "detectors of eyes and teeth in photographs",
    "dlib": "a second opinion on whose face it is",
    "heic": "photos in HEIC",
    "optimizers": "optimizers in 8 bits, and further ones",
    "trackers": "losses sent to TensorBoard",
    "cluster": "studies on several machines (--on ray)",
    "notebooks": "the notebooks",
}
"""What each extra is for; those for working on DreamLoom itself, and the one for the studio that
is still to come, are not listed."""

LARGE = ("torch", "diffusers", "transformers", "peft")
"""Needed packages that are looked at one by one."""

# Between them they import all that teaching, drawing, scoring, merging and reporting need.
_OWN_MODULES = (
    *("dreamloom.pipeline.train", "dreamloom.pipeline.draw", "dreamloom.pipeline.score"),
    *("dreamloom.merging.files.merge", "dreamloom.report.render", "dreamloom.display.tables"),
    "dreamloom.hub.push",
)
_TORCH_BUILDS = "https://pytorch.org/get-started/locally/ names the index for this machine"
_OTHER_TORCH = "pip install --force-reinstall torch --index-url INDEX"
_GIB = 2**30
_LEAST_MEMORY, _LEAST_DISK = 2 * _GIB, 1 * _GIB
# SDXL in half precision with its autoencoder, and a little room.
_SDXL_DISK = 8 * _GIB
_LEAST_WEIGHTS = 2**20


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Args:
        name: What was looked at.
        state: ``ok``; ``lacking``, where something can be added; ``broken``, where something that
            is needed does not work.
        detail: What was found.
        mend: The command or step that mends it; empty where nothing is to be done.
    """

    name: str
    state: State
    detail: str
    mend: str = ""


def carry_out(name: str, check: Check) -> Finding:
    """Carry out a check, whatever it runs into."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return check(name)
    except Exception as error:
        why = "torch is broken" if _find_fault("torch") else _say(error)
        return Finding(name, "lacking", f"cannot be told: {why}")


def list_checks(device: str = "auto") -> Iterator[tuple[str, str, Check]]:
    """List all checks: the part of the list, the name of what is looked at, the check.

    Args:
        device: The device that is looked at.
    """
    yield "needed", "python", check_python
    yield "needed", "dreamloom", check_dreamloom
    for name in LARGE:
        yield "needed", name, check_package
    yield "needed", "other packages", check_other_packages
    yield "needed", "own modules", check_own_modules
    for name in EXTRAS:
        yield "extras", name, check_extra
    yield "machine", "device", partial(check_device, device=device)
    yield "machine", "memory", check_memory
    yield "machine", "torch.compile", partial(check_compiler, device=device)
    yield "models", "picturebook", check_picturebook
    yield "models", "sdxl", check_sdxl
    yield "models", "encoders", check_encoders
    yield "folders", "encoders", check_encoders_folder
    yield "folders", "hub", check_hub_folder
    yield "folders", "here", check_current_folder


def check_python(name: str) -> Finding:
    """Say which Python runs."""
    return Finding(name, "ok", f"{platform.python_version()}, {sys.executable}")


def check_dreamloom(name: str) -> Finding:
    """Say which DreamLoom runs, and whether it is installed as a package."""
    folder = Path(__file__).parents[1]
    try:
        return Finding(name, "ok", f"{metadata.version('dreamloom')}, {folder}")
    except metadata.PackageNotFoundError:
        return Finding(
            name,
            "lacking",
            f"runs from {folder} and is not installed, so nobody says which versions it needs",
            command_line("pip", "install", "-e", folder.parents[1]),
        )


def check_package(name: str) -> Finding:
    """Look at a needed package: that it is there, new enough, and can be imported."""
    requirement = _needed().get(name)
    wanted = str(requirement) if requirement else name
    aside = f"; {_TORCH_BUILDS}" if name == "torch" else ""
    version = _version(name)
    if version is None:
        return Finding(name, "broken", f"is not installed{aside}", f'pip install "{wanted}"')
    if requirement and not requirement.specifier.contains(version, prereleases=True):
        detail = f"{version}, and {wanted} is needed{aside}"
        return Finding(name, "broken", detail, f'pip install --upgrade "{wanted}"')
    if fault := _find_fault(name):
        if name != "torch" and _find_fault("torch"):
            return Finding(name, "broken", f"{version} needs torch", "mend torch first")
        mend = f'pip install --force-reinstall "{name}=={version.partition("+")[0]}"'
        return Finding(name, "broken", f"{version} cannot be imported: {fault}{aside}", mend)
    return Finding(name, "ok", version)


def check_other_packages(name: str) -> Finding:
    """Look at all other needed packages: that they are there and new enough."""
    others = [one for key, one in _needed().items() if key not in LARGE]
    wrong = [one for one in others if not _is_met(one)]
    if wrong:
        told = ", ".join(f"{one} ({_version(one.name) or 'not installed'})" for one in wrong)
        mend = "pip install --upgrade " + " ".join(f'"{one}"' for one in wrong)
        return Finding(name, "broken", told, mend)
    return Finding(name, "ok", ", ".join(f"{one.name} {_version(one.name)}" for one in others))


def check_own_modules(name: str) -> Finding:
    """Import what teaching, drawing, scoring, merging and reporting need."""
    for module in _OWN_MODULES:
        if fault := _find_fault(module):
            why = "torch is broken" if _find_fault("torch") else fault
            detail = f"{module} cannot be imported: {why}"
            return Finding(name, "broken", detail, "mend what is broken above, or install anew")
    return Finding(name, "ok", "teaching, drawing, scoring, merging and reporting can begin")


def check_extra(name: str) -> Finding:
    """Say whether the packages of an extra are there."""
    wanted = [one for one in _requirements() if _belongs(one, name) and not _belongs(one, "")]
    missing = [one for one in wanted if not _is_met(one)]
    if not wanted:
        return Finding(name, "lacking", f"{EXTRAS[name]}: this DreamLoom has no such extra")
    if missing:
        told = " and ".join(_describe(one) for one in missing)
        mend = f'pip install "dreamloom[{name}]"'
        return Finding(name, "lacking", f"{EXTRAS[name]}: {told}", mend)
    versions = ", ".join(f"{one.name} {_version(one.name)}" for one in wanted)
    return Finding(name, "ok", f"{EXTRAS[name]}: {versions}")


def check_device(name: str, device: str = "auto") -> Finding:
    """Say which device computes, its memory, and in which precisions."""
    import torch

    from dreamloom.core.device import computes_bf16, pick_runtime
    from dreamloom.core.errors import DreamLoomError

    try:
        runtime = pick_runtime(device)
    except DreamLoomError as error:
        return Finding(name, "broken", error.problem, error.hint)
    chosen, precision = runtime.device, runtime.name.rpartition(" ")[2]
    try:
        some = torch.ones(2, 2, device=chosen, dtype=runtime.dtype)
        (some @ some).sum().item()
    except RuntimeError as error:
        detail = f"{runtime.name} cannot compute: {_say(error)}"
        return Finding(name, "broken", f"{detail}; {_TORCH_BUILDS}", _OTHER_TORCH)
    if chosen.type == "cuda":
        free, total = torch.cuda.mem_get_info(chosen)
        halves = "bf16 and fp16" if computes_bf16(chosen) else "fp16, and emulates bf16"
        detail = (
            f"{torch.cuda.get_device_name(chosen)}, {_gib(total)} of which {_gib(free)} are free; "
            f"computes in {halves}, and takes {precision}"
        )
        return Finding(name, "ok", detail)
    if chosen.type == "mps":
        return Finding(name, "ok", f"Apple's GPU, with the computer's memory; takes {precision}")
    detail = (
        f"the processor ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores, "
        f"threads: {torch.get_num_threads()}; takes {precision}"
    )
    if device == "auto" and shutil.which("nvidia-smi"):
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        detail += (
            f". There is an NVIDIA driver, but torch, which was built {built}, sees no GPU: it "
            f"needs another build, or a newer driver; {_TORCH_BUILDS}"
        )
        return Finding(name, "lacking", detail, _OTHER_TORCH)
    return Finding(name, "ok", detail)


def check_memory(name: str) -> Finding:
    """Say how much of the computer's memory is free."""
    from dreamloom.memory.host import read_host_memory

    memory = read_host_memory()
    whose = "that this container may use" if memory.is_limited else "of the computer"
    detail = f"{_gib(memory.free)} free of the {_gib(memory.total)} {whose}"
    if memory.free < _LEAST_MEMORY:
        return Finding(name, "lacking", f"{detail}; teaching takes 2 GiB", "end other programs")
    return Finding(name, "ok", detail)


def check_compiler(name: str, device: str = "auto") -> Finding:
    """Say whether torch can compile for a GPU."""
    from dreamloom.core.device import pick_runtime

    if pick_runtime(device).device.type != "cuda":
        return Finding(name, "ok", "not used on this device")
    compilers = [word for word in (os.environ.get("CC"), "gcc", "clang", "cc") if word]
    lacking = [] if find_spec("triton") else ["triton"]
    lacking += [] if any(map(shutil.which, compilers)) else ["a C compiler"]
    if lacking:
        detail = f"there is no {' and no '.join(lacking)}, so train.compile must stay off"
        return Finding(name, "lacking", detail, "install gcc; triton comes with torch for CUDA")
    return Finding(name, "ok", "triton and a C compiler are here for train.compile")


def check_picturebook(name: str) -> Finding:
    """Say whether the embedded model came along whole."""
    from dreamloom.picturebook import weights_folder

    weights = [
        *(f"{part}/model.safetensors" for part in ("text_encoder", "text_encoder_2")),
        *(f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")),
    ]
    files = [weights_folder() / file for file in weights]
    for file in files:
        if not file.is_file() or file.stat().st_size < _LEAST_WEIGHTS:
            detail = f"{file} is {'no weights' if file.exists() else 'missing'}"
            return Finding(name, "broken", detail, "install DreamLoom anew")
    size = sum(file.stat().st_size for file in files) / 2**20
    return Finding(name, "ok", f"built in, {size:.0f} MiB")


def check_sdxl(name: str) -> Finding:
    """Say whether SDXL is in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    from dreamloom.models.weight_files import SDXL_ID, SDXL_REVISION

    unet = "unet/diffusion_pytorch_model.fp16.safetensors"
    if isinstance(try_to_load_from_cache(SDXL_ID, unet, revision=SDXL_REVISION), str):
        return Finding(name, "ok", "in the hub's cache")
    patterns = " ".join(f"--include '{one}'" for one in ("*.json", "*.txt", "*.fp16.safetensors"))
    return Finding(
        name,
        "lacking",
        "not here; the first command with --base sdxl fetches it, about 7 GB",
        f"hf download {SDXL_ID} --revision {SDXL_REVISION} {patterns}",
    )


def check_encoders(name: str) -> Finding:
    """Say which models for scoring are here, and how the others are fetched."""
    from dreamloom.evaluation.encoders.store import list_models

    offered = [line for line in list_models() if line.state != "not offered"]
    here = [line.model.name for line in offered if line.state != "not here"]
    missing = [line.model for line in offered if line.state == "not here"]
    detail = f"here: {', '.join(here) or 'none'}"
    if not missing:
        return Finding(name, "ok", detail)
    detail += f"; not here: {', '.join(model.name for model in missing)}"
    fetched = [model.name for model in missing if model.source == "hub"]
    mend = "dreamloom models list" if not fetched else f"dreamloom models fetch {' '.join(fetched)}"
    return Finding(name, "lacking", detail, mend)


def check_encoders_folder(name: str) -> Finding:
    """Look at the folder of fetched encoders."""
    from dreamloom.evaluation.encoders.store import FOLDER_VARIABLE, models_folder

    return look_at_folder(name, models_folder(), _LEAST_DISK, f"set {FOLDER_VARIABLE}")


def check_hub_folder(name: str) -> Finding:
    """Look at the hub's cache, where base models lie."""
    from huggingface_hub import constants

    sdxl = carry_out("sdxl", check_sdxl)
    least = _LEAST_DISK if sdxl.state == "ok" else _SDXL_DISK
    found = look_at_folder(name, Path(constants.HF_HUB_CACHE), least, "set HF_HOME")
    if not constants.HF_HUB_OFFLINE:
        return found
    detail = f"{found.detail}; HF_HUB_OFFLINE is set, so nothing is fetched"
    return Finding(name, found.state, detail, found.mend)


def check_current_folder(name: str) -> Finding:
    """Look at the current folder, where runs are written."""
    return look_at_folder(name, Path.cwd(), _LEAST_DISK, "change to another folder")


def look_at_folder(name: str, folder: Path, least: int, mend: str) -> Finding:
    """Say where a folder is, and whether there is room and leave to write.

    Args:
        name: What it is called.
        folder: The folder; it need not exist yet.
        least: Bytes that should be free.
        mend: How another one is named.
    """
    nearest = next(one for one in (folder, *folder.parents) if one.exists())
    free = shutil.disk_usage(nearest).free
    detail = f"{folder}, {_gib(free)} free"
    if not os.access(nearest, os.W_OK):
        return Finding(name, "lacking", f"{detail}; nothing can be written there", mend)
    if free < least:
        detail = f"{detail}, less than the {_gib(least)} that may be needed"
        return Finding(name, "lacking", detail, f"{mend}, or make room")
    return Finding(name, "ok", detail)


@cache
def _find_fault(module: str) -> str:
    """Import a module; say what is wrong with it, in one line."""
    try:
        import_module(module)
    except Exception as error:
        return _say(error)
    return ""


@cache
def _requirements() -> tuple[Requirement, ...]:
    """Read what DreamLoom's own package says that it needs."""
    from packaging.requirements import Requirement

    return tuple(Requirement(text) for text in metadata.requires("dreamloom") or ())


def _needed() -> dict[str, Requirement]:
    """Give the needed packages by name; none where DreamLoom is not installed as a package."""
    try:
        return {one.name: one for one in _requirements() if _belongs(one, "")}
    except (ImportError, metadata.PackageNotFoundError):
        return {}


def _belongs(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _is_met(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _describe(requirement: Requirement) -> str:
    version = _version(requirement.name)
    return f"{requirement.name} is {'not installed' if version is None else f'only {version}'}"


def _say(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else f"{text[:200]}…"


def _gib(nbytes: int) -> str:
    return f"{nbytes / _GIB:.1f} GiB"
