"""Bad inputs, by the hundred: each ends in one or two plain lines and the right exit status.

Most rows are made from the command tree itself: every option of every command gets what its type
does not allow, and every setting a value of another type. The others are written by hand.
"""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dreamloom.cli.commands import UNEXPECTED
from dreamloom.cli.main import main
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.toml_files import list_fields
from dreamloom.lora.writing import write_adapter
from merges import random_adapter
from studio_set import make_photos

# What each command needs at least, so that the one bad thing in a row is the only one.
WORDS = {
    "demo": (),
    "photos": ("{photos}",),
    "train": ("{photos}", "--subject", "rraj person", "--out", "{out}"),
    "plan": ("--gpu-memory", "12GiB"),
    "generate": ("--prompt", "x", "--out", "{out}"),
    "packs": (),
    "evaluate": ("{pictures}", "--photos", "{photos}"),
    "compare": ("{card}", "{card}"),
    "retention": (
        *("{pictures}", "--base", "{pictures}", "--subject", "{pictures}"),
        *("--style", "{pictures}", "--photos", "{photos}"),
    ),
    "report": ("{run}",),
    "study": ("{study}", "--out", "{out}"),
    "settings": (),
    "models": (),
    "models list": (),
    "models fetch": ("clip-vit-b-32",),
    "models path": ("picturebook",),
    "merge": ("{one}", "{two}", "-o", "{merged}"),
    "remix": ("{one}", "a=1"),
    "inspect": ("{one}",),
    "diagnose": ("{one}", "{two}"),
    "resize": ("{one}", "--rank", "2", "-o", "{merged}"),
    "convert": ("{one}", "-o", "{merged}"),
    "extract": ("{gone}", "--base", "{gone}", "--rank", "2", "-o", "{merged}"),
    "bake": ("{one}", "--base", "{gone}", "-o", "{merged}"),
    "token": ("rraj person",),
    "doctor": ("--device", "cpu"),
    "completion": ("bash",),
    "search": ("{one}", "{two}", "--photos", "{photos}", "--out", "{out}"),
    "push": ("{run}", "me"),
    "ask": ("{run}", "sample"),
    "grid": ("--adapter", "{one}", "--prompt", "x", "--x", "steps=1,2", "--out", "{out}"),
    "studio": ("--root", "{out}"),
}
Row = tuple[str, ...]


def commands(group: click.Group = main, above: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield f"{above}{name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} ")


def bad_values(option: click.Option) -> list[str]:
    """What an option's type does not allow."""
    kind = option.type
    if isinstance(kind, click.Choice):
        return ["nonsense", ""]
    if isinstance(kind, click.types.IntParamType):
        beyond = [str(kind.min - 1)] if isinstance(kind, click.IntRange) else []
        return ["x", "1.5", "", *beyond]
    if isinstance(kind, click.types.FloatParamType):
        return ["x", "nan", "inf", "-1"]
    if isinstance(kind, click.Path):
        return ["", " "]
    return []


def rows_of_options() -> Iterator[Row]:
    for name, command in commands():
        plain = (*name.split(), *WORDS[name])
        yield (*plain, "--bogus")
        if isinstance(command, click.Group):
            yield (*plain, "bogus")
            continue
        if not any(p.nargs == -1 for p in command.params):
            yield (*plain, "one", "too", "many")
        for param in command.params:
            if isinstance(param, click.Argument):
                if param.required:
                    yield tuple(name.split())
                continue
            long = next(word for word in param.opts if word.startswith("--"))
            if not param.is_flag and param.name != "json_target":
                yield (*plain, long)  # nothing follows
            yield (*plain, f"{long}x", "1")  # misspelt
            for value in bad_values(param):
                yield (*plain, long, *[value] * param.nargs)
            if param.hidden:
                yield (*plain, long, "1")


def rows_of_settings() -> Iterator[Row]:
    """Every setting with a value that its type does not allow."""
    for name, info in list_fields(LoomConfig).items():
        words = ("train", *WORDS["train"], "--set")
        yield (*words, f"{name}=[[1]]")
        if any(kind in str(info.annotation) for kind in ("int", "float")):
            yield (*words, f"{name}=-1")
            yield (*words, f"{name}=nan")
        yield (*words, f"{name}x=1")


