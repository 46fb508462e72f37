"""Pages that draw and mix: forms become commands, and only what is listed is served."""

import io
import re
import shlex
import zipfile
from html import unescape
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image
from starlette.testclient import TestClient

from dreamloom.core.manifests import ImageSet, Picture, write_manifest
from dreamloom.core.run_folder import RunFolder
from dreamloom.evaluation.metrics.scorecard import Score
from dreamloom.experiments.grid.files import CellRetention, Grid, GridAxis, GridCell, write_grid
from dreamloom.studio.adapters import find_adapter, list_adapters
from dreamloom.studio.app import make_app
from dreamloom.studio.context import Studio, describe_argv
from dreamloom.studio.drawing import SCHEDULERS, Drawing, read_drawing
from dreamloom.studio.gallery import zip_files
from dreamloom.studio.mixing import (
    FORMATS,
    PRECISIONS,
    WantedMerge,
    find_nearest,
    list_ahead,
    list_heat,
    plot_retention,
)

# The runner that a job wakes goes away by itself; the studio does not wait for it.
pytestmark = pytest.mark.filterwarnings("ignore:subprocess:ResourceWarning")

SCRIPT = "<script>alert(1)</script>"
WEIGHTS = (0.0, 0.5, 1.0)


def make_run(root: Path, name: str, adapter: bytes = b"adapter") -> RunFolder:
    run = RunFolder(root / name)
    run.claim()
    run.adapter.write_bytes(adapter)
    return run


def make_set(run: RunFolder, name: str, prompts=("a photo", "a drawing"), seeds=2, **more):
    folder = run.images / name
    folder.mkdir(parents=True)
    pictures = []
    for prompt in prompts:
        for seed in range(seeds):
            file = f"{len(pictures):04d}.png"
            Image.new("RGB", (8, 8), (40 * seed, 90, 200)).save(folder / file)
            drawn = {"seed": seed, "scheduler": "ddim", "steps": 4, "guidance": 2.0}
            pictures.append(Picture(file=file, prompt=prompt, **drawn))
    images = ImageSet(folder=folder, base={}, resolution_px=8, pictures=tuple(pictures), **more)
    write_manifest(images)
    return images


def score(value: float) -> Score:
    return Score(value=value, n=4)


def make_ahead(studio: Studio, run: RunFolder, *adapters: RunFolder, third: str = "") -> Grid:
    cells = []
    for y, second in enumerate(WEIGHTS):
        for x, first in enumerate(WEIGHTS):
            name = f"mix-1-x{x}-y{y}"
            make_set(run, name, ("a photo",), 4, purpose="grid")
            kept = CellRetention(subject=score(first), style=score(second))
            measured = kept if first and second else None
            cells.append(GridCell(x=x, y=y, set=name, retention=measured))
    files = [f"{studio.path_of(one.path.name)}/adapter.safetensors" for one in adapters]
    files[2:] = [f"{file}:{third}" for file in files[2:]]
    options = [f"--adapter {file}" for file in files]
    grid = Grid(
        name="mix-1",
        command=f"dreamloom grid {' '.join(options)} --out x",
        base={},
        adapters=("adapter.safetensors",) * len(adapters),
        prompts=("a photo",),
        seeds=(0, 1, 2, 3),
        x=GridAxis(name="weight:1", label="weight of one", values=WEIGHTS),
        y=GridAxis(name="weight:2", label="weight of two", values=WEIGHTS),
        cells=tuple(cells),
        sheet="mix-1.png",
    )
    write_grid(run, grid)
    return grid


@pytest.fixture
def studio(tmp_path):
    root = tmp_path / "runs"
    root.mkdir()
    made = Studio(root, tmp_path)
    made.own.mkdir()
    with FileLock(made.own / "runner.lock"):  # another runner is at work: none starts here
        yield made


@pytest.fixture
def browser(studio):
    with TestClient(make_app(studio), follow_redirects=False) as client:
        yield client


@pytest.fixture
def two(studio):
    """Two runs with an adapter each, as forms call these."""
    make_run(studio.root, "me")
    make_run(studio.root, "style", b"another")
    by_name = {one.name: one.id for one in list_adapters(studio.root)}
    return by_name["me/adapter.safetensors"], by_name["style/adapter.safetensors"]


def shown_command(page: str, name: str = "command") -> str:
    return unescape(re.search(rf'id="{name}"[^>]*>(.*?)</pre>', page, re.DOTALL)[1])


