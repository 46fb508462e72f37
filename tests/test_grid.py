"""Grids of pictures: axes as typed, cells as drawn, what is kept of two adapters, and the list."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from dreamloom.cli.main import main
from dreamloom.core.config.loading import load_config
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.device import pick_runtime
from dreamloom.core.errors import ConfigError, DreamLoomError, RunFolderError
from dreamloom.core.events import Event, Progress, StageDone, StageSkipped
from dreamloom.core.manifests import ImageSet, Photo, PhotoSet, Picture, read_image_set
from dreamloom.core.run_folder import RunFolder
from dreamloom.evaluation.encoders.base import Encoders
from dreamloom.evaluation.encoders.store import Missing
from dreamloom.experiments.grid.axes import Axis, read_axes
from dreamloom.experiments.grid.files import Grid, GridAxis, grid_file, list_grids, read_grid
from dreamloom.experiments.grid.planning import GridRequest, plan_grid
from dreamloom.experiments.grid.retention import Ends, find_ends, measure_cells
from dreamloom.experiments.grid.running import draw_grid, write_command
from dreamloom.experiments.grid.sheet import lay_out
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.lora.writing import write_adapter
from dreamloom.models.base import AdapterSpec, Model
from dreamloom.pipeline.draw import GenerateRequest, draw
from dreamloom.pipeline.score_merge import score_merge
from dreamloom.report.story import read_story

ROOT = Path(__file__).parents[1]


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def layers(model: Model) -> dict[str, Layer]:
    """A few of the model's layers, as an adapter that changes nothing has them."""
    model.attach_adapter(AdapterSpec(2, 2.0, "attention", 0))
    fresh = model.read_adapter()
    model.detach_adapter()
    return dict(list(fresh.layers.items())[::8])


def write_random_adapter(layers: dict[str, Layer], path: Path, seed: int) -> Path:
    """An adapter that changes pictures plainly, and names a subject."""
    rng = torch.Generator().manual_seed(seed)
    layers = {
        name: Layer(layer.down, torch.randn(layer.up.shape, generator=rng))
        for name, layer in layers.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"dreamloom.subject": "rraj person", "dreamloom.kind": "subject"}
    write_adapter(path, Adapter(layers, header))
    return path


@pytest.fixture(scope="module")
def adapters(layers: dict[str, Layer], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    me, style = (
        str(write_random_adapter(layers, folder / f"{name}.safetensors", seed))
        for seed, name in enumerate(("me", "style"))
    )
    return me, style


@pytest.fixture(scope="module")
def config(tiny_sdxl: Path) -> LoomConfig:
    return load_config(
        overrides={
            "base": str(tiny_sdxl),
            "generate.steps": (2,),
            "generate.images_per_prompt": 2,
            "evaluate.resamples": 100,
            "evaluate.encoders": "picturebook",
        }
    )


def ask(out: Path, x: str, y: str | None = None, **given: object) -> GridRequest:
    asked = {"adapters": (), "prompts": ("a photo of a dog",), "name": "mix", **given}
    return GridRequest(x=(x,), y=(y,) if y else (), out=out, **asked)


def draw_it(request: GridRequest, config: LoomConfig, told: list[Event] | None = None) -> Grid:
    return draw_grid(
        request, config, pick_runtime("cpu"), (told if told is not None else []).append
    )


def pixels_of(folder: Path) -> list[bytes]:
    return [Image.open(path).tobytes() for path in read_image_set(folder).paths()]


# -- axes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("steps=10,20", Axis("steps", (10, 20))),
        ("weight = 0, 0.5 ,1.0,-1", Axis("weight", (0, 0.5, 1, -1))),
        ("weight:2=1", Axis("weight", (1,), 2)),
        ("scheduler=ddim,dpm++", Axis("scheduler", ("ddim", "dpm++"))),
        ("guidance=0,7.5", Axis("guidance", (0, 7.5))),
        ("prompt=a dog, running|a = b", Axis("prompt", ("a dog, running", "a = b"))),
        ("checkpoint=100,final", Axis("checkpoint", ("100", "final"))),
        ("checkpoint=a,b.safetensors|c", Axis("checkpoint", ("a,b.safetensors", "c"))),
    ],
)
def test_an_axis_is_read_as_typed(text: str, axis: Axis) -> None:
    assert read_axes([text]) == (axis, None)


