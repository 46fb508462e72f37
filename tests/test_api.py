"""The Python door: ten lines train, draw, score and merge, and what they give back shows itself."""

import ast
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dreamloom as dl
from dreamloom.api.options import list_adapters
from dreamloom.core.errors import AdapterError, ConfigError, PhotoError, RunFolderError
from dreamloom.core.events import Event, StageDone, silent
from dreamloom.merging.files.inspect import inspect_file

ROOT = Path(__file__).parents[1]
PHOTOS, STYLE = ROOT / "examples/rraj", ROOT / "examples/pixel-art"
BRIEF = {
    "train.steps": 2,
    "train.warmup_steps": 0,
    "train.batch_photos": 1,
    "train.batch_priors": 1,
    "priors.count": 2,
    "priors.steps": 1,
    "evaluate.resamples": 100,
}


@dataclass(frozen=True)
class Journey:
    """What a few lines made."""

    me: object
    style: object
    both: object
    pictures: object
    merged: object
    scores: object
    told: list[Event]


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Journey:
    out, told = tmp_path_factory.mktemp("door"), list[Event]()
    how = {"settings": BRIEF, "progress": told.append}
    me = dl.train(PHOTOS, "rraj person", base="picturebook", out=out / "me", **how)
    style = dl.train(
        STYLE, "pixel", class_noun="picture", prior="none", base="picturebook", out=out / "s", **how
    )
    both = dl.merge(me, (style, 0.8), out=out / "both.safetensors", names=("face", "style"))
    prompts = ["a photo of {subject}", "<b>a painting</b> of {subject}"]
    drawn = {"seeds": 2, "steps": 8, **how}  # fewer draw what no judge knows
    pictures = dl.generate(prompts, adapters=me, out=me.run, floor=True, **drawn)
    merged = dl.generate(prompts, adapters=both, out=me.run, name="merged", **drawn)
    scores = dl.evaluate(pictures, PHOTOS, **how)
    return Journey(me, style, both, pictures, merged, scores, told)


def test_what_was_trained_stands_for_its_file(journey: Journey):
    me = journey.me
    assert os.fspath(me) == str(me.run / "adapter.safetensors")
    assert Path(me).is_file()
    assert (me.subject, me.class_noun, me.base) == ("rraj person", "person", "picturebook")
    assert me.record.results["photo_exposures"] == 2
    assert len(me.photos) == 6
    assert "rraj person" in str(me)
    assert repr(me) == str(me)


def test_a_run_is_gone_on_with_and_another_subject_is_refused(journey: Journey):
    told = list[Event]()
    how = {"out": journey.me.run, "base": "picturebook", "settings": BRIEF}
    again = dl.train(PHOTOS, "rraj person", **how, progress=told.append)
    assert again.record.outputs == journey.me.record.outputs
    assert not [event for event in told if isinstance(event, StageDone) and event.stage == "train"]
    with pytest.raises(RunFolderError, match="another run"):
        dl.train(PHOTOS, "sks person", **how, progress=False)


def test_pictures_are_a_sequence_that_shows_itself(journey: Journey):
    pictures = journey.pictures
    assert len(pictures) == 4
    assert isinstance(pictures[0], Image.Image)
    assert [image.size for image in pictures[1:]] == [(128, 128)] * 3
    assert len([*pictures]) == 4
    assert pictures.prompts[0] == "a photo of rraj person"
    assert pictures.select(seed=1).images.pictures[0].seed == 1
    assert len(pictures.select(seed=1).floor) == 2
    assert "0, 1" in str(pictures)
    page = pictures._repr_html_()
    assert page.count("<img ") == 4
    assert "&lt;b&gt;a painting" in page
    assert "<b>a painting" not in page


def test_sets_stand_beside_each_other_picture_by_picture(journey: Journey):
    pictures = journey.pictures
    shown = dl.side_by_side({"base <model>": pictures.floor, "taught": pictures}, each=2)
    page = shown._repr_html_()
    assert page.count("<img ") == 8
    assert "base &lt;model&gt;" in page
    assert str(pictures.folder) in str(shown).replace("\n", "")
    with pytest.raises(ValueError, match="one set of pictures or more"):
        dl.side_by_side({})


def test_scores_are_a_mapping_that_prints_as_a_table(journey: Journey):
    scores = journey.scores
    identity = scores["identity"]
    assert identity.n == 4
    assert identity.floor is not None
    assert {"clip_t", "dino"} & {*scores}
    assert "identity" in str(scores)
    assert max(map(len, str(scores).splitlines())) <= 100
    assert "<pre" in scores._repr_html_()