def only_job(studio: Studio):
    (job,) = studio.jobs
    return job.asked


def test_adapters_are_those_of_runs_and_looks_and_files_below_the_root_alone(studio, tmp_path):
    run = make_run(studio.root, "me")
    look = run.validation_samples / "000040"
    look.mkdir(parents=True)
    (look / "adapter.safetensors").write_bytes(b"x")
    (run.path / "latents").mkdir()
    (run.path / "latents" / "crop.safetensors").write_bytes(b"x")
    (studio.root / "both.safetensors").write_bytes(b"x")
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    (studio.root / "linked.safetensors").symlink_to(tmp_path / "secret.safetensors")
    names = {one.name for one in list_adapters(studio.root)}
    assert names == {
        "me/adapter.safetensors",
        f"me/looks/000040/{look.name and 'adapter.safetensors'}",
        "both.safetensors",
    }
    assert find_adapter(studio.root, "../secret.safetensors") is None


def test_what_the_page_shows_is_what_the_job_runs(studio, browser, two):
    form = {
        "adapter1": two[0],
        "weight1": "0.8",
        "adapter2": two[1],
        "weight2": "1.2",
        "prompts": f"a photo of {{subject}}\n--out=/etc {SCRIPT}\n\n",
        "pack-person-v1": "on",
        "seeds": "3",
        "steps": "12",
        "guidance": "4.5",
        "scheduler": "dpm++",
        "width": "64",
        "height": "48",
        "negative": "-blurry",
        "first_seed": "7",
        "floor": "on",
        "preset": "quick",
        "device": "cpu",
    }
    page = browser.post("/draw/command", data=form).text
    assert SCRIPT not in page
    answer = browser.post("/draw", data=form)
    asked = only_job(studio)
    assert answer.status_code == 303
    assert shown_command(page) == describe_argv(asked.argv)
    assert shlex.split(shown_command(page))[1:] == list(asked.argv)
    assert "--prompt=--out=/etc " + SCRIPT in asked.argv
    expected = {"--size=64x48", "--negative-prompt=-blurry", "--floor", "--pack=person-v1"}
    assert expected <= {*asked.argv}
    assert "--adapter=runs/me/adapter.safetensors:0.8" in asked.argv
    job_page = browser.get(answer.headers["location"]).text
    assert SCRIPT not in job_page
    assert "&lt;script&gt;" in job_page


def test_the_command_can_be_read_by_the_command_line(studio, two):
    from dreamloom.cli.main import main

    form = {"adapter1": two[0], "prompts": "-x", "seeds": "2", "device": "cpu", "floor": "on"}
    from dreamloom.studio.page_draw import write_command

    _, argv = write_command(studio, read_drawing(form))
    command = main.commands["generate"]
    context = command.make_context("generate", argv[1:])
    assert context.params["prompts"] == ("-x",)
    assert context.params["adapters"] == ("runs/me/adapter.safetensors:1",)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", "0"),
        ("steps", "many"),
        ("guidance", "-3"),
        ("seeds", "0"),
        ("weight1", "1; rm"),
        ("adapter1", "../../etc/passwd"),
        ("scheduler", "magic"),
        ("device", "--help"),
        ("width", "64"),
        ("prompts", "\n\n"),
        ("run", "nowhere"),
        ("preset", "best"),
    ],
)
def test_what_is_wrong_is_said_beside_its_field_and_nothing_starts(
    studio, browser, two, field, value
):
    form = {"adapter1": two[0], "weight1": "1", "prompts": "a photo", "seeds": "2"} | {field: value}
    answer = browser.post("/draw", data=form)
    assert answer.status_code == 422
    assert re.search(rf'data-fault="{field}">[^<]+</p>', answer.text)
    assert not list(studio.jobs)


def test_an_adapter_twice_or_none_is_refused(studio, two):
    twice = Drawing(adapters=((two[0], "1"), (two[0], "0.5")), prompts=("a",))
    assert "adapter2" in twice.find_faults(studio)
    assert "adapter1" in Drawing(prompts=("a",)).find_faults(studio)


def test_every_drawing_gets_a_name_of_its_own(studio, browser, two):
    make_set(RunFolder(studio.root / "me"), "drawn-1")
    run = next(run.id for run in studio.runs() if run.name == "me")
    form = {"adapter1": two[0], "prompts": "a photo", "run": run}
    names = []
    for _ in range(2):
        browser.post("/draw", data=form)
        names = [word for job in studio.jobs for word in job.asked.argv if "--name" in word]
    assert names == ["--name=drawn-2", "--name=drawn-3"]


