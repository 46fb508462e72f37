"""The command that prints a shell's completion script, which is click's own."""

from __future__ import annotations

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    add_completion_class,
    get_completion_class,
)

from dreamloom.cli.options import LoomCommand

_PROGRAM, _VARIABLE = "dreamloom", "_DREAMLOOM_COMPLETE"
_END = "    return 0\n"
# A value follows, so no space does.
_NO_SPACE = "    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace\n"


@add_completion_class
class _Bash(BashComplete):
    """bash takes ``NAME=VALUE`` for three words; here they are one again."""

    source_template = BashComplete.source_template.replace(_END, _NO_SPACE + _END)

    _before = ""
    """What stands before the word that bash completes, and belongs to it."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Put the word that is being typed together."""
        args, incomplete = super().get_completion_args()
        if incomplete == "=":
            args, incomplete = [*args, "="], ""
        if args[-1:] != ["="] or len(args) < 2:
            return args, incomplete
        *before, name, _ = args
        if name.startswith("-"):
            return [*before, name], incomplete
        self._before = f"{name}="
        return before, f"{name}={incomplete}"

    def format_completion(self, item: CompletionItem) -> str:
        """Give only what goes on after that."""
        return f"{item.type},{item.value.removeprefix(self._before)}"


@click.command(cls=LoomCommand)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script by which SHELL completes commands.

    Options and their words, too. One line installs it, for shells that are started afterwards; bash
    must be 4.4 or newer, and in zsh the line must stand behind compinit.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    root = ctx.find_root().command
    click.echo(kind(root, {}, _PROGRAM, _VARIABLE).source())
