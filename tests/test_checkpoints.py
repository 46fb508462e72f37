"""Checkpoints: what goes on from one is what would have gone on without it, bit for bit."""

import errno
import importlib.util
import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import Parameter

from dreamloom.core.errors import TrainingError
from dreamloom.training import checkpoints
from dreamloom.training.checkpoints import (
    Checkpoints,
    DamagedCheckpointError,
)
from dreamloom.training.ema import EmaWeights, weights_to_use
from dreamloom.training.lr_scheduler import rate_factor, set_rates
from dreamloom.training.optimizers import OPTIMIZERS, group_weights, make_optimizer, usual_rate

INPUTS = {"photos": "a1", "base": "b2", "settings": "c3"}


class TrainingBatches:
    """A few weights, of which the last is never used, under AdamW."""

    def __init__(self, shapes=((3, 2), (5,), (2, 2)), seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.weights = [Parameter(torch.randn(*shape, generator=rng)) for shape in shapes]
        self.optimizer = torch.optim.AdamW(self.weights, lr=0.05, weight_decay=0.1)

    def learn(self, updates):
        for update in updates:
            rng = torch.Generator().manual_seed(update)
            self.optimizer.zero_grad()
            loss = sum(
                (weight * torch.randn(weight.shape, generator=rng)).sum().square()
                for weight in self.weights[:-1]
            )
            loss.backward()
            self.optimizer.step()
        return self

    def save(self, path, updates_done=4, inputs=INPUTS):
        self.kept_in(path.parent, inputs).write(path, updates_done)

    def load(self, path, inputs=INPUTS):
        return self.kept_in(path.parent, inputs).read(path)[0]

    def kept_in(self, folder, inputs=INPUTS):
        return Checkpoints(folder, self.weights, self.optimizer, inputs)

    def state(self):
        moments = [self.optimizer.state.get(weight, {}) for weight in self.weights]
        return [weight.detach().clone() for weight in self.weights], moments


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoints" / "last.safetensors"


def same(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def test_going_on_repeats_the_uninterrupted_run_bit_for_bit(path):
    whole = TrainingBatches().learn(range(7))
    TrainingBatches().learn(range(4)).save(path)
    resumed = TrainingBatches(seed=1)
    assert resumed.load(path) == 4
    resumed.learn(range(4, 7))
    assert same(whole.weights, resumed.weights)
    # The test can fail: without AdamW's moments the next updates are others.
    forgetful = TrainingBatches(seed=1)
    forgetful.load(path)
    forgetful.optimizer.state.clear()
    assert not torch.equal(forgetful.learn(range(4, 7)).weights[0], whole.weights[0])


# ------------------------------------------------------------------ every optimizer


class TrainContext:
    """An adapter in small: factors of a layer and a convolution, a magnitude, a new word."""

    SHAPES = (
        ("down", (2, 64)),
        ("up", (64, 2)),
        ("down", (2, 3, 3, 3)),
        ("up", (4, 2, 1, 1)),
        ("other", (5,)),
        ("text down", (64, 64)),  # large enough for 8-bit states
        ("tokens", (1, 6)),
    )

    def __init__(self, name, seed=0, averaged=True):
        rng = torch.Generator().manual_seed(seed)
        # Up factors begin at 0, so that the down factors' first gradient is 0, as in a LoRA.
        self.roles = [
            (role, [Parameter(torch.randn(shape, generator=rng) * ("up" not in role))])
            for role, shape in self.SHAPES
        ]
        self.weights = [weight for _, weights in self.roles for weight in weights]
        rate = usual_rate(name, 0.01)
        groups = group_weights(self.roles, rate)
        self.optimizer = make_optimizer(name, groups, weight_decay=0.01)
        self.others = {"scaler": torch.amp.GradScaler("cpu", init_scale=1024, growth_interval=3)}
        if averaged:
            self.others["average"] = EmaWeights(self.weights, decay=0.9)

    def loss(self):
        layer = self.weights[1] @ self.weights[0]
        convolution = torch.einsum("orab,rihw->oihw", self.weights[3], self.weights[2])
        rest = sum((weight - 0.3).square().mean() for weight in self.weights[4:])
        return (layer - 0.5).square().mean() + (convolution - 0.5).square().mean() + rest

    def learn(self, updates):
        for update in updates:
            set_rates(self.optimizer, rate_factor(update, "cosine", 2, 20))
            self.optimizer.zero_grad(set_to_none=True)
            scaler = self.others["scaler"]
            scaler.scale(self.loss()).backward()
            scaler.step(self.optimizer)
            scaler.update()
            if "average" in self.others:
                self.others["average"].update()
        return self

    def kept_in(self, folder):
        return Checkpoints(folder, self.weights, self.optimizer, INPUTS, self.others)


def context(name, seed=0, averaged=True):
    needed = {"adamw": "torch", "adamw8bit": "bitsandbytes"}.get(name, "pytorch_optimizer")
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}, of the extra 'optimizers'")
    return TrainContext(name, seed, averaged)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_bit_for_bit(name, tmp_path):
    whole = context(name).learn(range(7))
    assert all(weight.isfinite().all() for weight in whole.weights)
    context(name).learn(range(3)).kept_in(tmp_path).save(3)
    resumed = context(name, seed=1)
    assert resumed.kept_in(tmp_path).resume().updates_done == 3
    resumed.learn(range(3, 7))
    assert same(whole.weights, resumed.weights)
    assert resumed.others["scaler"].get_scale() == whole.others["scaler"].get_scale() == 4096
    with whole.others["average"].applied(), resumed.others["average"].applied():
        assert same(whole.weights, resumed.weights)
    # The test can fail: what forgets its state takes other steps.
    forgetful = context(name, seed=1)
    others = (context(name).optimizer, INPUTS, whole.others)
    Checkpoints(tmp_path, forgetful.weights, *others).read(next(tmp_path.iterdir()))
    assert not same(whole.weights, forgetful.learn(range(3, 7)).weights)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizers_state_has_its_types_back(name, tmp_path):
    """Torch's own loading would turn 8-bit and bfloat16 states into float32."""
    taught = context(name).learn(range(3))
    taught.kept_in(tmp_path).save(3)
    loaded = context(name, seed=1)
    loaded.kept_in(tmp_path).resume()
    for one, other in zip(taught.weights, loaded.weights, strict=True):
        before, after = taught.optimizer.state[one], loaded.optimizer.state[other]
        assert before.keys() == after.keys()
        for value, again in zip(before.values(), after.values(), strict=True):
            assert type(value) is type(again)
            assert not isinstance(value, torch.Tensor) or value.dtype == again.dtype


def test_a_state_in_another_precision_stays_in_it(tmp_path):
    def odd(seed):
        batches = TrainingBatches(seed=seed).learn(range(2))
        for state in batches.optimizer.state.values():
            state["exp_avg"] = state["exp_avg"].double() / 3
        return batches

    first = odd(0)
    first.save(tmp_path / "a.safetensors")
    loaded = TrainingBatches(seed=1)
    loaded.load(tmp_path / "a.safetensors")
    moments, again = first.state()[1][0]["exp_avg"], loaded.state()[1][0]["exp_avg"]
    assert again.dtype == torch.float64
    assert torch.equal(moments, again)


def test_a_training_that_stops_to_draw_and_save_is_not_changed_by_it(tmp_path):
    whole = context("schedule_free", averaged=False).learn(range(6))
    stopping = context("schedule_free", averaged=False)
    for update in range(6):
        stopping.learn([update])
        with weights_to_use(stopping.optimizer):
            pass
        stopping.kept_in(tmp_path).save(update + 1)
    assert same(whole.weights, stopping.weights)


def test_averaged_weights_are_not_saved_as_if_they_were_in_training(tmp_path):
    taught = context("schedule_free", averaged=False).learn(range(2))
    with (
        weights_to_use(taught.optimizer),
        pytest.raises(ValueError, match="save outside that block"),
    ):
        taught.kept_in(tmp_path).save(2)
    taught = context("adamw").learn(range(2))
    with taught.others["average"].applied(), pytest.raises(ValueError, match="leave the block"):
        taught.kept_in(tmp_path).save(2)
    assert not list(tmp_path.iterdir())


def test_what_is_neither_tensor_nor_plain_is_refused_before_anything_is_written(tmp_path):
    batches = TrainingBatches().learn(range(1))
    batches.optimizer.param_groups[0]["odd"] = {1, 2}
    with pytest.raises(ValueError, match="cannot hold a set"):
        batches.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_what_is_asked_for_is_refused(tmp_path):
    TrainingBatches().learn(range(2)).kept_in(tmp_path).save(2)
    batches = TrainingBatches()
    others = {"average": EmaWeights(batches.weights, 0.9)}
    asking = Checkpoints(tmp_path, batches.weights, batches.optimizer, INPUTS, others)
    with pytest.raises(TrainingError, match="holds other weights"):
        asking.resume()


# ------------------------------------------------------------------ one file


def test_the_moments_come_back_as_they_were(path):
    saved = TrainingBatches().learn(range(4))
    saved.save(path)
    loaded = TrainingBatches(seed=1).learn(range(2))
    loaded.load(path)
    (weights, moments), (same_weights, same_moments) = saved.state(), loaded.state()
    assert same(weights, same_weights)
    for one, other in zip(moments, same_moments, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert all(one[name].dtype == other[name].dtype for name in one)
    assert moments[0]["step"] == 4
    assert moments[-1] == {}


def test_a_checkpoint_from_before_the_first_update_forgets_later_moments(path):
    TrainingBatches().save(path, updates_done=0)
    later = TrainingBatches().learn(range(3))
    assert later.load(path) == 0
    assert torch.equal(
        later.learn(range(5)).weights[0], TrainingBatches().learn(range(5)).weights[0]
    )


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({**INPUTS, "photos": "z9"}, "photos"),
        ({**INPUTS, "photos": "z9", "base": "z9"}, "base, photos"),
        ({"photos": "a1", "base": "b2"}, "settings"),
        ({**INPUTS, "priors": "d4"}, "priors"),
    ],
)
def test_other_inputs_are_refused_and_named(path, inputs, named):
    TrainingBatches().learn(range(4)).save(path)
    batches = TrainingBatches(seed=1)
    before = batches.state()[0]
    with pytest.raises(TrainingError) as caught:
        batches.load(path, inputs)
    assert caught.value.problem == f"The checkpoint {path} was made with other {named}."
    assert "--out" in caught.value.hint
    assert same(before, batches.weights)