def test_a_gallery_shows_prompts_by_seeds_with_the_base_model_beside(studio, browser):
    run = make_run(studio.root, "me")
    make_set(run, "drawn-1", ("a photo", SCRIPT))
    make_set(run, "drawn-1_base", ("a photo", SCRIPT))
    run_id = studio.runs()[0].id
    page = browser.get(f"/draw/sets/{run_id}/drawn-1").text
    assert SCRIPT not in page
    assert page.count(f'src="/runs/{run_id}/sets/drawn-1/') == 4
    assert page.count(f'src="/runs/{run_id}/sets/drawn-1_base/') == 4
    listed = browser.get(f"/draw?run={run_id}").text
    assert f"/draw/sets/{run_id}/drawn-1" in listed
    assert "drawn-1_base" not in listed


def test_what_was_kept_is_filtered_and_zipped_and_what_is_hidden_stays(studio, browser):
    run = make_run(studio.root, "me")
    images = make_set(run, "drawn-1")
    before = images.fingerprint
    place = f"/draw/sets/{studio.runs()[0].id}/drawn-1"
    assert browser.get(f"{place}/kept.zip").status_code == 404
    assert browser.post(f"{place}/2/mark", data={"mark": "kept"}).status_code == 303
    part = browser.post(f"{place}/3/mark", data={"mark": "hidden"}, headers={"HX-Request": "true"})
    assert part.text.count("<figure") == 1
    kept = browser.get(f"{place}?which=kept").text
    assert f"{place}/2/mark" in kept
    assert f"{place}/1/mark" not in kept
    assert f"{place}/3/mark" not in browser.get(place).text
    assert f"{place}/3/mark" in browser.get(f"{place}?which=hidden").text
    with zipfile.ZipFile(io.BytesIO(browser.get(f"{place}/kept.zip").content)) as packed:
        assert packed.testzip() is None
        (name,) = packed.namelist()
        assert re.fullmatch(r"me-drawn-1-002-a-drawing-0\.png", name)
        assert packed.read(name) == images.paths()[2].read_bytes()
    assert images.fingerprint == before
    browser.post(f"{place}/2/mark", data={"mark": ""})
    assert browser.get(f"{place}/kept.zip").status_code == 404
    assert browser.post(f"{place}/2/mark", data={"mark": "../x"}).status_code == 422


def test_a_zip_is_made_piece_by_piece_and_passes_over_what_is_gone(tmp_path):
    large = tmp_path / "large.png"
    large.write_bytes(bytes(range(256)) * 4096)
    pieces = list(zip_files([("a.png", large), ("b.png", tmp_path / "gone.png")]))
    assert max(map(len, pieces)) < large.stat().st_size
    with zipfile.ZipFile(io.BytesIO(b"".join(pieces))) as packed:
        assert packed.namelist() == ["a.png"]
        assert packed.read("a.png") == large.read_bytes()


def test_nothing_but_what_is_listed_is_served(studio, browser, tmp_path):
    run = make_run(studio.root, "me")
    make_set(run, "drawn-1")
    (tmp_path / "secret.png").write_bytes(b"secret")
    stolen = make_set(run, "stolen")
    picture = stolen.pictures[0].model_copy(update={"file": "../../../../secret.png"})
    write_manifest(stolen.model_copy(update={"pictures": (picture,)}))
    run_id = studio.runs()[0].id
    for path in (
        "/draw/sets/0123456789ab/drawn-1",
        f"/draw/sets/{run_id}/..%2F..",
        f"/draw/sets/{run_id}/drawn-1/99",
        f"/draw/sets/{run_id}/stolen/0",
        f"/runs/{run_id}/sets/stolen/0",
        f"/draw/grids/{run_id}/..%2Floom",
        "/draw/jobs/nothing",
        "/mix/files/..%2F..%2Fetc%2Fpasswd",
        "/mix/files/0123456789ab/about",
        "/mix/diagnosis?first=a&second=b",
    ):
        assert browser.get(path).status_code == 404, path
    assert browser.post(f"/draw/sets/{run_id}/drawn-1/99/mark").status_code == 404
    assert browser.post("/mix/files/nothing/convert").status_code == 404


