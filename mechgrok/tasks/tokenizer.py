"""Byte-level BPE tokenizers: trained here, or read from a tokenizer.json.

Every text has tokens, as each of the 256 bytes is one, and decoding gives the text back (Sennrich et al.
1508.07909; on bytes: GPT-2, Radford et al. 2019). The `tokenizers` library does the work.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mechgrok.errors import ConfigError


def train_tokenizer(texts: Iterable[str], vocabulary: int, bos_token: str) -> Tokenizer:
    """A tokenizer of exactly `vocabulary` tokens: bos_token is 0, then the 256 bytes, then merges seen at least twice.

    The same texts in the same order give the same tokenizer, whatever the number of threads.

    Raises:
        ConfigError: the texts do not have that many merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[bos_token],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocabulary:
        raise ConfigError(
            f"vocabulary {vocabulary} is more than the text allows, which gives {tokenizer.get_vocab_size()} tokens; "
            "lower vocabulary to that or give more text"
        )
    return _of_plain_text(tokenizer)


def read_tokenizer(path: str) -> str:
    """The text of a tokenizer.json. Raises ConfigError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the tokenizer {path} ({error}); give the path of a tokenizer.json, or vocabulary"
        ) from None


def parse_tokenizer(text: str, source: str) -> Tokenizer:
    """A tokenizer from the text of a tokenizer.json; `source` names it in errors."""
    try:
        return _of_plain_text(Tokenizer.from_str(text))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(
            f"{source} is no tokenizer of the tokenizers library ({error}); give a tokenizer.json"
        ) from None


def bos_id(tokenizer: Tokenizer, bos_token: str) -> int:
    """The id of the token that rows begin with. Raises ConfigError if the tokenizer has none of that name."""
    found = tokenizer.token_to_id(bos_token)
    if found is None:
        special = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values())
        raise ConfigError(
            f"the tokenizer has no token {bos_token!r}; set bos_token to one of its own, such as {special or 'none'}"
        )
    return found


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The tokens of each text, without any that the text does not spell."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def token_names(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The vocabulary's own spelling of every id: printable, and no two alike ("Ġ" is a space, "Ċ" a line's end)."""
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    return tuple(names.get(index, f"<{index}>") for index in range(max(names) + 1))


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that no text spells, such as the beginning of a row."""
    return frozenset(index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def _of_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """A text that spells "<|endoftext|>" is a text; lengths are what they are."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
