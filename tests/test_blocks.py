"""Block weights: lists, words, patterns and tables say the same of the same layers, once."""

import doctest
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dreamloom.lora.patterns
import dreamloom.merging.blocks
from dreamloom.core.errors import ConfigError
from dreamloom.lora.adapter import Adapter
from dreamloom.lora.sdxl_layers import sdxl_layers
from dreamloom.merging.blocks import (
    LISTS,
    POSITIONS,
    WORDS,
    BlockWeights,
    find_position,
    parse_blocks,
    read_blocks,
)
from dreamloom.merging.merging import MergeRequest, combine
from merges import assert_same, random_adapter

# How the web interface's extension finds a layer's number: by Stability AI's name of its block.
THEIRS = {"input_blocks": "IN", "output_blocks": "OUT"}
ATTENTION = [
    "unet.down_blocks.1.attentions.0.proj_in",
    "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k",
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    "unet.up_blocks.0.attentions.0.transformer_blocks.3.attn1.to_q",
    "unet.up_blocks.0.attentions.1.proj_out",
    "unet.up_blocks.1.attentions.2.transformer_blocks.1.attn1.to_out.0",
]
CONVOLUTIONS = [
    "unet.down_blocks.0.resnets.0.conv1",
    "unet.down_blocks.0.downsamplers.0.conv",
    "unet.up_blocks.0.resnets.1.time_emb_proj",
    "unet.up_blocks.0.upsamplers.0.conv",
    "unet.up_blocks.2.resnets.2.conv_shortcut",
    "unet.mid_block.resnets.1.conv2",
]
OUTSIDE = ["unet.conv_in", "unet.conv_out", "unet.time_embedding.linear_1"]
TEXT = ["text_encoder.encoder.layers.1.mlp.fc1", "text_encoder_2.text_projection"]
SOME = [*ATTENTION, *CONVOLUTIONS, *OUTSIDE, *TEXT]


def weights_of(blocks, layers=SOME):
    return {layer: blocks.of(layer) for layer in layers}


def position_there(layer):
    """Name a layer's position by Stability AI's name of it, as the extension does."""
    if layer.name.startswith("text_encoder"):
        return "BASE"
    found = re.match(r"(input_blocks|output_blocks)\.(\d+)", layer.stability)
    if found:
        return f"{THEIRS[found[1]]}{int(found[2]):02}"
    return "MID" if layer.stability.startswith("middle_block") else ""


def test_every_layer_of_sdxl_has_the_position_that_the_extension_gives_it():
    layers = sdxl_layers()
    assert len(layers) > 1000
    named = 0
    for name, layer in layers.items():
        expected = position_there(layer)
        # The extension has no position for what stands before, beside and after the blocks.
        if expected:
            assert find_position(name) == expected, name
            named += 1
    outside = {name for name, layer in layers.items() if not position_there(layer)}
    assert {name.split(".")[1] for name in outside} == {
        "time_embedding",
        "add_embedding",
        "conv_out",
    }
    assert named == len(layers) - len(outside)


def test_layers_of_stable_diffusion_1_have_theirs():
    assert find_position("unet.down_blocks.3.resnets.1.conv1") == "IN11"
    assert find_position("unet.down_blocks.2.downsamplers.0.conv") == "IN09"
    assert find_position("unet.up_blocks.1.attentions.0.proj_in") == "OUT03"
    assert find_position("unet.up_blocks.3.attentions.2.proj_out") == "OUT11"
    assert find_position("unet.up_blocks.2.upsamplers.0.conv") == "OUT08"


@pytest.mark.parametrize("count", LISTS)
def test_each_number_of_a_list_is_for_its_own_block(count):
    blocks = read_blocks([float(number) for number in range(1, count + 1)])
    # All transformers of a block are alike, so one of each is enough.
    for layer in filter(
        lambda name: not re.search(r"transformer_blocks\.[1-9]", name), sdxl_layers()
    ):
        position = find_position(layer)
        if layer == "unet.conv_out" and count > 12:
            position = {20: "OUT08"}.get(count, "OUT11")
        expected = LISTS[count].index(position) + 1 if position in LISTS[count] else 0
        assert blocks.of(layer) == expected, layer
    assert blocks.positions == LISTS[count]