def test_a_grid_says_each_thing_once(studio, browser, two):
    form = {
        "adapter1": two[0],
        "weight1": "0.7",
        "prompts": "a photo",
        "steps": "12",
        "x": "weight:1",
        "x-values": "0, 0.5,\n1",
        "y": "steps",
        "y-values": "4, 8",
    }
    page = browser.post("/draw/grid/command", data=form).text
    browser.post("/draw/grid", data=form)
    asked = only_job(studio)
    assert shown_command(page) == describe_argv(asked.argv)
    assert "--x=weight:1=0,0.5,1" in asked.argv
    assert "--y=steps=4,8" in asked.argv
    assert "--adapter=runs/me/adapter.safetensors" in asked.argv
    assert not [word for word in asked.argv if word.startswith("--steps")]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"x-values": ""}, "x"),
        ({"x": "colour"}, "x"),
        ({"y": "weight"}, "x"),
        ({"y-values": "4, 4"}, "y"),
        ({"x": "checkpoint", "x-values": "/etc/passwd.safetensors"}, "x"),
        ({"y": "scheduler", "y-values": "magic"}, "y"),
    ],
)
def test_what_is_wrong_with_an_axis_is_said_beside_it(studio, browser, two, change, field):
    form = {"adapter1": two[0], "prompts": "a photo", "x": "weight", "x-values": "0,1"}
    form |= {"y": "steps", "y-values": "4,8", "run": ""} | change
    answer = browser.post("/draw/grid", data=form)
    assert answer.status_code == 422
    assert re.search(rf'data-fault="{field}">[^<]+</p>', answer.text)
    assert not list(studio.jobs)


def test_a_grid_is_a_table_and_its_cells_are_no_sets_of_their_own(studio, browser, two):
    run = RunFolder(studio.root / "me")
    make_ahead(studio, run, run, RunFolder(studio.root / "style"))
    run_id = next(one.id for one in studio.runs() if one.name == "me")
    page = browser.get(f"/draw/grids/{run_id}/mix-1?picture=3").text
    assert page.count("<img") == 9
    assert page.count('/3"') >= 9
    assert "mix-1-x0-y0" not in browser.get(f"/draw?run={run_id}").text
    assert "mix-1-x0-y0" not in browser.get(f"/runs/{run_id}").text


def test_the_sliders_have_every_cell_and_begin_at_the_nearest(studio, browser, two):
    run = RunFolder(studio.root / "me")
    make_ahead(studio, run, run, RunFolder(studio.root / "style"))
    (ahead,) = list_ahead(studio)
    assert [adapter.id for adapter in ahead.adapters] == list(two)
    assert [cell.weights for cell in ahead.cells] == [(a, b) for a in WEIGHTS for b in WEIGHTS]
    assert ahead.cells[find_nearest(ahead.cells, (0.6, 0.9))].weights == (0.5, 1.0)
    page = browser.get(f"/mix?first={two[0]}&second={two[1]}").text
    cells = re.findall(
        r'data-cell="(\d)" data-first="(.*?)" data-second="(.*?)"( data-aside)?', page
    )
    assert [(float(a), float(b)) for _, a, b, _ in cells] == [one.weights for one in ahead.cells]
    assert [int(number) for number, *_, aside in cells if not aside] == [8]
    first_cell = re.search(r'data-cell="1".*?</div>', page, re.DOTALL)[0]
    assert first_cell.count("mix-1-x0-y1/") == 4
    assert {*re.findall(r'data-point="(\d)"', page)} == {"4", "5", "7", "8"}


def test_points_lie_right_for_style_and_up_for_subject(studio, two):
    run = RunFolder(studio.root / "me")
    make_ahead(studio, run, run, RunFolder(studio.root / "style"))
    cells = list_ahead(studio)[0].cells
    plot = plot_retention(cells)
    by_weights = {cells[number].weights: place for number, place in plot.points.items()}
    assert by_weights[0.5, 1.0][0] > by_weights[0.5, 0.5][0]
    assert by_weights[1.0, 0.5][1] < by_weights[0.5, 0.5][1]
    assert plot_retention(cells[:1]) is None


