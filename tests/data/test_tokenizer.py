"""CLIP's tokenizer: a plain re-statement, a public implementation of the same merges, CLIP's own file where present."""

from __future__ import annotations

import gzip
import random
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from golden_cases import HERE as GOLDEN

from dinov3.data import tokenizer as module
from dinov3.data.tokenizer import END, START, Tokenizer, byte_characters, clean, plain_repair, read_merges, split
from dinov3.errors import DinoError, UnknownName, WeightsError

TINY = GOLDEN / "tiny_bpe.txt.gz"
TEXTS = [
    "A photo of the dog",
    "the cat's in the 1st red photo, doing nothing!!",
    "Été à Zürich: 狗 и 猫 😀😀",
    "we'll see; they've said it's #1 of 1,000,000",
    "",
    "...",
    "nothing" * 30,
]


def tiny() -> Tokenizer:
    return Tokenizer.from_file(TINY)


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("#version: test\n" + "\n".join(lines), encoding="utf-8")
    return path


# ---- splitting and cleaning ----------------------------------------------------------------------------------------


def test_words_are_cut_as_clips_pattern_cuts_them() -> None:
    regex = pytest.importorskip("regex")
    pattern = regex.compile(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
    )
    pieces = [
        "a",
        "'s",
        "’s",
        "don't",
        START,
        END,
        "!!",
        "12",
        "é",
        "狗",
        "😀",
        " ",
        "\u00a0",
        "İ",
        "ǅ",
        "'ſ",
        "_",
        "½",
    ]
    pieces += ["#", "x'LL", "re-do", "नमस्ते", "\ufe0f", "e\u0301", "Ⅷ", "㊀", "\u200d"]
    draw = random.Random(0)
    for _ in range(3000):
        text = clean("".join(draw.choice(pieces) for _ in range(draw.randint(1, 9))))
        assert split(text) == pattern.findall(text), text


def test_texts_are_cleaned_before_they_are_cut() -> None:
    assert clean("  A  photo\tof\nDOGS ") == "a photo of dogs"
    assert clean("fish &amp;amp; chips &lt;3") == "fish & chips <3"
    assert clean("the dog’s “ball”") == 'the dog\'s "ball"'
    assert clean("cafe\u0301") == "café"
    assert tiny().encode("caf\u00e9") == tiny().encode("cafe\u0301")


def test_the_fallback_is_ftfy_for_ordinary_text() -> None:
    ftfy = pytest.importorskip("ftfy")
    for text in (
        "A dog’s “ball” &amp; cafe\u0301",
        "it&rsquo;s <b>&lt;x&gt;</b>",
        "a\x01b\x1fc",
        "\ufeffnaïve — dash… ½ ²",
        "‚low‘ „x‟ zero\u200bwidth",
    ):
        assert plain_repair(text) == ftfy.fix_text(text)
    for text in ("schÃ¶n", "ﬁsh", "ＡＢＣ", "\x1b[36mred"):  # what the module's first lines say it does not do
        assert plain_repair(text) != ftfy.fix_text(text)


def test_neither_regex_nor_ftfy_is_needed() -> None:
    code = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"regex", "ftfy", "numpy"}}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hidden())
