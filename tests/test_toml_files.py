"""TOML files: settings, merge recipes and studies are read, and refused, in the same words."""

from pathlib import Path

import pytest

from dreamloom.core.errors import ConfigError
from dreamloom.core.toml_files import describe_fields
from dreamloom.merging.files.recipe import RecipeForm, read_recipe

PARTS = '[[parts]]\nfile = "a.safetensors"\n[[parts]]\nfile = "b.safetensors"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_says_all_that_the_command_can(tmp_path: Path) -> None:
    text = (
        'method = "ties"\nrank = 24\nseed = 3\nformat = "kohya"\nprecision = "fp16"\n'
        'base = "sdxl"\njoint = ["both"]\ndevice = "cpu"\n[options]\ndensity = 0.5\n'
        '[[parts]]\nfile = "a.safetensors"\nweight = 0.5\nname = "one"\nprompts = ["a"]\n'
        '[[parts]]\nfile = "b.safetensors"\nblocks = { style = 1.2 }\n'
    )
    recipe = read_recipe(write(tmp_path, text))
    assert (recipe.method, str(recipe.rank), recipe.seed) == ("ties", "24", 3)
    assert (recipe.format, recipe.precision, recipe.device) == ("kohya", "fp16", "cpu")
    assert (recipe.base, recipe.joint, recipe.options) == ("sdxl", ("both",), {"density": 0.5})
    one, other = recipe.parts
    assert (one.path, one.weight, one.name) == (tmp_path / "a.safetensors", 0.5, "one")
    assert one.prompts == ("a",)
    assert (other.name, other.weight, other.blocks) == ("b", 1.0, {"style": 1.2})


@pytest.mark.parametrize(
    ("text", "problem", "hint"),
    [
        ("methd = 1\n" + PARTS, "There is no setting 'methd'.", "Did you mean method?"),
        (
            PARTS + "wieght = 2\n",
            "There is no setting 'parts.2.wieght'.",
            "Did you mean parts.weight or parts.file?",
        ),
        (
            PARTS + 'weight = "much"\n',
            "parts.2.weight = 'much' is not allowed: input should be a valid number, unable to "
            "parse string as a number.",
            "parts.2.weight: How strongly it goes in; negative subtracts.",
        ),
        (
            "[[parts]]\nweight = 2.0\n",
            "parts.1.file is missing.",
            "parts.1.file: The adapter's file, from where the recipe lies; or of the hub, as "
            "user/name.",
        ),
        ("", "parts is missing.", "parts: The adapters, each in a [[parts]] of its own."),
        (
            "parts = 3\n",
            "parts = 3 is not allowed: it is a list of tables, each of which begins with "
            "[[parts]].",
            "parts: The adapters, each in a [[parts]] of its own.",
        ),
        (
            'precision = "fp8"\n' + PARTS,
            "precision = 'fp8' is not allowed: input should be 'fp32', 'fp16' or 'bf16'.",
            "precision: Of the numbers in it. One of: fp32, fp16, bf16.",
        ),
        (
            "rank = true\nsede = 1\n" + PARTS,
            "There is no setting 'sede'.",
            "Did you mean seed?",
        ),
    ],
)
def test_a_mistake_in_a_recipe_is_named_with_what_was_meant(
    text: str, problem: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_recipe(write(tmp_path, text))
    assert caught.value.problem == problem
    assert caught.value.hint == hint


def test_every_mistake_in_a_recipe_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_recipe(write(tmp_path, "sede = 1\nseed = 0.5\n" + PARTS + "weight = inf\n"))
    for name in ("'sede'", "seed = 0.5", "parts.2.weight = inf"):
        assert name in caught.value.problem


def test_a_missing_recipe_a_folder_and_damaged_toml_are_told_apart(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    with pytest.raises(ConfigError, match=r"There is no recipe .*none\.toml"):
        read_recipe(missing)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path)
    with pytest.raises(ConfigError, match=r"recipe\.toml is not valid TOML"):
        read_recipe(write(tmp_path, "parts = "))


def test_what_must_be_given_has_no_default() -> None:
    defaults = {name: default for name, default, _ in describe_fields(RecipeForm)}
    assert (defaults["parts.file"], defaults["parts.weight"]) == ("", "1.0")
    assert list(defaults)[:3] == ["parts", "parts.file", "parts.weight"]
