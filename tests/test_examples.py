"""Examples: each command's help ends with its own, and each can be typed as it stands."""

import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dreamloom.cli.examples import EXAMPLES
from dreamloom.cli.main import main
from dreamloom.core.config.loading import load_config
from dreamloom.evaluation.encoders.catalogue import find_model
from dreamloom.merging.files.recipe import parse_options
from dreamloom.pipeline.draw import find_pack

ROOT = Path(__file__).parents[1]


def commands(group: click.Group = main, above: str = ""):
    yield above.strip(), group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{above}{name} ")
        else:
            yield f"{above}{name}", command


LINES = [(name, line) for name, lines in EXAMPLES.items() for line in lines]


def parse(line: str) -> tuple[str, click.Context]:
    """Parse a line as the command line does, and name the command that it calls."""
    words = shlex.split(line.replace("\\\n", " "))
    words = words[: next((at for at, word in enumerate(words) if word in {">", ">>"}), None)]
    assert words.pop(0) == "dreamloom"
    command, names = main, []
    while isinstance(command, click.Group):
        names.append(words.pop(0))
        command = command.commands[names[-1]]
    return " ".join(names), command.make_context(names[-1], words)


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_a_command_s_help_ends_with_its_examples(name):
    lines = "\n".join(EXAMPLES[name]).splitlines()
    shown = CliRunner().invoke(main, [*name.split(), "--help"]).output.splitlines()
    assert shown[-len(lines) :] == [f"  {line}" for line in lines]
    assert shown[-len(lines) - 1] in {"Example:", "Examples:"}


def test_examples_are_of_commands_that_there_are():
    assert set(EXAMPLES) == {name for name, _ in commands()}


@pytest.mark.parametrize(("name", "line"), LINES)
def test_an_example_can_be_typed(name, line):
    called, context = parse(line)
    assert called.startswith(name)
    assert max(map(len, line.splitlines())) <= 78  # as wide as the rest of the help
    given = context.params
    if called == "merge":
        parse_options(given["method"] or "sum", given["options"])
    if "sets" in given:
        load_config(sets=given["sets"], overrides={"preset": given["preset"]})
    for pack in given.get("packs", ()):
        find_pack(pack)
    if called == "study":
        assert (ROOT / given["file"]).is_file()
    if called == "models fetch":
        assert all(map(find_model, given["names"]))


@pytest.mark.parametrize("line", ["dreamloom train --no-such x", "dreamloom plan --photos six"])
def test_a_line_that_cannot_be_typed_is_found(line):
    with pytest.raises(click.UsageError):
        parse(line)