def test_drawing_ahead_names_both_weights_and_the_photos(studio, browser, two):
    photos = studio.photo_sets.make("Me")
    data = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 80, 40)).save(data, "PNG")
    photos.store(data.getvalue(), "one.png")
    form = {"adapter1": two[0], "adapter2": two[1], "prompts": "a photo", "seeds": "4"}
    form |= {"photos": f"set-{photos.id}", "values": "0, 0.5, 1"}
    page = browser.post("/mix/ahead/command", data=form).text
    assert browser.post("/mix/ahead", data=form).status_code == 303
    asked = only_job(studio)
    assert shown_command(page) == describe_argv(asked.argv)
    assert {"--x=weight:1=0,0.5,1", "--y=weight:2=0,0.5,1"} <= {*asked.argv}
    assert any(word.startswith("--photos=runs/.studio/photos/") for word in asked.argv)
    for change, field in (({"photos": "/etc"}, "photos"), ({"values": "0,x"}, "values")):
        answer = browser.post("/mix/ahead", data=form | change)
        assert answer.status_code == 422
        assert re.search(rf'data-fault="{field}">[^<]+</p>', answer.text)
    assert browser.post("/mix/ahead", data=form | {"adapter2": two[0]}).status_code == 422


@pytest.fixture
def three(studio, two):
    """Three runs with an adapter each."""
    make_run(studio.root, "third", b"a third")
    by_name = {one.name: one.id for one in list_adapters(studio.root)}
    return *two, by_name["third/adapter.safetensors"]


def test_three_are_drawn_ahead_by_the_weights_of_two(studio, browser, three):
    from dreamloom.cli.main import main

    form = {f"adapter{n}": one for n, one in enumerate(three, start=1)}
    form |= {"weight3": "0.7", "prompts": "a photo", "values": "0, 1"}
    page = browser.post("/mix/ahead/command", data=form).text
    assert browser.post("/mix/ahead", data=form).status_code == 303
    asked = only_job(studio)
    assert shown_command(page) == describe_argv(asked.argv)
    given = main.commands["grid"].make_context("grid", list(asked.argv[1:])).params
    files = [f"runs/{name}/adapter.safetensors" for name in ("me", "style", "third")]
    assert given["adapters"] == (*files[:2], f"{files[2]}:0.7")
    assert (given["x"], given["y"]) == (("weight:1=0,1",), ("weight:2=0,1",))
    for wrong in ({"weight3": "much"}, {"adapter3": three[0]}, {"adapter3": "gone"}):
        assert browser.post("/mix/ahead", data=form | wrong).status_code == 422


def test_the_sliders_of_three_choose_among_the_pictures_of_two(studio, browser, three):
    runs = [RunFolder(studio.root / name) for name in ("me", "style", "third")]
    make_ahead(studio, runs[0], *runs, third="0.7")
    (ahead,) = list_ahead(studio)
    assert [adapter.id for adapter in ahead.adapters] == list(three)
    assert ahead.weights == ("1", "1", "0.7")
    chosen = dict(zip(("first", "second", "third"), three, strict=True))
    for asked in (chosen, {"grid": ahead.key}):
        page = browser.get("/mix", params=asked).text
        assert page.count('data-cell="') == 9
        assert "0.5 × me, 1 × style, 0.7 × third" in page
        assert "not measured" not in page  # there is nothing to ask for
        assert re.findall(r'data-slides="weight(\d)"', page) == ["1", "2", "3"]
        assert 'id="weight3" inputmode="decimal" value="0.7"' in page
        assert page.count("/mix/diagnosis?") == 3
    chosen.pop("third")
    assert 'data-cell="' not in browser.get("/mix", params=chosen).text


def test_a_grid_whose_adapter_has_gone_chooses_nothing(studio, browser, three):
    runs = [RunFolder(studio.root / name) for name in ("me", "style", "third")]
    make_ahead(studio, runs[0], *runs, third="0.7")
    runs[2].adapter.unlink()
    (ahead,) = list_ahead(studio)
    assert ahead.adapters == ()
    page = browser.get(f"/mix?grid={ahead.key}")
    assert page.status_code == 200
    assert 'data-slides="' not in page.text


def test_methods_are_those_that_take_so_many(studio, browser, three, monkeypatch):
    plain = {"summary": "", "formula": "", "needs": "factors", "options": []}
    many = {"name": "median", "least": 3, "most": None} | plain
    pair = {"name": "slerp", "least": 2, "most": 2} | plain

    async def answer(self, argv, because="", instead=""):
        return [*METHODS, many, pair], ""

    monkeypatch.setattr(Studio, "ask", answer)
    for parts, there, gone in ((2, "slerp", "median"), (3, "median", "slerp")):
        methods = browser.get("/mix/method", params={"parts": parts, "method": there}).text
        assert f"<option selected>{there}</option>" in methods
        assert f"<option>{gone}</option>" not in methods
        form = {f"adapter{n}": one for n, one in enumerate(three[:parts], start=1)}
        assert browser.post("/mix/merge", data=form | {"method": gone}).status_code == 422
        assert browser.post("/mix/merge", data=form | {"method": there}).status_code == 303
    form |= {"weight3": "0.4", "blocks3": "style=0", "method": "median"}
    page = browser.post("/mix/merge/command", data=form).text
    command = shown_command(page, "merge-text")
    assert "third=runs/third/adapter.safetensors:0.4" in command
    assert "--blocks=third:style=0" in command
    for wrong in ({"adapter3": three[0]}, {"adapter3": "gone"}, {"weight3": "much"}):
        answer = browser.post("/mix/merge", data=form | wrong)
        assert answer.status_code == 422


