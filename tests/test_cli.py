"""The command line as a user meets it: one clear sentence, the right exit code, nothing lost."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dreamloom.cli.main import main
from studio_set import make_photos


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


SMALL = [
    word
    for setting in (
        "train.steps=2",
        "train.rank=2",
        "train.batch_photos=1",
        "train.batch_priors=1",
        "priors.count=2",
        "priors.steps=2",
        "generate.steps=[2]",
        "generate.images_per_prompt=1",
        "evaluate.resamples=100",
    )
    for word in ("--set", setting)
]


def test_every_command_explains_itself() -> None:
    overview = run("--help")
    assert overview.exit_code == 0
    for name in main.commands:
        assert name in overview.output
        assert run(name, "--help").exit_code == 0


def test_train_generate_evaluate_merge_report(tiny_sdxl: Path, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos")
    out = tmp_path / "run"
    taught = run(
        *("train", photos, "--subject", "sks dog", "--class-noun", "dog"),
        *("--base", tiny_sdxl, "--out", out, "--device", "cpu", *SMALL),
    )
    assert taught.exit_code == 0, taught.output
    assert str(out / "adapter.safetensors") in taught.output

    drawn = run(
        *("generate", "--adapter", f"{out / 'adapter.safetensors'}:0.8", "--pack", "seed-v1"),
        *("--floor", "--out", out, "--device", "cpu", *SMALL),
    )
    assert drawn.exit_code == 0, drawn.output
    assert (out / "images" / "pictures" / "manifest.json").is_file()

    scored = run(
        *("evaluate", out / "images" / "pictures", "--photos", photos),
        *("--floor", out / "images" / "pictures_base", "--json", tmp_path / "scores.json"),
        *("--device", "cpu", *SMALL),
    )
    assert scored.exit_code == 0, scored.output
    assert "not measured" in scored.output
    card = json.loads((tmp_path / "scores.json").read_text())
    assert card["by_prompt"][0]["scored"] == "a photo of dog"
    assert json.loads((out / "scores.json").read_text())["pictures"] == card
    assert {"value", "n", "interval", "floor", "ceiling", "lift", "key"} <= set(
        card["scores"]["identity"]
    )

    merged = tmp_path / "merged.safetensors"
    adapter = out / "adapter.safetensors"
    assert run("merge", f"{adapter}:0.5", adapter, "-o", merged).exit_code == 0
    refused = run("merge", adapter, "-o", merged)
    assert refused.exit_code == 1
    assert "exists already" in refused.output
    told = json.loads(run("inspect", merged, "--json").output)
    assert told["metadata"]["dreamloom.kind"] == "merge"

    page = run("report", out)
    assert page.exit_code == 0, page.output
    assert (out / "report.html").is_file()


def test_train_takes_any_name_and_warns_of_captions_without_the_subject(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    photos = make_photos(tmp_path / "photos")
    name = os.fsdecode(b"Ren\xe9")
    try:
        (photos / "IMG_0.jpg").rename(photos / f"{name}.jpg")
    except OSError:
        name = "IMG_0"
    (photos / f"{name}.txt").write_text("a dog in a garden")
    (photos / "IMG_1.txt").write_text("a photo of SKS dog")
    shown = run("photos", photos, "--resolution", "64").output
    assert "caption: a dog in a garden" in shown
    assert "2 with a caption, no mask, no box" in shown
    words = ("train", photos, "--subject", "sks dog", "--base", tiny_sdxl, "--prior", "none")
    taught = run(*words, "--out", tmp_path / "run", "--device", "cpu", *SMALL)
    assert taught.exit_code == 0, taught.output
    said = " ".join(taught.output.split())
    assert "1 of 2 captions never name the subject, sks dog" in said
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert "1 of 2 captions never name the subject" in events


_SET = ("--set",)


def fill(text: str, places: dict[str, Path]) -> str:
    """Name the places; other braces are the user's own."""
    for name, path in places.items():
        text = text.replace(f"{{{name}}}", str(path))
    return text


