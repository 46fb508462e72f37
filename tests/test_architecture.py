"""The house rules of `docs/architecture.md`, read from the source itself.

Each rule is a function from the imports (or the text) of modules to a list of sentences, so that
it can be tried on a broken example as well as on the package: a rule that cannot fail proves
nothing.
"""

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"

# From the ground up. A room is a module or a folder directly inside the package; a new one is
# entered here. "__init__" is the public door: it opens on every library room, not on the faces.
# A program that `python -m` runs inside a room is a face of its own: it may call what lies above
# that room, for nothing imports it. It is entered by its dotted name.
LAYERS = {
    "ground": ("errors", "config", "events", "rundir", "pictures", "runtime"),
    "craft": (
        "audit",
        "objective",
        "optimizers",
        "joined",
        "noise",
        "pace",
        "calibrate",
        "combine",
        "copies",
        "diagnose",
        "extract",
        "metrics",
        "statistics",
        "significance",
        "verdicts",
        "comparisons",
        "scorecards",
        "plots",
        "pixels",
        "crops",
        "prompts",
        "quality",
        "quantise",
        "detectors",
        "latents",
        "lessons",
        "processes",
        "trackers",
        "features",
        "adapters",
        "checkpoints",
        "families",
        "footprint",
        "picturebook",
    ),
    "stages": ("photos", "priors", "train", "generate", "evaluate", "merge", "report"),
    "journey": (
        "journey",
        "plan",
        "fitting",
        "as_seed",
        "kept",
        "study",
        "search",
        "demo",
        "trial",
    ),
    "door": ("__init__",),
    "faces": (
        "console",
        "cli",
        "cli_adapters",
        "cli_search",
        "studio",
        "__main__",
        "picturebook.score",
    ),
}
LAYER = {room: layer for layer, rooms in LAYERS.items() for room in rooms}
HEIGHT = {layer: height for height, layer in enumerate(LAYERS)}

MODEL_LIBRARIES = {"diffusers", "peft", "transformers"}
MODEL_ROOMS = {"families", "features", "picturebook"}
GROUND_LIBRARIES = {"pydantic", "dreamloom", *sys.stdlib_module_names}
HEAVY = {"diffusers", "numpy", "peft", "torch", "transformers"}

MODULE_LINES = 500
FUNCTION_LINES = 100
BODY_LINES = 80  # without the docstring; 60 is the aim

Imports = Mapping[str, set[str]]
"""Absolute dotted names that each module imports, by the module's own dotted name."""


