"""Serve the studio: the address, the guard, and what is printed."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import uvicorn

from dreamloom.core.errors import DreamLoomError
from dreamloom.studio.app import make_app
from dreamloom.studio.context import Studio
from dreamloom.studio.guard import Guard, is_loopback, name_hosts, read_secret

_CLOSING_SECONDS = 2
"""How long pages that listen have to notice that the studio closes."""


def make_guarded(
    root: Path, address: str, port: int, password: str = "", hosts: Sequence[str] = ()
) -> tuple[Guard, Studio]:
    """Make the studio of a root with the guard before it."""
    root.mkdir(parents=True, exist_ok=True)
    studio = Studio(root.resolve(), Path.cwd())
    studio.own.mkdir(exist_ok=True)
    guard = Guard(
        make_app(studio),
        secret=read_secret(studio.own),
        hosts=name_hosts(address, hosts),
        port=port,
        password=password,
        only_here=is_loopback(address),
    )
    studio.guard = guard
    return guard, studio


def serve(
    root: Path,
    address: str,
    port: int,
    *,
    password: str = "",
    hosts: Sequence[str] = (),
    tell: Callable[[str], None] = print,
) -> None:
    """Serve until Ctrl-C.

    Args:
        root: Where all runs lie; it is made where it is missing.
        address: Where to listen: 127.0.0.1, or another for other machines.
        port: The port; 0 takes any that is free.
        password: What lets one in instead of the token; needed beyond this machine.
        hosts: Further names by which the studio may be asked for, behind a proxy.
        tell: Told the address to open.

    Raises:
        DreamLoomError: If another machine could reach it without a password, or the address is
            taken or not this machine's.
    """
    if not is_loopback(address) and not password:
        raise DreamLoomError(
            f"Whoever reaches {address} could use this studio.",
            "Give it a password: --password, or the environment variable DREAMLOOM_PASSWORD.",
        )
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, port), family=family)
    except OSError as error:
        raise DreamLoomError(
            f"The studio cannot listen at {address}, port {port}: {error.strerror or error}.",
            "Name another with --port, or stop what listens there.",
        ) from None
    port = listener.getsockname()[1]
    guard, studio = make_guarded(root, address, port, password, hosts)
    name = "127.0.0.1" if address in {"0.0.0.0", "::"} else address
    name = f"[{name}]" if ":" in name else name
    end = "" if password else f"?token={read_secret(studio.own)}"
    tell(f"The studio is open: http://{name}:{port}/{end}")
    tell("Ctrl-C closes it; what runs goes on.")
    studio.wake_runner()
    server = uvicorn.Server(
        uvicorn.Config(
            guard,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_CLOSING_SECONDS,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
        )
    )
    studio.is_closing = lambda: server.should_exit
    # What is cut off then was asked to end, and is no fault to tell of.
    logging.getLogger("uvicorn.error").addFilter(lambda record: not server.should_exit)
    # Ctrl-C has closed the server by the time that it is raised again.
    with suppress(KeyboardInterrupt), listener:
        server.run(sockets=[listener])
