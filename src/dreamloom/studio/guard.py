"""The guard before every page: who may ask, from where, and what a browser may do with the answer.

Three things are asked of each request, pictures and files included: that it names this server
(else another site's name could have been bent to it), that no other site sent it, and that it
bears the cookie that the printed address or the password gave.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dreamloom.studio.words import say

OPEN_PATHS = ("/login", "/static/")
"""What is answered without a cookie: where one logs in, and the files that come with DreamLoom."""

_SAFE = frozenset(("GET", "HEAD"))
_YEAR_SECONDS = 365 * 24 * 3600

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob:; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'self'; object-src 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Without a referrer of its own, a browser sends "Origin: null" with a form.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Cache-Control": "no-store",
}
"""Sent with each answer, unless it says otherwise itself."""


def read_secret(studio: Path) -> str:
    """Read the studio's secret; make one where there is none, for this user's eyes alone.

    It stays, so that a page that is open goes on when the server starts again.
    """
    file = studio / "secret"
    if not file.is_file():
        studio.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(secrets.token_urlsafe(32))
    return file.read_text(encoding="utf-8").strip()


def name_hosts(address: str, more: Iterable[str] = ()) -> frozenset[str]:
    """List the names by which this server may be asked for, beside numeric addresses."""
    own = (socket.gethostname(), address) if not is_loopback(address) else ()
    return frozenset(name.lower() for name in ("localhost", *own, *more))


def is_loopback(address: str) -> bool:
    """Say whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


class Guard:
    """Answers itself what may not pass; everything else goes on to the studio.

    Args:
        app: The studio.
        secret: What the cookie is made from, and the token of the printed address.
        hosts: Names by which the server may be asked for; see `name_hosts`.
        port: The server's: browsers send a cookie to all ports of a machine.
        password: What lets one in; empty where only the printed address does.
        only_here: Whether numeric addresses have to be this machine's own.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        secret: str,
        hosts: frozenset[str] = frozenset(("localhost",)),
        port: int = 0,
        password: str = "",
        only_here: bool = True,
    ) -> None:
        self._app = app
        self._secret = secret
        self._hosts = hosts
        self._cookie = f"dreamloom-{port}"
        self._password = password
        self._only_here = only_here
        key = f"{secret}\0{password}".encode()
        self._session = hmac.new(key, b"session", hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let it pass."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                message["headers"] = headers.raw
            await send(message)

        refusal = self._refuse(scope)
        await (refusal or self._app)(scope, receive, send_guarded)

    def _refuse(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._knows(host):
            return PlainTextResponse(say("guard.host", host=host[:200]), 421)
        origin = headers.get("origin")
        is_foreign = origin is not None and _host_of(origin) != host.lower()
        is_foreign |= headers.get("sec-fetch-site") in {"cross-site", "same-site"} and (
            scope["method"] not in _SAFE
        )
        if is_foreign:
            return PlainTextResponse(say("guard.origin"), 403)
        path = scope["path"]
        if path.startswith(OPEN_PATHS) or self._has_cookie(headers):
            return None
        if not self._password:
            token = parse_qs(scope["query_string"].decode("ascii", "replace")).get("token", [""])
            if scope["method"] in _SAFE and _equal(token[0], self._secret):
                # Two slashes would name another site.
                answer = RedirectResponse(f"/{path.lstrip('/')}", 303)
                self.let_in(answer)
                return answer
        elif scope["method"] in _SAFE and "text/html" in headers.get("accept", ""):
            return RedirectResponse("/login", 303)
        return PlainTextResponse(
            say("guard.token" if not self._password else "guard.password"), 401
        )

    def _knows(self, host: str) -> bool:
        """Say whether a Host header is a name of this server: no other site can pretend it."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self._hosts
        # Nobody can bend a number to another machine, as one can a name.
        return address.is_loopback or not self._only_here

    def _has_cookie(self, headers: Headers) -> bool:
        given = cookie_parser(headers.get("cookie", "")).get(self._cookie, "")
        return _equal(given, self._session)

    def is_right(self, password: str) -> bool:
        """Say whether a password lets one in."""
        return bool(self._password) and _equal(password, self._password)

    def let_in(self, answer: Response) -> None:
        """Give the cookie with an answer."""
        answer.set_cookie(
            self._cookie, self._session, max_age=_YEAR_SECONDS, httponly=True, samesite="strict"
        )


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())
