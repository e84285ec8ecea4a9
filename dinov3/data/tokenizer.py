"""CLIP's byte-pair encoding, which dino.txt's text tower reads (Radford et al. 2021; Sennrich et al. 2016).

A text is cleaned, lower-cased, split into words, each word written in bytes and the bytes joined by the merges of a
vocabulary file, in the file's order. The file is CLIP's `bpe_simple_vocab_16e6.txt.gz`, or a `merges.txt` of the same
contents; it comes as a path or a URL, packed or plain.

What differs without optional packages: `regex` is never needed; the split is done by Python's own Unicode tables, with
the same result for every character they know (3.11 knows Unicode 14) but U+0345. Without `ftfy` a text is still brought
to NFC, curly quotes straightened and control characters dropped, but mis-decoded text ("schÃ¶n"), ligatures ("ﬁ"),
full-width letters and terminal colour codes stay as they are and so give other ids than the reference, which has ftfy.
For text without any of these the ids are the same.
"""

from __future__ import annotations

import gzip
import html
import os
import re
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from dinov3.errors import DinoError, UnknownName
from dinov3.files import nonexistent

START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT_LENGTH = 77
N_MERGES = 48_894  # CLIP reads lines 2 to 48 895 of its file, which is longer; 512 + this + 2 = 49 408 ids
_WORDS_CACHED = 1 << 17  # encoded words that are cached

_FIXED = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)", re.IGNORECASE)
_CONTROL = dict.fromkeys((*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)))
_STRAIGHT = dict.fromkeys(map(ord, "ʼ‘’‚‛"), "'") | dict.fromkeys(map(ord, "“”„‟"), '"')


# ---- cleaning and splitting ----------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """Repaired Unicode, HTML entities resolved (twice, as captions of the web need), single spaces, lower case."""
    text = _repair()(text)
    text = html.unescape(html.unescape(text)).strip()
    return re.sub(r"\s+", " ", text).strip().lower()


@cache
def _repair() -> Callable[[str], str]:
    try:
        from ftfy import fix_text
    except ModuleNotFoundError:
        return plain_repair
    return fix_text


def plain_repair(text: str) -> str:
    """What is done in ftfy's absence: the part of its work that ordinary text needs, in its order."""
    if "<" not in text:  # as ftfy: where there are tags, entities are left to whoever reads the tags
        text = html.unescape(text)
    return unicodedata.normalize("NFC", text.translate(_STRAIGHT).translate(_CONTROL))


def split(text: str) -> list[str]:
    """Words of a cleaned text: special tokens, 's 't 're 've 'm 'll 'd, runs of letters, single digits (any number
    character), runs of anything else but space. Equal to CLIP's pattern with \\p{L} and \\p{N}, which Python's own `re`
    does not know."""
    words, at = [], 0
    while at < len(text):
        if fixed := _FIXED.match(text, at):
            words.append(fixed[0])
            at = fixed.end()
            continue
        kind, begin = _kind(text[at]), at
        at += 1
        while kind != "number" and at < len(text) and _kind(text[at]) == kind:
            at += 1
        if kind != "space":
            words.append(text[begin:at])
    return words


def _kind(character: str) -> str:
    if character.isalpha():  # exactly the categories L*
        return "letter"
    if character.isspace():
        return "space"
    return "number" if unicodedata.category(character)[0] == "N" else "other"


