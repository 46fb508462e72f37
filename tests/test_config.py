"""Settings: closed, complete, put together in order, and read back as they were written."""

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from dreamloom.core.config import loading
from dreamloom.core.config.aliases import RENAMED, use_earlier_names
from dreamloom.core.config.loading import PRESETS, load_config, setting_names, to_toml
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import ConfigError
from dreamloom.core.toml_files import allowed_words, describe_fields
from dreamloom.models.base import AdapterSpec
from dreamloom.models.peft_adapter import refuse_contradictions
from dreamloom.models.schedulers import SCHEDULERS
from dreamloom.training.optimizers import OPTIMIZERS


@pytest.fixture
def toml(tmp_path):
    """Write a settings file and return its path."""

    def write(text):
        path = tmp_path / "loom.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def find_field(name):
    group, _, inner = name.rpartition(".")
    fields = type(getattr(LoomConfig(), group)).model_fields if group else LoomConfig.model_fields
    return fields[inner]


def refusal(**given):
    with pytest.raises(ConfigError) as caught:
        load_config(**given)
    assert caught.value.exit_code == 2
    return caught.value


# ------------------------------------------------------------------ names and descriptions


def flatten(settings):
    flat = {}
    for name, value in settings:
        inner = flatten(value) if isinstance(value, BaseModel) else {"": value}
        flat |= {f"{name}.{key}".rstrip("."): item for key, item in inner.items()}
    return flat


def test_every_setting_is_named_once():
    assert setting_names() == list(flatten(LoomConfig()))


def test_every_setting_has_a_description_of_its_own():
    rows = describe_fields(LoomConfig)
    assert [name for name, _, _ in rows] == setting_names()
    undescribed = [name for name, _, text in rows if not text.strip().endswith(".")]
    assert undescribed == []


def test_a_default_is_shown_as_one_would_type_it():
    defaults = {name: default for name, default, _ in describe_fields(LoomConfig)}
    assert defaults["train.ema_decay"] == "none"
    assert (defaults["photos.flip"], defaults["generate.steps"]) == ("false", "[30]")
    others = ["train.ema_decay=0.5", "photos.flip=true", "generate.steps=[7]", "seed=3"]
    assert load_config(sets=others) != LoomConfig()
    typed = [f"{name}={default}" for name, default in defaults.items()]
    assert load_config(sets=[*others, *typed]) == LoomConfig()


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        LoomConfig().train.rank = 3


def test_a_copy_knows_no_other_settings():
    with pytest.raises(ValueError, match="TrainConfig has no updates"):
        LoomConfig().train.model_copy(update={"updates": 3})
    assert LoomConfig().train.model_copy(update={"steps": 3}).steps == 3


