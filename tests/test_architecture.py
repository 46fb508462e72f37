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
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tools.package_map import ORDER, PAGE, write_map

SOURCE = Path(__file__).parents[1] / "src"

# Each package imports only what stands to its left in `ORDER`. `tools/` may import all of them;
# nothing imports `tools/`.
OUTSIDE = ("dreamloom.__init__", "dreamloom.__main__")
HEIGHT = {package: height for height, package in enumerate(ORDER)}

# What these need of the settings reaches them as plain arguments.
WITHOUT_SETTINGS = (
    *("picturebook", "lora", "models", "evaluation", "merging"),
    *("data.buckets", "data.image_io", "data.photos", "data.prompts", "data.quality"),
    *("training.batches", "training.latent_cache", "training.losses", "training.noise"),
    *("training.ema", "training.lr_scheduler"),
    *("training.optimizers", "training.flat_adamw", "training.checkpoints"),
)

MODEL_LIBRARIES = {"diffusers", "peft", "transformers"}
MODEL_PACKAGES = ("models", "evaluation.encoders", "picturebook")
CORE_LIBRARIES = {"pydantic", "dreamloom", *sys.stdlib_module_names}
MORE_IN_CORE = {
    "core.device": {"torch"},
    "core.distributed": {"accelerate", "torch"},
    "core.requests": {"psutil"},
}
HEAVY = {"diffusers", "numpy", "peft", "torch", "transformers"}

MODULE_LINES = 500
FUNCTION_LINES = 100
BODY_LINES = 80  # without the docstring; 60 is the aim
LONG_LINES, LONG_SHARE = 60, 0.01  # so few lines may stand in longer functions

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

    ``from dreamloom import core`` counts as ``dreamloom.core``.
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


def library_of(name: str) -> str:
    return name.partition(".")[0]


def package_of(name: str) -> str:
    """Name the package of a dotted name: ``core``; what lies in none is outside."""
    library, _, rest = name.partition(".")
    package = rest.partition(".")[0]
    return package if library == "dreamloom" and package in HEIGHT else "outside"


def lies_in(module: str, places: Iterable[str]) -> bool:
    inner = module.partition(".")[2]
    return any(inner == place or inner.startswith(f"{place}.") for place in places)


def unknown_packages(modules: Mapping[str, str]) -> list[str]:
    return [
        f"{module} is in no package of the order"
        for module in modules
        if package_of(module) == "outside" and module not in OUTSIDE
    ]


def upward_imports(imports: Imports) -> list[str]:
    """Whatever imports from its right, or from the public door, which looks at all of them."""
    return [
        f"{module} imports {name}"
        for module, names in imports.items()
        for name in sorted(names)
        if package_of(module) in HEIGHT and library_of(name) in ("dreamloom", "tools")
        if HEIGHT.get(package_of(name), len(ORDER)) > HEIGHT[package_of(module)]
    ]


