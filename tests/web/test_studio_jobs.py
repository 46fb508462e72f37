"""Jobs in the studio as a person at a browser has them: queued, stopped, gone on with."""

import time
from pathlib import Path
from typing import Any

import pytest

from dreamloom.core.run_folder import file_sha256
from dreamloom.data.examples import examples_folder
from web.conftest import RunningStudio, Watch

pytestmark = pytest.mark.web

PHOTOS = sorted((examples_folder() / "rraj").glob("*.jpg"))
# Few updates on few layers: it is the jobs that are tried here.
SMALL = {
    "train.steps": "24",
    "train.target_modules": "attention",
    "train.checkpointing_steps": "12",
    "train.batch_photos": "1",
    "priors.count": "4",
    "priors.steps": "2",
    "priors.kind": "none",
}


def enter(browser: Any, studio: RunningStudio, watch: Watch | None = None) -> Any:
    page = browser.new_context().new_page()
    page.set_default_timeout(120_000)  # on cores that do other work
    if watch:
        watch.on(page)
    page.goto(studio.door)
    return page


def drop_photos(page: Any, studio: RunningStudio, photos: list[Path] = PHOTOS) -> str:
    """Make a set of photos; give its address."""
    page.goto(f"{studio.origin}/")
    page.get_by_label("Name of the set").fill("me")
    page.get_by_role("button", name="Begin").click()
    page.locator("#files").set_input_files(photos)
    page.locator("ul.photos > li").nth(len(photos) - 1).wait_for(timeout=60_000)
    return page.url


def ask_to_teach(page: Any, studio: RunningStudio, settings: dict[str, str], **fields: str) -> None:
    """Fill in the form and start it."""
    page.goto(f"{studio.origin}/teach?preset=quick")
    for name, value in fields.items():
        page.locator(f"#{name}").fill(value)
    page.locator("input[name=looks]").uncheck()
    page.locator("input[name=then]").uncheck()
    page.locator("#prior").select_option("none")
    page.locator("details.room").evaluate_all("all => all.forEach((one) => { one.open = true; })")
    for name, value in settings.items():
        control = page.locator(f'[name="{name}"]')
        if control.count() == 0:
            continue  # asked for above
        if control.evaluate("one => one.tagName") == "SELECT":
            control.select_option(value)
        else:
            control.fill(value)
    page.locator("#start").click()
    page.wait_for_url("**/jobs/*")


def test_three_jobs_run_in_their_order_and_can_change_it(browser, studio):
    page = enter(browser, studio)
    drop_photos(page, studio)
    for name in ("one person", "two person", "three person"):
        ask_to_teach(page, studio, SMALL, subject=name)
    page.goto(f"{studio.origin}/jobs")
    first = studio.wait_for(lambda: studio.jobs.running())[0]
    assert first.asked.run == "one-person"
    page.get_by_role("button", name="Earlier: Teach three-person").click()
    page.wait_for_load_state()
    assert [job.asked.run for job in studio.jobs.waiting()] == ["three-person", "two-person"]
    jobs = studio.wait_until_idle(600)
    assert [job.outcome for job in jobs] == ["done"] * 3
    began = {job.asked.run: job.became.started_at for job in jobs}
    ended = {job.asked.run: job.became.ended_at for job in jobs}
    assert ended["one-person"] <= began["three-person"] <= ended["three-person"]
    assert ended["three-person"] <= began["two-person"]


def test_a_stopped_training_keeps_a_checkpoint_and_ends_as_an_unstopped_one(browser, studio):
    page = enter(browser, studio)
    drop_photos(page, studio)
    long = SMALL | {"train.steps": "60", "train.checkpointing_steps": "60"}
    for _ in range(2):
        ask_to_teach(page, studio, long, subject="same person")
    whole, broken = studio.root / "same-person", studio.root / "same-person-2"

    def has_begun() -> bool:
        events = broken / "events.jsonl"
        return events.is_file() and '"LossLogged"' in events.read_text()

    studio.wait_for(has_begun, 300)
    job = next(job for job in studio.jobs if job.asked.run == "same-person-2")
    page.goto(f"{studio.origin}/jobs/{job.id}")
    began = time.monotonic()
    page.get_by_role("button", name="Stop").click()
    studio.wait_for(lambda: job.outcome == "cancelled", 30)
    # The runner looks five times a second; the process itself has five seconds.
    assert time.monotonic() - began < 6
    assert list((broken / "checkpoints").iterdir())
    assert not (broken / "adapter.safetensors").is_file()
    page.goto(f"{studio.origin}/")
    page.get_by_role("link", name="same-person-2").click()
    page.get_by_role("button", name="Go on").click()
    studio.wait_until_idle(300)
    files = [folder / "adapter.safetensors" for folder in (whole, broken)]
    assert file_sha256(files[0]) == file_sha256(files[1])


def test_twenty_browsers_on_one_page_cost_little_and_see_no_error(browser, studio):
    page = enter(browser, studio)
    drop_photos(page, studio)
    ask_to_teach(page, studio, SMALL | {"train.steps": "60"}, subject="seen person")
    run = studio.wait_for(lambda: list(studio.root.glob("seen-person/loom.toml")), 120)
    assert run
    page.goto(f"{studio.origin}/")
    page.get_by_role("link", name="seen-person").click()
    address, before, watch = page.url, studio.memory_mb(), Watch()
    contexts = [browser.new_context(storage_state=page.context.storage_state()) for _ in range(20)]
    pages = [watch.on(context.new_page()) for context in contexts]
    for one in pages:
        one.goto(address)
    time.sleep(6)
    grown = studio.memory_mb() - before
    for context in contexts:
        context.close()
    assert watch.errors == []
    assert grown < 50, f"{grown:.0f} MB more"
    assert all(url.startswith(studio.origin) for url in watch.asked)


def test_another_preset_keeps_what_was_typed_and_nothing_else(browser, studio):
    page = enter(browser, studio)
    drop_photos(page, studio, PHOTOS[:1])
    page.goto(f"{studio.origin}/teach?preset=quick")
    page.locator("#subject").fill("kept person")
    page.get_by_label("Find a setting").fill("train.rank")
    page.locator('[name="train.rank"]').fill("5")
    with page.expect_navigation():
        page.locator("#preset").select_option("thorough")
    assert page.locator("#subject").input_value() == "kept person"
    assert page.locator('[name="train.rank"]').input_value() == "5"
    assert page.locator('[name="train.steps"]').input_value() == "1000"
    page.locator("#plan pre").wait_for()
    command = page.locator("#plan pre").text_content()
    assert command.count("--set") == 2  # the rank, and looks on the way
    page.locator('[name="train.rank"]').fill("many")
    page.locator('[data-fault="train.rank"]', has_text="valid integer").wait_for()
    assert page.locator("#start").is_disabled()