# ------------------------------------------------------------------ unknown names


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train.rnak", "train.rank"),
        ("train.lerning_rate", "train.learning_rate"),
        ("trian.rank", "train.rank"),
        ("rank", "train.rank"),
        ("lerning_rate", "train.learning_rate"),
        ("images_per_prompt", "generate.images_per_prompt"),
        ("generate.image_per_prompt", "generate.images_per_prompt"),
        ("sede", "seed"),
        ("subject.prase", "subject.phrase"),
        ("train.rank.value", "train.rank"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_one_that_was_meant(typed, meant):
    error = refusal(sets=[f"{typed}=3"])
    if typed != "train.rank.value":
        assert f"There is no setting {typed!r}." in error.problem
        assert error.hint.startswith("Did you mean ")
    assert meant in error.hint.removeprefix("Did you mean ").rstrip("?").split(" or ")[0]


def test_a_name_that_several_groups_know_is_offered_from_each():
    hint = refusal(sets=["train.guidance=3"]).hint
    assert hint == "Did you mean priors.guidance or generate.guidance?"


def test_a_name_like_no_other_gets_the_list_of_its_group():
    hint = refusal(sets=["photos.xyzzyq=3"]).hint
    assert hint == (
        "Known are: photos.resolution_px, photos.shape, photos.flip, photos.caption_lines, "
        "photos.shuffle_caption, photos.keep_tokens, photos.caption_tag_dropout_rate."
    )
    assert ", ".join(setting_names()) in refusal(sets=["xyzzyq=3"]).hint


def test_an_unknown_setting_in_a_file_is_refused_alike(toml):
    error = refusal(file=toml("sedd = 1\n[train]\nrnak = 3\nrank = 8\n"))
    assert "There is no setting 'sedd'." in error.problem
    assert "There is no setting 'train.rnak'." in error.problem
    assert "train.rank" in error.hint
    assert "seed" in error.hint


def test_an_unknown_option_of_a_command_is_refused_alike():
    assert "'subject.prase'" in refusal(overrides={"subject.prase": "sks dog"}).problem


# ------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("train.rank=0", "greater than or equal to 1"),
        ("train.rank=two", "valid integer"),
        ("train.rank=1.5", "valid integer"),
        ("train.prior_weight=-0.1", "greater than or equal to 0"),
        ("train.prior_weight=nan", "finite number"),
        ("train.prior_weight=inf", "finite number"),
        ("train.learning_rate=0", "greater than 0"),
        ("train.learning_rate=inf", "finite number"),
        ("train.alpha=-4", "greater than 0"),
        ("objective.snr_gamma=0", "greater than 0"),
        ("photos.flip=maybe", "valid boolean"),
        ("train.lr_scheduler=stepwise", "'constant'"),
        ("photos.resolution_px=0", "greater than or equal to 8"),
        ("photos.resolution_px=wide", "'auto', or input should be a valid integer"),
        ("priors.guidance=-1", "greater than or equal to 0"),
        ("priors.kind=some", "'generated', 'folder', 'base' or 'none'"),
        ("generate.steps=[25, 0]", "greater than or equal to 1"),
        ("generate.steps=[]", "at least 1 item"),
        ("generate.guidance_interval=1", "should be a list, such as [25, 50]"),
        ("evaluate.confidence=1", "less than 1"),
        ("seed=-1", "greater than or equal to 0"),
        ("subject.phrase=", "at least 1 character"),
        ("subject.photo_prompt=a photo of {name}", "the only word in braces may be {subject}"),
        ("subject.photo_prompt=a photo of {}", "the only word in braces may be {subject}"),
        ("subject.photo_prompt=a photo of {subject", "the only word in braces may be {subject}"),
        ("subject.class_prompt=a {subject}", "the only word in braces may be {class_noun}"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_its_limit(setting, reason):
    error = refusal(sets=[setting])
    name = setting.partition("=")[0]
    assert error.problem.startswith(f"{name} = ")
    assert reason in error.problem
    assert "config" not in error.problem.lower()
    description = next(text for known, _, text in describe_fields(LoomConfig) if known == name)
    assert error.hint == f"{name}: {description}"


def test_a_group_is_not_a_setting():
    problem = refusal(sets=["photos=3"]).problem
    assert problem == "photos = 3 is not allowed: it is a group of settings, such as train.rank."


def test_all_problems_are_told_at_once(toml):
    error = refusal(
        file=toml("[train]\nrank = 0\n[generate]\nfirst_seed = -1\n"),
        sets=["seed=-1", "train.steps=many", "train.rnak=3"],
    )
    for name in ("train.rank", "generate.first_seed", "seed", "train.steps"):
        assert f"{name} = " in error.problem
    assert "There is no setting 'train.rnak'." in error.problem
    # "seed" is told although "generate.first_seed" holds its letters.
    assert error.problem.count("is not allowed") == 4


@pytest.mark.parametrize("text", ["train.rank", "train.rank 32", ""])
def test_a_set_without_a_value_shows_how_to_write_it(text):
    error = refusal(sets=[text])
    assert error.problem == f"--set {text} has no value."
    assert "train.rank=32" in error.hint


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("train.rank=32", 32),
        (" train.rank = 32 ", 32),
        ("train.learning_rate=1e-4", 1e-4),
        ("train.learning_rate=auto", "auto"),
        ("photos.flip=true", True),
        ("train.ema_decay=none", None),
        ("train.ema_decay=0.5", 0.5),
        ("priors.kind=none", "none"),
        ("subject.phrase=sks dog", "sks dog"),
        ('subject.phrase="sks = dog"', "sks = dog"),
        ("subject.phrase=sks = dog", "sks = dog"),
        ("subject.phrase=sks # dog", "sks # dog"),
        ("subject.phrase=1\nbase = 2", "1\nbase = 2"),
        ("generate.steps=[25, 50]", (25, 50)),
        ('generate.schedulers=["ddim", "dpm++"]', ("ddim", "dpm++")),
        ("base=C:\\models\\base.safetensors", "C:\\models\\base.safetensors"),
    ],
)
def test_set_reads_toml_or_else_plain_text(text, value):
    assert flatten(load_config(sets=[text]))[text.partition("=")[0].strip()] == value


