"""What happens in a run while a page is open: its events as a stream, from any byte on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from dreamloom.studio.runs import read_events

_LOOK_EVERY_SECONDS = 0.7
_SAY_SOMETHING_EVERY = 20
"""So many looks at a file that does not change: proxies close lines that say nothing."""
_MOST_BYTES = 256 * 1024


async def follow_events(
    file: Path, start: int, state: Callable[[], str], is_closing: Callable[[], bool]
) -> AsyncIterator[str]:
    """Follow an events file: new lines as one message, whose id is the byte after them.

    A browser that lost the line asks again with that id, so that nothing is told twice or left
    out. The message ``state`` tells that what works on the run has changed.

    Args:
        file: ``events.jsonl``; it may appear only later.
        start: The byte to begin at.
        state: Says what works on the run now.
        is_closing: Says whether to stop, for the server ends.
    """
    known, silent = state(), 0
    yield f"retry: 2000\nid: {start}\n\n"
    while not is_closing():
        events, end = await asyncio.to_thread(read_events, file, start, _MOST_BYTES)
        now = await asyncio.to_thread(state)
        if end != start:
            start, silent = end, 0
            yield f"id: {start}\nevent: events\ndata: {json.dumps(events)}\n\n"
        if now != known:
            known, silent = now, 0
            yield f"id: {start}\nevent: state\ndata: {json.dumps(now)}\n\n"
        silent += 1
        if silent % _SAY_SOMETHING_EVERY == 0:
            yield ": still here\n\n"
        await asyncio.sleep(_LOOK_EVERY_SECONDS)
