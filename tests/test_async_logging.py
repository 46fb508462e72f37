"""What an update came to is told in order, in time, and without asking the device for it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dreamloom.core.config.loading import load_config
from dreamloom.core.device import Runtime
from dreamloom.core.errors import TrainingError
from dreamloom.core.events import silent
from dreamloom.models.base import WeightGroup
from dreamloom.training.async_logging import AsyncLossLog, StepOutcome
from dreamloom.training.batches import Sample
from dreamloom.training.losses import combine_errors
from dreamloom.training.trainable_adapter import TrainableAdapter

CARDS = (Sample("photo", 0, (0, 0, False), 0), Sample("class image", 1, (0, 0, False), 0))
CPU = torch.device("cpu")


def trainable(weight: Tensor, device: torch.device = CPU, **settings: object) -> TrainableAdapter:
    config = load_config(
        overrides={
            "train.learning_rate": 0.1,
            "train.text_learning_rate": 0.1,
            "train.token_learning_rate": 0.1,
            "train.warmup_steps": 0,
            **settings,
        }
    )
    made = TrainableAdapter(
        [WeightGroup("down", (torch.nn.Parameter(weight),))],
        config,
        Runtime(device, torch.float32),
        silent,
    )
    made.set_rates(0)
    return made


def write(loss_log: AsyncLossLog, update: int, finite: tuple[bool, bool], loss: float) -> None:
    loss_log.write(
        update,
        0.1,
        CARDS,
        torch.tensor(finite),
        torch.tensor([loss, loss / 2, loss / 2]),
        torch.tensor(3.0),
    )


def test_on_the_processor_an_update_is_told_at_once() -> None:
    told: list[StepOutcome] = []
    loss_log = AsyncLossLog(CPU, told.append)
    write(loss_log, 0, (True, True), 1.0)
    write(loss_log, 1, (True, False), 2.0)
    assert [(one.update, one.total, one.subject, one.prior) for one in told] == [
        (0, 1.0, 0.5, 0.5),
        (1, 2.0, 1.0, 1.0),
    ]
    assert told[1].broken == CARDS[1:]
    assert told[1].samples == 2


def test_the_gradients_noise_travels_where_it_was_asked_for() -> None:
    told: list[StepOutcome] = []
    loss_log, three = AsyncLossLog(CPU, told.append), torch.tensor([1.0, 0.5, 0.5])
    args = (0.1, CARDS, torch.tensor([True, True]), three, torch.tensor(3.0))
    loss_log.write(0, *args)
    loss_log.write(1, *args, torch.tensor(7.0))
    assert [(one.norm, one.noise, one.total) for one in told] == [(3.0, None, 1.0), (3.0, 7.0, 1.0)]


def test_numbers_that_travel_are_read_in_order_and_not_too_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same without a GPU: its events are stood in for, and its memory is the processor's."""
    arrived: set[int] = set()

    class Event:
        count = 0

        def __init__(self) -> None:
            Event.count += 1
            self.number = Event.count

        def record(self) -> None: ...

        def query(self) -> bool:
            return self.number in arrived

        def synchronize(self) -> None:
            arrived.add(self.number)

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda shape, pin_memory: empty(shape))
    told: list[StepOutcome] = []
    loss_log = AsyncLossLog(torch.device("cuda"), told.append, behind=2)
    for update in range(2):
        write(loss_log, update, (True, True), float(update))
    assert told == []
    arrived.add(2)
    # The second is there, but the first is not, and they come in order.
    write(loss_log, 2, (True, True), 2.0)
    assert [one.update for one in told] == [0, 1]
    loss_log.flush()
    assert [one.update for one in told] == [0, 1, 2]


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_never_take_a_gradient_that_is_not_finite(optimizer: str, bad: float) -> None:
    if optimizer == "prodigy":
        pytest.importorskip("pytorch_optimizer")
    rate = {"train.learning_rate": 1.0} if optimizer == "prodigy" else {}
    one = trainable(torch.ones(3), **{"train.optimizer": optimizer, **rate})
    one.parameters[0].grad = torch.tensor([1.0, bad, 1.0])
    assert not math.isfinite(float(one.clip_and_step(torch.tensor([True]))))
    assert torch.equal(one.parameters[0].detach(), torch.ones(3))
    one.parameters[0].grad = torch.ones(3)
    # A loss may be broken where its gradient is not.
    one.clip_and_step(torch.tensor([True, False]))
    assert torch.equal(one.parameters[0].detach(), torch.ones(3))
    one.clip_and_step(torch.tensor([True, True]))
    assert not torch.equal(one.parameters[0].detach(), torch.ones(3))
    with pytest.raises(TrainingError, match="not finite at update 8, with IMG_1"):
        one.refuse_broken(7, bad, lambda: "IMG_1")


def test_a_large_gradient_is_cut_as_torch_cuts_it() -> None:
    gradient, start = torch.tensor([30.0, -40.0, 0.5]), torch.tensor([1.0, 2.0, 3.0])
    ours = trainable(start.clone(), **{"train.max_grad_norm": 2.0, "train.weight_decay": 0.1})
    theirs = torch.nn.Parameter(start.clone())
    plain = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1)
    for scale in (1.0, 0.001, 3.0):
        ours.parameters[0].grad, theirs.grad = gradient * scale, gradient * scale
        norm = ours.clip_and_step(torch.tensor([True]))
        expected = torch.nn.utils.clip_grad_norm_([theirs], 2.0)
        plain.step()
        torch.testing.assert_close(norm, expected)
        torch.testing.assert_close(ours.parameters[0], theirs)


class Listener(TorchDispatchMode):
    """Writes down which operations are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(op))
        return op(*args, **(kwargs or {}))


def test_choosing_what_is_prior_counts_nothing_on_the_device() -> None:
    """Rows picked by a mask are a number of rows that somebody must wait for."""
    with Listener() as heard:
        combine_errors(torch.ones(2), torch.tensor([False, True]))
    assert not {name for name in heard.names if "index" in name or "nonzero" in name}


def test_a_step_asks_for_no_number() -> None:
    """The way is the same on a processor and on a GPU, which a question would stop."""
    one = trainable(torch.ones(4, 4))
    one.parameters[0].grad = torch.ones(4, 4)
    with Listener() as heard:
        norm = one.clip_and_step(torch.ones(2, dtype=torch.bool))
    assert "aten._fused_adamw_.default" in heard.names
    assert not {name for name in heard.names if "scalar_dense" in name or "nonzero" in name}
    with Listener() as heard:
        bool(norm > 1)
    assert {name for name in heard.names if "scalar_dense" in name}
