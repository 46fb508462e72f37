"""Weights written in prompts, and other programs' syntax."""

import pytest

from dreamloom.models.prompt_weights import find_foreign_syntax, parse_weights


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog", [("a dog", 1)]),
        ("", []),
        ("a (red:1.5) dog", [("a ", 1), ("red", 1.5), (" dog", 1)]),
        ("a (red) [dog]", [("a ", 1), ("red", 1.1), (" ", 1), ("dog", 1 / 1.1)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("(a (red:1.5) dog:2)", [("a ", 2), ("red", 3), (" dog", 2)]),
        ("(red: .5 ) dog", [("red", 0.5), (" dog", 1)]),
        ("(red:-1)", [("red", -1)]),
        ("at 10:30, a dog", [("at 10:30, a dog", 1)]),
        (r"a \(red\) dog", [("a (red) dog", 1)]),
        ("a (red dog", [("a ", 1), ("red dog", 1.1)]),
        ("a red) dog]", [("a red) dog]", 1)]),
        ("(red]:2)", [("red]", 2)]),
        ("back\\", [("back\\", 1)]),
        ("(red:very)", [("red:very", 1.1)]),
    ],
)
def test_weights_are_read_as_they_are_written(text: str, expected: list) -> None:
    found = parse_weights(text)
    assert [piece for piece, _ in found] == [piece for piece, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("a photo of a (person:1.5)", "(person:1.5)"),
        ("a (person)", "(person)"),
        ("[trigger], a dog", "[trigger]"),
        ("a dog <lora:style:0.8>", "<lora:style:0.8>"),
        ("a {red|blue} dog", "{red|blue}"),
        ("a dog BREAK snow", "BREAK"),
    ],
)
def test_what_is_taken_literally_is_told(text: str, quoted: str) -> None:
    (told,) = find_foreign_syntax(text, weighted=False)
    assert told.startswith(f"{quoted} is taken literally")


def test_every_kind_of_bracket_in_a_prompt_is_told_of() -> None:
    (told,) = find_foreign_syntax("a (red hat:1.4) [trigger]", weighted=False)
    assert told.startswith("(red hat:1.4) and [trigger] are taken literally")


@pytest.mark.parametrize("text", ["a dog", r"a \(dog\)", "a) dog (", "2 < 3 > 1", "a break"])
def test_plain_words_are_not_suspected(text: str) -> None:
    assert not find_foreign_syntax(text, weighted=False)


def test_weights_that_are_read_are_not_told_of() -> None:
    assert not find_foreign_syntax("a (red:1.2) [dog]", weighted=True)
    assert find_foreign_syntax("<lora:x:1> (red)", weighted=True)