BY_HAND: list[Row] = [
    ("trian",),
    ("train", "{photos}"),
    ("train", "{photos}", "--subject", "rraj"),
    ("train", "{photos}", "--subject", ""),
    ("train", "{photos}", "--subject", "  "),
    ("train", "{photos}", "--subject", "{subject} dog"),
    ("train", "{photos}", "--subject", "sks dog", "--class-noun", " "),
    ("train", "{gone}", "--subject", "sks dog", "--out", "{out}"),
    ("train", "{empty}", "--subject", "sks dog", "--out", "{out}"),
    ("train", "{text}", "--subject", "sks dog", "--out", "{out}"),
    ("train", "{photos}", "--subject", "sks dog", "--out", "{photos}"),
    ("train", "{photos}", "--subject", "sks dog", "--out", "{text}"),
    ("train", "{photos}", "--subject", "sks dog", "--out", "{text}/below"),
    ("train", *WORDS["train"][:3], "--out", "{out}", "--resume"),
    ("train", *WORDS["train"], "--prior", "{photos}"),
    ("train", *WORDS["train"], "--prior", "{gone}"),
    ("train", *WORDS["train"], "--prior", ""),
    ("train", *WORDS["train"], "--preset", "quik"),
    ("train", *WORDS["train"], "--base", "nowhere/at-all"),
    ("train", *WORDS["train"], "--base", ""),
    ("train", *WORDS["train"], "--base", "{text}"),
    ("train", *WORDS["train"], "--base", "{empty}"),
    ("train", *WORDS["train"], "--device", "tpu"),
    ("train", *WORDS["train"], "--device", "cuda:99"),
    ("train", *WORDS["train"], "--device", ""),
    ("train", *WORDS["train"], "--format", "zip"),
    ("train", *WORDS["train"], "--seed", "-1"),
    ("train", *WORDS["train"], "--config", "{gone}"),
    ("train", *WORDS["train"], "--config", "{text}"),
    ("train", *WORDS["train"], "--config", "{empty}"),
    ("train", *WORDS["train"], "--config", "{one}"),
    ("train", *WORDS["train"], "--set", "train.rank"),
    ("train", *WORDS["train"], "--set", "=3"),
    ("train", *WORDS["train"], "--set", "train=3"),
    ("train", *WORDS["train"], "--set", "train.optimizer=adamv"),
    ("train", *WORDS["train"], "--set", "priors.scheduler=dimm"),
    ("train", *WORDS["train"], "--set", "validation.tracker=tensorbord"),
    ("train", *WORDS["train"], "--set", "subject.photo_prompt=a {subjct}"),
    ("generate", *WORDS["generate"], "--scheduler", "dimm"),
    ("generate", *WORDS["generate"], "--steps", "5000"),
    ("generate", *WORDS["generate"], "--steps", "0"),
    ("generate", *WORDS["generate"], "--seeds", "0"),
    ("generate", *WORDS["generate"], "--seed", "7"),
    ("generate", *WORDS["generate"], "--set", "generate.first_seed=18446744073709551616"),
    ("generate", *WORDS["generate"], "--pack", "person"),
    ("generate", *WORDS["generate"], "--pack", "seed-v1", "--subject", "rraj"),
    ("generate", *WORDS["generate"], "--pack", "seed-v1", "--subject", "{subject} dog"),
    ("generate", *WORDS["generate"], "--name", "a/b"),
    ("generate", *WORDS["generate"], "--name", ""),
    ("generate", *WORDS["generate"], "--name", "x" * 300),
    ("generate", *WORDS["generate"], "--compose", "swich"),
    ("generate", *WORDS["generate"], "--adapter", "{gone}"),
    ("generate", *WORDS["generate"], "--adapter", "{text}"),
    ("generate", *WORDS["generate"], "--adapter", "{one}:nan"),
    ("generate", *WORDS["generate"], "--adapter", ""),
    ("generate", "--prompt", "a {subjct}", "--subject", "sks dog", "--out", "{out}"),
    ("generate", "--prompt", "a {subject}", "--out", "{out}"),
    ("generate", "--out", "{out}"),
    ("generate", "--prompt", "x", "--out", "{photos}"),
    ("evaluate", "{gone}", "--photos", "{photos}"),
    ("evaluate", "{empty}", "--photos", "{photos}"),
    ("evaluate", "{text}", "--photos", "{photos}"),
    ("evaluate", "{prepared}", "--photos", "{photos}"),
    ("evaluate", "{damaged}", "--photos", "{photos}"),
    ("evaluate", "{pictures}", "--photos", "{gone}"),
    ("evaluate", "{pictures}", "--photos", "{empty}"),
    ("evaluate", *WORDS["evaluate"], "--seed", "1"),
    ("evaluate", *WORDS["evaluate"], "--subject", "rraj"),
    ("evaluate", *WORDS["evaluate"], "--target-text", "x"),
    ("evaluate", *WORDS["evaluate"], "--floor", "{gone}"),
    ("evaluate", *WORDS["evaluate"], "--strangers", "{gone}"),
    ("evaluate", *WORDS["evaluate"], "--set", "evaluate.encoders=standrad"),
    ("evaluate", *WORDS["evaluate"], "--json", "scores"),
    ("compare", "{gone}", "{gone}"),
    ("compare", "{text}", "{text}"),
    ("compare", "{card}", "{card}"),
    ("compare", "--json", "a.json", "{card}"),
    ("retention", "{gone}", *WORDS["retention"][1:]),
    ("retention", *WORDS["retention"], "--seed", "1"),
    ("report", "{gone}"),
    ("report", "{text}"),
    ("report", "{empty}"),
    ("study", "{gone}"),
    ("study", "{text}"),
    ("study", "{toml}"),
    ("study", "{study}", "--workers", "0"),
    ("packs", "person"),
    ("models", "path", "sdxl"),
    ("models", "fetch", "clip"),
    ("models", "fetch", "clip-vit-b-32", "--from", "{gone}"),
    ("plan", "--gpu-memory", "much"),
    ("plan", "--gpu-memory", "0.001"),
    ("plan", "--gpu-memory", "nanGiB"),
    ("plan", *WORDS["plan"], "--gpu-rate", "0"),
    ("plan", *WORDS["plan"], "--photos", "0"),
    ("plan", *WORDS["plan"], "--seed", "0"),
    ("photos", "{gone}"),
    ("photos", "{empty}"),
    ("photos", "{text}"),
    ("photos", "{photos}", "--resolution", "0"),
    ("photos", "{photos}", "--resolution", "99999999"),
    ("merge",),
    ("merge", "{one}"),
    ("merge", "{one}", "{gone}", "-o", "{merged}"),
    ("merge", "{one}", "{text}", "-o", "{merged}"),
    ("merge", "{one}:x", "{two}", "-o", "{merged}"),
    ("merge", "{one}:inf", "{two}", "-o", "{merged}"),
    ("merge", "{one}", "{two}", "-o", "{one}"),
    ("merge", "{one}", "{two}", "-o", "{gone}/x.safetensors"),
    ("merge", "{one}", "{two}", "-o", "{empty}"),
    ("merge", "{one}", "{two}", "-o", "{out}.zip"),
    ("merge", *WORDS["merge"], "--method", "sun"),
    ("merge", *WORDS["merge"], "--base", "picturebook"),
    ("merge", *WORDS["merge"], "--device", "cpu"),
    ("merge", *WORDS["merge"], "--seed", "3"),
    ("merge", *WORDS["merge"], "--method", "ssr", "--base", "nowhere/at-all"),
    ("merge", *WORDS["merge"], "--prompt", "one:x"),
    ("merge", *WORDS["merge"], "--set", "density=1"),
    ("merge", *WORDS["merge"], "--method", "ties", "--set", "densty=1"),
    ("merge", *WORDS["merge"], "--method", "ties", "--set", "density=nan"),
    ("merge", *WORDS["merge"], "--method", "ties", "--set", "density"),
    ("merge", *WORDS["merge"], "--rank", "0"),
    ("merge", *WORDS["merge"], "--rank", "many"),
    ("merge", *WORDS["merge"], "--rank", "energy:2"),
    ("merge", *WORDS["merge"], "--rank", "budget:x"),
    ("merge", *WORDS["merge"], "--blocks", "x"),
    ("merge", *WORDS["merge"], "--inputs", "{empty}"),
    ("merge", "{one}", "--verify"),
    ("merge", "{toml}", "-o", "{merged}"),
    ("merge", "--methods", "--method", "sun"),
    ("remix", "{one}", "a=1"),
    ("remix", "{gone}"),
    ("remix", "{one}", "a"),
    ("inspect", "{gone}"),
    ("inspect", "{text}"),
    ("inspect", "{empty}"),
    ("inspect", "{short}"),
    ("diagnose", "{one}", "{gone}"),
    ("diagnose", "{one}", "{two}", "--picture", "x.gif"),
    ("resize", "{one}", "--rank", "0", "-o", "{merged}"),
    ("resize", "{gone}", "--rank", "2", "-o", "{merged}"),
    ("resize", "{one}", "--rank", "2", "-o", "{one}"),
    ("convert", "{gone}", "-o", "{merged}"),
    ("convert", "{one}", "--format", "zip", "-o", "{merged}"),
    ("convert", "{one}", "--rank", "x", "-o", "{merged}"),
    ("extract", "{empty}", "--base", "{empty}", "--rank", "2", "-o", "{merged}"),
    ("bake", "{one}", "--base", "{text}", "-o", "{merged}"),
    ("search", "{one}", "{gone}", "--photos", "{photos}", "--out", "{out}"),
    ("search", *WORDS["search"], "--between", "1", "0.5"),
    ("search", *WORDS["search"], "--budget", "0"),
    ("search", *WORDS["search"], "--subject", "rraj"),
    ("search", *WORDS["search"], "--subject", "sks dog", "--prompt", "a {subjct}"),
    ("search", *WORDS["search"], "--subject", "sks dog", "--pack", "person"),
    ("push", *WORDS["push"]),
    ("push", "{run}", "a--b"),
    ("push", "{run}", ""),
    ("push", *WORDS["push"], "--out", "{out}"),
    ("push", *WORDS["push"], "--out", "{photos}"),
    ("push", *WORDS["push"], "--out", "{text}"),
    ("push", *WORDS["push"], "--out", "{out}", "--public"),
    ("push", "{gone}", "me", "--out", "{out}"),
    ("push", "{text}", "me", "--out", "{out}"),
    ("inspect", "user/nobody"),
    ("inspect", "user/nobody:me.bin"),
    ("generate", *WORDS["generate"], "--adapter", "user/nobody:0.8"),
]