@pytest.mark.parametrize("shapes", [((3, 2), (5,)), ((3, 2), (5,), (2, 3)), ((3, 2),) * 4])
def test_other_weights_are_refused_before_any_is_touched(path, shapes):
    TrainingBatches().learn(range(4)).save(path)
    batches = TrainingBatches(shapes, seed=1)
    before = batches.state()[0]
    with pytest.raises(TrainingError, match="holds other weights than this model trains"):
        batches.load(path)
    assert same(before, batches.weights)


def refusal(path):
    with pytest.raises(DamagedCheckpointError) as caught:
        TrainingBatches().load(path)
    assert caught.value.problem.startswith(f"The checkpoint {path} cannot be read")
    assert caught.value.hint == "Delete it to start from the beginning."


def test_a_damaged_file_is_told_with_the_way_out(path):
    TrainingBatches().learn(range(4)).save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[: len(whole) // 2], b"\xff" * len(whole)):
        path.write_bytes(damaged)
        refusal(path)


def test_a_single_wrong_bit_is_found(path):
    TrainingBatches().learn(range(4)).save(path)
    whole = path.read_bytes()
    tensors_begin = 8 + int.from_bytes(whole[:8], "little")
    update = whole.index(b'"updates_done":"4"') + len('"updates_done":"')
    for place in (tensors_begin, len(whole) - 1, update):
        wrong = bytearray(whole)
        wrong[place] ^= 1
        path.write_bytes(wrong)
        refusal(path)


@pytest.mark.parametrize(
    "story",
    [
        None,
        {"updates_done": "4"},
        {"inputs": "{}"},
        {"updates_done": "many", "inputs": "{}"},
        {"updates_done": "4", "inputs": "{half"},
        {"updates_done": "4", "inputs": "3"},
        {"updates_done": "4", "inputs": "{}", "state": "{}", "checksum": "0"},
    ],
)
def test_a_file_of_another_kind_is_told_alike(tmp_path, story):
    path = tmp_path / "other.safetensors"
    save_file({"0.weight": torch.zeros(1)}, path, metadata=story)
    refusal(path)


def test_a_checkpoint_is_safetensors_that_tells_what_it_is(path):
    from safetensors import safe_open

    TrainingBatches().learn(range(4)).save(path)
    with safe_open(path, framework="pt") as file:
        story = file.metadata()
        assert len(file.keys()) == 3 + 2 * 3  # three weights; two have three moments each
    assert story["updates_done"] == "4"
    assert json.loads(story["inputs"]) == INPUTS
    assert json.loads(story["state"]).keys() == {"weights", "optimizer", "others", "losses"}


# ------------------------------------------------------------------ the folder


def test_the_newest_two_are_kept(tmp_path):
    batches = TrainingBatches()
    kept = batches.kept_in(tmp_path)
    for done in (8, 9, 10):
        batches.learn(range(1))
        kept.save(done)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "update-0000009.safetensors",
        "update-0000010.safetensors",
    ]
    resumed = TrainingBatches(seed=1).kept_in(tmp_path).resume()
    assert resumed.updates_done == 10
    assert resumed.note == f"goes on after update 10, from {resumed.path}"
    kept.clear()
    assert not list(tmp_path.iterdir())
    assert kept.resume() == checkpoints.Resumed(0)