def test_two_evaluations_are_compared_by_value_file_and_set(journey: Journey, tmp_path: Path):
    other = dl.evaluate(journey.merged, PHOTOS, settings=BRIEF, progress=silent)
    file = other.save(tmp_path / "other.json")
    by_value = dl.compare(journey.scores, other, "identity")
    assert [one.measure for one in by_value] == ["identity"]
    assert len(by_value) == 1
    assert by_value == dl.compare(f"{journey.me.run}:pictures", file, "identity")
    assert "identity" in str(by_value)


def test_a_merge_is_verified_and_stands_for_its_file(journey: Journey):
    both = journey.both
    assert Path(both).is_file()
    assert both.error == 0
    assert both.ranks
    assert "layers" in str(both)
    assert "face" in both.verify()
    with pytest.raises(RunFolderError, match="exists"):
        dl.merge(journey.me, out=both, progress=False)


def test_a_merge_keeps_what_it_is_told(journey: Journey, tmp_path: Path):
    out = tmp_path / "ties.safetensors"
    made = dl.merge(
        journey.me,
        (journey.style, 0.5),
        out=out,
        names=("face", "style"),
        method="ties",
        options={"density": 0.5},
        blocks={"style": "mid=0"},
        rank=4,
        precision="fp16",
        progress=False,
    )
    assert max(made.ranks) <= 4
    assert made.error > 0
    recipe = inspect_file(out)["recipe"]
    assert recipe["method"] == "ties"
    assert recipe["options"]["density"] == 0.5
    assert [(part["name"], part["weight"]) for part in recipe["parts"]] == [
        ("face", 1.0),
        ("style", 0.5),
    ]
    assert [bool(part.get("blocks")) for part in recipe["parts"]] == [False, True]


def test_a_diagnosis_gives_advice_and_a_picture(journey: Journey):
    found = dl.diagnose(journey.me, (journey.style, 0.8), progress=False)
    assert found.advice
    assert found.picture.size[0] > 100
    assert "cosine" in str(found)
    assert 'src="data:image/png;base64,' in found._repr_html_()


def test_what_a_merge_kept_and_what_a_faulty_script_says(journey: Journey):
    retained = dl.retention(
        journey.merged,
        base=journey.pictures.floor,
        subject=journey.pictures,
        style=journey.merged,
        photos=PHOTOS,
        style_photos=STYLE,
        settings=BRIEF,
        progress=silent,
    )
    assert "subject" in str(retained)
    audited = dl.audit(journey.pictures, PHOTOS, progress=silent)
    assert "CLIP-I" in str(audited)
    assert len(audited.audit.rows) > 2


def test_a_report_is_a_page(journey: Journey):
    page = dl.write_report(journey.me.run, progress=False)
    assert Path(page).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert dl.write_report(journey.me, progress=False).path == page.path
    assert "report.html" in page._repr_html_()


def test_a_plan_counts_without_a_gpu():
    plan = dl.plan("sdxl", gpu_memory="16GiB")
    assert plan.fits
    assert "in 16 GiB" in str(plan)


def test_photos_are_checked():
    checked = dl.check_photos(PHOTOS)
    assert checked.usable
    assert len(checked.check.photos) == 6
    assert "upright" in str(checked)


def test_progress_is_told_only_where_it_is_asked_for(journey: Journey, capsys):
    assert {event.stage for event in journey.told if isinstance(event, StageDone)} >= {
        "train",
        "photos",
        "priors",
    }
    dl.diagnose(journey.me, journey.style, progress=False)
    assert capsys.readouterr() == ("", "")
    dl.diagnose(journey.me, journey.style)
    assert "diagnose" in capsys.readouterr().err


def test_what_asks_for_attention_is_a_warning_where_nothing_is_shown(tmp_path: Path):
    rng = np.random.default_rng(0)
    for number in range(3):
        noise = rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    how = {"settings": BRIEF, "prior": "none", "out": tmp_path / "run", "progress": False}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        dl.train(tmp_path, "zzz person", base="picturebook", **how)
    assert [one for one in warned if "these are photographs" in str(one.message)]