def test_an_axis_given_again_goes_on() -> None:
    x, y = read_axes(["prompt=a", "prompt=b|c"], ["steps=2", "steps=1"])
    assert x.values == ("a", "b", "c")
    assert y is not None
    assert y.values == (2, 1)


@pytest.mark.parametrize(
    ("x", "y", "complaint"),
    [
        ("step=1", None, r"there is no axis 'step'. Did you mean steps\?"),
        ("steps:1=1", None, "there is no axis 'steps:1'"),
        ("steps", None, "has no values. Write it as NAME=VALUES, like steps=10,20,30"),
        ("=3", None, "has no name"),
        ("steps=", None, "--x steps has an empty value. Write it like steps=10"),
        ("prompt=a||b", None, "--x prompt has an empty value"),
        ("steps=10", "steps=20", "--x and --y are both steps"),
        ("weight=0,1", "weight:1=0,1", "set the weight of the same adapter"),
        ("steps=ten", None, "'ten' is not a whole number from 1 to 1000"),
        ("steps=2.5", None, "'2.5' is not a whole number"),
        ("steps=0", None, "'0' is not a whole number"),
        ("steps=1001", None, "'1001' is not a whole number"),
        ("guidance=-1", None, "'-1' is not a finite number, at least 0"),
        ("weight=nan", None, "'nan' is not a finite number"),
        ("weight:0=1", None, "does not say which adapter's weight. Write weight:1"),
        ("weight:x=1", None, "does not say which adapter's weight"),
        ("steps=10,20,10", None, "--x steps names 10 twice"),
        ("weight=1,1.0", None, "--x weight names 1 twice"),
        (
            f"steps={','.join(map(str, range(1, 22)))}",
            f"guidance={','.join(map(str, range(20)))}",
            "21 × 20 are 420 cells. A grid has at most 400",
        ),
    ],
)
def test_an_axis_that_is_not_allowed_is_explained(x: str, y: str | None, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_axes([x], [y] if y else [])


def test_an_axis_is_one_thing() -> None:
    with pytest.raises(ConfigError, match=r"--x is given steps and guidance\. An axis changes one"):
        read_axes(["steps=1", "guidance=2"])


@pytest.mark.parametrize(
    ("x", "given", "complaint"),
    [
        ("weight=0,1", {}, "has no adapter to weigh. Give --adapter"),
        ("weight:2=0,1", {"adapters": ("ME",)}, "is about adapter 2, but there is 1"),
        ("weight:3=0,1", {"adapters": ("ME", "STYLE")}, "about adapter 3, but there are 2"),
        ("weight=0,1", {"adapters": ("ME:0.5",)}, "has a weight, and the axis weight sets it"),
        ("weight:1=0,1", {"adapters": ("ME:1@0,0@1",)}, "has a weight, and the axis weight:1"),
        ("steps=1,2", {"prompts": ()}, "There is nothing to draw. Give --prompt or --pack."),
        ("steps=1,2", {"prompts": ("a {dog}",)}, "has {dog}, which means nothing here"),
        ("prompt=a|b", {}, "--prompt and --pack change nothing"),
        ("prompt=a {subject}", {"prompts": ()}, "nobody is named"),
        ("scheduler=ddim,dim", {}, "There is no scheduler 'dim'. Did you mean ddim"),
        ("checkpoint=final", {}, "has no adapter.safetensors, so there is no final checkpoint"),
        ("checkpoint=50", {}, "keeps no adapter of update 50. Name the run with --run"),
        ("steps=1", {"style_photos": Path("x")}, "takes --photos, too"),
        ("steps=1", {"name": "a b"}, "'a b' cannot name a set of pictures"),
    ],
)
def test_what_cannot_be_drawn_is_explained_and_leaves_nothing(
    x: str,
    given: dict[str, object],
    complaint: str,
    adapters: tuple[str, str],
    config: LoomConfig,
    tmp_path: Path,
) -> None:
    if "adapters" in given:
        named = dict(zip(("ME", "STYLE"), adapters, strict=True))
        texts = [text.partition(":") for text in given["adapters"]]  # type: ignore[attr-defined]
        given = {**given, "adapters": tuple(named[n] + colon + w for n, colon, w in texts)}
    with pytest.raises(ConfigError, match=complaint):
        draw_it(ask(tmp_path / "run", x, **given), config)
    assert not (tmp_path / "run").exists()


# -- drawing ---------------------------------------------------------------------------------------


def test_cells_are_what_generate_draws_and_the_list_says_so(
    adapters: tuple[str, str], config: LoomConfig, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    prompts = ("a photo of {subject}", "a dog in the snow")
    asked = ask(out, "weight:1=0,1", "weight:2=0,0.5", adapters=adapters, prompts=prompts)
    told: list[Event] = []
    grid = draw_it(asked, config, told)
    assert [(c.x, c.y, c.set) for c in grid.cells] == [
        (0, 0, "mix-x0-y0"),
        (1, 0, "mix-x1-y0"),
        (0, 1, "mix-x0-y1"),
        (1, 1, "mix-x1-y1"),
    ]
    assert (grid.x.name, grid.x.label, grid.x.values) == ("weight:1", "weight of me", (0, 1))
    assert grid.seeds == (0, 1)
    assert grid.prompts == ("a photo of rraj person", "a dog in the snow")
    assert grid.reason.startswith("no photos")
    me, style = adapters
    typed = {
        "mix-x0-y0": (f"{me}:0", f"{style}:0"),
        "mix-x1-y1": (me, f"{style}:0.5"),
    }
    for name, worn in typed.items():
        request = GenerateRequest(
            adapters=worn,
            prompts=prompts,
            packs=(),
            subject="rraj person",
            floor=False,
            name="same",
            out=tmp_path / name,
        )
        (folder,) = draw(request, config, pick_runtime("cpu"))
        assert pixels_of(out / "images" / name) == pixels_of(folder)
    assert len({tuple(pixels_of(out / "images" / cell.set)) for cell in grid.cells}) == 4
    base, both = (read_image_set(out / "images" / f"mix-{at}") for at in ("x0-y0", "x1-y1"))
    assert (base.role, both.role, both.purpose) == ("base", "merged", "grid")
    assert read_grid(grid_file(RunFolder(out), "mix")) == grid
    assert list_grids(out) == [grid]
    with Image.open(out / "grids" / grid.sheet) as sheet:
        assert sheet.size > (2 * 64, 2 * 64)
    counts = [e.done for e in told if isinstance(e, Progress) and e.stage == "grid-mix"]
    assert counts == [0, 1, 2, 3, 4]
    assert isinstance(told[-1], StageDone)
    logged = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert any((one["event"], one["stage"]) == ("StageDone", "grid-mix") for one in logged)
    # The report has pictures of its own to show.
    assert read_story(out).sets == {}


class StoppedError(Exception):
    """Somebody pressed Ctrl-C."""


def test_a_stopped_grid_goes_on_and_may_grow(config: LoomConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = ask(out, "steps=1,2", "scheduler=ddim,euler")

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and (event.stage, event.done) == ("generate-mix-x1-y0", 2):
            raise StoppedError

    with pytest.raises(StoppedError):
        draw_grid(asked, config, pick_runtime("cpu"), stop)
    assert not grid_file(RunFolder(out), "mix").exists()
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("images/*/*.png")}
    assert len(stamps) == 4
    told: list[Event] = []
    draw_it(asked, config, told)
    assert [e.stage for e in told if isinstance(e, StageSkipped)] == ["generate-mix-x0-y0"]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    told.clear()
    longer = draw_it(ask(out, "steps=1,2,3", "scheduler=ddim,euler"), config, told)
    assert len([e for e in told if isinstance(e, StageSkipped)]) == 4
    assert len(longer.cells) == 6
    with pytest.raises(RunFolderError, match="is a grid with --x steps=1,2,3"):
        draw_it(ask(out, "steps=1,3"), config)
    with pytest.raises(RunFolderError, match="is a grid with --y scheduler=ddim,euler"):
        draw_it(ask(out, "steps=1,2", "guidance=1,2"), config)
    with pytest.raises(RunFolderError, match="other prompts"):
        draw_it(ask(out, "steps=1,2,3", "scheduler=ddim,euler", prompts=("a dog",)), config)
    assert read_grid(grid_file(RunFolder(out), "mix")) == longer


def test_what_is_not_a_grid_is_left_alone(config: LoomConfig, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim()
    file = grid_file(folder, "mix")
    file.parent.mkdir()
    file.write_text("mine")
    with pytest.raises(RunFolderError, match="cannot be read"):
        draw_it(ask(tmp_path, "steps=1"), config)
    assert file.read_text() == "mine"
    file.write_text("{}")
    with pytest.raises(DreamLoomError, match="is no grid that this version wrote: name"):
        read_grid(file)
    assert list_grids(folder) == []
    file.rename(file.with_suffix(".png"))
    with pytest.raises(RunFolderError, match="no grid that it would be of"):
        draw_it(ask(tmp_path, "steps=1"), config)
    with pytest.raises(DreamLoomError, match="There is no grid"):
        read_grid(file)


def test_checkpoints_of_a_run_are_an_axis(
    layers: dict[str, Layer], adapters: tuple[str, str], config: LoomConfig, tmp_path: Path
) -> None:
    home = RunFolder(tmp_path / "taught")
    for update in (10, 20):
        place = home.validation_samples / f"{update:06d}" / "adapter.safetensors"
        write_random_adapter(layers, place, update)
    write_random_adapter(layers, home.adapter, 30)
    asked = ask(
        tmp_path / "out",
        f"checkpoint=10,final,{adapters[0]}",
        "weight:2=0",
        adapters=adapters[1:],
        prompts=("a photo of {subject}",),
        run=home.path,
    )
    grid = draw_it(asked, config)
    assert grid.adapters == ("checkpoint", "style.safetensors")
    assert (grid.x.label, grid.y and grid.y.label) == ("checkpoint", "weight of style")
    assert grid.prompts == ("a photo of rraj person",)
    worn = [read_image_set(tmp_path / "out" / "images" / cell.set).adapters for cell in grid.cells]
    assert [len(some) for some in worn] == [1, 1, 1]
    assert len({some[0].sha256 for some in worn}) == 3
    with pytest.raises(ConfigError, match=r"update 15\. It keeps those of 10, 20\."):
        draw_it(ask(tmp_path / "out", "checkpoint=15", run=home.path), config)


def test_guidance_and_prompts_are_axes(config: LoomConfig, tmp_path: Path) -> None:
    grid = draw_it(ask(tmp_path, "prompt=a dog|a person", "guidance=1,3.5", prompts=()), config)
    drawn = [read_image_set(tmp_path / "images" / cell.set).pictures[0] for cell in grid.cells]
    assert [(one.prompt, one.guidance) for one in drawn] == [
        ("a dog", 1),
        ("a person", 1),
        ("a dog", 3.5),
        ("a person", 3.5),
    ]
    assert grid.prompts == ("a dog", "a person")


def test_the_command_draws_the_same(
    adapters: tuple[str, str], config: LoomConfig, tmp_path: Path
) -> None:
    asked = ask(tmp_path, "steps=1,2", adapters=adapters[:1], prompts=("a photo of {subject}",))
    grid = draw_it(asked, config)
    words = shlex.split(grid.command)
    assert words[:2] == ["dreamloom", "grid"]
    done = run("--quiet", *words[1:], "--json")
    assert done.exit_code == 0, done.output
    assert Grid.model_validate(json.loads(done.stdout)) == grid
    shown = run("--quiet", *words[1:]).output
    assert str(tmp_path / "grids" / "mix.png") in shown
    # A preset's numbers of steps and pictures are in it, too.
    quick = load_config("quick", overrides={"base": "picturebook"})
    assert "--set generate.images_per_prompt=4" in write_command(asked, quick)


def test_an_option_that_an_axis_sets_is_refused(tmp_path: Path) -> None:
    done = run("grid", "--x", "steps=1,2", "--steps", 5, "--prompt", "a", "--out", tmp_path / "a")
    assert done.exit_code == 2
    assert "The axis steps sets what --steps sets, too" in done.output
    assert not (tmp_path / "a").exists()


# -- what is kept ----------------------------------------------------------------------------------


def test_what_cells_keep_is_what_retention_says_of_their_sets(
    adapters: tuple[str, str], config: LoomConfig, tmp_path: Path
) -> None:
    out, examples = tmp_path / "run", ROOT / "examples"
    photos, style_photos = examples / "rraj", examples / "pixel-art"
    asked = ask(
        out,
        "weight:2=0,2",
        "weight:1=0,1",
        adapters=adapters,
        photos=photos,
        style_photos=style_photos,
    )
    grid = draw_it(asked, config)
    roles = {cell.set: cell.role for cell in grid.cells if cell.role}
    # The first adapter is the subject's, on whichever axis.
    assert roles == {"mix-x0-y0": "base", "mix-x0-y1": "subject", "mix-x1-y0": "style"}
    assert grid.reference is not None
    assert (grid.reference.subject_weight, grid.reference.style_weight) == (1, 2)
    assert "in the style" in grid.reference.style_pictures
    assert grid.reason == ""
    assert [cell.set for cell in grid.cells if cell.retention] == ["mix-x1-y1"]
    folders = {role: out / "images" / name for name, role in roles.items()}
    merged = {"merged": out / "images" / "mix-x1-y1"}
    found = score_merge({**folders, **merged}, photos, style_photos, config)
    kept = grid.cell(1, 1).retention
    assert kept is not None
    assert (kept.subject, kept.style, kept.both) == (found.identity, found.style, found.both)
    assert "picturebook-identity" in str(kept.subject.key)


class Hues:
    """Sees a picture's mean colour: TEST."""

    key = "hues@TEST"

    def embed(self, images: list[Image.Image]) -> torch.Tensor:
        rows = torch.tensor([image.resize((1, 1)).getpixel((0, 0)) for image in images])
        return torch.nn.functional.normalize(rows.float(), dim=1)


def paint_set(folder: Path, colour: tuple[int, int, int]) -> ImageSet:
    """Eight pictures, each a little different."""
    folder.mkdir(parents=True)
    pictures = []
    for seed in range(8):
        picture = Picture(
            file=f"{seed}.png", prompt="a", seed=seed, scheduler="ddim", steps=1, guidance=1
        )
        shade = tuple(min(255, part + seed) for part in colour)
        Image.new("RGB", (8, 8), shade).save(folder / picture.file)
        pictures.append(picture)
    return ImageSet(folder=folder, base={}, resolution_px=8, pictures=tuple(pictures))


def photos_of(images: ImageSet) -> PhotoSet:
    sides = {"original_px": (8, 8), "scaled_px": (8, 8)}
    photos = (Photo(file=one.file, source="", source_sha256="", **sides) for one in images.pictures)
    return PhotoSet(folder=images.folder, resolution_px=8, photos=tuple(photos))


def test_a_cell_between_both_parts_keeps_some_of_each(config: LoomConfig, tmp_path: Path) -> None:
    red, blue = (220, 40, 40), (40, 40, 220)
    colours = {"00": (60, 60, 60), "10": red, "01": blue, "11": (140, 40, 140), "21": (40, 40, 215)}
    sets = {name: paint_set(tmp_path / name, colour) for name, colour in colours.items()}
    absent = Missing("it is not here")
    encoders = Encoders("standard", identity=Hues(), clip=absent, dino=absent, style=Hues())
    ends = Ends({"base": "00", "subject": "10", "style": "01"}, (1, 1))
    counts = []
    found, compared = measure_cells(
        ends,
        sets,
        photos_of(sets["10"]),
        photos_of(sets["01"]),
        config.evaluate,
        encoders,
        lambda done, total: counts.append((done, total)),
    )
    assert set(found) == {"11", "21"}
    assert counts == [(1, 2), (2, 2)]
    assert compared == "8 pictures in the style"
    between, styled = found["11"], found["21"]
    for score in (between.subject, between.style):
        assert score.value is not None
        assert score.interval is not None
        assert 0.1 < score.value < 0.9
    assert between.both is not None
    assert styled.style.value == pytest.approx(1, abs=0.02)
    assert styled.both == 0


def plan_ends(adapters: tuple[str, ...], config: LoomConfig, x: str, y: str | None) -> Ends | str:
    asked = ask(Path("nowhere"), x, y, adapters=adapters, photos=Path("photos"))
    return find_ends(asked, plan_grid(asked, config))


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        ("weight:1=0,1", "steps=1,2", "it takes two adapters, and their weights as the axes"),
        ("weight=0,1", None, "it takes two adapters"),
        ("weight:1=0.5,1", "weight:2=0,1", "the axis weight:1 has no 0"),
        ("weight:1=0,1", "weight:2=0,-1", "the axis weight:2 has no weight above 0"),
    ],
)
def test_why_nothing_is_measured_is_told(
    x: str, y: str | None, reason: str, adapters: tuple[str, str], config: LoomConfig
) -> None:
    found = plan_ends(adapters, config, x, y)
    assert isinstance(found, str)
    assert found.startswith(reason)


def test_alone_is_a_weight_of_1_or_else_the_highest(
    adapters: tuple[str, str], config: LoomConfig
) -> None:
    found = plan_ends(adapters, config, "weight:1=0,1,1.5", "weight:2=0.8,0,0.4")
    assert isinstance(found, Ends)
    assert found.weights == (1, 0.8)
    assert found.sets == {"base": "mix-x0-y1", "subject": "mix-x1-y1", "style": "mix-x0-y0"}


# -- the sheet and the list ------------------------------------------------------------------------


def test_the_sheet_shows_each_cell_in_its_place() -> None:
    x = GridAxis(name="steps", label="steps", values=(1, 2, 3))
    y = GridAxis(name="prompt", label="prompt", values=("a " + "very " * 40 + "long prompt", "b"))
    colours = [(200, 20 * n, 10 * n) for n in range(6)]
    sheet = lay_out(x, y, [Image.new("RGB", (64, 32), colour) for colour in colours])
    places = {
        colour: [
            (column, row)
            for row in range(0, sheet.height, 4)
            for column in range(0, sheet.width, 4)
            if sheet.getpixel((column, row)) == colour
        ]
        for colour in colours
    }
    firsts = [places[colour][0] for colour in colours]
    assert len({row for _, row in firsts[:3]}) == len({row for _, row in firsts[3:]}) == 1
    assert firsts[0][0] < firsts[1][0] < firsts[2][0]
    assert firsts[0][1] < firsts[3][1]
    assert sheet.width < 600  # the long prompt is cut


def test_the_sheet_of_many_pictures_stays_small() -> None:
    x = GridAxis(name="steps", label="steps", values=tuple(range(1, 401)))
    sheet = lay_out(x, None, [Image.new("RGB", (128, 128))] * 400)
    assert sheet.width < 20_000


def test_reading_grids_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from dreamloom.experiments.grid.files import list_grids, read_grid\n"
        "from dreamloom.experiments.grid.axes import read_axes\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'torch', 'numpy', 'diffusers', 'PIL', 'transformers'}))"
    )
    path = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