from dinov3.data.tokenizer import Tokenizer
print(Tokenizer.from_file({str(TINY)!r}).encode("the dog’s photo"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(tiny().encode("the dog's photo"))


# ---- ids -----------------------------------------------------------------------------------------------------------


def test_every_byte_has_its_own_printable_character() -> None:
    table = byte_characters()
    assert sorted(table) == list(range(256))
    assert len(set(table.values())) == 256
    assert list(table)[:3] == [33, 34, 35]  # the vocabulary's order: printable bytes first, then 0, 1, …
    assert list(table)[188] == 0
    assert table[0] == "Ā"
    assert table[32] == "Ġ"
    assert not any(c.isspace() for c in table.values())


def test_ids_come_in_clips_order() -> None:
    t = Tokenizer([("t", "h"), ("th", "e</w>")])
    assert t.encode("the") == [513]
    assert t.encode("!") == [256]
    assert t.encode("th") == [list(byte_characters()).index(ord("t")), 256 + list(byte_characters()).index(ord("h"))]
    assert (t.start_id, t.end_id, t.vocab_size) == (514, 515, 516)
    assert t.tokenize("the", 5).tolist() == [[514, 513, 515, 0, 0]]


def test_merges_go_by_rank_everywhere_at_once() -> None:
    """The plain loop: of all pairs present the first of the list, joined from left to right, until none is left."""

    def plain(word: str, merges: list[tuple[str, str]]) -> list[str]:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while present := [m for m in merges if any(m == (a, b) for a, b in pairwise(symbols))]:
            first, i = present[0], 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == first:
                    symbols[i : i + 2] = ["".join(first)]
                i += 1
        return symbols

    draw = random.Random(1)
    for _ in range(60):
        known, merges = ["a", "b", "a</w>", "b</w>"], []
        while len(merges) < 12:
            pair = draw.choice([k for k in known if not k.endswith("</w>")]), draw.choice(known)
            if pair not in merges and pair[0] + pair[1] not in known:
                merges.append(pair)
                known.append(pair[0] + pair[1])
        t = Tokenizer(merges)
        for _ in range(20):
            word = "".join(draw.choice("ab") for _ in range(draw.randint(1, 14)))
            assert [t.symbols[i] for i in t.encode(word)] == plain(word, merges)


def test_decoding_gives_the_cleaned_text_back() -> None:
    t = tiny()
    assert t.decode(t.encode("A photo of the dog")) == "a photo of the dog"
    assert t.decode(t.tokenize("Été 狗 😀", 40)[0]) == "été 狗 😀"
    with pytest.raises(DinoError, match="id 600 is none of this vocabulary's 537"):
        t.decode([600])


def test_transformers_gives_the_same_ids_from_the_same_merges(oracles, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, ours = clip_of(transformers, TINY), tiny()
    for text in TEXTS:
        assert theirs(text)["input_ids"] == [ours.start_id, *ours.encode(text), ours.end_id], text


def clip_of(transformers, path: Path):
    """transformers' CLIP tokenizer over a merges file; its vocabulary is written down here once more."""
    merges = [m for m in read_merges(path) if m != ("", "")]
    bytes_ = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(b) for b in bytes_] + [chr(256 + i) for i in range(256 - len(bytes_))]
    symbols = characters + [c + "</w>" for c in characters] + [a + b for a, b in merges]
    n = len(symbols) + len(read_merges(path)) - len(merges)
    vocabulary = {s: i for i, s in enumerate(symbols)} | {START: n, END: n + 1}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)


@pytest.mark.data
def test_clips_own_vocabulary_gives_the_well_known_ids(development_data: Path, oracles) -> None:
    path = development_data / "bpe-vocab" / "bpe_simple_vocab_16e6.txt.gz"
    if not path.is_file():
        pytest.skip(f"CLIP's vocabulary not present at {path}")
    t = Tokenizer.from_file(path)
    assert (t.vocab_size, t.start_id, t.end_id) == (49408, 49406, 49407)
    assert t.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    transformers = pytest.importorskip("transformers")
    theirs = clip_of(transformers, path)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == [t.start_id, *t.encode(text), t.end_id], text
    assert t.decode(t.encode(TEXTS[2])) == "été à zürich : 狗 и 猫 😀😀"


# ---- lengths -------------------------------------------------------------------------------------------------------


def test_a_long_text_is_cut_before_its_end_token_with_a_warning() -> None:
    t, long = tiny(), "the " * 20
    with pytest.warns(UserWarning, match=r"1 of 2 texts have more than 8 tokens .*text 1 has 22: 'the the"):
        tokens = t.tokenize(["dog", long], 8)
    assert tokens.shape == (2, 8)
    assert tokens.dtype == torch.int64
    assert tokens[1, -1] == t.end_id
    assert (tokens[1] == t.end_id).sum() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(t.tokenize(["dog", long], 8, too_long="cut"), tokens)
        assert t(["the " * 6], 8)[0, -1] == t.end_id  # exactly as long as the context: nothing to tell
    with pytest.raises(DinoError, match="shorten them"):
        t.tokenize(["dog", long], 8, too_long="refuse")


def test_errors_are_one_sentence() -> None:
    t = tiny()
    for call, words in (
        (lambda: t.tokenize([]), "an empty list"),
        (lambda: t.tokenize(["dog", 3]), "a text is a str, not int"),
        (lambda: t.tokenize("dog", 1), "no room for the start and the end"),
    ):
        with pytest.raises(DinoError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(UnknownName, match="'warn', 'cut' or 'refuse'"):
        t.tokenize("dog", too_long="drop")


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_vocabulary_is_read_packed_or_plain_by_path_or_url(tmp_path: Path) -> None:
    plain = tmp_path / "merges.txt"
    plain.write_bytes(gzip.decompress(TINY.read_bytes()))
    for source in (TINY, str(TINY), TINY.as_uri(), plain, plain.as_uri()):
        assert Tokenizer.from_file(source).symbols == tiny().symbols


def test_only_the_lines_that_clip_reads_count(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "N_MERGES", 2)
    assert (
        Tokenizer.from_file(write(tmp_path / "long.txt", ["t h", "th e</w>", "i n", "anything at all"])).vocab_size
        == 516
    )


def test_a_file_that_is_no_clip_vocabulary_is_refused(tmp_path: Path) -> None:
    def text(content: str) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.txt"
        path.write_text(content, encoding="utf-8")
        return path

    (tmp_path / "half.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(5000))[:2000])
    (tmp_path / "weights.pth").write_bytes(b"PK\x03\x04\xff\xfe\x00")
    for path, words in (
        (tmp_path / "haf.txt.gz", "no vocabulary file: .*did you mean 'half.txt.gz'"),
        (tmp_path / "half.txt.gz", "truncated or damaged"),
        (tmp_path / "weights.pth", "neither text nor packed text"),
        (text("<!doctype html>\nlog in"), "first line should hold '#version'"),
        (text(""), "first line should hold '#version'"),
        (text("#version\nt h\nth e f"), "line 3: 'th e f' is no pair"),
        (text("#version\nt h\nxy z</w>"), "line 3: 'xy z</w>' is no pair of symbols that exist by then"),
        (text("#version\nt h\n\ni n</w>"), "line 3: '' is no pair"),
        (text("#version: 0.2\nĠ t\nh e"), "marks no end of a word"),
    ):
        with pytest.raises(DinoError, match=words) as caught:
            Tokenizer.from_file(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="no file at"):
        Tokenizer.from_file((tmp_path / "missing.txt").as_uri())


def test_a_tokenizer_travels_to_worker_processes_and_forgets_words_in_time(monkeypatch) -> None:
    import pickle

    t = pickle.loads(pickle.dumps(tiny()))
    assert t.encode("the dog") == tiny().encode("the dog")
    monkeypatch.setattr(module, "_WORDS_CACHED", 10)
    before = {text: tiny().encode(text) for text in TEXTS}
    for _ in range(2):
        assert {text: t.encode(text) for text in TEXTS} == before
    assert len(t._encoded) <= 10
    assert t.encode(END) == [t.end_id]