# ------------------------------------------------------------------ order


def test_each_source_goes_before_the_one_under_it(toml):
    assert load_config("quick").train.steps == 120
    file = toml("[train]\nsteps = 7\nrank = 2\n")
    assert load_config("quick", file).train.steps == 7
    options = {"train.steps": 8, "train.alpha": None}
    assert load_config("quick", file, overrides=options).train.steps == 8
    settings = load_config("quick", file, ["train.steps=9", "train.steps=10"], options)
    assert settings.train.steps == 10
    # What the others leave open stays: the file's rank, the preset's number of class images.
    assert (settings.train.rank, settings.priors.count) == (2, 24)
    assert settings.train.alpha == "auto"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_changes_what_it_names_and_nothing_else(preset):
    changed = {
        f"{group}.{name}": value
        for group, values in PRESETS[preset].items()
        for name, value in values.items()
    }
    assert flatten(load_config(preset)) == {
        **flatten(LoomConfig()),
        **changed,
        "preset": preset,
    }


def test_loading_leaves_the_presets_alone():
    load_config("quick", sets=["train.steps=1", "priors.count=1"])
    assert load_config("quick").train.steps == 120


def test_a_preset_named_in_a_file_or_a_set_takes_effect(toml):
    assert load_config(file=toml('preset = "quick"\n')).train.steps == 120
    assert load_config("thorough", sets=["preset=quick"]) == load_config("quick")
    assert load_config(overrides={"preset": "quick"}) == load_config("quick")


@pytest.mark.parametrize("sets", [[], ["preset=fast"]])
def test_an_unknown_preset_is_refused_with_the_known_ones(sets):
    error = refusal(preset="quick" if sets else "fast", sets=sets)
    assert error.problem == "There is no preset 'fast'."
    assert error.hint == "Choose one of: quick, standard, thorough."


# ------------------------------------------------------------------ files


def test_a_missing_file_a_folder_and_damaged_toml_are_told_apart(toml, tmp_path):
    missing = tmp_path / "missing.toml"
    assert f"There is no settings file {missing}." in refusal(file=missing).problem
    assert "cannot be read" in refusal(file=tmp_path).problem
    damaged = refusal(file=toml("[train\nrank = 3\n")).problem
    assert "loom.toml is not valid TOML" in damaged
    assert "line 1" in damaged
    path = tmp_path / "latin.toml"
    path.write_bytes('base = "J\xfcrgen"'.encode("latin-1"))
    assert "is not valid TOML" in refusal(file=path).problem


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_written_is_read_back(preset, toml):
    settings = load_config(preset)
    assert load_config(file=toml(to_toml(settings))) == settings


def test_nothing_is_read_back_as_nothing_whatever_the_preset_says(toml, monkeypatch):
    monkeypatch.setitem(loading.PRESETS, "quick", {"train": {"ema_decay": 0.9}})
    assert load_config("quick").train.ema_decay == 0.9
    settings = load_config("quick", sets=["train.ema_decay=none"])
    assert settings.train.ema_decay is None
    assert load_config(file=toml(to_toml(settings))).train.ema_decay is None


def test_a_written_file_does_not_depend_on_what_a_preset_means_later(toml, monkeypatch):
    settings = load_config("quick")
    text = to_toml(settings)
    monkeypatch.setitem(loading.PRESETS, "quick", {"train": {"steps": 1, "rank": 1}})
    assert load_config(file=toml(text)) == settings


TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="{}"), min_size=1, max_size=12
) | st.sampled_from(
    ['"', "\\", '\\"', "\n", "\r\n", "\t", "\x00", "\x7f", "\x1b", "ü", "🐶", "none"]
)
NUMBER = st.floats(1e-300, 1e300, allow_nan=False)


