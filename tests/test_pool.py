"""Whoever works beside each other is heard to the last word."""

from dreamloom.core.events import Event, Note, Observer, silent
from dreamloom.experiments.pool import open_crew

WORDS = 40


def speak(number: int, observe: Observer = silent) -> int:
    """Say something and end at once."""
    for word in range(WORDS):
        observe(Note("work", f"{number}.{word}"))
    return number


def test_what_is_told_last_is_heard_before_the_work_counts_as_done() -> None:
    told: list[Event] = []
    items = {str(number): number for number in range(6)}
    with open_crew(2) as crew:
        done = crew.do_all(speak, items, told.append, "speaking", "test", is_told=True)
    assert done == items
    notes = [one for one in told if isinstance(one, Note)]
    assert {one.text for one in notes} == {f"{n}.{word}" for n in range(6) for word in range(WORDS)}
    assert {one.stage for one in notes} == {f"work-{number}" for number in range(6)}
