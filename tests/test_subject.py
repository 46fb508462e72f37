"""The subject in words: it is named, and everything that is taught is said before it is."""

from pathlib import Path
from shutil import copytree

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from dreamloom.cli.main import main
from dreamloom.core.config.loading import load_config
from dreamloom.core.config.settings import SubjectConfig
from dreamloom.core.errors import ConfigError, RunFolderError
from dreamloom.core.manifests import ImageSet
from dreamloom.pipeline.score import find_subject
from dreamloom.pipeline.subject import (
    check_held_out,
    describe_reading,
    fill_subject,
    require_subject,
    warn_of_photographs,
)
from dreamloom.pipeline.train import open_run, take_up
from studio_set import make_photos

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_ones_own_photos_are_taught_under_a_name_that_somebody_gave(tmp_path):
    photos = make_photos(tmp_path / "photos")
    result = run("train", photos, "--out", tmp_path / "run", "--base", "picturebook")
    assert result.exit_code == 2
    assert '--subject "rraj person"' in result.output
    assert not (tmp_path / "run").exists()


def test_a_file_may_name_the_subject(tmp_path):
    file = tmp_path / "loom.toml"
    file.write_text('[subject]\nphrase = "sks dog"\n')
    require_subject(load_config(file=file))
    file.write_text("[train]\nrank = 2\n")
    with pytest.raises(ConfigError, match="Nobody says"):
        require_subject(load_config(file=file))


def test_a_phrase_of_one_word_does_not_become_its_own_class():
    with pytest.raises(ConfigError, match="--class-noun"):
        require_subject(load_config(overrides={"subject.phrase": "rraj"}))
    named = {"subject.phrase": "rraj", "subject.class_noun": "person"}
    require_subject(load_config(overrides=named))


@pytest.mark.parametrize("phrase", [" ", "", "{subject} dog", "sks {subjct}"])
def test_a_phrase_says_something_and_has_no_blanks(phrase):
    with pytest.raises(ConfigError, match=r"subject\.phrase"):
        load_config(overrides={"subject.phrase": phrase})


@pytest.mark.parametrize("noun", [" ", "{class_noun}"])
def test_so_does_a_class_noun(noun):
    with pytest.raises(ConfigError, match=r"subject\.class_noun"):
        load_config(overrides={"subject.class_noun": noun})


@pytest.mark.parametrize("prompt", ["a {subjct}", "a {}", "a {subject!x}", "a {subject:d}", "a {"])
def test_a_prompt_has_the_one_blank_that_is_filled_in(prompt):
    with pytest.raises(ConfigError, match=r"\{subject\}"):
        load_config(sets=[f"subject.photo_prompt={prompt}"])


def test_the_noun_follows_the_phrase_that_was_given_last(tmp_path):
    file = tmp_path / "loom.toml"
    file.write_text('[subject]\nphrase = "rraj person"\nclass_noun = "man"\n')

    def noun(**given: str) -> str:
        overrides = {f"subject.{name}": value for name, value in given.items()}
        return load_config(file=file, overrides=overrides).subject.class_noun

    assert noun() == "man"
    assert noun(phrase="rraj person") == "man"
    assert noun(phrase="sks dog") == "dog"
    assert noun(phrase="sks dog", class_noun="animal") == "animal"
    assert load_config(file=file, sets=["subject.phrase=sks cat"]).subject.class_noun == "cat"


def test_a_run_goes_on_with_its_own_subject_only(tmp_path):
    known = load_config(overrides={"subject.phrase": "rraj person", "subject.class_noun": "man"})
    begun = open_run(tmp_path / "run", known)
    same_phrase = load_config(overrides={"subject.phrase": "rraj person"})
    for given in (load_config(), known, same_phrase):
        assert take_up(begun, given) == known
    for name, value in (("phrase", "zzz dog"), ("class_noun", "dog"), ("class_noun", "person")):
        given = load_config(overrides={f"subject.{name}": value})
        with pytest.raises(
            RunFolderError, match=rf"subject\.{name} is .* there and '{value}' here"
        ):
            take_up(begun, given)


def test_a_misspelt_blank_is_refused_with_the_nearest():
    assert fill_subject("a {subject} in snow, {{", "sks dog") == "a sks dog in snow, {{"
    with pytest.raises(ConfigError, match=r"\{subjct\}.*Did you mean \{subject\}"):
        fill_subject("a {subjct}", "sks dog")
    with pytest.raises(ConfigError, match="nobody is named"):
        fill_subject("a {subject}", "")


def test_generate_refuses_it_before_a_model_is_loaded(tmp_path):
    asked = ("generate", "--base", "nowhere/at-all", "--out", tmp_path / "out")
    result = run(*asked, "--prompt", "a {subjct}")
    assert result.exit_code == 2
    assert "{subjct}" in result.output