@cache
def byte_characters() -> dict[int, str]:
    """A printable character for every byte, in the order of the vocabulary: printable bytes stand for themselves, the
    others for code points from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


# ---- the tokenizer -------------------------------------------------------------------------------------------------


class Tokenizer:
    """Texts to ids. `merges` are pairs of symbols in order of rank; a symbol that ends a word ends in `</w>`.

    Ids: 256 byte characters, the same at a word's end, one per merge, start of text, end of text.
    """

    def __init__(self, merges: Sequence[tuple[str, str]]) -> None:
        characters = list(byte_characters().values())
        symbols = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in merges), START, END]
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.symbols = symbols
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.start_id, self.end_id = len(symbols) - 2, len(symbols) - 1
        self._encoded: dict[str, list[int]] = {START: [self.start_id], END: [self.end_id]}

    @classmethod
    def from_file(cls, path_or_url: str | os.PathLike[str]) -> Tokenizer:
        """From CLIP's vocabulary file or a merges.txt, at a path or an http(s) or file URL, gzip-packed or not.

        Raises `DinoError` with one sentence when there is no such file or it is no vocabulary of CLIP's kind.
        """
        return cls(read_merges(path_or_url))

    @property
    def vocab_size(self) -> int:
        return len(self.symbols)

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} ids)"

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start and end, however long. (`<|endoftext|>` in a text is the end token, as in
        CLIP.)"""
        if not isinstance(text, str):
            raise DinoError(f"a text is a str, not {type(text).__name__} ({str(text)[:40]!r})")
        return [id for word in split(clean(text)) for id in self._word(word)]

    def decode(self, ids: Iterable[int]) -> str:
        """The cleaned text of ids, words separated by single spaces; start, end and what follows the end are dropped."""
        values = [int(i) for i in ids]
        if self.end_id in values:
            values = values[: values.index(self.end_id)]
        bad = [i for i in values if not 0 <= i < self.vocab_size]
        if bad:
            raise DinoError(f"id {bad[0]} is none of this vocabulary's {self.vocab_size}")
        written = "".join(self.symbols[i] for i in values if i != self.start_id).replace("</w>", " ")
        byte_of = {c: b for b, c in byte_characters().items()} | {" ": 32}
        return bytes(byte_of[c] for c in written).decode("utf-8", errors="replace").strip()

    def tokenize(
        self, texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, *, too_long: str = "warn"
    ) -> Tensor:
        """int64 [n, context_length]: start, ids, end, then zeros. One str counts as a list of one.

        A text of more ids is cut, its last id becoming the end token, as in the reference. `too_long` says what else
        happens: "warn" (one UserWarning per call with the number of texts and the longest), "cut" (nothing; for
        training) or "refuse" (`DinoError`).
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise DinoError("no texts were given: an empty list has nothing to tokenize")
        if context_length < 2:
            raise DinoError(f"a context length of {context_length} has no room for the start and the end of a text")
        if too_long not in ("warn", "cut", "refuse"):
            raise UnknownName(f"too_long is 'warn', 'cut' or 'refuse', not {too_long!r}")
        rows = [[self.start_id, *self.encode(text), self.end_id] for text in texts]
        lengths = [len(row) for row in rows]
        if max(lengths) > context_length and too_long != "cut":
            n, longest = sum(length > context_length for length in lengths), lengths.index(max(lengths))
            message = (
                f"{n} of {len(texts)} texts have more than {context_length} tokens with start and end "
                f"(text {longest} has {max(lengths)}: {texts[longest][:40]!r}…)"
            )
            if too_long == "refuse":
                raise DinoError(f"{message}; shorten them, or let them be cut with too_long='cut'")
            warnings.warn(f"{message}; what is beyond was cut", stacklevel=2)
        tokens = torch.zeros(len(rows), context_length, dtype=torch.int64)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row[:context_length])
            tokens[i, min(len(row), context_length) - 1] = self.end_id
        return tokens

    __call__ = tokenize

    def _word(self, word: str) -> list[int]:
        """The ids of one word: of all neighbours the pair of lowest rank is joined, everywhere, until none has one."""
        if word in self._encoded:
            return self._encoded[word]
        table = byte_characters()
        symbols = [table[b] for b in word.encode("utf-8", errors="replace")]
        symbols[-1] += "</w>"
        while len(symbols) > 1:
            best = min(pairwise(symbols), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            joined: list[str] = []
            for symbol in symbols:
                if joined and joined[-1] == best[0] and symbol == best[1]:
                    joined[-1] += symbol
                else:
                    joined.append(symbol)
            symbols = joined
        if len(self._encoded) >= _WORDS_CACHED:
            self._encoded = {START: [self.start_id], END: [self.end_id]}
        ids = self._encoded[word] = [self.ids[symbol] for symbol in symbols]
        return ids


# ---- the file ------------------------------------------------------------------------------------------------------


def read_merges(path_or_url: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """The merges of a vocabulary file, checked: a header, pairs of known symbols, ends of words marked `</w>`."""
    source = os.fspath(path_or_url)
    path = _located(source)
    content = path.read_bytes()
    try:
        text = (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise DinoError(f"{source} is truncated or damaged ({error}); fetch it again") from None
    except UnicodeDecodeError:
        raise DinoError(f"{source} is no vocabulary: neither text nor packed text (CLIP's is a .txt.gz)") from None
    lines = text.split("\n")
    if "#version" not in lines[0]:
        raise DinoError(
            f"{source} is no list of merges: its first line should hold '#version', not {lines[0][:40]!r} "
            "(wanted: CLIP's bpe_simple_vocab_16e6.txt.gz, or a merges.txt)"
        )
    merges: list[tuple[str, str]] = []
    characters = byte_characters().values()
    known = {*characters, *(c + "</w>" for c in characters)}
    for number, line in enumerate(lines[1 : N_MERGES + 1], 2):
        pair = line.split()
        if not pair and not any(rest.strip() for rest in lines[number:]):
            merges.append(("", ""))  # CLIP gives the empty end of a short file an id too: start and end come after it
            continue
        if len(pair) != 2 or not known.issuperset(pair):
            raise DinoError(f"{source}, line {number}: {line[:40]!r} is no pair of symbols that exist by then")
        merges.append((pair[0], pair[1]))
        known.add(pair[0] + pair[1])
    if not any(second.endswith("</w>") for _, second in merges):
        raise DinoError(f"{source} marks no end of a word with </w>: it is not a vocabulary of CLIP's kind (GPT-2's?)")
    return merges


def _located(source: str) -> Path:
    if "://" in source or source.startswith("file:"):
        from dinov3.weights import download as downloads

        return downloads.fetch(source)
    path = Path(source).expanduser()
    if not path.is_file():
        raise DinoError(f"there is no vocabulary file: {nonexistent(source)}")
    return path
