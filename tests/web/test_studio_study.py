"""A study asked from the page: one button, and later one sentence in its place."""

import json

import pytest

from web.conftest import RunningStudio, Watch
from web.test_studio_jobs import drop_photos, enter

pytestmark = pytest.mark.web


def test_a_question_is_asked_by_a_button_and_answered_by_a_sentence(browser, studio: RunningStudio):
    watch = Watch()
    page = enter(browser, studio, watch)
    drop_photos(page, studio)
    page.goto(f"{studio.origin}/measure")
    card = page.locator("#question-weak-spots")
    card.get_by_role("button", name="Ask").click()
    page.wait_for_url("**/measure#question-weak-spots")
    card.get_by_text("running").wait_for()

    # When the job has ended, the card has the sentence, and can be asked again; nobody loads the
    # page anew.
    card.get_by_role("button", name="Ask").wait_for(timeout=2_400_000)
    (job,) = studio.jobs
    assert (job.asked.kind, job.outcome) == ("study", "done")
    folder = studio.root / job.asked.run
    sentence = json.loads((folder / "study.json").read_text(encoding="utf-8"))["answer"]
    assert card.locator("strong").text_content() == sentence

    # What it taught and drew on its way is no run of the user's.
    assert len(list(folder.glob("*/*/records"))) > 2
    page.goto(f"{studio.origin}/")
    assert page.locator("ul.runs > li").count() == 1
    page.locator("ul.runs").get_by_role("link", name=job.asked.run).click()
    assert page.get_by_text(sentence).is_visible()
    assert watch.errors == []
