"""Trains the byte-level BPE tokenizer of our own CLAP: all bytes are tokens, so no word is unknown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from stable_audio_lite.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# RoBERTa's order, so that padding is token 1 as its position table expects.
_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> Tokenizer:
    """Learn at most `vocab_size` tokens from `texts`; a text becomes `<s> tokens </s>`, lower-cased.

    Raises:
        UserError: vocab_size can't hold the 256 bytes and the four special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    smallest = 256 + len(_SPECIAL)
    if vocab_size < smallest:
        raise UserError(f"vocab_size: must be at least {smallest} (all bytes and the special tokens), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>")]
    )
    return tokenizer
