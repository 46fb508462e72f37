"""The whole path on the built-in model, as somebody walks it who has six photos and no GPU."""

import json
from typing import Any

import pytest

from dreamloom.core.manifests import read_photo_set
from dreamloom.data.examples import examples_folder
from web.conftest import RunningStudio, Watch
from web.test_studio_jobs import drop_photos, enter

pytestmark = pytest.mark.web

STYLE = sorted((examples_folder() / "pixel-art").glob("*.png"))


def edit_first_photo(page: Any) -> None:
    """Set a crop by keyboard, paint a mask by mouse, and write a caption."""
    page.locator("ul.photos a").first.click()
    page.get_by_role("button", name="Set a crop").click()
    frame = page.get_by_role("slider", name="Crop frame")
    for key in ("ArrowLeft", "ArrowUp", "Shift+ArrowRight"):
        frame.press(key)
    page.get_by_text("Saved.").wait_for()
    page.get_by_label("paint").check()
    box = page.locator(".stage").bounding_box()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.7 * box["height"], steps=8)
    page.mouse.up()
    with page.expect_response("**/mask") as kept:
        page.get_by_role("button", name="Keep the mask").click()
    assert kept.value.ok, kept.value.text()
    page.locator("#caption").fill("a photo of rraj person, smiling")
    with page.expect_response("**/caption") as kept:
        page.get_by_role("button", name="Keep the caption").click()
    assert kept.value.ok, kept.value.text()


def test_from_six_photos_to_a_merged_picture_and_the_report(browser, studio: RunningStudio):
    watch = Watch()
    page = enter(browser, studio, watch)
    assert studio.started_s < 20  # 3 s on cores that do nothing else; see docs/studio.md
    photos = drop_photos(page, studio)
    edit_first_photo(page)

    # Teach, with looks on the way, and with what follows.
    page.goto(photos)
    page.get_by_role("link", name="Teach this set").click()
    assert page.locator("#preset").input_value() == "quick"
    page.get_by_text("How the model reads these words").wait_for(timeout=120_000)
    page.locator("#start").click()
    page.wait_for_url("**/jobs/*")
    run = studio.root / "rraj-person"
    studio.wait_for(lambda: (run / "events.jsonl").is_file(), 120)
    page.goto(f"{studio.origin}/")
    page.get_by_role("link", name="rraj-person").click()
    address = page.url
    page.locator("#curve canvas").wait_for(timeout=300_000)

    # A reload shows the running job with its curve; so does a server that crashed and came back.
    page.reload()
    page.locator("#curve canvas").wait_for()
    assert page.get_by_text("running").first.is_visible()
    (job,) = studio.jobs.running()
    pid = job.became.pid
    studio.kill()
    studio.start()
    page.goto(address)
    assert page.get_by_text("running").first.is_visible()
    (still,) = studio.jobs.running()
    assert (still.id, still.became.pid) == (job.id, pid)
    watch.errors.clear()  # the line was lost: that is what was tried

    page.get_by_role("button", name="Draw now").click()
    page.get_by_text("Asked for").wait_for()
    jobs = studio.wait_until_idle(1500)
    assert [(one.asked.kind, one.outcome) for one in jobs] == [
        ("train", "done"),
        ("generate", "done"),
        ("evaluate", "done"),
        ("report", "done"),
    ]

    # What was set at the photo was taught.
    first = read_photo_set(run / "photos").photos[0]
    assert first.caption == "a photo of rraj person, smiling"
    assert first.box_px
    assert first.mask

    # The looks stand side by side, with likeness between floor and ceiling.
    page.goto(address)
    page.locator("table.looks img").nth(5).wait_for()
    assert page.get_by_text("Take the adapter after").is_visible()
    assert page.get_by_text("(base model) to").first.is_visible()
    compare_looks(page)

    # The report stands in the page.
    page.get_by_role("link", name="Report", exact=True).click()
    report = page.frame_locator("iframe.report")
    report.get_by_role("heading", level=1).wait_for()

    # A style, a merge, and a picture by it.
    teach_style(page, studio)
    merged = merge_both(page, studio)
    draw_with(page, studio, merged)
    assert watch.errors == []
    assert all(url.startswith((studio.origin, "data:", "blob:")) for url in watch.asked)