# --- bad input ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda out: dl.train("nowhere", "rraj person", out=out), PhotoError, "nowhere"),
        (lambda out: dl.train(PHOTOS, out=out), ConfigError, "subject"),
        (lambda out: dl.train(PHOTOS, "a b", out=out, step=1), ConfigError, "argument 'step'"),
        (
            lambda out: dl.train(PHOTOS, "a b", out=out, settings={"train.step": 1}),
            ConfigError,
            "train.step",
        ),
        (lambda out: dl.generate(out=out), ConfigError, "nothing to draw"),
        (lambda out: dl.generate("a", out=out, seed=1), ConfigError, "argument 'seed'"),
        (
            lambda out: dl.generate("a", out=out, adapters=out / "x.safetensors"),
            AdapterError,
            "x.safetensors",
        ),
        (lambda out: dl.generate("a", out=out, adapters=[3]), ConfigError, "3 is no adapter"),
        (lambda out: dl.generate("a", out=out, schedulers="dim"), ConfigError, "scheduler 'dim'"),
        (
            lambda out: dl.merge(out=out.with_suffix(".safetensors")),
            ConfigError,
            "nothing to merge",
        ),
        (lambda out: dl.merge("a", out=out, methods="x"), ConfigError, "argument 'methods'"),
        (lambda out: dl.merge("a", out=out, names=("x", "y")), ConfigError, "2 names"),
        (
            lambda out: dl.merge("a", out=out, names=("x",), prompts={"y": ["p"]}),
            ConfigError,
            "'y', which names no part",
        ),
        (lambda out: dl.compare(out / "a.json", out / "b.json"), dl.DreamLoomError, "a.json"),
        (lambda out: dl.plan("sdxl", gpu_memory="much"), ConfigError, "much"),
        (lambda out: dl.study(out / "x.toml"), ConfigError, "x.toml"),
        (lambda out: dl.write_report(out), dl.DreamLoomError, ""),
    ],
)
def test_bad_input_is_refused_in_words_and_nothing_is_made(call, error, says, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(error) as refused:
        call(out)
    assert says in str(refused.value)
    assert not out.exists()


def test_adapters_are_one_or_several_with_weights():
    assert list_adapters("a") == [(Path("a"), 1.0)]
    assert list_adapters(("a", 0.5)) == [(Path("a"), 0.5)]
    assert list_adapters(("a", "b")) == [(Path("a"), 1.0), (Path("b"), 1.0)]
    assert list_adapters([("a", 0.5), Path("b")]) == [(Path("a"), 0.5), (Path("b"), 1.0)]
    assert list_adapters(()) == []


# --- the promised names ------------------------------------------------------------------


def test_type_checkers_are_told_of_the_same_names_as_python():
    tree = ast.parse(Path(dl.__file__).read_text(encoding="utf-8"))
    told = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert sorted(told) == dl.__all__ == dir(dl)
    assert {name: getattr(dl, name).__module__ for name in told} == told


def test_importing_the_door_loads_nothing_heavy():
    asked = "import sys, dreamloom; print(sorted({'torch', 'numpy', 'rich'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


OUTSIDE = """
import dreamloom as dl

me = dl.train("photos", "rraj person", base="picturebook", settings={"train.steps": 3})
pictures = dl.generate("a photo of {subject}", adapters=[(me, 0.8)], out=me.run, seeds=2)
scores = dl.evaluate(pictures, "photos")
lift: float | None = scores["identity"].lift
names: list[str] = [picture.prompt for picture in pictures.images.pictures]
both = dl.merge(me, ("style.safetensors", 0.8), out="both.safetensors", method="ties")
reveal_type(both.error)
dl.generate("x", out="y", seed=3)
dl.trian("photos")
"""


def test_an_outside_program_is_checked_against_the_package(tmp_path: Path):
    pytest.importorskip("mypy", reason="mypy comes with the extra 'dev'")
    program, settings = tmp_path / "program.py", tmp_path / "mypy.ini"
    program.write_text(OUTSIDE, encoding="utf-8")
    # Others' sources are not what is asked about, and take minutes to read.
    others = "accelerate,diffusers,peft,transformers,torch,numpy,PIL,pydantic,rich,safetensors"
    skipped = "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in others.split(","))
    settings.write_text(f"[mypy]\nstrict = true\nfollow_imports = silent\n{skipped}")
    command = (sys.executable, "-m", "mypy", "--config-file", settings, program)
    # Away from the checkout, so that what is installed is found and nothing else.
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    found = [line.split(": ", 1)[1] for line in done.stdout.splitlines()[:-1]]
    assert [line for line in found if "defined in" not in line] == [
        'note: Revealed type is "float"',
        'error: Unexpected keyword argument "seed" for "generate"; did you mean "seeds"?  '
        "[call-arg]",
        'error: Module has no attribute "trian"; maybe "train"?  [attr-defined]',
    ]
