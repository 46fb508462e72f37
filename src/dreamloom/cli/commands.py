"""The group of commands: how each ends, whatever happens, and in which words."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from dreamloom.cli.options import LoomGroup
from dreamloom.cli.output import drop, flush, is_closed, take_any_text

UNEXPECTED = "DreamLoom has a fault of its own"
"""How the message of an error that nobody foresaw begins."""


class Commands(LoomGroup):
    """Shows what a user can mend as two plain lines, and the traceback only with --debug."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line; end with 0, with 1 (can be mended) or 2 (used wrongly)."""
        take_any_text()
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        try:
            status = super().main(args, prog_name, complete_var, False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            status = error.exit_code
        except click.UsageError as error:
            # click lists the choices of an argument one a line.
            _complain(error.format_message().replace("\n\t", " "))
            if error.ctx is not None:
                click.echo(f"'{error.ctx.command_path} --help' tells what it takes.", err=True)
            status = error.exit_code
        except click.Abort:
            status = 1
        status = status if isinstance(status, int) else 0
        sys.exit(flush() or status)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; turn a known problem into its message and exit code."""
        from dreamloom.core.errors import DreamLoomError

        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("Stopped. What is finished is kept: run the command again.", err=True)
            ctx.exit(1)
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            if isinstance(error, OSError) and is_closed(error):
                drop(sys.stdout)
                ctx.exit(1)
            problem, hint = _explain(error)
            _complain(problem)
            if hint:
                click.echo(hint, err=True)
            ctx.exit(error.exit_code if isinstance(error, DreamLoomError) else 1)


def _complain(problem: str) -> None:
    click.secho(f"Error: {problem}", fg="red", err=True)


def _explain(error: Exception) -> tuple[str, str]:
    """Say what went wrong, and what to do about it."""
    from dreamloom.core.errors import DreamLoomError
    from dreamloom.core.packages import explain_missing

    if isinstance(error, ModuleNotFoundError):
        error = explain_missing(error) or error
    if isinstance(error, DreamLoomError):
        return error.problem, error.hint
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        said = f"{where}{error.strerror or error}."
        return said, "What is finished is kept: mend that and run the command again."
    said = " ".join(str(error).split())
    said = f"{said[:200]}…" if len(said) > 200 else said
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return (
            f"There is not enough memory: {said or 'none is left'}.",
            "'dreamloom plan' tells what fits; smaller batches, pictures or ranks need less.",
        )
    return (
        f"{UNEXPECTED}: {type(error).__name__}: {said}.",
        "'dreamloom --debug COMMAND' shows where, for a report of this.",
    )