_NAMED = ("--subject", "rraj person")
_TINY = ("train", "{photos}", *_NAMED, "--out", "{out}", "--base", "{tiny}", *_SET)


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        (("train", "{photos}", "--out", "{out}", "--set", "train.rnak=3"), "train.rank", 2),
        (("train", "{photos}", "--out", "{out}", "--set", "train.rank=0"), "train.rank", 2),
        (("train", "{photos}", "--out", "{out}", "--preset", "fast"), "quick", 2),
        (
            ("train", "{photos}", *_NAMED, "--out", "{out}", "--base", "sdxl"),
            "not on this machine",
            1,
        ),
        (
            ("train", "{photos}", *_NAMED, "--out", "{out}", "--base", "nowhere/at-all"),
            "nowhere/at-all",
            1,
        ),
        (("train", "{empty}", *_NAMED, "--out", "{out}"), "{empty}", 1),
        (("train", "{gone}", *_NAMED, "--out", "{out}"), "{gone}", 1),
        (("train", "{broken}", *_NAMED, "--out", "{out}"), "IMG_0.jpg", 1),
        (("train", "{photos}", *_NAMED, "--out", "{photos}"), "already holds other files", 1),
        (("train", "{photos}", *_NAMED, "--out", "{out}", "--device", "tpu"), "--device tpu", 2),
        (("train",), "Missing argument 'FOLDER'", 2),
        ((*_TINY, "objective.zero_terminal_snr=true"), "predicts noise", 2),
        (
            (*_TINY, "validation.held_out_photos=3", *_SET, "validation.every=1"),
            "none of 3 photos",
            2,
        ),
        ((*_TINY, "validation.held_out_photos=1"), "validation.every", 2),
        ((*_TINY, "objective.timestep_range=[0.5,0.5001]"), "timestep_range", 2),
        ((*_TINY, "photos.resolution_px=20"), "resolution_px", 2),
        ((*_TINY, "adapter.blocks=nowhere"), "nowhere", 2),
        ((*_TINY, "train.optimizer=adam"), "Did you mean adamw", 2),
        ((*_TINY, "train.optimizer=prodigy", *_SET, "adapter.loraplus_lr_ratio=4"), "prodigy", 2),
        ((*_TINY, "train.optimizer=schedule_free", *_SET, "train.ema_decay=0.9"), "average", 2),
        ((*_TINY, "validation.tracker=tensorbord"), "tensorboard", 2),
        (("train", "{photos}", *_NAMED, "--out", "{out}", "--format", "kohya"), "kohya", 1),
        ((*_TINY, "priors.kind=folder"), "--prior DIR", 2),
        ((*_TINY, "seed=1", "--prior", "{gone}"), "{gone}", 1),
        ((*_TINY, "seed=1", "--from", "{gone}"), "{gone}", 1),
        (
            (*_TINY, 'adapter.placeholder_tokens={"<foo>"="person"}'),
            "<foo> stands in no photo's prompt",
            2,
        ),
        ((*_TINY, 'validation.prompts=["a {foo}"]'), "validation.prompts", 2),
        (("generate", "--adapter", "{pickle}", "--prompt", "x", "--out", "{out}"), "pickle", 1),
        (("generate", "--adapter", "{gone}", "--prompt", "x", "--out", "{out}"), "{gone}", 1),
        (("generate", "--out", "{out}"), "nothing to draw", 2),
        (
            ("generate", "--prompt", "a {subjct}", "--out", "{out}"),
            "{subjct}, which means nothing here",
            2,
        ),
        (("generate", "--prompt", "a {x|y}", "--out", "{out}"), "--prompt for each choice", 2),
        (("generate", "--prompt", "x", "--size", "wide", "--out", "{out}"), "such as 768x512", 2),
        (
            ("generate", "--prompt", "x", "--negative-prompt", "a {x}", "--out", "{out}"),
            "generate.negative_prompt",
            2,
        ),
        (
            ("generate", "--base", "{tiny}", "--prompt", "x", "--size", "60x64", "--out", "{out}"),
            "generate.width_px = 60",
            2,
        ),
        (("generate", "--adapter", "{gone}:1@0,2", "--out", "{out}"), "'2' is no WEIGHT@", 2),
        (("generate", "--compose", "swich", "--out", "{out}"), "'swich' is none of sum, switch", 2),
        (("merge", "{pickle}", "-o", "{out}.safetensors"), "pickle", 1),
        (("merge", "{photos}/IMG_0.jpg", "-o", "{out}.safetensors"), "IMG_0.jpg", 1),
        (("evaluate", "{gone}", "--photos", "{photos}"), "{gone}", 1),
        (("report", "{gone}"), "{gone}", 1),
        (("models", "path", "sdxl"), "picturebook", 1),
    ],
)
def test_bad_input_ends_with_one_clear_sentence(
    words: tuple[str, ...], says: str, code: int, tmp_path: Path, tiny_sdxl: Path
) -> None:
    places = {
        "tiny": tiny_sdxl,
        "photos": make_photos(tmp_path / "photos"),
        "empty": tmp_path / "empty",
        "gone": tmp_path / "gone",
        "out": tmp_path / "out",
        "broken": make_photos(tmp_path / "broken", count=1),
        "pickle": tmp_path / "style.ckpt",
    }
    places["empty"].mkdir()
    places["pickle"].write_bytes(b"\x80\x02")
    broken = places["broken"] / "IMG_0.jpg"
    broken.write_bytes(broken.read_bytes()[:700])
    before = {path: path.stat().st_size for path in tmp_path.rglob("*")}

    result = run(*(fill(word, places) for word in words))

    assert result.exit_code == code, result.output
    assert fill(says, places) in result.output.replace("\n", " ")
    assert "Traceback" not in result.output
    assert {path: path.stat().st_size for path in tmp_path.rglob("*")} == before


def test_the_embedded_models_folder_is_printed() -> None:
    folder = Path(run("models", "path", "picturebook").output.strip())
    assert (folder / "model_index.json").is_file()


def test_every_setting_is_listed_with_its_meaning() -> None:
    listed = run("settings").output
    assert "train.rank = 16" in listed
    assert "Rank of the adapter" in listed


def test_photos_are_checked_in_words_and_json(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos")
    (photos / "notes.txt").write_text("not a picture")
    words = run("photos", photos)
    assert words.exit_code == 0
    assert "notes.txt" in words.output
    report = json.loads(run("photos", photos, "--json").output)
    assert [photo["file"] for photo in report["photos"]] == [f"IMG_{i}.jpg" for i in range(3)]
    (photos / "IMG_1.jpg").write_bytes(b"")
    assert run("photos", photos).exit_code == 1
