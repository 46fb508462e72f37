"""What a running training can be asked for: what it does, and that it learns the same."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from dreamloom.cli.main import main
from dreamloom.core.config.loading import load_config
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import ConfigError, RunFolderError, TrainingError
from dreamloom.core.events import (
    AdapterSaved,
    Event,
    LossLogged,
    Note,
    RequestTaken,
    ValidationSampled,
)
from dreamloom.core.manifests import (
    ClassImageSet,
    ImageSet,
    PhotoSet,
    Picture,
    read_image_set,
    write_manifest,
)
from dreamloom.core.requests import (
    REQUEST_KINDS,
    Request,
    announce_training,
    ask,
    find_training,
    take_requests,
)
from dreamloom.core.run_folder import RunFolder
from dreamloom.evaluation.metrics.scorecard import Score, Scorecard
from dreamloom.lora.reading import read_adapter
from dreamloom.models.base import Model, Sampler, Shot
from dreamloom.report.samples import sample_galleries
from dreamloom.report.story import read_story
from dreamloom.training.train import train_adapter
from dreamloom.training.validation_samples import ScoreImages, ValidationSampler
from studio_set import claimed, small_config

Sets = tuple[PhotoSet, ClassImageSet]
Wish = tuple[str, Sequence[str]]
SAMPLE, SAVE, STOP = (("sample", ()), ("save", ()), ("stop", ()))
PAINTING = ("prompts", ("a painting of {subject}", "a dog in the snow"))
BEFORE = ["a photo of rraj person"]
AFTER = ["a painting of rraj person", "a dog in the snow"]


def no_warning(text: str) -> None:
    raise AssertionError(text)


# ------------------------------------------------------------------------------ files


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return claimed(tmp_path / "run")


def test_each_request_is_taken_once_in_the_order_of_asking(run: RunFolder) -> None:
    with announce_training(run):
        assert take_requests(run, no_warning) == []
        ask(run, "save")
        ask(run.path, "prompts", ("a photo of {subject}", "a castle"))
        file = ask(str(run.path), "sample")
        assert file.is_file()
        assert take_requests(run, no_warning) == [
            Request("save"),
            Request("prompts", ("a photo of {subject}", "a castle")),
            Request("sample"),
        ]
        assert not file.exists()
        assert take_requests(run, no_warning) == []
    assert {path.name for path in run.path.iterdir()} == {"records"}


def test_what_is_no_request_is_told_and_removed(run: RunFolder) -> None:
    run.requests.mkdir()
    bad = ("no JSON", "[]", '{"kind": "dance"}', '{"kind": ["stop"]}', '{"kind": "prompts"}')
    bad += ('{"kind": "prompts", "prompts": ["a {foo}"]}', '{"kind": "prompts", "prompts": [3]}')
    bad += ('{"kind": "stop", "prompts": ["a castle"]}', "[" * 100_000)
    for number, text in enumerate(bad):
        (run.requests / f"{number}.json").write_text(text)
    (run.requests / ".writing-abc.json").write_text('{"kind": "stop"}')
    (run.requests / "9.json").write_text('{"kind": "stop"}')
    warnings: list[str] = []
    assert take_requests(run, warnings.append) == [Request("stop")]
    assert len(warnings) == len(bad)
    assert "the request 0.json is left out: it is not JSON" in warnings
    assert "the request 2.json is left out: A training cannot be asked for 'dance'." in warnings
    # What another process is still writing stays.
    assert [path.name for path in run.requests.iterdir()] == [".writing-abc.json"]


@pytest.mark.parametrize(
    ("kind", "prompts", "says"),
    [
        ("sampel", (), "Did you mean sample?"),
        ("prompts", (), "validation.prompts"),
        ("prompts", ("a {foo}",), "the only word in braces may be {subject}"),
        ("prompts", (" ",), "it is blank"),
        ("stop", ("a castle",), "takes no prompts"),
    ],
)
def test_what_cannot_be_asked_is_refused_and_leaves_no_file(
    run: RunFolder, kind: str, prompts: Sequence[str], says: str
) -> None:
    with announce_training(run):
        with pytest.raises(ConfigError) as refused:
            ask(run, kind, prompts)
        assert says in str(refused.value)
        assert not run.requests.exists()


def test_where_no_training_runs_nothing_is_asked(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="There is no run in"):
        ask(tmp_path / "nothing", "stop")
    with pytest.raises(TrainingError, match=r"No training runs in .*run, so nothing is asked"):
        ask(run, "stop")
    run.adapter.touch()
    with pytest.raises(TrainingError, match="for it is finished"):
        ask(run, "stop")
    assert not run.requests.exists()
    assert find_training(run) is None
    for damaged in ("", "[]", '{"pid": "x"}', '{"pid": -1, "started_s": 0, "host": ""}'):
        run.training_file.write_text(damaged)
        find_training(run)


def test_a_killed_training_runs_no_more_nor_does_another_process_of_its_number(
    run: RunFolder,
) -> None:
    words = (
        "import sys, time; from dreamloom.core.requests import announce_training\n"
        "from dreamloom.core.run_folder import RunFolder\n"
        "with announce_training(RunFolder(sys.argv[1])): print('here', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", words, str(run.path)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        found = find_training(run)
        assert found is not None
        assert found.pid == child.pid
        left = ask(run, "stop")
        child.kill()
        # Whether its parent has noticed or not.
        psutil.wait_procs([psutil.Process(child.pid)], timeout=0.1)
        for _ in range(100):
            if find_training(run) is None:
                break
            time.sleep(0.05)
        assert find_training(run) is None
    assert find_training(run) is None
    with pytest.raises(TrainingError, match="No training runs"):
        ask(run, "sample")
    # What it did not take is dropped by the next one.
    assert left.is_file()
    with announce_training(run):
        assert take_requests(run, no_warning) == []
        known = json.loads(run.training_file.read_text())
        run.training_file.write_text(json.dumps({**known, "started_s": known["started_s"] - 60}))
        assert find_training(run) is None
        # Nobody here sees what runs on another machine.
        run.training_file.write_text(json.dumps({**known, "pid": 0, "host": "elsewhere"}))
        assert find_training(run) is not None


def test_of_several_processes_the_first_alone_says_that_it_trains(run: RunFolder) -> None:
    with announce_training(run, is_main=False):
        assert find_training(run) is None
    with announce_training(run):
        with announce_training(run, is_main=False):
            pass
        assert find_training(run) is not None


def test_asking_loads_no_torch() -> None:
    words = "import sys, dreamloom.core.requests; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", words], check=True)


def test_looking_for_requests_costs_an_update_next_to_nothing(run: RunFolder) -> None:
    with announce_training(run):
        ask(run, "stop")
        take_requests(run, no_warning)  # from now on the folder is there
        spent = []
        for _ in range(50):
            began = time.perf_counter()
            take_requests(run, no_warning)
            spent.append(time.perf_counter() - began)
    # Some 10 µs; the least of many, for others use this machine, too.
    assert min(spent) < 100e-6


# ------------------------------------------------------------------------------ training


def configure(model: Model, **settings: Any) -> LoomConfig:
    small = {
        **{"train__steps": 4, "train__batch_photos": 1, "train__checkpointing_steps": 100},
        **{"train__prior_weight": 0.0, "priors__kind": "none"},
        **{"validation__images": 1, "validation__steps": 1},
    }
    return small_config(model, **{**small, **settings})


def train(
    run: RunFolder,
    model: Model,
    sets: Sets,
    config: LoomConfig,
    wishes: dict[int, Sequence[Wish]] | None = None,
    judge: ScoreImages | None = None,
) -> list[Event]:
    """Train, and ask for something as soon as the loss of an update is told."""
    told: list[Event] = []

    def observe(event: Event) -> None:
        told.append(event)
        if isinstance(event, LossLogged):
            for kind, prompts in (wishes or {}).get(event.update, ()):
                ask(run, kind, prompts)

    train_adapter(run, model, sets[0], None, config, observe, judge)
    return told


def of_kind(told: list[Event], kind: type) -> list[Any]:
    return [event for event in told if isinstance(event, kind)]


def looks(told: list[Event]) -> list[int]:
    return [event.update for event in of_kind(told, ValidationSampled)]


def taken(told: list[Event]) -> list[tuple[int, str]]:
    return [(event.update, event.kind) for event in of_kind(told, RequestTaken)]


def prompts_of(run: RunFolder, update: int) -> list[str]:
    images = read_image_set(run.validation_samples / f"{update:06d}")
    return [picture.prompt for picture in images.pictures]


def equal(first: Path, second: Path) -> bool:
    one, other = load_file(first), load_file(second)
    return one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)


class Judge:
    """Scores pictures as a list says, and keeps what was shown."""

    def __init__(self, *lifts: float | None) -> None:
        self.lifts = list(lifts)
        self.floors: list[list[str] | None] = []
        self.pictures: list[bytes] = []

    def __call__(self, images: ImageSet, floor: ImageSet | None) -> Scorecard:
        self.floors.append([one.prompt for one in floor.pictures] if floor else None)
        if floor is not None:
            assert [(one.prompt, one.seed) for one in floor.pictures] == [
                (one.prompt, one.seed) for one in images.pictures
            ]
            self.pictures.append(Image.open(floor.paths()[0]).tobytes())
        lift = self.lifts.pop(0)
        score = Score(value=lift, n=1, floor=0.0, ceiling=1.0, lift=lift)
        rest = {"photos": 3, "confidence": 0.95, "resamples": 100, "pictures": ()}
        return Scorecard(scores={"identity": score}, encoders="picturebook", **rest)


@pytest.fixture(scope="module")
def plain(model: Model, sets: Sets, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A training that nobody asked for anything."""
    run = claimed(tmp_path_factory.mktemp("plain"))
    train(run, model, sets, configure(model))
    return run