@given(
    phrase=TEXT.filter(str.strip),
    folder=TEXT,
    prompt=TEXT,
    rate=NUMBER | st.just("auto"),
    decay=st.floats(0.001, 0.999) | st.none(),
    words=st.dictionaries(TEXT, TEXT, max_size=2),
    steps=st.lists(st.integers(1, 1000), min_size=1, max_size=3),
    flip=st.booleans(),
)
def test_any_settings_are_read_back_as_they_were(tmp_path_factory, **given):
    settings = load_config(
        overrides={
            "subject.phrase": given["phrase"],
            "subject.photo_prompt": given["prompt"] + "{subject}",
            "priors.folder": given["folder"],
            "train.learning_rate": given["rate"],
            "train.ema_decay": given["decay"],
            "adapter.placeholder_tokens": given["words"],
            "photos.flip": given["flip"],
            "generate.steps": given["steps"],
        }
    )
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(to_toml(settings), encoding="utf-8", newline="")
    assert load_config(file=path) == settings


# ------------------------------------------------------------------ what the base model advises

ADVICE = {
    **{"resolution_px": 64, "guidance": 4.0, "learning_rate": 2e-3, "target_modules": "all"},
    "weighting": "debiased",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_advice_fills_every_auto_that_the_base_model_decides(preset):
    flat = flatten(load_config(preset, sets=["train.rank=8"]).resolve(ADVICE))
    left = {name for name, value in flat.items() if value == "auto"}
    # These depend on the machine, on where the pictures come from, and on what is written.
    assert left == {
        *("device", "precision", "validation.tracker", "evaluate.encoders", "adapter.format"),
        *(
            "memory.limit",
            "memory.gradient_checkpointing",
            "memory.base_quantization",
            "memory.micro_batch_size",
        ),
        "memory.cpu_offload",
    }
    assert flat["photos.resolution_px"] == 64
    assert flat["priors.guidance"] == flat["generate.guidance"] == 4.0
    assert (flat["train.learning_rate"], flat["train.target_modules"]) == (2e-3, "all")
    assert flat["train.alpha"] == 8.0
    assert flat["train.text_learning_rate"] == pytest.approx(1e-3)
    assert flat["train.text_encoder_2_learning_rate"] == flat["train.text_learning_rate"]
    assert flat["train.token_learning_rate"] == pytest.approx(2e-2)
    assert flat["photos.shape"] == "square"
    assert flat["objective.weighting"] == "debiased"


def test_advice_changes_nothing_that_was_chosen():
    chosen = load_config(
        sets=[
            *("photos.resolution_px=128", "priors.guidance=1.0", "generate.guidance=2.0"),
            *("train.learning_rate=0.5", "train.target_modules=linear", "train.alpha=3.0"),
            *("train.text_learning_rate=0.1", "train.token_learning_rate=0.2"),
            "train.text_encoder_2_learning_rate=0.3",
            *("photos.shape=buckets", "objective.weighting=p2", "priors.prompts=[]"),
            *(
                "train.caption_dropout=0.3",
                "train.prior_target=base_prediction",
                "train.final_scale=0.5",
            ),
        ]
    )
    assert chosen.resolve(ADVICE) == chosen
    settled = load_config().resolve(ADVICE)
    assert settled.resolve({**ADVICE, "guidance": 9.0, "target_modules": "linear"}) == settled


def test_settled_settings_are_read_back(toml):
    settled = load_config("thorough").resolve(ADVICE)
    assert load_config(file=toml(to_toml(settled))) == settled


# ------------------------------------------------------------------ prompts


def test_prompts_are_filled_in():
    settings = load_config(sets=["subject.phrase=sks {dog}", "subject.class_noun=dog"])
    assert settings.photo_prompt() == "a photo of sks {dog}"
    assert settings.class_prompt() == "a photo of a dog"


@pytest.mark.parametrize("name", ["photo_prompt", "class_prompt"])
def test_a_prompt_need_not_have_a_blank(name):
    settings = load_config(overrides={f"subject.{name}": "a drawing"})
    assert getattr(settings, name)() == "a drawing"
    assert list(string.Formatter().parse(getattr(LoomConfig().subject, name)))


# ------------------------------------------------------------------ earlier names

# Values of each, as a file of an earlier version has them, and what is meant by them.
EARLIER = {
    "train.updates": ("7", 7),
    "train.accumulate": ("2", 2),
    "train.reach": ('"linear"', "linear"),
    "train.warmup_updates": ("3", 3),
    "train.schedule": ('"linear"', "linear"),
    "train.clip_norm": ("0.5", 0.5),
    "train.average_decay": ("0.9", 0.9),
    "train.checkpoint_every": ("11", 11),
    "train.save_memory": ("true", "full"),
    "memory.checkpointing": ('"low"', "low"),
    "memory.base": ('"int8"', "int8"),
    "memory.images_per_pass": ("2", 2),
    "memory.one_at_a_time": ("true", True),
    "adapter.ranks": ('{"mid_block" = 4}', {"mid_block": 4}),
    "adapter.alphas": ('{"mid_block" = 2.0}', {"mid_block": 2.0}),
    "adapter.rank_stabilised": ("true", True),
    "adapter.initial": ('"pissa"', "pissa"),
    "adapter.up_rate_ratio": ("16.0", 16.0),
    "adapter.new_words": ('{"<me>" = "person"}', {"<me>": "person"}),
    "watch.every": ("50", 50),
    "watch.prompts": ('["a {subject}"]', ("a {subject}",)),
    "watch.images": ("2", 2),
    "watch.steps": ("9", 9),
    "watch.held_out_photos": ("1", 1),
    "watch.scores": ("false", False),
    "watch.tracker": ('"none"', "none"),
}


def test_every_earlier_name_is_tried_and_leads_to_a_setting():
    assert set(EARLIER) == set(RENAMED)
    assert set(RENAMED.values()) <= set(setting_names())
    assert not set(RENAMED) & set(setting_names())


@pytest.mark.parametrize("earlier", EARLIER)
def test_a_file_with_an_earlier_name_is_read_and_the_name_noted(earlier, toml):
    written, meant = EARLIER[earlier]
    group, name = earlier.split(".")
    noted = []
    for settings in (
        load_config(file=toml(f"[{group}]\n{name} = {written}\n"), observe=noted.append),
        load_config(sets=[f"{earlier}={written}"], observe=noted.append),
    ):
        found = flatten(settings)
        assert found[RENAMED[earlier]] == meant
        rest = {key: value for key, value in found.items() if key != RENAMED[earlier]}
        assert rest == {key: flatten(LoomConfig())[key] for key in rest}
    assert [event.text for event in noted] == [f"{earlier} is now called {RENAMED[earlier]}"] * 2


def test_todays_names_are_not_noted(toml):
    noted = []
    load_config(file=toml("[train]\nsteps = 3\n"), sets=["train.rank=2"], observe=noted.append)
    assert noted == []


def test_what_is_typed_goes_before_an_earlier_name_in_a_file(toml):
    file = toml("[train]\nupdates = 7\nsave_memory = false\n")
    newer = load_config(file=file, sets=["train.steps=8", "memory.gradient_checkpointing=low"])
    assert (newer.train.steps, newer.memory.gradient_checkpointing) == (8, "low")


def test_a_setting_under_both_names_is_refused(toml):
    error = refusal(file=toml("[train]\nupdates = 7\nsteps = 8\n"))
    assert error.problem == "train.updates is now train.steps; give it once."


@pytest.mark.parametrize(("said", "meant"), [("true", "full"), ("false", "none"), ("auto", "auto")])
def test_the_earliest_spelling_of_recomputing_still_works(said, meant):
    assert load_config(sets=[f"train.save_memory={said}"]).memory.gradient_checkpointing == meant


def test_a_wrong_value_under_an_earlier_name_is_refused_under_todays():
    assert "train.steps = 'many'" in refusal(sets=["train.updates=many"]).problem


def test_fingerprints_see_the_earlier_names():
    values = {"steps": 1, "rank": 2, "target_modules": "all", "lr_scheduler": "cosine"}
    earlier = {"updates": 1, "rank": 2, "reach": "all", "schedule": "cosine"}
    assert use_earlier_names(values, "train") == earlier


# Settings that came after fingerprints were first taken, with a value that changes something.
LATER = {
    "train.text_encoder_2_learning_rate": 0.5,
    "train.learning_rate_pattern": {"mid_block": 0.1},
    "train.lr_num_cycles": 1,
    "train.lr_power": 1.0,
    "photos.caption_lines": "choose",
    "photos.shuffle_caption": True,
    "photos.keep_tokens": 1,
    "photos.caption_tag_dropout_rate": 0.1,
    "objective.multires_noise_iterations": 6,
    "objective.multires_noise_discount": 0.5,
}


@pytest.mark.parametrize("name", LATER)
def test_fingerprints_see_later_settings_only_where_they_change_something(name):
    group, own = name.split(".")
    before, after = (
        load_config(overrides=given).resolve(ADVICE) for given in ({}, {name: LATER[name]})
    )
    for within, settings in (("", LoomConfig.flat), (group, lambda c: vars(getattr(c, group)))):
        asked = name if not within else own
        assert asked not in use_earlier_names(settings(before), within)
        assert use_earlier_names(settings(after), within)[asked] == LATER[name]


# ------------------------------------------------------------------ words that are allowed

CHOICES = {
    name: (field.annotation, description)
    for name, _, description in describe_fields(LoomConfig)
    for field in [find_field(name)]
    if allowed_words(field.annotation)
}


def test_settings_with_words_to_choose_from_are_found():
    assert {"memory.gradient_checkpointing", "objective.loss", "train.rank"} & set(CHOICES) == {
        "memory.gradient_checkpointing",
        "objective.loss",
    }


@pytest.mark.parametrize("name", CHOICES)
def test_a_description_names_just_the_words_that_are_accepted(name):
    annotation, description = CHOICES[name]
    listed = description.rpartition(": ")[2].rstrip(".").split(", ")
    if allowed_words(annotation) == ["auto"]:
        assert "auto" in description
    else:
        assert listed == allowed_words(annotation)
    for word in allowed_words(annotation):
        load_config(sets=[f"{name}={word}"])
    assert "'sideways'" in refusal(sets=[f"{name}=sideways"]).problem


# Words that are not listed in a setting's type, because only the code that takes them knows them.
LISTED = {
    "generate.schedulers": tuple(SCHEDULERS),
    "adapter.init_lora_weights": (
        *("default", "gaussian", "pissa", "pissa_niter_16", "olora", "orthogonal"),
    ),
}


@pytest.mark.parametrize("name", LISTED)
def test_a_description_lists_what_is_known_elsewhere(name):
    described = {setting: text for setting, _, text in describe_fields(LoomConfig)}[name]
    words = re.split(r"[ ,.:;]+", described.partition(": ")[2].replace(" (or another number)", ""))
    assert tuple(filter(None, words)) == LISTED[name]


@pytest.mark.parametrize("word", LISTED["adapter.init_lora_weights"])
def test_every_listed_beginning_of_factors_is_taken(word):
    spec = AdapterSpec(rank=2, alpha=2.0, target_modules="attention", seed=0, init=word)
    refuse_contradictions(spec)


def test_every_optimizer_that_a_description_names_is_one():
    described = {setting: text for setting, _, text in describe_fields(LoomConfig)}[
        "train.optimizer"
    ]
    named = described.removesuffix(" and others.").split(", ")
    assert set(named) <= set(OPTIMIZERS)


def test_one_value_is_a_list_of_one():
    config = load_config(sets=["generate.steps=6", "generate.schedulers=euler"])
    assert (config.generate.steps, config.generate.schedulers) == ((6,), ("euler",))
    assert load_config(sets=["validation.prompts=a {subject}"]).validation.prompts == (
        "a {subject}",
    )
    with pytest.raises(ConfigError, match=r"generate\.guidance_interval"):
        load_config(sets=["generate.guidance_interval=0.5"])


def test_seeds_end_where_generators_of_random_numbers_do():
    last = 2**64 - 1
    load_config(sets=[f"generate.first_seed={last}", "generate.images_per_prompt=1"])
    for sets in ([f"generate.first_seed={last + 1}"], [f"generate.first_seed={last}"]):
        with pytest.raises(ConfigError, match="18446744073709551615"):
            load_config(sets=sets)