METHODS = [
    {"name": "sum", "needs": "factors", "options": []},
    {
        "name": "ties",
        "needs": "entries",
        "options": [
            {"name": "density", "default": 0.2, "low": 0.01, "high": 1.0, "choices": []},
            {"name": "election", "default": "mass", "low": None, "high": None, "choices": ["mass"]},
        ],
    },
]


def test_a_merge_is_told_only_what_differs_and_never_writes_over_a_file(studio, two):
    (studio.root / "both.safetensors").write_bytes(b"x")
    pair = ((two[0], "0.8"), (two[1], "0.5"))
    wanted = WantedMerge(
        pair, "ties", {"density": "0.3", "election": "mass"}, ("style=0", ""), title="Both!"
    )
    assert wanted.find_faults(studio, METHODS) == {}
    file, argv = wanted.write_command(studio, METHODS)
    assert file == "both-2.safetensors"
    assert argv[:3] == [
        "merge",
        "me=runs/me/adapter.safetensors:0.8",
        "style=runs/style/adapter.safetensors:0.5",
    ]
    assert {"--set=density=0.3", "--blocks=me:style=0", "--verify"} <= {*argv}
    assert not [word for word in argv if "election" in word]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"options": {"density": "2"}}, "opt-density"),
        ({"options": {"election": "all"}}, "opt-election"),
        ({"blocks": ("mid=x", "")}, "blocks1"),
        ({"rank": "--overwrite"}, "rank"),
        ({"format": "zip"}, "format"),
        ({"method": "magic"}, "method"),
    ],
)
def test_what_is_wrong_with_a_merge_is_said_by_field(studio, two, change, field):
    plain = {"adapters": ((two[0], "1"), (two[1], "1")), "method": "ties"}
    assert field in WantedMerge(**plain | change).find_faults(studio, METHODS)


def test_a_heat_map_has_a_row_for_each_block_and_levels_by_share():
    block = {"shared": 1, "cosine": -0.9, "row_overlap": [0.5, 0.4], "row_chance": [0.1, 0.1]}
    rows = list_heat(
        {
            "blocks": [
                {"block": "down", "norms": [2.0, 1.0]} | block,
                {"block": "up", "norms": [0.0, 4.0], "shared": 0, "cosine": None}
                | {"row_overlap": None, "row_chance": None},
            ]
        }
    )
    assert [row["block"] for row in rows] == ["down", "up"]
    assert rows[0]["values"][:3] == [("2", 5), ("1", 1), ("-0.90", 4)]
    assert rows[1]["values"][2:] == [("–", 0)] * 3


def test_a_file_is_downloaded_by_its_name_in_forms_and_converted_into_another(studio, browser):
    (studio.root / "both.safetensors").write_bytes(b"bytes")
    (file,) = list_adapters(studio.root)
    answer = browser.get(f"/mix/files/{file.id}")
    assert answer.content == b"bytes"
    assert 'filename="both.safetensors"' in answer.headers["content-disposition"]
    place = f"/mix/files/{file.id}/convert"
    assert browser.post(place, data={"format": "x", "precision": "fp16"}).status_code == 422
    browser.post(place, data={"format": "kohya", "precision": "fp16"})
    argv = only_job(studio).argv
    assert argv[-2:] == ("--", "runs/both.safetensors")
    assert "--out=runs/both-kohya-fp16.safetensors" in argv


def test_words_that_are_written_out_are_the_command_lines():
    from dreamloom.cli.adapters import FORMATS as formats
    from dreamloom.cli.adapters import PRECISIONS as precisions
    from dreamloom.cli.words import SCHEDULERS as schedulers

    assert schedulers == SCHEDULERS
    assert tuple(formats.choices) == FORMATS
    assert tuple(precisions.choices) == PRECISIONS
