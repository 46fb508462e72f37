"""Files made to do harm: whatever a header says, a command ends soon and in a sentence."""

import json
import struct
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dreamloom.core.errors import AdapterError, DreamLoomError
from dreamloom.lora.adapter import Adapter, Layer
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.writing import write_adapter
from dreamloom.merging.files.certificate import CERTIFICATE_KEYS
from dreamloom.merging.files.convert import convert_file, resize_adapter
from dreamloom.merging.files.inspect import diagnose_files, inspect_file
from dreamloom.merging.files.merge import carry_out
from dreamloom.merging.files.recipe import AdapterPart, Recipe
from dreamloom.merging.files.reweight import list_parts, remix_merge
from dreamloom.merging.files.verify import verify_merge
from dreamloom.merging.ranks import FULL

NAME = "unet.down_blocks.1.attentions.0.proj_in"
CONFIG = "lora_adapter_metadata"
# A second on an idle machine; tests run beside each other here.
SECONDS = 5.0


def layer(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return Layer(torch.randn(2, 4, generator=rng), torch.randn(6, 2, generator=rng))


@pytest.fixture
def merged(tmp_path):
    """A merge with new words, in PEFT's names: its header says all that a header can."""
    word = {"text_encoder": torch.ones(1, 4), "text_encoder_2": torch.ones(1, 6)}
    parts = []
    for number in range(2):
        path = tmp_path / f"part{number}.safetensors"
        words = {"<me>": word} if number == 0 else {}
        write_adapter(path, Adapter({NAME: layer(number)}, tokens=words), format="peft")
        parts.append(AdapterPart(path))
    out = tmp_path / "merged.safetensors"
    carry_out(Recipe(tuple(parts), format="peft"), out)
    return out


def rewrite(path: Path, **entries):
    with safe_open(path, "pt") as file:
        header = dict(file.metadata())
    save_file(load_file(path), path, {**header, **entries})


def tries(path: Path):
    """Every way in which a command reads a file."""
    beside, thin = path.with_name("converted.safetensors"), path.with_name("thin.safetensors")
    return {
        "inspect": lambda: inspect_file(path),
        "verify": lambda: verify_merge(path),
        "list parts": lambda: list_parts(path),
        "remix": lambda: remix_merge(path, {"part0": 0.5}, path.with_name("remixed.safetensors")),
        "convert": lambda: convert_file(path, beside, overwrite=True),
        "resize": lambda: resize_adapter(path, thin, FULL, overwrite=True),
        "diagnose": lambda: diagnose_files(AdapterPart(path), AdapterPart(path, name="again")),
        "merge": lambda: carry_out(
            Recipe((AdapterPart(path),)), path.with_name("again.safetensors"), overwrite=True
        ),
    }


def assert_ends_in_a_sentence(path: Path, names=None):
    for name, attempt in tries(path).items():
        if names and name not in names:
            continue
        begin = time.monotonic()
        # Anything else than a sentence is no DreamLoomError, and ends the test.
        with suppress(DreamLoomError):
            attempt()
        assert time.monotonic() - begin < SECONDS, name


DEEP = "[" * 100_000 + "]" * 100_000
NONSENSE = ["", "null", "[]", "3", '{"<me>": 3}', "nonsense", DEEP]
NONSENSE += ['{"<me>": {"file": 3, "sha256": []}}', '{"parts": [3], "ranks": {}}']
KEYS = [
    *("dreamloom.words", "dreamloom.recipe", "dreamloom.layers", "dreamloom.slices"),
    *("dreamloom.seal", "dreamloom.layer_names", "dreamloom.base", "dreamloom.subject"),
    *("dreamloom.words_sha256", "dreamloom.prediction", "ss_tag_frequency", CONFIG),
]


@pytest.mark.parametrize("key", KEYS)
def test_nonsense_in_an_entry_ends_in_a_sentence(merged, key):
    whole = merged.read_bytes()
    for text in NONSENSE:
        merged.write_bytes(whole)
        rewrite(merged, **{key: text})
        # What a merge says of itself, every command reads in its own way.
        assert_ends_in_a_sentence(merged, None if key in CERTIFICATE_KEYS else ("inspect", "merge"))


@given(
    key=st.sampled_from(["dreamloom.recipe", "dreamloom.layers", "dreamloom.words", CONFIG]),
    path=st.integers(0, 30),
    value=st.sampled_from([None, True, -1, 1e400, 3.5, "x", [], {}, [[]], {"a": [1]}, 10**400]),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_value_of_another_type_ends_in_a_sentence(merged, key, path, value):
    """One value anywhere in an entry's JSON becomes another."""
    whole = merged.read_bytes()
    with safe_open(merged, "pt") as file:
        entry = json.loads(file.metadata()[key])
    places = list(list_places(entry))
    holder, at = places[path % len(places)]
    holder[at] = value
    rewrite(merged, **{key: json.dumps(entry)})
    try:
        assert_ends_in_a_sentence(merged)
    finally:
        merged.write_bytes(whole)


def list_places(value):
    """Every place in a JSON value that can be set."""
    if isinstance(value, dict | list):
        for at in value if isinstance(value, dict) else range(len(value)):
            yield value, at
            yield from list_places(value[at])


def config_with(**entries):
    return json.dumps({f"unet.{key}": value for key, value in entries.items()})


PATTERNS = {
    "three megabytes of them": {f"down_blocks.{n}.attentions.0.proj_in": 1 for n in range(80_000)},
    "as many as there are layers": {f"block.{n}.*": 1.0 for n in range(1000)},
    "one that never ends": {"(a|a|[a-z._0-9]|.)*(a|a|.)*(.|a)*!": 1.0},
    "a long one": {"a?" * 5000: 1.0},
    "one that is none": {"(": 1.0},
    "a number": 3,
}


@pytest.mark.parametrize("case", PATTERNS)
def test_patterns_in_a_configuration_end_soon(tmp_path, case):
    path = tmp_path / "a.safetensors"
    write_adapter(path, Adapter({NAME: layer()}), format="peft")
    config = config_with(peft_type="LORA", r=2, lora_alpha=2, alpha_pattern=PATTERNS[case])
    rewrite(path, **{CONFIG: config})
    assert_ends_in_a_sentence(path)


@pytest.mark.parametrize("count", [60_000, 1_000_000])
def test_a_million_layers_are_refused_at_once(tmp_path, count):
    """Told by the header's length, or by the number of its entries, before a tensor is read."""
    path = tmp_path / "a.safetensors"
    entry = '"unet.layer.%07d.lora_A.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(map(entry.__mod__, range(count))) + "}").encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    begin = time.monotonic()
    with pytest.raises(AdapterError) as caught:
        read_adapter(path)
    assert time.monotonic() - begin < SECONDS
    assert "no adapter of SDXL" in caught.value.problem