def circles(imports: Imports) -> list[str]:
    """Modules that import each other, over whatever detours, inside packages too."""
    graph = {
        module: {_module_of(name, imports) for name in names} - {module, ""}
        for module, names in imports.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return ["modules import each other: " + " -> ".join(error.args[1])]
    return []


def _module_of(name: str, imports: Imports) -> str:
    """Name the module that an imported name lies in: itself, or what it is taken from."""
    while name and name not in imports:
        name = name.rpartition(".")[0]
    return name


def settings_behind_the_door(imports: Imports) -> list[str]:
    return [
        f"{module} imports the settings"
        for module, names in imports.items()
        if lies_in(module, WITHOUT_SETTINGS)
        and any(f"{name}.".startswith("dreamloom.core.config.") for name in names)
    ]


def model_libraries_outside(imports: Imports) -> list[str]:
    return [
        f"{module} names {library_of(name)}"
        for module, names in imports.items()
        for name in sorted(names)
        if library_of(name) in MODEL_LIBRARIES and not lies_in(module, MODEL_PACKAGES)
    ]


def foreign_libraries_in_core(imports: Imports) -> list[str]:
    return [
        f"{module} imports {library_of(name)}"
        for module, names in imports.items()
        for name in sorted(names)
        if package_of(module) == "core"
        and library_of(name) not in CORE_LIBRARIES
        and library_of(name) not in MORE_IN_CORE.get(module.partition(".")[2], ())
    ]


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's lines without its docstring."""
    first, documented = node.body[0], ast.get_docstring(node) is not None
    docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if documented else 0
    return (node.end_lineno or node.lineno) - node.lineno + 1 - docstring


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
            body = body_lines(node)
            if whole > FUNCTION_LINES:
                found.append(f"{name} has {whole} lines, more than {FUNCTION_LINES}")
            if body > BODY_LINES:
                found.append(f"the body of {name} has {body} lines, more than {BODY_LINES}")
    return found


def share_in_long_functions(modules: Mapping[str, str]) -> float:
    """The share of all lines that stand in functions of more than `LONG_LINES` lines."""
    lengths = [
        body_lines(node)
        for text in modules.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return sum(lines for lines in lengths if lines > LONG_LINES) / sum(
        len(text.splitlines()) for text in modules.values()
    )


IMPORT_RULES = [
    upward_imports,
    circles,
    settings_behind_the_door,
    model_libraries_outside,
    foreign_libraries_in_core,
]


@pytest.fixture(scope="module")
def modules() -> dict[str, str]:
    return read_modules()


def test_every_module_lies_in_a_package_of_the_order(modules):
    assert modules
    assert unknown_packages(modules) == []


@pytest.mark.parametrize("rule", IMPORT_RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(modules, rule):
    assert rule(read_imports(modules)) == []


def test_the_page_shows_the_packages_as_they_are():
    page = PAGE.read_text(encoding="utf-8")
    assert write_map(page) == page, "run `python -m tools.package_map`"


# What newcomers search for, and the file that does it: found by its name or first line.
SOUGHT = {
    "gradient checkpointing": "models/gradient_checkpointing.py",
    "text encoder": "models/prompts.py",
    "class images": "data/class_images.py",
    "caption": "data/photos/listing.py",
    "lora_alpha": "lora/peftconfig.py",
    "offload": "models/offload.py",
    "quantization": "models/quantization.py",
    "validation": "training/validation_samples.py",
    "LoRA schedule": "models/lora_schedule.py",
    "merge": "merging/files/merge.py",
    "rank": "merging/ranks.py",
    "EMA": "training/ema.py",
    "learning rate": "training/lr_scheduler.py",
    "scheduler": "models/schedulers.py",
}


@pytest.mark.parametrize("words", SOUGHT)
def test_a_search_finds_the_file_by_its_name_or_first_line(words):
    path = SOURCE / "dreamloom" / SOUGHT[words]
    first = path.read_text(encoding="utf-8").splitlines()[0]
    known = f"{path.stem} {path.stem.replace('_', ' ')} {first}"
    assert words.casefold() in known.casefold()


def test_modules_and_functions_stay_short(modules):
    assert too_long(modules) == []


def test_few_lines_stand_in_long_functions(modules):
    assert share_in_long_functions(modules) <= LONG_SHARE


def test_lines_in_long_functions_are_counted():
    long_one = "def f():\n" + "    x = 1\n" * LONG_LINES
    texts = {"a": long_one, "b": "y = 2\n" * (LONG_LINES + 1)}
    assert share_in_long_functions(texts) == 0.5
    assert share_in_long_functions({"a": texts["a"].replace("    x = 1\n", "", 1)}) == 0


@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        (upward_imports, {"models.base": "from dreamloom.training.losses import huber_deltas"}),
        (upward_imports, {"core.errors": "def f():\n    from dreamloom.cli import main"}),
        (upward_imports, {"models.sdxl": "from ..data.photos import check"}),
        (upward_imports, {"lora.x": "import importlib\nimportlib.import_module('dreamloom.cli')"}),
        (upward_imports, {"training.train": "from dreamloom import load_photos"}),
        (upward_imports, {"picturebook.world": "from tools.picturebook.trial import run_trial"}),
        (upward_imports, {"report.page": "import dreamloom.pipeline.score"}),
        (circles, {"data.a": "from . import b", "data.b": "from dreamloom.data.a import x"}),
        (
            circles,
            {
                "training.a": "from dreamloom.training.b import x",
                "training.b": "from dreamloom.training.c import y",
                "training.c": "def f():\n    from dreamloom.training.a import z",
            },
        ),
        (circles, {"lora": "from dreamloom.lora.a import x", "lora.a": "import dreamloom.lora"}),
        (
            settings_behind_the_door,
            {"merging.ties": "from dreamloom.core.config.settings import LoomConfig"},
        ),
        (settings_behind_the_door, {"training.noise": "from dreamloom.core import config"}),
        (model_libraries_outside, {"training.loop": "def f():\n    from diffusers import DDPM"}),
        (model_libraries_outside, {"lora.files": "import peft.utils"}),
        (foreign_libraries_in_core, {"core.run_folder": "import torch"}),
        (foreign_libraries_in_core, {"core.device": "import numpy"}),
    ],
)
def test_a_broken_rule_is_found(rule, broken):
    modules = {f"dreamloom.{name}": text for name, text in broken.items()}
    assert len(rule(read_imports(modules))) == 1


@pytest.mark.parametrize(
    "allowed",
    [
        {"training.train": "import torch\nfrom dreamloom.core.config.settings import LoomConfig"},
        {"models.sdxl": "import diffusers\nfrom dreamloom.picturebook import folder"},
        {"evaluation.encoders.clip": "import transformers"},
        {"core.device": "import torch\nfrom .errors import ConfigError"},
        {"merging.mix": "from .ties import ties", "merging.ties": "from . import method"},
    ],
)
def test_an_allowed_import_is_not_reported(allowed):
    imports = read_imports({f"dreamloom.{name}": text for name, text in allowed.items()})
    assert [finding for rule in IMPORT_RULES for finding in rule(imports)] == []


def test_a_package_outside_the_order_is_found():
    assert unknown_packages({"dreamloom.helpers": "", "dreamloom.core.errors": ""}) == [
        "dreamloom.helpers is in no package of the order"
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
