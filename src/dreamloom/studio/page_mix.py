"""Mix: two adapters, what they share, their weights over pictures drawn ahead, and one file."""

from __future__ import annotations

from starlette.routing import Route

ROUTES: list[Route] = []