ROWS = list(dict.fromkeys([*rows_of_options(), *rows_of_settings(), *BY_HAND]))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of things that are not what they are taken for, and of some that are."""
    home = tmp_path_factory.mktemp("bad")
    names = ("empty", "run", "prepared", "damaged")
    named = {name: home / name for name in (*names, "gone", "out")}
    for name in names:
        named[name].mkdir()
    named |= {
        "photos": make_photos(home / "photos", count=1),
        "pictures": make_photos(home / "pictures", count=1),
        "text": home / "notes.txt",
        "toml": home / "other.toml",
        "study": home / "study.toml",
        "card": home / "card.json",
        "short": home / "short.safetensors",
        "merged": home / "merged.safetensors",
    }
    named["text"].write_text("not a picture: [")
    named["toml"].write_text("[nobody]\nknows = 1\n")
    named["study"].write_text('question = "?"\nanswer = "compare"\n')
    named["card"].write_text("{}")
    named["short"].write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (named["prepared"] / "manifest.json").write_text(
        json.dumps({"resolution_px": 64, "photos": [{"file": "0000.png"}]})
    )
    (named["damaged"] / "manifest.json").write_text(json.dumps({"pictures": [{"file": 3}] * 9}))
    for seed, name in enumerate(("one", "two")):
        named[name] = home / f"{name}.safetensors"
        write_adapter(named[name], random_adapter(seed, {"linear": 2}))
    return named


def snapshot(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_there_are_three_hundred_and_every_command_has_some():
    assert len(ROWS) >= 300
    assert {name.split()[0] for name, _ in commands()} <= {row[0] for row in ROWS}


def test_each_ends_in_one_or_two_plain_lines(places, monkeypatch):
    """One test for all rows: a test each would take longer to set up than to run."""
    home = places["photos"].parent
    monkeypatch.chdir(places["empty"])
    before = snapshot(home)
    found = []
    for row in ROWS:
        words = [fill(word, places) for word in row]
        result = CliRunner().invoke(main, ["--quiet", *words])
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        said = result.output
        problems = [
            f"exit {result.exit_code}" * (result.exit_code not in (1, 2)),
            f"{len(lines)} lines" * (not 1 <= len(lines) <= 2),
            "traceback" * ("Traceback" in said or not isinstance(result.exception, SystemExit)),
            "not foreseen" * (UNEXPECTED in said),
            "pydantic" * ("pydantic" in said or "[type=" in said),
            f"{max(map(len, lines), default=0)} letters" * (max(map(len, lines), default=0) > 700),
            "something was written" * (snapshot(home) != before),
        ]
        if any(problems):
            told = ", ".join(filter(None, problems))
            found.append(f"{' '.join(row)}: {told}\n    {said[:300]}\n    {result.exception!r}")
            before = snapshot(home)
    assert not found, f"{len(found)} of {len(ROWS)}:\n" + "\n".join(found)


def fill(word: str, places: dict[str, Path]) -> str:
    for name, path in places.items():
        word = word.replace(f"{{{name}}}", str(path))
    return word


SHOWN = [
    ("--help",),
    ("train", "--help"),
    ("settings",),
    ("packs",),
    ("packs", "person-v1"),
    ("packs", "--json"),
    ("merge", "--methods"),
    ("merge", "--methods", "--method", "della"),
    ("models", "list"),
    ("token", "rraj person"),
    ("doctor",),
    ("inspect", "{one}"),
    ("inspect", "{one}", "--json"),
    ("diagnose", "{one}", "{two}"),
    ("photos", "{写真}"),
    ("photos", "{写真}", "--json"),
]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("columns", [8, 80])
def test_any_encoding_and_width_can_be_written_to(encoding, columns, places, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    photos = make_photos(places["empty"] / "写真 é", count=1)
    try:
        for row in SHOWN:
            raw = io.BytesIO()
            stream = io.TextIOWrapper(raw, encoding=encoding)
            monkeypatch.setattr(sys, "stdout", stream)
            words = [fill(word, {**places, "写真": photos}) for word in row]
            with pytest.raises(SystemExit) as ended:
                main(words, prog_name="dreamloom")
            stream.flush()
            # click takes a terminal that claims ASCII for one that is set up wrongly.
            said = raw.getvalue().decode("utf-8" if encoding == "ascii" else encoding)
            assert ended.value.code == 0, said
            assert said
            if "--json" in row:
                json.loads(said)
    finally:
        for path in [*photos.iterdir()]:
            path.unlink()
        photos.rmdir()


def shell(line: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in which D is the command."""
    env = {**os.environ, "D": f"{sys.executable} -m dreamloom", **extra}
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=env, check=False
    )


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("$D settings | head -1 > /dev/null; exit ${PIPESTATUS[0]}", (0, 1), ""),
        ("$D settings >&-", (0, 1), ""),
        ("$D nothing 2>&-", (2,), ""),
        ("$D settings > /dev/full", (1,), "No space left"),
        ("PYTHONIOENCODING=ascii $D packs > /dev/null", (0,), ""),
    ],
)
def test_output_that_is_closed_or_full_ends_quietly(line, status, said):
    done = shell(line)
    assert done.returncode in status, done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) <= 2, done.stderr
    assert "run the command again" not in done.stderr or said
    assert "Exception ignored" not in done.stderr
