"""The measure page: reports, scorecards, comparisons and studies, each from a run's own files."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the studio needs the extra 'studio'")

from dreamloom.evaluation.compare import Comparison
from dreamloom.evaluation.metrics.scorecard import Score, Scorecard
from dreamloom.experiments.study.asked import list_questions
from dreamloom.studio.context import Studio
from dreamloom.studio.jobs import Became
from dreamloom.studio.page_measure import OWN_PHOTOS, list_scored
from dreamloom.studio.runs import list_runs
from dreamloom.studio.words import read_words, say
from studio_case import enter, make_jpeg, make_run, open_studio

PACKAGE = Path(__file__).parents[1] / "src" / "dreamloom"


def make_card(value: float) -> Scorecard:
    scores = {
        "identity": Score(value=value, n=8, interval=(0.1, 0.9), floor=0.2, ceiling=0.9, lift=0.5),
        "clip_t": Score(note="not measured: no encoder <b>here</b>"),
    }
    return Scorecard(
        alarms=("a sign <i>of</i> a mistake",),
        scores=scores,
        encoders="picturebook",
        photos=6,
        confidence=0.95,
        resamples=10,
        pictures=(),
    )


@pytest.fixture
def studio(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "runs")
    cards = {name: make_card(0.5).model_dump(mode="json") for name in ("pictures", "o<b>dd")}
    (folder / "scores.json").write_text(json.dumps({**cards, "broken": {"scores": 3}}))
    with open_studio(tmp_path / "runs", monkeypatch) as (client, own, _):
        yield enter(client, own), own


def test_a_run_shows_its_report_and_its_scores_with_floor_and_ceiling(studio):
    client, own = studio
    run = own.runs()[0]
    text = client.get("/measure", params={"run": run.id}).text
    assert f'src="/runs/{run.id}/report" sandbox="allow-scripts"' in text
    for told in ("0.500", "0.200", "0.900", "0.100 to 0.900", "Identity"):
        assert told in text
    assert "not measured: no encoder &lt;b&gt;here" in text
    assert "a sign &lt;i&gt;of" in text
    assert "o&lt;b&gt;dd" in text


def test_the_report_is_written_anew_as_a_job(studio):
    client, own = studio
    run = own.runs()[0]
    assert client.post(f"/measure/{run.id}/report").status_code == 303
    [job] = own.jobs
    assert job.asked.argv == ("report", "--", "runs/me")
    assert client.post("/measure/nothing/report").status_code == 404


def test_a_set_is_scored_against_photos_and_then_told_of(studio):
    client, own = studio
    run = own.runs()[0]
    photos = own.photo_sets.make("me")
    wanted = {"set": "pictures", "photos": photos.id, "floor": ""}
    for bad in ({"set": "../x"}, {"photos": "../../etc"}, {"floor": "--help"}):
        answer = client.post(f"/measure/{run.id}/score", data=wanted | bad)
        assert answer.status_code == 422
    assert client.post(f"/measure/{run.id}/score", data={**wanted, "photos": OWN_PHOTOS}).is_error
    assert not list(own.jobs)
    data = wanted | {"floor": "pictures"}
    assert client.post(f"/measure/{run.id}/score", data=data).status_code == 303
    first, second = own.jobs.waiting()
    told = "evaluate runs/me/images/pictures --photos runs/.studio/photos/photos-001"
    assert " ".join(first.asked.argv).startswith(f"{told} --floor runs/me/images/pictures")
    assert second.asked.after == first.id
    assert second.asked.kind == "report"


def test_two_sets_are_compared_by_the_command(studio, monkeypatch):
    client, own = studio
    asked = []

    async def answer(self, argv, because=""):
        asked.append(tuple(argv))
        found = Comparison(
            measure="identity", outcome="better", difference=0.25, pairs=8, prompts=4
        )
        return [found.model_dump(mode="json")], ""

    monkeypatch.setattr(Studio, "ask", answer)
    one, other = [scored.id for scored in list_scored(own.runs())][:2]
    text = client.get("/measure/compare", params={"first": one, "second": other}).text
    assert asked == [("compare", "--json", "--", "runs/me:pictures", "runs/me:o<b>dd")]
    assert "Identity: better; +0.250, 8 pairs of 4 prompts." in text
    for query in ({}, {"first": one}, {"first": one, "second": one}, {"first": "x", "second": "y"}):
        assert client.get("/measure/compare", params=query).status_code == 200
    assert len(asked) == 1


@pytest.mark.parametrize("told", [None, {}, [{"measure": 3}], "words"])
def test_an_answer_that_is_no_comparison_is_told(studio, monkeypatch, told):
    client, own = studio

    async def answer(self, argv, because=""):
        return told, "" if told is not None else "Error: <b>nothing</b> in common."

    monkeypatch.setattr(Studio, "ask", answer)
    one, other = [scored.id for scored in list_scored(own.runs())][:2]
    page = client.get("/measure/compare", params={"first": one, "second": other})
    assert page.status_code == 200
    assert "<b>nothing" not in page.text


def test_damaged_scores_and_answers_do_no_harm(studio):
    client, own = studio
    run = own.runs()[0]
    for text in ("", "[]", "3", "{", '{"a": 1}', "null"):
        run.files.scores.write_text(text)
        (run.folder / "study.json").write_text(text)
        assert client.get("/measure", params={"run": run.id}).status_code == 200


# Studies ----------------------------------------------------------------------------------------


def test_each_question_of_the_package_is_a_card_with_words_of_its_own(studio):
    client, own = studio
    asked = list_questions()
    assert {one.name for one in asked} == {
        *("checkpoint", "obedience", "photos", "prior", "sampling", "weak-spots"),
    }
    own.photo_sets.make("me").store(make_jpeg(), "a.jpg")
    text = client.get("/measure").text
    for one in asked:
        assert one.text in text
        assert say(f"question.{one.name}") in text
        assert f'action="/measure/questions/{one.name}"' in text


def test_a_question_is_asked_as_a_study_at_the_quick_preset(studio):
    client, own = studio
    photos = own.photo_sets.make("me")
    data = {"photos": photos.id, "subject": "rraj person"}
    assert client.post("/measure/questions/prior", data=data).status_code == 422  # no photo yet
    photos.store(make_jpeg(), "a.jpg")
    assert client.post("/measure/questions/prior", data={**data, "subject": ""}).status_code == 422
    assert client.post("/measure/questions/..", data=data).status_code in {404, 405}
    assert client.post("/measure/questions/nothing", data=data).status_code == 404
    answer = client.post("/measure/questions/prior", data=data)
    assert answer.status_code == 303
    [job] = own.jobs
    assert job.asked.argv[0] == "study"
    assert Path(job.asked.argv[1]).is_file()
    assert "--quick" in job.asked.argv
    assert job.asked.argv[-2:] == ("--out", "runs/study-prior-photos-001")
    assert f"/jobs/{job.id}" in client.get("/measure").text


def test_a_study_that_is_done_answers_in_one_sentence(studio):
    client, own = studio
    folder = make_run(own.root, "study-of-mine")
    text = "With class images identity is <better>."
    found = {"question": "Does prior preservation help?", "answer": text}
    (folder / "study.json").write_text(json.dumps(found))
    page = client.get("/measure").text
    assert page.count("With class images identity is &lt;better&gt;.") == 1


KEY = "0123456789abcdef"


def make_study(root: Path) -> Path:
    """Make a study's folder with what it has taught and drawn on its way."""
    folder = make_run(root, "study-mine")
    (folder / "adapter.safetensors").unlink()
    for part in ("runs", "pictures", "class-images"):
        inner = make_run(folder / part, KEY)
        (inner / "scores.json").write_text(json.dumps({"pictures": {}}))
    return folder


