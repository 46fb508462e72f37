"""The hub: what is pushed and what never is, what is asked before, what is said when it fails.

The hub's own client talks to a server on this machine that answers as the hub does.
"""

import getpass
import io
import json
import re
import shutil
import socket
import struct
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from dreamloom.cli.main import main
from dreamloom.core.config.loading import load_config
from dreamloom.core.manifests import Picture
from dreamloom.core.run_folder import Record
from dreamloom.hub.card import Base, CardFacts, find_base, make_card
from dreamloom.hub.upload import LEFT_OUT
from dreamloom.lora.writing import write_adapter
from hub_server import Hub, Repository
from merges import random_adapter
from studio_set import make_photos

# The hub's client uploads in a way that its HTTP library will not know for ever.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CAPTION, PHOTO = "my garden at the lake", "Summer_at_home"
WEIGHTS = "pytorch_lora_weights.safetensors"
WORD = "pytorch_lora_weights-tokens/zwx.safetensors"
SAMPLES = [f"samples/{number:02d}.png" for number in range(1, 5)]
SMALL = [
    word
    for setting in (
        *("train.steps=2", "train.rank=2", "train.batch_photos=1", "priors.kind=none"),
        *("train.target_modules=attention", "validation.tracker=none"),
        *("generate.steps=[2]", "generate.images_per_prompt=2", "evaluate.resamples=100"),
        'adapter.placeholder_tokens={"<zwx>" = "dog"}',
    )
    for word in ("--set", setting)
]
PUBLISHED = """
base base_fingerprint base_revision base_storage class_noun kind layout photo_prompt prediction
prior resolution_px seed settings subject words zero_terminal_snr
architecture description hash_sha256 implementation implementation_version prediction_type
resolution sai_model_spec tags title trigger_phrase usage_hint
format sshs_model_hash ss_base_model_version ss_caption_tag_dropout_rate
ss_gradient_accumulation_steps ss_keep_tokens ss_learning_rate ss_lr_scheduler ss_lr_warmup_steps
ss_max_grad_norm ss_max_train_steps ss_mixed_precision ss_multires_noise_discount
ss_multires_noise_iterations ss_network_alpha ss_network_dim ss_network_module ss_noise_offset
ss_num_train_images ss_optimizer ss_output_name ss_prior_loss_weight ss_resolution ss_sd_model_name
ss_seed ss_shuffle_caption ss_steps ss_text_encoder_lr ss_unet_lr ss_zero_terminal_snr
"""
"""Everything that an uploaded header may say."""
PROMPTS = (
    "a photo of {subject}",
    "a {subject} in snow",
    "a {subject} | a cat",
    "a dog",
    "{subject}",
)


def run_command(*words: object, **how: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], **how)


def succeed(*words: object) -> str:
    done = run_command(*words)
    assert done.exit_code == 0, done.output
    return done.output


def fail(*words: object, **how: object) -> str:
    done = run_command("--quiet", *words, **how)
    assert done.exit_code == 1, done.output
    lines = done.stderr.splitlines()
    assert len(lines) <= 2, done.stderr
    return " ".join(lines)


