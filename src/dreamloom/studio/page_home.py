"""The first page: where one begins, what is there, and what goes on; and where one logs in."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dreamloom.studio.context import go_to, read_form, render, studio_of
from dreamloom.studio.words import say


def home(request: Request) -> Response:
    """Where one begins, and all runs."""
    studio = studio_of(request)
    runs = [(run, studio.job_of(run)) for run in studio.runs()]
    return render(request, "home.html", runs=runs, sets=list(studio.photo_sets))


def login(request: Request) -> Response:
    """Where the password is asked for."""
    return render(request, "login.html", fault="")


async def let_in(request: Request) -> Response:
    """Let in whoever knows the password."""
    studio = studio_of(request)
    guard = studio.guard
    given = (await read_form(request)).get("password", "")
    if guard is None or not await studio.may_enter(given):
        return render(request, "login.html", 403, fault=say("login.wrong"))
    answer = go_to("/")
    guard.let_in(answer)
    return answer


ROUTES = [
    Route("/", home),
    Route("/login", login),
    Route("/login", let_in, methods=["POST"]),
]