def test_what_a_list_does_not_name_has_weight_0():
    ones = parse_blocks(",".join(["1"] * 12))
    assert all(ones.of(layer) == 1 for layer in (*ATTENTION, *TEXT))
    assert ones.of("unet.down_blocks.0.resnets.0.conv1") == 0
    full = parse_blocks("[" + ", ".join(["1"] * 20) + "]")
    assert set(weights_of(full).values()) == {1.0}
    none = parse_blocks(",".join(["0"] * 20))
    assert set(weights_of(none).values()) == {0.0}


def test_a_list_for_another_base_is_refused_where_it_would_drop_attention():
    parse_blocks(",".join(["1"] * 12)).check(SOME)
    parse_blocks(",".join(["1"] * 20)).check(SOME)
    parse_blocks(",".join(["1"] * 26)).check(SOME)
    with pytest.raises(ConfigError, match=r"list of 17 .* none for OUT00, where unet\.up_blocks"):
        parse_blocks(",".join(["1"] * 17)).check(SOME)
    old = ["unet.down_blocks.0.attentions.0.proj_in", "unet.up_blocks.3.attentions.0.proj_in"]
    parse_blocks(",".join(["1"] * 17)).check(old)
    for count in (12, 20):
        with pytest.raises(ConfigError, match="12 for SDXL's attention, 20 for all of SDXL"):
            parse_blocks(",".join(["1"] * count)).check(old)


def test_a_word_alone_keeps_its_block_and_nothing_else():
    content = weights_of(parse_blocks("content"))
    assert {layer for layer, weight in content.items() if weight} == {ATTENTION[3]}
    style = weights_of(parse_blocks("style"))
    assert {layer for layer, weight in style.items() if weight} == {ATTENTION[4]}
    both = weights_of(parse_blocks("content, style=0.25"))
    assert {layer: weight for layer, weight in both.items() if weight} == {
        ATTENTION[3]: 1.0,
        ATTENTION[4]: 0.25,
    }
    assert set(weights_of(parse_blocks("all")).values()) == {1.0}


def test_a_word_with_a_weight_leaves_the_rest():
    found = weights_of(parse_blocks("style=-1.5, mid=0, text=0.5"))
    assert found[ATTENTION[4]] == -1.5
    assert [layer for layer, weight in found.items() if weight == 0] == [
        layer for layer in SOME if "mid_block" in layer
    ]
    assert all(found[layer] == 0.5 for layer in TEXT)
    assert found[ATTENTION[3]] == 1.0


def test_what_is_named_later_counts():
    assert parse_blocks("all=0.5, up=2, up_blocks.0=3").of(ATTENTION[3]) == 3.0
    assert parse_blocks("up_blocks.0=3, up=2").of(ATTENTION[3]) == 2.0


def test_patterns_are_those_of_training():
    blocks = parse_blocks("attentions.1=0.5, up_blocks.*.to_q=0.25")
    assert blocks.of("unet.up_blocks.0.attentions.1.proj_in") == 0.5
    assert blocks.of("unet.up_blocks.0.attentions.10.proj_in") == 1.0
    assert blocks.of(ATTENTION[3]) == 0.25
    assert blocks.of(ATTENTION[1]) == 0.5


def test_positions_are_words_too():
    for position, patterns in POSITIONS.items():
        assert WORDS[position] == patterns
    assert parse_blocks("OUT02=0.5").of("unet.up_blocks.0.upsamplers.0.conv") == 0.5


@settings(max_examples=25)
@given(st.lists(st.floats(-2, 2), min_size=20, max_size=20))
def test_a_list_is_the_words_of_its_positions(weights):
    listed = read_blocks(weights)
    pairs = zip(LISTS[20], weights, strict=True)
    said = parse_blocks(", ".join(f"{position}={weight!r}" for position, weight in pairs))
    for layer in [*ATTENTION, *CONVOLUTIONS, *TEXT]:
        assert listed.of(layer) == said.of(layer)
    assert read_blocks(",".join(map(repr, weights))) == listed