def test_losses_come_back_with_the_state_and_may_be_missing(tmp_path):
    batches = TrainingBatches().learn(range(2))
    batches.kept_in(tmp_path).save(2, [0.1, 0.30000000000000004])
    assert batches.kept_in(tmp_path).resume().losses == (0.1, 0.30000000000000004)
    batches.kept_in(tmp_path).save(3)
    assert batches.kept_in(tmp_path).resume().losses == ()


def test_a_damaged_newest_gives_way_to_the_one_before(tmp_path):
    batches = TrainingBatches().learn(range(4))
    batches.kept_in(tmp_path).save(4)
    newest = batches.learn(range(4, 6)).kept_in(tmp_path).save(6)
    newest.write_bytes(newest.read_bytes()[:-100])
    resumed = TrainingBatches(seed=1)
    found = resumed.kept_in(tmp_path).resume()
    assert found.updates_done == 4
    assert "goes on after update 4" in found.note
    assert f"the newer one is damaged: The checkpoint {newest} cannot be read" in found.note
    resumed.learn(range(4, 7))
    assert same(resumed.weights, TrainingBatches().learn(range(7)).weights)


def test_two_damaged_ones_are_an_error_not_a_new_start(tmp_path):
    batches = TrainingBatches().learn(range(4))
    for done in (4, 5):
        batches.kept_in(tmp_path).save(done).write_bytes(b"no")
    with pytest.raises(TrainingError, match=r"update-0000005\.safetensors cannot be read"):
        batches.kept_in(tmp_path).resume()