def test_pictures_know_their_noun_where_the_command_does_not(tmp_path):
    drawn = {"folder": tmp_path, "base": {}, "resolution_px": 64, "pictures": ()}
    pictures = ImageSet(**drawn, subject="rraj", class_noun="person")
    given = load_config(overrides={"subject.phrase": "rraj"})
    assert find_subject(given, pictures) == SubjectConfig(phrase="rraj", class_noun="person")
    with pytest.raises(ConfigError, match="--class-noun"):
        find_subject(load_config(overrides={"subject.phrase": "sks"}), pictures)


@pytest.mark.parametrize("copied", [False, True])
def test_photos_of_the_subject_are_no_class_images(copied, tmp_path):
    photos = make_photos(tmp_path / "photos")
    priors = copytree(photos, tmp_path / "priors") if copied else photos
    if copied:
        (priors / "IMG_0.jpg").rename(priors / "other.jpg")
        Image.new("RGB", (80, 80), "red").save(priors / "own.png")
    result = run(
        *("train", photos, "--subject", "rraj person", "--prior", priors),
        *("--out", tmp_path / "run", "--base", "picturebook"),
    )
    assert result.exit_code == 2
    assert "3 pictures in" in result.output
    assert not (tmp_path / "run").exists()


def test_photos_of_the_subject_are_no_strangers(tmp_path):
    photos = make_photos(tmp_path / "photos")
    words = ("--photos", photos, "--strangers", photos, "--device", "cpu")
    result = run("evaluate", make_photos(tmp_path / "drawn", count=1), *words)
    assert result.exit_code == 2
    assert "3 pictures in" in result.output


def test_held_out_photos_are_not_taught(tmp_path):
    photos = make_photos(tmp_path / "photos")
    (photos / "copy.jpg").write_bytes((photos / "IMG_2.jpg").read_bytes())
    held = load_config(sets=["validation.held_out_photos=1"])
    with pytest.raises(ConfigError, match=r"copy\.jpg is held out.*IMG_2\.jpg"):
        check_held_out(photos, held)
    check_held_out(make_photos(tmp_path / "others"), held)
    check_held_out(photos, load_config())


def test_what_is_taught_is_said_first(tiny_sdxl, tmp_path):
    photos = make_photos(tmp_path / "photos")
    small = [
        word
        for setting in ("train.steps=1", "train.rank=2", "train.batch_photos=1", "priors.kind=none")
        for word in ("--set", setting)
    ]
    result = run(
        *("train", photos, "--subject", "rraj person", "--base", tiny_sdxl),
        *("--out", tmp_path / "run", "--device", "cpu", *small),
    )
    assert result.exit_code == 0, result.output
    told = " ".join(result.stderr.split())
    before = told[: told.index("photos in")]
    for fact in (
        str(tiny_sdxl),
        "“rraj person”",
        "class: person",
        "“a photo of rraj person”",
        "“a photo of a person”",
        "64 × 64",
        "person (tokens of text_encoder and text_encoder_2)",
    ):
        assert fact in before.replace("\n", ""), fact


def test_tokens_are_those_of_the_tokenizers(model):
    (line,) = [
        note.text
        for note in describe_reading(model, load_config().resolve(vars(model.advice)))
        if "read as" in note.text
    ]
    assert "r · r · a · j · person" in line


def test_photographs_are_outside_picturebooks_world(tmp_path):
    from types import SimpleNamespace

    from dreamloom.core.device import pick_runtime

    runtime = pick_runtime("cpu")
    picturebook = SimpleNamespace(identity=SimpleNamespace(name="picturebook"), runtime=runtime)
    assert list(warn_of_photographs(picturebook, EXAMPLES / "rraj")) == []
    noisy = tmp_path / "noisy"
    noisy.mkdir()
    for number in range(3):
        Image.effect_noise((200, 200), 90 + number).convert("RGB").save(noisy / f"{number}.png")
    (note,) = warn_of_photographs(picturebook, noisy)
    assert note.warning
    assert "photographs" in note.text


def test_a_rank_that_no_layer_can_hold_is_refused_before_anything_is_made(tiny_sdxl, tmp_path):
    photos = make_photos(tmp_path / "photos")
    words = ("train", photos, "--subject", "rraj person", "--base", tiny_sdxl, "--device", "cpu")
    for setting in ("train.rank=1000000", 'adapter.rank_pattern={"to_q"=1000}'):
        result = run(*words, "--out", tmp_path / "run", "--set", setting)
        assert result.exit_code == 2, result.output
        assert "more than any layer" in result.output
        assert "at most 64" in result.output
    assert not (tmp_path / "run").exists()