def test_diffusers_tables_reach_what_is_no_attention():
    table = {"down": 0.2, "mid": [0.3], "up": {"block_0": 0.4, "block_1": [0.5, 0.6, 0.7]}}
    for given_table in (table, {"unet": table}):
        found = weights_of(read_blocks(given_table))
        assert found["unet.down_blocks.0.resnets.0.conv1"] == 0.2
        assert found["unet.down_blocks.1.attentions.0.proj_in"] == 0.2
        assert found["unet.mid_block.resnets.1.conv2"] == 0.3
        assert found["unet.up_blocks.0.upsamplers.0.conv"] == 0.4
        assert found[ATTENTION[5]] == 0.7
        assert found["unet.up_blocks.2.resnets.2.conv_shortcut"] == 1.0
        assert found["unet.conv_in"] == 1.0
    blocks = read_blocks(table)
    assert blocks.of("unet.up_blocks.1.resnets.0.conv1") == 0.5
    assert blocks.of("unet.up_blocks.1.attentions.1.proj_in") == 0.6
    assert blocks.of("unet.up_blocks.1.upsamplers.0.conv") == 0.7
    places = read_blocks({"down": [0.1, 0.2]})
    assert places.of("unet.down_blocks.2.resnets.0.conv1") == 0.1
    assert places.of("unet.down_blocks.2.attentions.1.proj_in") == 0.2
    assert places.of("unet.down_blocks.0.downsamplers.0.conv") == 0.2


def test_a_table_may_be_typed_or_name_words_and_patterns():
    typed = parse_blocks('{"up": {"block_0": [1, 0.5, 0.25]}, "text_encoder": 0}')
    assert typed == read_blocks({"up": {"block_0": [1, 0.5, 0.25]}, "text_encoder": 0})
    assert typed.of(ATTENTION[4]) == 0.5
    assert (typed.of(TEXT[0]), typed.of(TEXT[1])) == (0.0, 1.0)
    named = read_blocks({"style": 1.2, "attn2.to_k": 0})
    assert (named.of(ATTENTION[4]), named.of(ATTENTION[1])) == (1.2, 0.0)


@pytest.mark.parametrize(
    ("given_blocks", "told"),
    [
        ("1,0,1", "no list of 3 block weights.*12 for SDXL"),
        ("1,R,0,0,0,0,0,0,0,0,0,0", "'1', which is no block with a weight"),
        ("style=strong", "'style=strong', which is no block"),
        ("=1", "no block with a weight"),
        ("style=nan", "block weight of style cannot be nan"),
        (",".join(["inf"] * 12), "finite"),
        ('{"up": ', "no JSON"),
        ({"up": {"first": 1}}, "'first' where a block of down or up belongs"),
        ({"mid": {"block_0": 1}}, "a table for 'mid'"),
        ({"up": {"block_0": []}}, "empty list"),
        ({"mid": [1, 2]}, "block weight of mid cannot be"),
        ({"style": True}, "block weight of style cannot be True"),
        ({"style": "much"}, "block weight of style cannot be 'much'"),
        ([1.0, None], "block weight of the list cannot be None"),
        (0.5, "Block weights cannot be 0.5"),
    ],
)
def test_what_cannot_be_read_is_told(given_blocks, told):
    with pytest.raises(ConfigError, match=told):
        read_blocks(given_blocks)


def test_nothing_is_weight_1_everywhere():
    assert parse_blocks(" ") == BlockWeights()
    assert set(weights_of(BlockWeights()).values()) == {1.0}


@pytest.mark.parametrize("word", ["styel=1", "content", "up_blocks.7"])
def test_a_word_that_is_in_no_layer_is_refused(word):
    one = random_adapter(1, {"linear": 2})
    with pytest.raises(ConfigError, match=r"in no layer that changes.*unet\.linear"):
        combine([one], MergeRequest([1.0], blocks=[parse_blocks(word)]))


def test_a_block_weight_counts_once_and_its_sign_stays():
    """A factor on each of an update's factors would square it and lose the sign."""
    one = random_adapter(1, {"linear": 2, "conv": 3})
    for weight in (0.5, -1.0, 3.0):
        blocks = parse_blocks(f"all={weight}")
        merged = combine([one], MergeRequest([2.0], blocks=[blocks])).adapter
        assert_same(merged, combine([one], MergeRequest([2.0 * weight])).adapter)
    kept = combine([one], MergeRequest([1.0], blocks=[parse_blocks("conv=0")])).adapter
    assert_same(kept, Adapter({"unet.linear": one.layers["unet.linear"]}))


@pytest.mark.parametrize("module", [dreamloom.merging.blocks, dreamloom.lora.patterns])
def test_the_examples_are_true(module):
    failures, tried = doctest.testmod(module)
    assert tried
    assert not failures