def read_modules(source: Path = SOURCE) -> dict[str, str]:
    """Read every module of the package: its text by its dotted name."""
    modules = {}
    for path in sorted(source.glob("dreamloom/**/*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)
        modules[name] = path.read_text(encoding="utf-8")
    return modules


def imports_of(text: str, module: str, *, is_package: bool = False) -> set[str]:
    """List what a module imports anywhere in it, also inside functions and by `import_module`.

    ``from dreamloom import photos`` counts as ``dreamloom.data.photos``.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names}
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in {"import_module", "importlib.import_module", "__import__"}
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(str(node.args[0].value))
    return found


def read_imports(modules: Mapping[str, str]) -> dict[str, set[str]]:
    return {
        name: imports_of(
            text, name, is_package=any(other.startswith(f"{name}.") for other in modules)
        )
        for name, text in modules.items()
    }


def room_of(name: str) -> str:
    """Name the room of a dotted name; what the door itself offers belongs to the door.

    A program entered in `LAYERS` is a room of its own, not part of the room that it lies in.
    """
    parts = name.split(".")[1:]
    known = (room for room in (".".join(parts[:2]), *parts[:1]) if room in LAYER)
    return next(known, "__init__")


def library_of(name: str) -> str:
    return name.partition(".")[0]


def inside(imports: Imports) -> Iterator[tuple[str, str, str]]:
    """Yield (module, its room, room it imports) for every import of another room."""
    for module, names in imports.items():
        for name in sorted(names):
            if library_of(name) == "dreamloom" and room_of(name) != room_of(module):
                yield module, room_of(module), room_of(name)


def unknown_rooms(modules: Mapping[str, str]) -> list[str]:
    return [f"{m} is in no layer" for m in modules if m.split(".")[1] not in LAYER]


def upward_imports(imports: Imports) -> list[str]:
    return [
        f"{module} ({LAYER[mine]}) imports {other} ({LAYER[other]})"
        for module, mine, other in inside(imports)
        if HEIGHT[LAYER[other]] > HEIGHT[LAYER[mine]]
    ]


def stages_importing_stages(imports: Imports) -> list[str]:
    return [
        f"{module} imports the stage {other}"
        for module, mine, other in inside(imports)
        if LAYER[mine] == LAYER[other] == "stages"
    ]


def circles(imports: Imports) -> list[str]:
    graph: dict[str, set[str]] = {}
    for _, mine, other in inside(imports):
        graph.setdefault(mine, set()).add(other)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return ["rooms import each other: " + " -> ".join(error.args[1])]
    return []


def config_in_craft(imports: Imports) -> list[str]:
    return [
        f"{module} imports config, which stops at the stages' door"
        for module, mine, other in inside(imports)
        if LAYER[mine] == "craft" and other == "config"
    ]


def model_libraries_outside(imports: Imports) -> list[str]:
    return [
        f"{module} names {library_of(name)}"
        for module, names in imports.items()
        for name in sorted(names)
        if library_of(name) in MODEL_LIBRARIES and room_of(module) not in MODEL_ROOMS
    ]


def foreign_libraries_in_ground(imports: Imports) -> list[str]:
    return [
        f"{module} imports {library_of(name)}"
        for module, names in imports.items()
        for name in sorted(names)
        if LAYER[room_of(module)] == "ground"
        and library_of(name) not in GROUND_LIBRARIES
        and not (room_of(module) == "runtime" and library_of(name) == "torch")
    ]


def too_long(modules: Mapping[str, str]) -> list[str]:
    found = []
    for module, text in modules.items():
        lines = len(text.splitlines())
        if lines > MODULE_LINES:
            found.append(f"{module} has {lines} lines, more than {MODULE_LINES}")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            name, end = f"{module}.{node.name}", node.end_lineno or node.lineno
            whole = end - node.lineno + 1
            skipped = node.body[0].end_lineno if ast.get_docstring(node) is not None else None
            body = end - (skipped or node.body[0].lineno - 1)
            if whole > FUNCTION_LINES:
                found.append(f"{name} has {whole} lines, more than {FUNCTION_LINES}")
            if body > BODY_LINES:
                found.append(f"the body of {name} has {body} lines, more than {BODY_LINES}")
    return found


IMPORT_RULES = [
    upward_imports,
    stages_importing_stages,
    circles,
    config_in_craft,
    model_libraries_outside,
    foreign_libraries_in_ground,
]


@pytest.fixture(scope="module")
def modules() -> dict[str, str]:
    return read_modules()


def test_every_module_lives_in_a_layer(modules):
    assert modules
    assert unknown_rooms(modules) == []


@pytest.mark.parametrize("rule", IMPORT_RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(modules, rule):
    assert rule(read_imports(modules)) == []


def test_modules_and_functions_stay_short(modules):
    assert too_long(modules) == []


@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        (upward_imports, {"objective": "from dreamloom.training import train_adapter"}),
        (upward_imports, {"errors": "def f():\n    from dreamloom import runtime, cli"}),
        (upward_imports, {"families.sdxl": "from ..photos import PhotoSet"}),
        (upward_imports, {"journey": "import importlib\nimportlib.import_module('dreamloom.cli')"}),
        (upward_imports, {"train": "from dreamloom import load_photos"}),
        (
            upward_imports,
            {"picturebook.measurements": "from tools.picturebook.trial import run_trial"},
        ),
        (upward_imports, {"picturebook.samples": "from .score import main"}),
        (stages_importing_stages, {"evaluate": "import dreamloom.inference.generate"}),
        (circles, {"metrics": "from . import features", "features": "from . import metrics"}),
        (config_in_craft, {"combine.ties": "from dreamloom.core.config import LoomConfig"}),
        (model_libraries_outside, {"train": "def f():\n    from diffusers import DDPMScheduler"}),
        (model_libraries_outside, {"adapters.files": "import peft.utils"}),
        (model_libraries_outside, {"picturebook.score": "from diffusers import DDIMScheduler"}),
        (foreign_libraries_in_ground, {"rundir": "import torch"}),
        (foreign_libraries_in_ground, {"runtime": "import numpy"}),
    ],
)
def test_a_broken_rule_is_found(rule, broken):
    modules = {f"dreamloom.{name}": text for name, text in broken.items()}
    assert len(rule(read_imports(modules))) == 1


@pytest.mark.parametrize(
    "allowed",
    [
        {"train": "from dreamloom.models.base import Model\nfrom dreamloom.core.config import X"},
        {"families.sdxl": "import diffusers\nfrom dreamloom.picturebook import folder"},
        {"runtime": "import torch\nfrom .errors import ConfigError"},
        {"cli": "import dreamloom\nfrom dreamloom import load_photos"},
        {"combine": "from .ties import ties", "combine.ties": "from . import registry"},
        {
            "picturebook.score": "from tools.picturebook.trial import x",
            "trial": "from .picturebook import y",
        },
    ],
)
def test_an_allowed_import_is_not_reported(allowed):
    imports = read_imports({f"dreamloom.{name}": text for name, text in allowed.items()})
    assert [finding for rule in IMPORT_RULES for finding in rule(imports)] == []


def test_an_unknown_room_is_found():
    assert unknown_rooms({"dreamloom.helpers": "", "dreamloom.train": ""}) == [
        "dreamloom.helpers is in no layer"
    ]


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("\n" * (MODULE_LINES + 1), "dreamloom.train has"),
        ("def f():\n    x = 1\n" + "    x += 1\n" * BODY_LINES, "the body of dreamloom.train.f"),
        ('def f():\n    """Do.' + "\n" * FUNCTION_LINES + '"""\n', "dreamloom.train.f has"),
    ],
    ids=["module", "body", "function"],
)
def test_an_overlong_piece_is_found(text, finding):
    assert [one for one in too_long({"dreamloom.train": text}) if one.startswith(finding)]


def loaded_after(code: str) -> set[str]:
    """Run code in a fresh interpreter and list which heavy libraries it has loaded."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return HEAVY & set(done.stdout.splitlines()[-1].split())


HELP = """
import sys
from dreamloom.cli.main import main
sys.argv = ["dreamloom", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""


@pytest.mark.parametrize("code", ["import dreamloom", HELP], ids=["import", "help"])
def test_the_door_and_the_help_load_nothing_heavy(code):
    assert loaded_after(code) == set()


def test_a_heavy_import_is_found():
    assert loaded_after("import numpy") == {"numpy"}


def test_public_names_resolve():
    door = importlib.import_module("dreamloom")
    rooms = {name.split(".")[1] for name in read_modules()}
    assert len(set(door.__all__)) == len(door.__all__)
    for name in door.__all__:
        # Once a submodule is imported, its name in the package means the module: a function of
        # the same name would be one thing on first use and another on the second.
        assert name not in rooms
        assert getattr(door, name) is getattr(door, name)
    with pytest.raises(AttributeError):
        _ = door.no_such_name