def compare_looks(page: Any) -> None:
    """See them beside each other, and two of them laid over each other."""
    assert_pictures_load(page, "table.looks img")
    page.locator("#split summary").click()
    page.locator("#split .under[src]").wait_for(state="attached")
    assert_pictures_load(page, "#split img")
    over, under = (page.locator(f"#split .{one}").get_attribute("src") for one in ("over", "under"))
    assert over != under


def assert_pictures_load(page: Any, selector: str) -> None:
    page.locator(selector).first.wait_for()
    for picture in page.locator(selector).all()[:6]:
        picture.scroll_into_view_if_needed()
        assert picture.evaluate("one => one.decode().then(() => one.naturalWidth)") > 0


def teach_style(page: Any, studio: RunningStudio) -> None:
    page.goto(f"{studio.origin}/photos")
    page.get_by_role("button", name="Take the example style").click()
    page.get_by_role("link", name="Teach this set").click()
    assert page.locator("#preset").input_value() == "quick"
    page.locator("#subject").fill("pixel")
    page.locator("#class_noun").fill("picture")
    page.locator("#prior").select_option("none")
    page.locator("input[name=looks]").uncheck()
    page.locator("input[name=then]").uncheck()
    page.locator("#start").click()
    page.wait_for_url("**/jobs/*")
    jobs = studio.wait_until_idle(900)
    assert jobs[-1].outcome == "done"
    assert (studio.root / "pixel" / "adapter.safetensors").is_file()
    captions = {photo.caption for photo in read_photo_set(studio.root / "pixel" / "photos").photos}
    assert captions == {file.with_suffix(".txt").read_text().strip() for file in STYLE}


def merge_both(page: Any, studio: RunningStudio) -> str:
    """Choose the two, look at what they share, give the style less, and make one file."""
    page.goto(f"{studio.origin}/")
    page.get_by_role("link", name="rraj-person").click()
    page.get_by_role("link", name="Mix it").click()
    page.locator("#second").select_option(label="pixel")
    page.get_by_role("button", name="Look at these").click()
    page.locator("#share + div svg, #share + div table").first.wait_for(timeout=120_000)
    page.locator("#weight2").fill("0.8")
    page.locator("#title").fill("me in pixels")
    page.locator("#method select").wait_for(timeout=120_000)
    page.get_by_role("button", name="Merge and verify").click()
    page.wait_for_url("**/draw/jobs/*")
    page.wait_for_url("**/mix#files", timeout=600_000)
    (file,) = studio.root.glob("*pixels*.safetensors")
    page.get_by_role("button", name=f"Verify: {file.stem}").click()
    page.locator("[id^=verified-] .good").wait_for(timeout=120_000)
    return file.stem


def draw_with(page: Any, studio: RunningStudio, merged: str) -> None:
    page.get_by_role("link", name=f"Draw with it: {merged}").click()
    page.locator("#prompts").fill("pixel, a photo of {subject}")
    page.locator("[name=seeds]").fill("2")
    page.locator("[name=preset]").select_option("quick")
    page.locator("#subject").fill("rraj person")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.wait_for_url("**/draw/sets/**", timeout=300_000)
    jobs = list(studio.jobs)
    assert (jobs[-1].asked.kind, jobs[-1].outcome) == ("generate", "done")
    assert f"{merged}.safetensors" in " ".join(jobs[-1].asked.argv)
    run = studio.root / jobs[-1].asked.run
    (manifest,) = [
        file for file in run.glob("images/*/manifest.json") if merged in file.read_text()
    ]
    pictures = json.loads(manifest.read_text())["pictures"]
    assert {one["prompt"] for one in pictures} == {"pixel, a photo of rraj person"}
    assert_pictures_load(page, "table.gallery-table img")
