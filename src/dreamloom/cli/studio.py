"""The command that opens the studio: parse, call the library, say where it is."""

from __future__ import annotations

from pathlib import Path

import click

from dreamloom.cli.options import PATH, LoomCommand


@click.command(cls=LoomCommand)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8787,
    show_default=True,
    help="0 takes any that is free.",
)
@click.option(
    "--listen",
    "address",
    metavar="ADDRESS",
    default="127.0.0.1",
    show_default=True,
    help="Another than this machine's own needs a password.",
)
@click.option(
    "--root", type=PATH, default=Path("runs"), show_default=True, help="Where all runs lie."
)
@click.option(
    "--password",
    envvar="DREAMLOOM_PASSWORD",
    default="",
    help="What lets one in; better given as the environment variable DREAMLOOM_PASSWORD.",
)
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A name by which a proxy asks for the studio; repeat.",
)
def studio(root: Path, address: str, port: int, password: str, hosts: tuple[str, ...]) -> None:
    """Open the studio: everything on a page of this machine, for a browser.

    It shows the runs below --root, whoever made them, and starts commands as jobs of a queue that
    goes on when the page or the studio is closed. It prints the address to open.
    """
    try:
        from dreamloom.studio.serve import serve
    except ImportError as error:
        raise missing_studio(error) from None
    serve(root, address, port, password=password, hosts=hosts, tell=click.echo)


def missing_studio(error: ImportError) -> Exception:
    """Say what the studio needs and how it comes.

    Raises:
        ImportError: The error itself, where it is of something else.
    """
    from dreamloom.core.errors import DreamLoomError

    library = (error.name or "").partition(".")[0]
    if library not in {"starlette", "uvicorn"}:
        raise error
    return DreamLoomError(
        f"The studio needs {library}, which is not installed.",
        "Run: pip install 'dreamloom[studio]'",
    )
