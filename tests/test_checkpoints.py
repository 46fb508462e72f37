"""Checkpoints: what goes on from one is what would have gone on without it, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import Parameter

from dreamloom import checkpoints
from dreamloom.checkpoints import load_checkpoint, save_checkpoint
from dreamloom.errors import TrainingError

INPUTS = {"photos": "a1", "base": "b2", "settings": "c3"}


class Lesson:
    """A few weights, of which the last is never used, under AdamW."""

    def __init__(self, shapes=((3, 2), (5,), (2, 2)), seed=0):
        dice = torch.Generator().manual_seed(seed)
        self.weights = [Parameter(torch.randn(*shape, generator=dice)) for shape in shapes]
        self.optimizer = torch.optim.AdamW(self.weights, lr=0.05, weight_decay=0.1)

    def learn(self, updates):
        for update in updates:
            dice = torch.Generator().manual_seed(update)
            self.optimizer.zero_grad()
            loss = sum(
                (weight * torch.randn(weight.shape, generator=dice)).sum().square()
                for weight in self.weights[:-1]
            )
            loss.backward()
            self.optimizer.step()
        return self

    def save(self, path, updates_done=4, inputs=INPUTS):
        save_checkpoint(path, self.weights, self.optimizer, inputs, updates_done)

    def load(self, path, inputs=INPUTS):
        return load_checkpoint(path, self.weights, self.optimizer, inputs)

    def state(self):
        moments = [self.optimizer.state.get(weight, {}) for weight in self.weights]
        return [weight.detach().clone() for weight in self.weights], moments


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoints" / "last.safetensors"


def test_going_on_repeats_the_uninterrupted_run_bit_for_bit(path):
    whole = Lesson().learn(range(7))
    Lesson().learn(range(4)).save(path)
    resumed = Lesson(seed=1)
    assert resumed.load(path) == 4
    resumed.learn(range(4, 7))
    for one, other in zip(whole.weights, resumed.weights, strict=True):
        assert torch.equal(one, other)
    # The test can fail: without AdamW's moments the next updates are others.
    forgetful = Lesson(seed=1)
    forgetful.load(path)
    forgetful.optimizer.state.clear()
    assert not torch.equal(forgetful.learn(range(4, 7)).weights[0], whole.weights[0])


def test_the_moments_come_back_as_they_were(path):
    saved = Lesson().learn(range(4))
    saved.save(path)
    loaded = Lesson(seed=1).learn(range(2))
    loaded.load(path)
    (weights, moments), (same_weights, same_moments) = saved.state(), loaded.state()
    for one, other in zip(weights, same_weights, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(moments, same_moments, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert all(one[name].dtype == other[name].dtype for name in one)
    assert moments[0]["step"] == 4
    assert moments[-1] == {}


def test_a_checkpoint_from_before_the_first_update_forgets_later_moments(path):
    Lesson().save(path, updates_done=0)
    later = Lesson().learn(range(3))
    assert later.load(path) == 0
    assert torch.equal(later.learn(range(5)).weights[0], Lesson().learn(range(5)).weights[0])


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
    Lesson().learn(range(4)).save(path)
    lesson = Lesson(seed=1)
    before = lesson.state()[0]
    with pytest.raises(TrainingError) as caught:
        lesson.load(path, inputs)
    assert caught.value.problem == f"The checkpoint {path} was made with other {named}."
    assert "--out" in caught.value.hint
    assert all(map(torch.equal, before, lesson.weights))


@pytest.mark.parametrize("shapes", [((3, 2), (5,)), ((3, 2), (5,), (2, 3)), ((3, 2),) * 4])
def test_other_weights_are_refused_before_any_is_touched(path, shapes):
    Lesson().learn(range(4)).save(path)
    lesson = Lesson(shapes, seed=1)
    before = lesson.state()[0]
    with pytest.raises(TrainingError, match="holds other weights than this model trains"):
        lesson.load(path)
    assert all(map(torch.equal, before, lesson.weights))


def refusal(path):
    with pytest.raises(TrainingError) as caught:
        Lesson().load(path)
    assert caught.value.problem.startswith(f"The checkpoint {path} cannot be read")
    assert caught.value.hint == "Delete it to start from the beginning."


def test_a_damaged_file_is_told_with_the_way_out(path):
    Lesson().learn(range(4)).save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[: len(whole) // 2], b"\xff" * len(whole)):
        path.write_bytes(damaged)
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
    ],
)
def test_a_file_of_another_kind_is_told_alike(tmp_path, story):
    path = tmp_path / "other.safetensors"
    save_file({"0.weight": torch.zeros(1)}, path, metadata=story)
    refusal(path)


def test_a_write_that_fails_keeps_the_older_checkpoint(path, monkeypatch):
    lesson = Lesson().learn(range(4))
    lesson.save(path)

    def fill_the_disk(tensors, filename, metadata):
        save_file(tensors, filename, metadata=metadata)
        filename.write_bytes(filename.read_bytes()[:10])
        raise OSError("no space left")

    monkeypatch.setattr(checkpoints, "save_file", fill_the_disk)
    with pytest.raises(OSError, match="no space left"):
        lesson.learn(range(4, 6)).save(path, updates_done=6)
    assert Lesson().load(path) == 4
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_checkpoint_is_safetensors_that_tells_what_it_is(path):
    from safetensors import safe_open

    Lesson().learn(range(4)).save(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"updates_done": "4", "inputs": json.dumps(INPUTS)}
        assert "0.exp_avg_sq" in file.keys()  # noqa: SIM118
        assert "2.exp_avg_sq" not in file.keys()  # noqa: SIM118


@pytest.mark.gpu
def test_going_on_repeats_the_uninterrupted_run_on_a_gpu(path):
    def lesson(seed):
        fresh = Lesson(seed=seed)
        for weight in fresh.weights:
            weight.data = weight.data.cuda()
        return fresh

    def learn(taught, updates):
        for update in updates:
            dice = torch.Generator("cuda").manual_seed(update)
            for weight in taught.weights:
                weight.grad = torch.randn(weight.shape, generator=dice, device="cuda")
            taught.optimizer.step()
        return taught

    whole = learn(lesson(0), range(7))
    learn(lesson(0), range(4)).save(path)
    resumed = lesson(1)
    resumed.load(path)
    learn(resumed, range(4, 7))
    for one, other in zip(whole.weights, resumed.weights, strict=True):
        assert torch.equal(one, other)
