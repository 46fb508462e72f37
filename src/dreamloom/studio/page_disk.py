"""Disk and device: what runs take, and what the machine has."""

from __future__ import annotations

from starlette.routing import Route

ROUTES: list[Route] = []