def test_asked_for_samples_and_files_a_training_learns_the_same(
    model: Model, sets: Sets, tmp_path: Path, plain: RunFolder
) -> None:
    """With validation off, and a judge: the untrained model's pictures are drawn, too."""
    run, judge = claimed(tmp_path / "asked"), Judge(0.5, 0.5)
    wishes = {1: [SAVE, SAMPLE, PAINTING], 2: [SAMPLE, SAMPLE]}
    told = train(run, model, sets, configure(model), wishes, judge)
    assert equal(plain.adapter, run.adapter)
    assert looks(told) == [1, 2]
    asked = [(1, "save"), (1, "sample"), (1, "prompts"), (2, "sample"), (2, "sample")]
    assert taken(told) == asked
    assert prompts_of(run, 1) == prompts_of(run, 2) == AFTER
    file = run.saved_adapters / "adapter-000001.safetensors"
    assert of_kind(told, AdapterSaved) == [AdapterSaved(1, str(file))]
    assert read_adapter(file).metadata["ss_steps"] == "1"
    assert equal(file, run.validation_samples / "000001" / "adapter.safetensors")
    assert not equal(file, run.adapter)
    # One drawing without the adapter serves both.
    assert judge.floors == [AFTER, AFTER]
    assert judge.pictures[0] == judge.pictures[1]
    assert len(list(run.validation_samples.glob("untrained-*"))) == 1
    # Samples on request alone recommend nothing: the finished adapter was not among them.
    record = run.read_record("train")
    assert record is not None
    assert "recommended" not in record.results
    assert not run.training_file.exists()
    assert not run.requests.exists()


