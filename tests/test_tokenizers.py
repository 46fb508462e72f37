"""Tokenizers without weights: found by the base's name, and the same pieces as a loaded model's."""

import shutil

import pytest

from dreamloom.core.errors import BaseModelError
from dreamloom.models.sdxl_configs import make_tokenizers
from dreamloom.models.tokenizers import (
    TEXT_ENCODERS,
    list_merges,
    load_tokenizers,
    tell_reading,
    tokenize_text,
)


def test_a_text_is_read_as_the_loaded_model_reads_it(model, tiny_sdxl):
    text = "a photo of Rraj person, ohwx!"
    assert tokenize_text(load_tokenizers(str(tiny_sdxl)), text) == model.tokenize(text)


def test_sdxl_reads_as_its_embedded_tokenizers_do():
    found = load_tokenizers("sdxl")
    assert tuple(found) == TEXT_ENCODERS
    for own, made in zip(found.values(), make_tokenizers(), strict=True):
        assert own("rraj person").input_ids == made("rraj person").input_ids
    assert list(tokenize_text(found, "rraj person").values()) == [["r", "raj", "person"]] * 2


def test_a_checkpoint_has_the_tokenizers_of_sdxl(tmp_path):
    (tmp_path / "mine.safetensors").touch()
    tokenizers = load_tokenizers(str(tmp_path / "mine.safetensors"))
    assert [len(list_merges(one)) for one in tokenizers.values()] == [48_894] * 2


@pytest.mark.parametrize("base", ["", "sdx", "nobody/nothing", "gone.safetensors"])
def test_a_base_that_is_not_here_is_refused(base):
    with pytest.raises(BaseModelError, match="whose tokenizers could be asked") as caught:
        load_tokenizers(base)
    assert "--base sdxl" in caught.value.hint


def test_a_folder_without_tokenizers_is_refused(tiny_sdxl, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(BaseModelError, match="holds no tokenizer in CLIP's form"):
        load_tokenizers(str(tmp_path))
    shutil.copytree(tiny_sdxl / "tokenizer", tmp_path / "tokenizer", dirs_exist_ok=True)
    with pytest.raises(BaseModelError, match="tokenizer_2 holds no tokenizer"):
        load_tokenizers(str(tmp_path))


def test_pieces_are_spelled_in_letters_where_they_are_whole_letters():
    read = tokenize_text(load_tokenizers("sdxl"), "müller 😀 ’")["text_encoder"]
    assert read[:3] == ["mü", "ller", "😀"]
    assert len(read) == 5  # a typographic apostrophe is cut within its bytes
    assert all(piece.strip() and "\N{REPLACEMENT CHARACTER}" not in piece for piece in read)


def test_text_encoders_that_read_the_same_share_a_sentence():
    same = tell_reading("rraj", {"one": ["r", "raj"], "two": ["r", "raj"]})
    assert same == ["“rraj” is read as r · raj (tokens of one and two)"]
    assert len(tell_reading("rraj", {"one": ["r", "raj"], "two": ["rraj"]})) == 2