def test_what_a_study_has_made_on_its_way_fills_no_page(studio):
    client, own = studio
    make_study(own.root)
    make_run(own.root / "runs", KEY[::-1])  # of that shape, but in no study
    make_run(own.root / "me", "inner")
    assert {run.name for run in own.runs()} == {
        *("me", "me/inner", "study-mine", f"runs/{KEY[::-1]}")
    }
    assert len(list_runs(own.root, of_studies=True)) == 7
    for address in ("/", "/measure", "/draw", "/draw/grid", "/mix", "/disk"):
        page = client.get(address).text
        assert KEY not in page, address
    assert client.get("/").text.count("<strong>study-mine</strong>") == 1
    assert len(list_runs(own.root / "study-mine")) == 3  # opened on itself, it hides nothing


def test_a_study_is_answered_where_others_are_taught(studio):
    client, own = studio
    folder = make_study(own.root)
    run = next(one for one in own.runs() if one.folder == folder)
    assert "not finished" in client.get(f"/runs/{run.id}").text
    found = {"question": "Is <it>?", "answer": "It is <so>."}
    (folder / "study.json").write_text(json.dumps(found))
    for address in ("/", f"/runs/{run.id}", f"/runs/{run.id}/live"):
        page = client.get(address).text
        assert "It is &lt;so&gt;." in page
        assert "answered" in page
        assert "not finished" not in page