def test_other_inputs_are_refused_even_if_an_older_one_would_fit(tmp_path):
    batches = TrainingBatches().learn(range(4))
    batches.kept_in(tmp_path).save(4)
    batches.kept_in(tmp_path, {**INPUTS, "base": "z9"}).save(5)
    with pytest.raises(TrainingError, match="made with other base"):
        batches.kept_in(tmp_path).resume()


class Disk:
    """A disk that holds so many checkpoints, and breaks a write off when it is full."""

    def __init__(self, monkeypatch, room):
        self.room = room
        monkeypatch.setattr(checkpoints, "save_file", self.write)

    def write(self, tensors, filename, metadata):
        if len(list(filename.parent.glob("update-*"))) >= self.room:
            filename.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, filename, metadata=metadata)


def test_a_full_disk_leaves_the_one_before_and_says_that_nothing_is_lost(tmp_path, monkeypatch):
    batches = TrainingBatches().learn(range(4))
    batches.kept_in(tmp_path).save(4)
    Disk(monkeypatch, room=1)
    with pytest.raises(TrainingError) as caught:
        batches.learn(range(4, 6)).kept_in(tmp_path).save(6)
    assert "after update 6 cannot be written" in caught.value.problem
    assert "No space left on device" in caught.value.problem
    assert (
        "update-0000004.safetensors, is whole; nothing up to there is lost" in caught.value.problem
    )
    assert caught.value.hint.startswith("Make room on the disk")
    assert [file.name for file in tmp_path.iterdir()] == ["update-0000004.safetensors"]
    resumed = TrainingBatches(seed=1)
    assert resumed.kept_in(tmp_path).resume().updates_done == 4
    assert same(resumed.learn(range(4, 7)).weights, TrainingBatches().learn(range(7)).weights)


def test_on_a_full_disk_the_oldest_makes_room(tmp_path, monkeypatch):
    batches = TrainingBatches().learn(range(2))
    batches.kept_in(tmp_path).save(1)
    batches.kept_in(tmp_path).save(2)
    Disk(monkeypatch, room=2)
    batches.kept_in(tmp_path).save(3)
    assert TrainingBatches().kept_in(tmp_path).resume().updates_done == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_before_the_first_checkpoint_is_told_as_it_is(tmp_path, monkeypatch):
    Disk(monkeypatch, room=0)
    with pytest.raises(TrainingError) as caught:
        TrainingBatches().kept_in(tmp_path).save(1)
    assert "lost" not in caught.value.problem
    assert "begins anew" in caught.value.hint


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    (tmp_path / ".writing-abc.safetensors").write_bytes(b"half")
    TrainingBatches().kept_in(tmp_path).save(1)
    assert [file.name for file in tmp_path.iterdir()] == ["update-0000001.safetensors"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_going_on_repeats_the_uninterrupted_run_on_a_gpu(name, tmp_path):
    def fresh(seed):
        made = context(name, seed, averaged=False)
        for weight in made.weights:
            weight.data = weight.data.cuda()
        made.optimizer = make_optimizer(
            name, group_weights(made.roles, usual_rate(name, 0.01)), weight_decay=0.01
        )
        made.others = {"scaler": torch.amp.GradScaler("cuda", init_scale=1024)}
        return made

    whole = fresh(0).learn(range(7))
    fresh(0).learn(range(3)).kept_in(tmp_path).save(3)
    resumed = fresh(1)
    resumed.kept_in(tmp_path).resume()
    assert same(resumed.learn(range(3, 7)).weights, whole.weights)
