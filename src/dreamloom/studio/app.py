"""The studio's app: which address is answered by which function."""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from dreamloom.core.errors import DreamLoomError
from dreamloom.studio import (
    page_disk,
    page_draw,
    page_home,
    page_jobs,
    page_measure,
    page_mix,
    page_photos,
    page_run,
    page_teach,
)
from dreamloom.studio.context import Studio, not_found, refuse
from dreamloom.studio.words import say

_STATIC = Path(__file__).parent / "static"
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def static(request: Request) -> Response:
    """A file that comes with DreamLoom; only those that are there, by their whole names."""
    wanted = request.path_params["name"]
    files = {file.relative_to(_STATIC).as_posix(): file for file in _STATIC.rglob("*.*")}
    file = files.get(wanted)
    if file is None or file.suffix not in _TYPES:
        return not_found()
    return FileResponse(
        file, media_type=_TYPES[file.suffix], headers={"Cache-Control": "max-age=3600"}
    )


def _tell_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "error.not_found", 405: "error.method"}
    text = say(words[error.status_code]) if error.status_code in words else error.detail
    return PlainTextResponse(text, error.status_code, headers=error.headers)


def _tell_refusal(request: Request, error: Exception) -> Response:
    return refuse(str(error))


def _tell_value(request: Request, error: Exception) -> Response:
    """Refuse what a function could not read as what it wanted: its words are a programmer's."""
    return refuse(say("error.value"))


def _tell_fault(request: Request, error: Exception) -> Response:
    return refuse(say("error.server"), 500)


def make_app(studio: Studio) -> Starlette:
    """Make the app of a studio, without the guard before it."""
    app = Starlette(
        routes=[
            Route("/static/{name:path}", static),
            *page_home.ROUTES,
            *page_jobs.ROUTES,
            *page_photos.ROUTES,
            *page_teach.ROUTES,
            *page_run.ROUTES,
            *page_draw.ROUTES,
            *page_mix.ROUTES,
            *page_measure.ROUTES,
            *page_disk.ROUTES,
        ],
        exception_handlers={
            HTTPException: _tell_http,
            DreamLoomError: _tell_refusal,
            ValueError: _tell_value,
            Exception: _tell_fault,
        },
    )
    app.state.studio = studio
    return app


__all__ = ["make_app"]