def test_the_floor_of_new_prompts_is_what_the_untrained_model_draws(
    model: Model, sets: Sets, tmp_path: Path
) -> None:
    run, judge = claimed(tmp_path), Judge(0.5)
    # So fast that the pictures change.
    config = configure(model, train__learning_rate=0.05, train__warmup_steps=0, train__steps=2)
    train(run, model, sets, config, {2: [PAINTING, SAMPLE]}, judge)
    sampler = Sampler("ddim", 1, float(config.generate.guidance))
    (untrained,) = model.sample([Shot(AFTER[0], 0)], sampler)
    (drawn,) = judge.pictures
    # Adapted layers that are switched off compute in another order than those without an adapter.
    assert largest_gap(drawn, untrained.tobytes()) <= 1
    with Image.open(run.validation_samples / "000002" / "0000.png") as taught:
        assert largest_gap(taught.tobytes(), untrained.tobytes()) > 1


def largest_gap(one: bytes, other: bytes) -> int:
    """The most that a level of two pictures differs by."""
    return max(abs(here - there) for here, there in zip(one, other, strict=True))


def test_stop_does_what_ctrl_c_does(
    model: Model, sets: Sets, tmp_path: Path, plain: RunFolder
) -> None:
    run = claimed(tmp_path)
    wishes = {3: [STOP, PAINTING, SAMPLE]}
    with pytest.raises(TrainingError, match=r"Stopped after update 3 of 4; nothing is lost"):
        train(run, model, sets, configure(model), wishes)
    assert not run.training_file.exists()
    assert [one.name for one in run.checkpoints.iterdir()] == ["update-0000003.safetensors"]
    assert prompts_of(run, 3) == AFTER
    # The prompts stay what they became.
    told = train(run, model, sets, configure(model, validation__every=4))
    assert len(of_kind(told, LossLogged)) == 1
    assert looks(told) == [4]
    assert prompts_of(run, 4) == AFTER
    assert equal(plain.adapter, run.adapter)


