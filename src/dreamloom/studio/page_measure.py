"""Measure: the report, any two sets compared in pairs, and the studies as questions."""

from __future__ import annotations

from starlette.routing import Route

ROUTES: list[Route] = []
