"""Byte-level BPE tokenizers with RoBERTa's special tokens: read from a file, trained, and applied to texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stable_audio_lite.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# In RoBERTa's order, whose position table counts from PAD_TOKEN + 1.
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
PAD_TOKEN = _SPECIAL.index("<pad>")
UNKNOWN_TOKEN = _SPECIAL.index("<unk>")
_SAME_WORD = 30  # merges within which parts of one word follow one another


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        UserError: the file is missing or no tokenizer, or its padding token isn't RoBERTa's.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); a tokenizer.json is needed") from error
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path}: not a tokenizer.json ({' '.join(str(error).split())[:120]})") from error
    if tokenizer.token_to_id("<pad>") != PAD_TOKEN:
        raise UserError(f"{path}: its <pad> must be token {PAD_TOKEN}, as RoBERTa's is; give the CLAP's own tokenizer")
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Texts -> token ids (B, N) and their mask (B, N), True where a token is real; N is that of the longest text.

    A text of more than `max_tokens` tokens is cut; its end token stays.
    """
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    ids = [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD_TOKEN)
    return padded, padded != PAD_TOKEN


def unread_parts(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> list[str]:
    """The end of each text that `tokenize` cuts off, "" where it reads all of it."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    found = zip(texts, tokenizer.encode_batch(list(texts)), strict=True)
    # The end token takes the last of the places.
    return [text[e.offsets[max_tokens - 1][0] :].strip() if len(e.ids) > max_tokens else "" for text, e in found]


def ran_out(tokenizer: Tokenizer, vocab_size: int) -> bool:
    """Tell whether training made all words whole tokens before there were `vocab_size` of them."""
    return tokenizer.get_vocab_size() < vocab_size


def unlearned_words(tokenizer: Tokenizer, text: str) -> list[str]:
    """Find the words of a text that are not in those which a tokenizer was trained on, if it ran out of words."""
    normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(normal)
    words = [normal[first:last].strip() for piece, (first, last) in pieces if tokenizer.token_to_id(piece) is None]
    return list(dict.fromkeys(word for word in words if any(map(str.isalnum, word))))


def learned_words(tokenizer: Tokenizer) -> list[str]:
    """List the words that a tokenizer was trained on, if it ran out of them.

    A token whose next merge followed at once was only a step on the way to a longer word.
    """
    merges = [m.split(" ") if isinstance(m, str) else m for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    rank = {first + second: at for at, (first, second) in enumerate(merges)}
    continued: dict[str, int] = {}
    for at, (first, _) in enumerate(merges):
        continued.setdefault(first, at)
    words = []
    for token, at in rank.items():
        word = token.removeprefix("\u0120")  # a space, in byte-level BPE
        step = token in continued and (continued[token] - at <= _SAME_WORD or len(word) < 3)
        if word != token and word.isalpha() and len(word) > 1 and not step:
            words.append(word)
    return sorted(words)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> Tokenizer:
    """Learn at most `vocab_size` tokens from `texts`; a text becomes `<s> tokens </s>`, lower-cased.

    All bytes are tokens, so no word is unknown.

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
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>")]
    )
    return tokenizer
