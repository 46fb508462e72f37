"""The documentation site's hooks: pages written from the code, and links that leave ``docs/``.

The pages of ``docs/`` are read in the repository, too, so they link to files beside that folder.
On the site such a file is a page of its own (`_BESIDE`), or a copy under ``files/``.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import dreamloom
from dreamloom.cli.examples import EXAMPLES, name_command
from dreamloom.cli.main import main
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.toml_files import describe_fields

ROOT = Path(__file__).resolve().parents[1]

_BESIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "reference/examples.md",
}
"""Pages of the repository that are pages of the site, by where they lie in each."""

_STANDS_FOR = {
    "README.md": "index.md",
    "examples": "reference/examples.md",
    "recipes": "reference/recipes.md",
}
"""What else has a page that says it."""

_COMMANDS = """# Commands

What `dreamloom COMMAND --help` says, for every command. Settings that have no option of their own
are given as `--set NAME=VALUE`; they are listed [here](settings.md).
"""

_PYTHON = """# Python

What `import dreamloom as dl` offers: the functions, what they give back, and the options that they
share. [Python and notebooks](../python.md) shows them at work.
"""

# The classes of results and options beside the functions that give or take them.
_CLASSES = {
    "dreamloom.api.options": ("Options",),
    "dreamloom.api.drawing": ("DrawOptions", "Pictures", "SideBySide"),
    "dreamloom.api.merging": ("MergeOptions", "MergedAdapter", "DiagnosedAdapters"),
    "dreamloom.api.scoring": (
        *("Scores", "ScoreTable", "Comparisons", "Retained", "AuditedScores"),
    ),
    "dreamloom.api.studies": ("Plan", "StudyAnswer", "Report"),
    "dreamloom.api.training": ("CheckedPhotos", "TrainedAdapter"),
}

# Names of tests, one after the other; on trainers.md behind an arrow.
_TESTS = re.compile(r"(?: → )?`test_[\w.:]+`(?:[,;] `test_[\w.:]+`)*")

# A relative target of a link or a picture, with its anchor.
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are written from the code, and those that lie beside ``docs/``."""
    written = {
        "reference/commands.md": write_commands_page(),
        "reference/python.md": write_python_page(),
        "reference/recipes.md": write_recipes_page(),
        "reference/settings.md": write_settings_page(),
    }
    beside = {uri: (ROOT / name).read_text(encoding="utf-8") for name, uri in _BESIDE.items()}
    for uri, text in (written | beside).items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead each relative link to where its file is on the site, and fold tests in tables."""
    own = page.file.src_uri
    home = next((name for name, uri in _BESIDE.items() if uri == own), f"docs/{own}")

    def lead(found: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(home), found[1]))
        uri = _place(target, config, files)
        if uri is None:
            return found[0]  # for the build to complain about
        return os.path.relpath(uri, os.path.dirname(own) or ".") + (found[2] or "")

    return fold_tests(_LINK.sub(lead, markdown))


def fold_tests(markdown: str) -> str:
    """Fold what tables name of tests: long names in narrow columns push the others off the page."""

    def fold(found: re.Match[str]) -> str:
        names = re.findall(r"`[^`]+`", found[0])
        count = "1 test" if len(names) == 1 else f"{len(names)} tests"
        return f" <details><summary>{count}</summary>{', '.join(names)}</details>"

    lines = markdown.split("\n")
    return "\n".join(_TESTS.sub(fold, one) if one.startswith("|") else one for one in lines)


def _place(target: str, config: MkDocsConfig, files: Files) -> str | None:
    """Find a file of the repository on the site; what is on no page is copied there."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if target in _BESIDE or target in _STANDS_FOR:
        return (_BESIDE | _STANDS_FOR)[target]
    file = ROOT / target
    if not file.is_file() or ROOT not in file.resolve().parents:
        return None
    uri = f"files/{target}" if file.suffix else f"files/{target}.txt"
    if files.get_file_from_path(uri) is None:
        files.append(File.generated(config, uri, abs_src_path=str(file)))
    return uri


def write_commands_page() -> str:
    """Write every command: how it is called, what it does, and its options."""
    return "\n".join([_COMMANDS, *_write_command(click.Context(main, info_name="dreamloom"))])


def _write_command(context: click.Context) -> Iterator[str]:
    """Write a command, its examples, and the commands below it."""
    command = context.command
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield f"\n## {context.command_path}\n\n```text\n{usage}\n```\n"
    yield _escape(inspect.cleandoc(command.help or ""))
    # Arguments stand in the line above, and have nothing else to say.
    options = [one for one in command.params if isinstance(one, click.Option)]
    if records := [found for one in options if (found := one.get_help_record(context))]:
        yield "\n| option | what it does |\n|---|---|"
        yield from (f"| `{names}` | {_escape(meaning)} |" for names, meaning in records)
    if examples := EXAMPLES.get(name_command(context)):
        yield "\n".join(["", "```sh", *examples, "```"])
    if isinstance(command, click.Group):
        for name, below in sorted(command.commands.items()):
            yield from _write_command(click.Context(below, info_name=name, parent=context))


def write_settings_page() -> str:
    """Write every setting by its group, with its default and what it means."""
    lines = [
        "# Settings",
        "",
        "What `dreamloom settings` lists. Each can be given as `--set NAME=VALUE`, in a TOML file "
        "with `--config`, or in Python as `settings={…}`. `--set` goes before a command's own "
        "options, these before the file, and the file before the preset.",
    ]
    group = None
    for name, default, meaning in describe_fields(LoomConfig):
        if (name.rpartition(".")[0] or "general") != group:
            group = name.rpartition(".")[0] or "general"
            lines += ["", f"## {group}"]
        lines += ["", f"### `{name}`", "", f"{_escape(meaning)}", "", f"Default: {_code(default)}"]
    return "\n".join(lines) + "\n"


def write_python_page() -> str:
    """Write what the door offers, for mkdocstrings to fill in from the docstrings."""
    functions = [name for name in dir(dreamloom) if name[0].islower()]
    errors = [name for name in dir(dreamloom) if not name[0].islower()]
    lines = [_PYTHON, "## Functions", ""]
    lines += [f"::: dreamloom.{name}\n" for name in functions]
    lines += ["## Results and options", ""]
    lines += [f"::: {module}.{name}\n" for module, names in _CLASSES.items() for name in names]
    lines += ["## Errors", ""]
    lines += [f"::: dreamloom.{name}\n" for name in errors]
    return "\n".join(lines)


def write_recipes_page() -> str:
    """Write the files of settings and questions that come with the project, each in full."""
    lines = [
        "# Recipes",
        "",
        "Files of settings, for `dreamloom train --config FILE`, and of questions, for "
        "[`dreamloom study FILE`](../studies.md). They lie in the project's folder `recipes/`.",
    ]
    for path in sorted((ROOT / "recipes").rglob("*.toml")):
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8").strip()
        lines += ["", f"## `{name}`", "", "```toml", text, "```"]
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return f"`{text}`" if text else "empty"


def _escape(text: str) -> str:
    """Let signs that Markdown reads stand for themselves."""
    return re.sub(r"([\\`*_<>\[\]|])", r"\\\1", text)