def test_a_question_is_shown_anew_as_long_as_a_job_works_on_it(studio):
    client, own = studio
    photos = own.photo_sets.make("me")
    photos.store(make_jpeg(), "a.jpg")
    data = {"photos": photos.id, "subject": "rraj person"}
    answer = client.post("/measure/questions/prior", data=data)
    assert answer.headers["location"] == "/measure#question-prior"
    [job] = own.jobs
    polls = 'hx-get="/measure/questions/prior"'
    assert client.get("/measure").text.count("hx-get=") == 1
    assert polls in client.get("/measure/questions/prior").text
    job.write_became(Became(outcome="failed"))
    job.log_file.write_text("No <photo> could be read.\n")
    card = client.get("/measure/questions/prior").text
    assert polls not in card
    assert "No &lt;photo&gt; could be read." in card
    assert 'action="/measure/questions/prior"' in card
    job.write_became(Became(outcome="done"))
    assert f"/jobs/{job.id}" not in client.get("/measure/questions/prior").text
    assert client.get("/measure/questions/nothing").status_code == 404


def test_a_study_that_was_stopped_goes_on(studio):
    client, own = studio
    make_study(own.root)
    run = next(one for one in own.runs() if one.name == "study-mine")
    argv = ["study", "prior.toml", "--out", "runs/study-mine"]
    own.jobs.add("study", argv, run=run.name).write_became(Became(outcome="cancelled"))
    assert "Go on" in client.get(f"/runs/{run.id}").text
    assert client.post(f"/runs/{run.id}/resume").status_code == 303
    [job] = own.jobs.waiting()
    assert (job.asked.kind, list(job.asked.argv)) == ("study", argv)


# Words ------------------------------------------------------------------------------------------


def test_every_text_that_a_page_asks_for_is_in_the_catalogue():
    known = read_words()
    sources = [*PACKAGE.glob("studio/**/*.html"), *PACKAGE.glob("studio/*.py")]
    asked = {
        (name, file.name)
        for file in sources
        for name in re.findall(r"""\bsay\(\s*["']([\w.-]+)["'](?!\s*~)""", file.read_text("utf-8"))
        if not name.endswith(".")
    }
    assert len(asked) > 100
    assert {(name, file) for name, file in asked if name not in known} == set()


def test_every_text_of_a_page_is_told_the_values_that_it_wants():
    known = read_words()
    missing = []
    for file in [*PACKAGE.glob("studio/**/*.html"), *PACKAGE.glob("studio/*.py")]:
        text = file.read_text("utf-8")
        for name in re.findall(r"""\bsay\(["']([\w.-]+)["']\)""", text):
            if re.search(r"(?<!\{)\{\w+\}(?!\})", known.get(name, "")):
                missing.append((file.name, name))
    assert missing == []