@pytest.fixture(scope="module")
def taught(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an adapter of a new word, pictures of it and of the base, and scores."""
    home = tmp_path_factory.mktemp("private")
    photos, out = make_photos(home / "photos"), home / "the-run"
    (photos / "IMG_0.jpg").rename(photos / f"{PHOTO}.jpg")
    (photos / f"{PHOTO}.txt").write_text(f"a photo of <zwx> dog, {CAPTION}")
    named = ("--subject", "<zwx> dog", "--class-noun", "dog", "--base", tiny_sdxl)
    succeed("train", photos, *named, "--out", out, "--device", "cpu", *SMALL)
    prompts = [word for text in PROMPTS for word in ("--prompt", text)]
    words = ("--adapter", f"{out / 'adapter.safetensors'}:0.8", *prompts, "--floor")
    succeed("generate", *words, "--out", out, "--base", tiny_sdxl, "--device", "cpu", *SMALL)
    images = out / "images"
    words = ("--photos", photos, "--floor", images / "pictures_base", "--device", "cpu")
    succeed("evaluate", images / "pictures", *words, *SMALL)
    return out


@pytest.fixture
def copied(taught: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return shutil.copytree(taught, tmp_path / "copied")


def readable_parts(name: str, content: bytes) -> bytes:
    """All of a file that is words: of weights the header, of a picture what is not its pixels."""
    if name.endswith(".safetensors"):
        return content[: 8 + struct.unpack("<Q", content[:8])[0]]
    if name.endswith(".png"):
        return b"".join(data for kind, data in read_chunks(content) if kind != b"IDAT")
    return content


def read_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def find_leaks(files: dict[str, bytes], secrets: list[str]) -> list[str]:
    """List what of the secrets stands in any file: short ones as words, in what is words."""
    found = []
    for name, content in files.items():
        words = readable_parts(name, content)
        for secret in secrets:
            bare = re.escape(secret.encode())
            is_there = re.search(rb"(?<![\w-])" + bare + rb"(?![\w-])", words, re.IGNORECASE)
            if is_there or (len(secret) > 6 and secret.encode() in content):
                found.append(f"{secret} in {name}")
    return found


def list_secrets(run: Path) -> list[str]:
    photos = [path.stem for path in (run.parent / "photos").iterdir()]
    places = [str(run), run.name, run.parent.name, str(run.parent), str(Path.home())]
    return [CAPTION, *photos, *places, socket.gethostname(), getpass.getuser(), "/tmp", "hf_write"]


def test_a_push_holds_the_adapter_a_card_and_pictures_and_nothing_else(taught: Path, hub: Hub):
    said = succeed("push", taught, "me", "--licence", "mit")
    assert f"{hub.endpoint}/user/me" in said
    assert "only you can see it" in said
    pushed = hub.repositories["user/me"]
    assert pushed.private
    assert len(pushed.commits) == 2  # the hub's own, and one with all files
    assert sorted(pushed.files) == sorted([".gitattributes", "README.md", WEIGHTS, WORD, *SAMPLES])
    secrets = list_secrets(taught)
    assert find_leaks(pushed.files, secrets) == []
    # Nor in anything else that was sent: requests, messages of commits.
    said_of_it = [re.sub(rb'"(content|sample)": ?"[^"]*"', b"", body) for body in hub.received]
    bodies = {
        f"{asked}.safetensors" if asked.startswith("PUT /lfs") else asked: body
        for asked, body in zip(hub.requests, said_of_it, strict=True)
    }
    assert find_leaks(bodies | {"asked": "\n".join(hub.requests).encode()}, secrets) == []
    assert hub.summaries == ["Push the adapter with DreamLoom"]


def test_a_leak_would_be_found(taught: Path):
    adapter = (taught / "adapter.safetensors").read_bytes()
    assert find_leaks({"a.safetensors": adapter}, [CAPTION]) == [f"{CAPTION} in a.safetensors"]
    assert find_leaks({"README.md": b"made on vm-7."}, ["vm-7"]) == ["vm-7 in README.md"]
    assert find_leaks({"README.md": b"made on vm-7."}, ["vm"]) == []


def test_the_adapter_is_the_same_and_its_header_says_no_more_than_was_decided(
    taught: Path, hub: Hub, tmp_path: Path
):
    succeed("push", taught, "me")
    file = tmp_path / WEIGHTS
    file.write_bytes(hub.repositories["user/me"].files[WEIGHTS])
    own, sent = load_file(taught / "adapter.safetensors"), load_file(file)
    assert own.keys() == sent.keys()
    assert all(torch.equal(own[key], sent[key]) for key in own)
    with safe_open(taught / "adapter.safetensors", "pt") as ours, safe_open(file, "pt") as theirs:
        before, after = ours.metadata(), theirs.metadata()
    assert after == {key: text for key, text in before.items() if key not in LEFT_OUT}
    # A new entry of training's is to be looked at before it is published.
    assert {key.partition(".")[2] or key for key in after} == set(PUBLISHED.split())


def test_pictures_are_chosen_by_the_rule_and_say_nothing_but_pixels(taught: Path, hub: Hub):
    succeed("push", taught, "me")
    files = hub.repositories["user/me"].files
    manifest = json.loads((taught / "images/pictures/manifest.json").read_text())["pictures"]
    drawn = [one for one in manifest if one["seed"] == 0 and "<zwx> dog" in one["prompt"]]
    card = ModelCard(files["README.md"].decode())
    shown = [(one["text"], one["output"]["url"]) for one in card.data["widget"]]
    assert shown == list(zip([one["prompt"] for one in drawn], SAMPLES, strict=True))
    for one, name in zip(drawn, SAMPLES, strict=True):
        assert {kind for kind, _ in read_chunks(files[name])} == {b"IHDR", b"IDAT", b"IEND"}
        sample = Image.open(Path(taught / "images/pictures" / one["file"]))
        assert Image.open(io.BytesIO(files[name])).tobytes() == sample.convert("RGB").tobytes()


def test_fewer_pictures_are_spread_evenly_and_none_is_none(taught: Path, tmp_path: Path):
    succeed("push", taught, "me", "--samples", 2, "--out", tmp_path / "two")
    text = (tmp_path / "two/README.md").read_text()
    widget = ModelCard(text).data["widget"]
    assert [one["text"] for one in widget] == ["a photo of <zwx> dog", "<zwx> dog"]
    assert "2 of 4 prompts, evenly spread" in text
    succeed("push", taught, "me", "--samples", 0, "--out", tmp_path / "none")
    assert not (tmp_path / "none/samples").exists()
    assert "widget" not in (tmp_path / "none/README.md").read_text()


def test_what_is_not_as_it_was_drawn_or_repeats_a_photo_is_never_pushed(
    copied: Path, tmp_path: Path
):
    pictures = copied / "images/pictures"
    photo = next((copied / "photos").glob("*.png"))
    (pictures / "0000.png").write_bytes(photo.read_bytes())
    said = succeed("push", copied, "me", "--out", tmp_path / "up")
    assert "1 picture of the set pictures left out: not as drawn" in said
    widget = ModelCard((tmp_path / "up/README.md").read_text()).data["widget"]
    assert widget[0]["text"] == "a photo of <zwx> dog"  # of the next seed
    drawn = Image.open(pictures / "0001.png").convert("RGB").tobytes()
    assert Image.open(tmp_path / "up/samples/01.png").tobytes() == drawn
    # Scores are of the pictures as they were: none is told.
    assert "was not compared with the photos" in said
    assert "Not measured." in (tmp_path / "up/README.md").read_text()


def test_a_picture_that_repeats_a_photo_stays_here(copied: Path, tmp_path: Path):
    scores = json.loads((copied / "scores.json").read_text())
    for one in scores["pictures"]["pictures"]:
        one["copied"] = one["file"] in ("0000.png", "0001.png")
    (copied / "scores.json").write_text(json.dumps(scores))
    said = succeed("push", copied, "me", "--out", tmp_path / "up")
    assert "2 pictures of the set pictures left out: found to repeat a photo" in said
    widget = ModelCard((tmp_path / "up/README.md").read_text()).data["widget"]
    assert widget[0]["text"] == "a <zwx> dog in snow"


def test_the_card_tells_what_the_hubs_filters_read_and_people_want_to_know(taught: Path, hub: Hub):
    succeed("push", taught, "user/me", "--licence", "other")
    text = hub.repositories["user/me"].files["README.md"].decode()
    data = ModelCard(text).data
    assert data.license == "other"
    assert data["instance_prompt"] == "a photo of <zwx> dog"
    assert data.pipeline_tag == "text-to-image"
    assert data.base_model is None  # a folder of this machine
    tags = "text-to-image diffusers lora dreambooth stable-diffusion-xl template:sd-lora"
    assert {*tags.split(), "stable-diffusion-xl-diffusers", "template:diffusion-lora"} <= {
        *data.tags
    }
    assert "`tiny-sdxl`" in text
    assert "from 3 photos" in text
    assert f"`<zwx>` (`{WORD}`)" in text
    assert "dreamloom generate --adapter user/me --prompt" in text
    assert "train.rank = 2\n" in text
    assert "- Rank: 2\n" in text
    for place in ("priors.folder", "init_adapter", '\nbase = "/', "device ="):
        assert place not in text
    score = json.loads((taught / "scores.json").read_text())["pictures"]["scores"]["copy"]
    low, high = score["interval"]
    assert (
        f"| {score['value']:.3f} | {score['n']} | {low:.3f} to {high:.3f} | {score['floor']:.3f} |"
        in text
    )
    assert "Not measured: Identity," in text
    assert "Drawn with this adapter at a weight of 0.8. Nobody picked them" in text
    assert "`a <zwx> dog | a cat`, seed 0, DDIM, 2 steps" in text


def test_the_card_of_sdxl_names_its_base_and_licence_and_any_text_stays_text():
    config = load_config(overrides={"base": "sdxl", "subject.phrase": "`x` <b>|person"})
    base = find_base(Record(stage="train", base={"name": "sdxl", "revision": "4621"}), config)
    assert base.hub_id == "stabilityai/stable-diffusion-xl-base-1.0"
    picture = Picture(
        file="0.png",
        prompt="--- ``x``\n: [",
        seed=1,
        scheduler="ddim",
        steps=3,
        guidance=5,
        negative_prompt="blur",
    )
    facts = CardFacts(
        "user/me",
        WEIGHTS,
        config,
        base,
        1,
        2,
        "For diffusers.",
        "openrail++",
        [("samples/01.png", picture)],
    )
    card = make_card(facts)
    again = ModelCard(str(card))
    assert again.data.base_model == "stabilityai/stable-diffusion-xl-base-1.0"
    assert again.data.library_name == "diffusers"
    assert again.data["widget"][0]["text"] == picture.prompt
    assert again.data["widget"][0]["parameters"] == {"negative_prompt": "blur"}
    assert "`openrail++`, the base model's own." in card.text
    assert "# `x` &lt;b&gt;|person" in card.text
    assert "`samples/01.png`: ```--- ``x`` : [```, seed 1" in card.text
    assert "## Scores\n\nNot measured." in card.text
    other = find_base(Record(stage="train", base={"name": "user/base", "revision": "9"}), config)
    assert other == Base("user/base", "user/base")
    local = find_base(Record(stage="train", base={"name": "/home/me/x.safetensors"}), config)
    assert local == Base("x.safetensors")


def test_a_look_without_the_hub_is_the_same_upload(taught: Path, hub: Hub, tmp_path: Path):
    succeed("push", taught, "user/me")
    hub.requests.clear()
    said = succeed("push", taught, "user/me", "--out", tmp_path / "look")
    assert hub.requests == []
    assert "7 files" in said
    sent = hub.repositories["user/me"].files
    here = {
        path.relative_to(tmp_path / "look").as_posix(): path.read_bytes()
        for path in (tmp_path / "look").rglob("*")
        if path.is_file()
    }
    assert here == {name: text for name, text in sent.items() if name != ".gitattributes"}
    assert "is not empty" in fail("push", taught, "me", "--out", tmp_path / "look")


def test_what_is_there_is_replaced_only_after_asking(
    taught: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    there = hub.repositories["user/me"] = Repository(private=True)
    there.commit({"README.md": b"mine", "notes.txt": b"mine", "samples/09.png": b"old"})
    before = there.files
    said = fail("push", taught, "me")
    assert "Nothing was pushed: user/me is on the hub already; pushing replaces README.md" in said
    assert "deletes samples/09.png" in said
    assert "--yes" in said
    assert there.files == before
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True)
    asked = run_command("push", taught, "me", input="n\n")
    assert asked.exit_code == 1
    assert "replaces README.md and deletes samples/09.png. Push? [y/N]" in asked.stderr
    assert there.files == before
    assert run_command("push", taught, "me", input="y\n").exit_code == 0
    assert there.files["README.md"] != b"mine"
    assert there.files["notes.txt"] == b"mine"
    assert "samples/09.png" not in there.files
    assert len(there.commits) == 3
    again = json.loads(run_command("--quiet", "push", taught, "me", "--yes", "--json").output)
    assert again["private"]
    assert again["commit"] == there.head


def test_nothing_becomes_public_unasked(taught: Path, hub: Hub):
    hub.repositories["user/open"] = Repository(private=False)
    assert "everybody can see it. Add --public" in fail("push", taught, "open")
    assert len(hub.repositories["user/open"].commits) == 1
    succeed("push", taught, "open", "--public")
    succeed("push", taught, "new", "--public")
    assert not hub.repositories["user/new"].private
    succeed("push", taught, "quiet")
    assert "lets everybody see it" in fail("push", taught, "quiet", "--public")
    assert hub.repositories["user/quiet"].private
    hub.failures["PUT .*/settings"] = 403, "not you"
    said = fail("push", taught, "quiet", "--public", "--yes")
    assert "user/quiet was pushed, but only you can see it still: not you" in said
    hub.failures.clear()
    assert "everybody can see it" in succeed("push", taught, "quiet", "--public", "--yes")
    assert not hub.repositories["user/quiet"].private


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (("/lfs/objects/batch", 413, "too big"), "does not take a file of this size: too big"),
        (
            ("POST /api/models/.*/commit", 403, "read only"),
            "not allow it with this token: read only",
        ),
        (("POST /api/models/.*/commit", 400, "bad"), "the hub says: bad"),
        (("PUT /lfs/", 418, "no tea"), "the hub says: no tea"),
    ],
)
def test_a_push_that_fails_leaves_nothing_half_done(
    taught: Path, hub: Hub, failure: tuple[str, int, str], says: str
):
    pattern, status, message = failure
    hub.failures[pattern] = status, message
    assert says in fail("push", taught, "me")
    assert hub.repositories == {}
    there = hub.repositories["user/me"] = Repository(private=True)
    there.commit({"README.md": b"mine"})
    before = there.head
    assert says in fail("push", taught, "me", "--yes")
    assert there.head == before


def test_an_empty_repository_that_cannot_be_removed_is_told_of(taught: Path, hub: Hub):
    hub.failures["POST /api/models/.*/commit"] = 400, "bad"
    hub.failures["DELETE"] = 500, "no"
    said = fail("push", taught, "me")
    assert (
        "user/me was made on the hub, but nothing could be pushed into it: bad. It is empty" in said
    )


def test_a_change_on_the_hub_meanwhile_is_not_overwritten(
    taught: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    there = hub.repositories["user/me"] = Repository(private=True)
    there.commit({"README.md": b"mine"})
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True)

    def agree(*args: object, **how: object) -> bool:
        there.commit({"README.md": b"somebody's"})
        return True

    monkeypatch.setattr("click.confirm", agree)
    assert "it changed on the hub meanwhile: The branch has moved" in fail("push", taught, "me")
    assert there.files["README.md"] == b"somebody's"


def test_bad_input_is_said_in_a_sentence_before_anything_is_made(
    taught: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("a/b/c", "-x", "a--b", "ümlaut", "x.git", "n" * 97):
        assert "cannot name a repository on the hub" in fail("push", taught, "--", name)
    assert "does not allow it with this token" in fail("push", taught, "somebody/me")
    said = fail("push", taught, "me", "--licence", "gpl-ish")
    assert 'does not take the card: "license" must be one of' in said
    hub.largest = 100
    assert "does not take a file of this size" in fail("push", taught, "me")
    assert "is no run with a finished adapter" in fail("push", tmp_path, "me")
    said = fail("push", taught.parent, "me")
    assert f"Name one of these: {taught}." in said
    said = fail("push", taught, "me", "--pictures", "pictures_base")
    assert "no set of pictures pictures_base that its adapter alone has drawn" in said
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for name in ("me", "user/me"):
        assert "the hub does not know the token" in fail("push", taught, name)
    monkeypatch.delenv("HF_TOKEN")
    assert "There is no token to push with. Make one" in fail("push", taught, "me")
    assert hub.repositories == {}


def test_without_network_a_push_says_so(taught: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "me was not pushed: the hub cannot be reached. Connect" in fail("push", taught, "me")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "me was not pushed: the hub cannot be reached. Connect" in fail("push", taught, "me")


def test_an_adapter_that_training_did_not_write_is_not_pushed(copied: Path, hub: Hub):
    write_adapter(copied / "adapter.safetensors", random_adapter(0, {"linear": 2}))
    said = fail("push", copied, "me")
    assert "adapter.safetensors is not as this run's training wrote it" in said
    assert hub.repositories == {}


def test_a_run_without_pictures_is_pushed_without(copied: Path, hub: Hub):
    shutil.rmtree(copied / "images")
    told = json.loads(run_command("--quiet", "push", copied, "me", "--json").output)
    assert "the card has no pictures and no scores" in told["notes"][0]
    assert sorted(told["files"]) == ["README.md", WORD, WEIGHTS]


def test_the_demos_pictures_lie_beside_its_runs(copied: Path, hub: Hub):
    demo, run = copied, copied / "with_prior"
    (run / "records").mkdir(parents=True)
    for name in ("loom.toml", "adapter.safetensors", "adapter-tokens", "records/train.json"):
        (demo / name).rename(run / name)
    (demo / "summary.json").write_text("{}")
    succeed("push", run, "me")
    files = hub.repositories["user/me"].files
    assert set(SAMPLES) < files.keys()
    assert "Not measured: Identity" in files["README.md"].decode()


def test_an_adapter_of_the_hub_draws_what_the_runs_own_draws(
    taught: Path, tiny_sdxl: Path, hub: Hub, tmp_path: Path
):
    succeed("push", taught, "me")
    words = ("--prompt", "a {subject}", "--base", tiny_sdxl, "--device", "cpu", *SMALL)
    for name, adapter in (("own", taught / "adapter.safetensors"), ("hub", "user/me")):
        succeed("generate", "--adapter", f"{adapter}:0.5", *words, "--out", tmp_path / name)
    own, other = (tmp_path / name / "images/pictures/0000.png" for name in ("own", "hub"))
    assert own.read_bytes() == other.read_bytes()
