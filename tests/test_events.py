"""Events: values that observers are told, in order."""

import dataclasses

import pytest

from dreamloom.core.events import LossLogged, Note, Progress, StageDone, StageStarted, silent, tee


def test_tee_tells_every_observer_each_event_in_order():
    heard = []
    observe = tee(lambda e: heard.append(("first", e)), lambda e: heard.append(("second", e)))
    events = [StageStarted("train"), StageDone("train", 1.5)]
    for event in events:
        observe(event)
    assert heard == [(who, event) for event in events for who in ("first", "second")]


def test_nobody_need_listen(capsys):
    assert tee()(Note("train", "unheard")) is None
    assert silent(Note("train", "unheard")) is None
    assert capsys.readouterr() == ("", "")


def test_an_observer_cannot_change_what_the_next_one_hears():
    event = LossLogged(update=3, total=0.5, subject=0.4, prior=None, learning_rate=1e-3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.total = 0.0


def test_events_do_not_share_their_values():
    first, second = (Progress("train", "updates", n, 2) for n in (1, 2))
    first.values["loss"] = 0.1
    assert second.values == {}