def test_prompts_that_cannot_be_read_are_those_of_the_settings(
    model: Model, sets: Sets, tmp_path: Path
) -> None:
    run = claimed(tmp_path / "damaged")
    run.validation_samples.mkdir()
    run.validation_prompts.write_text('{"prompts": ["a {foo}"]}')
    told = train(run, model, sets, configure(model, train__steps=1), {1: [SAMPLE]})
    assert prompts_of(run, 1) == ["a photo of rraj person"]
    (warning,) = [note.text for note in of_kind(told, Note) if "cannot be read" in note.text]
    assert warning.endswith("prompts.json cannot be read, so validation.prompts are drawn")


def test_looks_with_other_prompts_are_not_compared(
    model: Model, sets: Sets, tmp_path: Path
) -> None:
    """The likeness of the first prompts' pictures was greater, and says nothing of the others'."""
    run, judge = claimed(tmp_path), Judge(0.0, 0.9, 0.6, 0.2)
    config = configure(model, validation__every=1, train__steps=3)
    told = train(run, model, sets, config, {2: [PAINTING]}, judge)
    assert looks(told) == [0, 1, 2, 3]
    assert [prompts_of(run, update) for update in range(4)] == [BEFORE, BEFORE, AFTER, AFTER]
    assert judge.floors == [None, BEFORE, AFTER, AFTER]
    record = run.read_record("train")
    assert record is not None
    found = record.results["recommended"]
    assert found["update"] == 2
    assert found["why"].endswith("; 1 with other prompts are not compared")
    # The report lays them side by side, each prompt in its row.
    (gallery,) = sample_galleries(read_story(run.path))
    rows = [row for _, group in gallery.groups for row in group]
    assert [row.prompt for row in rows] == BEFORE + AFTER


def test_what_is_drawn_on_request_ends_nothing_and_delays_nothing(
    model: Model, sets: Sets, tmp_path: Path
) -> None:
    """It is better than the validations before and after it."""
    run, judge = claimed(tmp_path), Judge(0.0, 0.5, 0.9, 0.4)
    patient = {"validation__every": 2, "validation__patience": 1, "train__steps": 5}
    told = train(run, model, sets, configure(model, **patient), {3: [SAMPLE]}, judge)
    assert looks(told) == [0, 2, 3, 4]
    record = run.read_record("train")
    assert record is not None
    assert record.results["stopped"]["update"] == 4


