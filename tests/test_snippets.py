"""Every snippet of the pages: it runs, or says why not and is at least accepted as it is written.

A page's blocks of ``sh``, ``python`` and ``toml`` run in order, in one folder where ``examples``,
``recipes`` and ``my-photos`` lie. A block under ``<!-- not run: why -->`` is parsed: its commands
by the command line itself, Python by its compiler, TOML by its reader.
"""

import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from click.testing import CliRunner

from dreamloom.cli.main import main
from dreamloom.core.config.loading import load_config
from dreamloom.core.errors import ConfigError
from dreamloom.experiments.study.question import Changes, read_study
from dreamloom.merging.files.recipe import read_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)
PROGRAMS = set(
    "accelerate cp docker dreamloom hf jupyter make pip pytest python source tensorboard "
    "unzip".split()
)


class Snippet(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    why_not_run: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """Split its lines as a shell does; in a transcript, those behind a dollar sign."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language != "sh":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        for line in lines:
            for part in line.split("&&"):
                if words := shlex.split(part, comments=True):
                    yield [word for word in words if not re.fullmatch(r"[A-Z_]+=\S+", word)]


def collect_snippets(page: Path) -> list[Snippet]:
    text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
    return [
        Snippet(
            name,
            text.count("\n", 0, found.end("language")),
            *found.group("language", "text", "why"),
        )
        for found in BLOCK.finditer(text)
    ]


SNIPPETS = [snippet for page in PAGES for snippet in collect_snippets(page)]
RUN = [one for one in SNIPPETS if one.language in ("sh", "python", "toml") and not one.why_not_run]


def parse_command(words: list[str]) -> None:
    """Let the command line read what was typed, and stop before anything is done.

    Raises:
        click.UsageError: If it would refuse a command, an option or a value.
    """
    context = main.make_context("dreamloom", list(words))
    while isinstance(context.command, click.Group):
        below = [*context._protected_args, *context.args]
        name, command, rest = context.command.resolve_command(context, below)
        assert command is not None
        context = command.make_context(name, rest, parent=context)


def find_command(words: list[str]) -> list[str] | None:
    """Find what is said to DreamLoom, also through a launcher."""
    if words[0] == "dreamloom":
        return words[1:]
    if words[:3] == ["python", "-m", "dreamloom"] or "-m dreamloom" in " ".join(words):
        return words[words.index("dreamloom") + 1 :]
    return None


@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_each_snippet_is_accepted_as_it_is_written(snippet: Snippet, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    if snippet.language == "python":
        compile(snippet.text, str(snippet), "exec")
    elif snippet.language == "toml":
        tomllib.loads(snippet.text)
    for words in snippet.commands():
        if (typed := find_command(words)) is not None:
            try:
                parse_command(typed)
            except click.ClickException as error:
                pytest.fail(f"{snippet}: {shlex.join(words)}: {error.format_message()}")
        elif snippet.language == "sh":
            known = words[0] in PROGRAMS
            assert known, f"{snippet}: what is {words[0]}?"


@pytest.mark.parametrize(
    "typed",
    [
        "train my-photos --subjekt 'rraj person'",
        "trian my-photos",
        "plan --photos none",
        "models fetch",
        "compare A",
    ],
)
def test_what_the_command_line_refuses_is_found(typed: str) -> None:
    with pytest.raises(click.UsageError):
        parse_command(shlex.split(typed))


def test_no_snippet_is_missed_for_its_spelling() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.findall(r"^ *```(?:sh|python|toml)\b", text, flags=re.MULTILINE)
        taken = [one for one in collect_snippets(page) if one.language in ("sh", "python", "toml")]
        assert len(fences) == len(taken), page
        said = re.findall(r"^<!-- not run: .+ -->$", text, flags=re.MULTILINE)
        assert len(said) == sum(bool(one.why_not_run) for one in taken), page
        assert not re.search(r"^```(bash|shell|console|py|zsh)\b", text, re.MULTILINE), page
    assert len(RUN) > 10


@pytest.mark.parametrize("page", dict.fromkeys(one.page for one in RUN))
@pytest.mark.filterwarnings("default")
def test_each_page_runs_from_its_first_snippet_to_its_last(page, tmp_path, monkeypatch) -> None:
    work = tmp_path / "work"
    for name in ("examples", "recipes"):
        shutil.copytree(ROOT / name, work / name)
    shutil.copytree(work / "examples" / "rraj", work / "my-photos")
    monkeypatch.chdir(work)
    known: dict[str, object] = {}
    for number, snippet in enumerate(one for one in RUN if one.page == page):
        if snippet.language == "toml":
            check_toml(snippet, number)
        elif snippet.language == "python":
            exec(compile(snippet.text, str(snippet), "exec"), known)
        else:
            for words in snippet.commands():
                run_command(snippet, words)


def run_command(snippet: Snippet, words: list[str]) -> None:
    if words[:2] == ["cp", "-r"]:
        shutil.copytree(words[2], words[3], dirs_exist_ok=True)
        return
    assert words[0] == "dreamloom", f"{snippet}: {words[0]} is not run here: say why on the page"
    done = CliRunner().invoke(main, ["--quiet", *words[1:]])
    assert done.exit_code == 0, f"{snippet}: {shlex.join(words)}\n{done.output}"


def check_toml(snippet: Snippet, number: int) -> None:
    """Let it be read by what such a file is for; its first line may name it for what follows."""
    named = re.match(r"# (\S+\.toml)\n", snippet.text)
    file = Path(named[1]) if named else Path("snippets") / f"{number}.toml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(snippet.text, encoding="utf-8")
    given = tomllib.loads(snippet.text)
    if "question" in given:
        read_study(file, Changes())
    elif "parts" in given:
        read_recipe(file)
    else:
        load_config(file=file)


def test_settings_that_do_not_exist_are_found_in_toml(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="rnak"):
        check_toml(Snippet("page", 1, "toml", "[train]\nrnak = 8\n", ""), 0)
