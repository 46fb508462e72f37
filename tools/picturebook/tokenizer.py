"""The tokenizer: byte pairs in CLIP's form, learned from the world's captions."""

import json
import random
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Lowercase, Replace, Sequence
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from dreamloom.picturebook.world import KNOWN_PERSONS, known_person, sample_drawing
from tools.picturebook.captions import caption

MAX_TOKENS = 32
_LARGEST_VOCABULARY = 1600
_CAPTIONS = 12_000


def training_captions(count: int = _CAPTIONS) -> Iterable[str]:
    """Yield what the tokenizer learns from: captions of somebody known.

    Known names shall become single tokens. Invented words stand only before the nouns of unnamed
    figures and so stay out: an unknown word always falls into letters and small pieces, as a rare
    identifier does in SDXL.
    """
    rng = random.Random("tokenizer")
    for seed in range(count):
        name, _ = known_person(seed % KNOWN_PERSONS)
        yield caption(sample_drawing(seed, name=name), rng)


def train_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learn the byte pairs and write the tokenizer's files to a folder."""
    learner = Tokenizer(BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer = Sequence([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()])
    learner.pre_tokenizer = PreTokenizers([Whitespace(), ByteLevel(add_prefix_space=False)])
    trainer = BpeTrainer(
        vocab_size=_LARGEST_VOCABULARY,
        min_frequency=4,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(training_captions(), trainer)
    learned = json.loads(learner.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in learned["merges"]]
    vocabulary: dict[str, int] = learned["vocab"]
    # Every letter also ends words, which the learner adds only where it met it.
    for letter in ByteLevel.alphabet():
        vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
    with tempfile.TemporaryDirectory() as scratch:
        vocabulary_file, merges_file = Path(scratch, "vocab.json"), Path(scratch, "merges.txt")
        vocabulary_file.write_text(json.dumps(vocabulary))
        merges_file.write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        tokenizer = CLIPTokenizer(
            str(vocabulary_file), str(merges_file), model_max_length=MAX_TOKENS
        )
        tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)