@pytest.mark.parametrize(
    ("lifts", "waits"),
    [
        # The first prompts' likeness was greater; the others' is measured from their own first.
        (((BEFORE, 0.9), (BEFORE, 0.8), (AFTER, 0.3)), True),
        (((BEFORE, 0.9), (AFTER, 0.3), (AFTER, 0.2)), False),
        (((BEFORE, 0.9), (AFTER, 0.3), (AFTER, 0.4)), True),
        # New prompts may show nobody.
        (((BEFORE, 0.9), (AFTER, None), (AFTER, None)), True),
    ],
)
def test_patience_waits_anew_for_new_prompts(
    run: RunFolder, lifts: Sequence[tuple[list[str], float | None]], waits: bool
) -> None:
    for number, (prompts, lift) in enumerate(lifts, start=1):
        folder = run.validation_samples / f"{number * 10:06d}"
        folder.mkdir(parents=True)
        (folder / "adapter.safetensors").touch()
        pictures = tuple(
            Picture(file="0.png", prompt=one, seed=0, scheduler="ddim", steps=1, guidance=1.0)
            for one in prompts
        )
        images = ImageSet(folder=folder, base={}, resolution_px=64, pictures=pictures)
        write_manifest(images)
        (folder / "scores.json").write_text(Judge(lift)(images, None).model_dump_json())
    run.validation_prompts.write_text(json.dumps({"prompts": AFTER}))
    config = load_config(sets=("validation.every=10", "validation.patience=1"))
    made = ValidationSampler(run, None, config, None, None, print)  # type: ignore[arg-type]
    assert (made.find_reason_to_stop(len(lifts) * 10) == "") == waits


# ------------------------------------------------------------------------------ command


def say(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(word) for word in words])
    return done.exit_code, " ".join(done.output.split())


def test_the_command_asks(run: RunFolder) -> None:
    with announce_training(run):
        code, said = say("ask", run.path, "save")
        assert (code, said) == (
            0,
            "Asked: after the update that it is at, the training writes a checkpoint and the "
            "adapter.",
        )
        code, said = say("ask", run.path, "prompts", "--prompt", "a {subject}", "--json")
        assert json.loads(said)["prompts"] == ["a {subject}"]
        assert take_requests(run, no_warning) == [
            Request("save"),
            Request("prompts", ("a {subject}",)),
        ]
        for kind in REQUEST_KINDS:
            words = ("--prompt", "a castle") if kind == "prompts" else ()
            assert say("ask", run.path, kind, *words)[0] == 0


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        (("sampel",), "Did you mean sample?", 2),
        (("prompts",), "at least one --prompt", 2),
        (("stop", "--prompt", "x"), "stop takes none", 2),
        (("prompts", "--prompt", "a {foo}"), "validation.prompts", 2),
        (("stop",), "No training runs in", 1),
    ],
)
def test_the_command_says_what_is_wrong(
    run: RunFolder, words: Sequence[str], says: str, code: int
) -> None:
    done, said = say("ask", run.path, *words)
    assert (done, says in said) == (code, True), said


@pytest.mark.slow
def test_two_processes_do_the_same_together(tiny_sdxl: Path, tmp_path: Path) -> None:
    """Asked while it runs, both stop after the same update, and the first one draws and writes."""
    from studio_set import make_photos

    make_photos(tmp_path / "photos", count=4)
    out = RunFolder(tmp_path / "two")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += ["-m", "dreamloom", "train", str(tmp_path / "photos"), "--base", str(tiny_sdxl)]
    words += ["--subject", "sks dog", "--device", "cpu", "--prior", "none", "--out", str(out.path)]
    settings = ("train.steps=100000", "train.rank=2", "train.batch_photos=1")
    words += [word for one in settings for word in ("--set", one)]
    words += ["--set", "validation.images=1", "--set", "validation.steps=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as both:
        until = time.monotonic() + 120
        while find_training(out) is None and time.monotonic() < until:
            time.sleep(0.2)
        for kind in ("save", "sample", "stop"):
            ask(out, kind)
        _, said = both.communicate(timeout=180)
    assert both.returncode != 0
    assert "nothing is lost" in said
    lines = map(json.loads, out.events_file.read_text().splitlines())
    assert [one["kind"] for one in lines if one["event"] == "RequestTaken"] == [
        "save",
        "sample",
        "stop",
    ]
    assert len(list(out.saved_adapters.glob("*.safetensors"))) == 1
    assert len(list(out.validation_samples.glob("[0-9]*/0000.png"))) == 1
    assert len(list(out.checkpoints.glob("*.safetensors"))) == 1
