"""Draw: prompts, schedulers, seeds and adapters with weights, and a grid over any two of them."""

from __future__ import annotations

from starlette.routing import Route

ROUTES: list[Route] = []
