"""Search: exact answers equal numpy's, the index finds nearly all of them, mistakes are sentences, the sheet is drawn."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lancedb")

from dinov3 import drawing
from dinov3.embedding import flat, manage
from dinov3.embedding import search as search_module
from dinov3.embedding.schema import Row, StoreFacts
from dinov3.embedding.search import Hit, IndexStatus, build_index, index_status, search, sheet
from dinov3.embedding.store import EmbeddingStore
from dinov3.errors import DinoError, StoreError, UnknownName, printable

D = 16
FACTS = StoreFacts(model="tiny@1", dim=D, preprocessing="s224")


def filled(folder, vectors: np.ndarray, **facts: object) -> EmbeddingStore:
    """A store of these vectors; image n is `n.jpg`, n + 1 wide."""
    store = EmbeddingStore.create(folder, dataclasses.replace(FACTS, dim=vectors.shape[1], **facts))  # type: ignore
    rows = [Row(f"{n:05d}.jpg", "h", "1", n + 1, 480, vector) for n, vector in enumerate(vectors)]
    store.append(rows)
    return store


def clustered(rows: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors in 50 clusters, and 40 queries near some of them: like embeddings of images."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((50, dim))
    vectors = centres[rng.integers(50, size=rows)] + 0.35 * rng.standard_normal((rows, dim))
    queries = vectors[rng.integers(rows, size=40)] + 0.1 * rng.standard_normal((40, dim))
    return vectors.astype(np.float32), queries.astype(np.float32)


def by_hand(
    vectors: np.ndarray, query: np.ndarray, top: int, keep: np.ndarray | None = None
) -> list[tuple[str, float]]:
    """The definition: every cosine, sorted, equal ones by path."""
    vectors, query = vectors.astype(np.float64), query.astype(np.float64)
    scores = [float(v @ query / np.linalg.norm(v) / np.linalg.norm(query)) for v in vectors]
    kept = range(len(vectors)) if keep is None else np.flatnonzero(keep)
    return sorted(((f"{n:05d}.jpg", scores[n]) for n in kept), key=lambda pair: (-pair[1], pair[0]))[:top]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    vectors, queries = clustered(300, D)
    with filled(tmp_path_factory.mktemp("small") / "s", vectors) as store:
        store.add_column("label", lambda path: "even" if int(path[:5]) % 2 == 0 else "odd")
        yield store, vectors, queries


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("length", [0.01, 1.0, 300.0])
def test_exact_search_is_the_brute_force_over_all_rows(tmp_path, dtype, length):
    vectors, queries = clustered(200, D, seed=3)
    vectors = (vectors * length).astype(dtype)
    with filled(tmp_path / "s", vectors, vector_dtype=dtype) as store:
        for query, hits in zip(queries[:5], search(store, queries[:5], top=7)):
            wanted = by_hand(vectors, query, 7)
            assert [hit.path for hit in hits] == [path for path, _ in wanted]
            np.testing.assert_allclose([hit.score for hit in hits], [score for _, score in wanted], atol=1e-9)
            assert [hit.rank for hit in hits] == list(range(1, 8))
            assert [hit.width for hit in hits] == [int(path[:5]) + 1 for path, _ in wanted]


def test_one_query_may_come_as_a_vector_and_a_stored_one_finds_itself(small):
    store, vectors, _ = small
    hits = search(store, vectors[17])
    assert len(hits) == 10
    assert hits[0].path == "00017.jpg"
    assert hits[0].score == pytest.approx(1.0, abs=1e-12)


def test_many_queries_are_answered_as_each_alone(small):
    store, _, queries = small
    queries = np.concatenate([queries, queries])  # 80: more than are asked at once
    together = search(store, queries, top=3)
    assert len(together) == 80
    assert together[70] == search(store, queries[70], top=3)
    assert together[:40] == together[40:]


def test_a_filter_is_applied_before_ranking(small):
    store, vectors, queries = small
    odd = np.arange(300) % 2 == 1
    hits = search(store, queries[0], top=20, where="label = 'odd'", columns=["label", "stamp"])
    assert [hit.path for hit in hits] == [path for path, _ in by_hand(vectors, queries[0], 20, odd)]
    assert hits[0].extra == {"label": "odd", "stamp": "1"}
    assert len(search(store, queries[0], top=20, where="width <= 3")) == 3
    assert search(store, queries[:2], where="width > 9999") == [[], []]


def test_ties_are_broken_by_path_also_when_they_reach_beyond_the_last_place(tmp_path):
    rng = np.random.default_rng(0)
    image, others = rng.standard_normal(D), rng.standard_normal((50, D))
    copies = [Row(f"{n:05d}.jpg", "h", "1", 1, 1, image * 2.0 ** (n % 3)) for n in range(400)]  # lengths do not count
    rest = [Row(f"other{n}.jpg", "h", "1", 1, 1, vector) for n, vector in enumerate(others)]
    with EmbeddingStore.create(tmp_path / "s", FACTS) as store:
        store.append([*reversed(copies), *rest])  # the store's own order is not the paths'
        hits = search(store, image, top=4)
        ((first, *_), *_) = search(store, np.stack([image, others[0]]), top=4)
    assert [hit.path for hit in hits] == ["00000.jpg", "00001.jpg", "00002.jpg", "00003.jpg"]
    assert len({hit.score for hit in hits}) == 1
    assert first == hits[0]


CASES = [{"where": where, "top": top} for where in (None, "width > 30", "width < 9") for top in (1, 10, 400)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_searches_from_memory_find_what_a_scan_finds_until_the_store_changes(tmp_path, monkeypatch, dtype):
    vectors, queries = clustered(300, D)
    vectors[200:] = vectors[0]  # ties beyond the last place
    with filled(tmp_path / "s", vectors, vector_dtype=dtype) as store:
        ask = [vectors[0], *queries[:3]]
        monkeypatch.setattr(flat, "PAYS_AFTER", 10**6)
        scanned = [search(store, query, **case) for case in CASES for query in ask]
        assert store not in flat._IN_MEMORY
        monkeypatch.setattr(flat, "PAYS_AFTER", 0)
        assert [search(store, query, **case) for case in CASES for query in ask] == scanned
        assert len(flat._IN_MEMORY[store].vectors) == 300
        together = [search(store, np.stack(ask), **case) for case in CASES]
        assert [hits for case in together for hits in case] == scanned
        store.append([Row("new.jpg", "h", "1", 1, 1, queries[0])])
        assert search(store, queries[0], top=1)[0].path == "new.jpg"
        store.remove(["new.jpg", "00000.jpg"])
        assert search(store, vectors[0], top=1)[0].path == "00200.jpg"


def test_more_vectors_than_may_be_kept_are_scanned(small, monkeypatch):
    store, _, queries = small
    monkeypatch.setattr(flat, "PAYS_AFTER", 0)
    monkeypatch.setattr(flat, "CACHED_BYTES", 4 * 300 * D - 1)
    flat._IN_MEMORY.pop(store, None)
    assert search(store, queries[0])
    assert store not in flat._IN_MEMORY


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_new_process_finds_by_the_flat_index_what_a_scan_finds(tmp_path, monkeypatch, dtype):
    vectors, queries = clustered(300, D)
    vectors[200:] = vectors[0]  # ties beyond the last place
    ask = [vectors[0], *queries[:3]]
    with filled(tmp_path / "s", vectors, vector_dtype=dtype) as store:
        store.append([Row(f"later{n}.jpg", "h", "1", n, 1, vector) for n, vector in enumerate(queries)])
        store.remove(["00007.jpg", "00150.jpg"])  # row ids with gaps
        scanned = [search(store, query, **case) for case in CASES for query in ask]
        assert not flat.is_kept(store)
        flat.write(store)
    monkeypatch.setattr(search_module, "_nearest", None)  # no scan
    monkeypatch.setattr(flat, "CACHED_BYTES", 0)  # nothing is read into memory
    opened = EmbeddingStore.open(tmp_path / "s")
    assert [search(opened, query, **case) for case in CASES for query in ask] == scanned
    together = [search(opened, np.stack(ask), **case) for case in CASES]
    assert [hits for case in together for hits in case] == scanned
    monkeypatch.setattr(search_module, "SCORES_AT_ONCE", 1)
    assert [search(opened, np.stack(ask), **case) for case in CASES] == together


def test_rows_whose_filter_column_is_empty_do_not_pass(tmp_path):
    vectors, _ = clustered(20, D)
    with filled(tmp_path / "s", vectors) as store:
        store.add_column("label", {"00003.jpg": "cat", "00005.jpg": "dog"})
        flat.write(store)
        for where, wanted in (
            ("label = 'cat'", {3}),
            ("label != 'cat'", {5}),
            ("label IS NULL", {*range(20)} - {3, 5}),
        ):
            found = search(store, vectors[3], top=20, where=where, exact=True)
            assert {int(hit.path[:5]) for hit in found} == wanted


def test_a_flat_index_of_another_version_is_not_used_until_it_is_written_again(tmp_path):
    vectors, _ = clustered(300, D)
    with filled(tmp_path / "s", vectors) as store:
        folder = flat.write(store)
        written = np.load(folder / flat.VECTORS, mmap_mode="r+")
        np.negative(written, out=written)
        assert search(EmbeddingStore.open(store.uri), vectors[5], top=1)[0].path != "00005.jpg"  # it is what was read
        store.append([Row("new.jpg", "h", "1", 1, 1, -vectors[5])])
        opened = EmbeddingStore.open(store.uri)
        assert search(opened, vectors[5], top=1)[0].path == "00005.jpg"
        assert search(opened, -vectors[5], top=1)[0].path == "new.jpg"
        manage.compact(store)
        assert not folder.exists()
        assert flat._mapped(opened, opened.read(lambda table: table.version), 301) is not None
        assert search(opened, -vectors[5], top=1)[0].path == "new.jpg"


def test_a_flat_index_of_a_store_that_was_made_anew_is_not_used(tmp_path):
    vectors, _ = clustered(50, D)
    with filled(tmp_path / "s", -vectors) as store:
        folder = flat.write(store)
    with filled(tmp_path / "other", vectors) as other:
        assert other.table.version == store.table.version
        shutil.copytree(folder.parent, tmp_path / "other" / flat.FOLDER)
        assert flat.is_kept(other)
        assert search(other, vectors[5], top=1)[0].path == "00005.jpg"


def test_a_damaged_flat_index_is_as_none_and_can_be_deleted(tmp_path):
    vectors, _ = clustered(50, D)
    with filled(tmp_path / "s", vectors) as store:
        folder = flat.write(store)
        for damage in (lambda p: os.truncate(p, 200), lambda p: p.write_bytes(b""), os.remove):
            damage(folder / flat.VECTORS)
            assert search(EmbeddingStore.open(store.uri), vectors[5], top=1)[0].path == "00005.jpg"
        shutil.rmtree(folder.parent)
        assert search(EmbeddingStore.open(store.uri), vectors[5], top=1)[0].path == "00005.jpg"
        flat.refresh(store)
        assert not folder.parent.exists()  # only on request


def test_a_flat_index_on_object_storage_is_refused():
    with EmbeddingStore.create("memory://flat", FACTS) as store, pytest.raises(StoreError, match="not on it"):
        flat.write(store)


def test_asking_for_more_than_there_is_gives_all(small):
    store, _, queries = small
    assert len(search(store, queries[0], top=1000)) == 300


def test_an_empty_store_has_no_neighbours(tmp_path):
    with EmbeddingStore.create(tmp_path / "s", FACTS) as store:
        assert search(store, np.ones((2, D))) == [[], []]
        assert index_status(store) is None


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"vectors": np.zeros(D)}, StoreError, "query 0 is zero"),
        ({"vectors": np.array([np.ones(D), np.full(D, np.nan)])}, StoreError, "query 1 .* not a number"),
        ({"vectors": np.ones(D + 1)}, StoreError, r"shape \(17,\), expected \(Q, 16\)"),
        ({"vectors": np.ones(D), "top": 0}, StoreError, "at least one"),
        ({"vectors": np.ones(D), "columns": ["lable"]}, UnknownName, "did you mean 'label'"),
        ({"vectors": np.ones(D), "where": "lable = 'x'"}, UnknownName, "'lable'; did you mean 'label'.*there are path"),
        ({"vectors": np.ones(D), "where": "label = = 'x'"}, StoreError, "the filter"),
        ({"vectors": np.ones(D), "where": "label > 3"}, StoreError, "the filter"),
        ({"vectors": np.ones(D), "exact": False}, StoreError, "build_index"),
    ],
)
def test_mistakes_are_one_sentence(small, arguments, error, words):
    with pytest.raises(error, match=words) as caught:
        search(small[0], **arguments)
    assert isinstance(caught.value, DinoError)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------- the index


@pytest.fixture(scope="module")
def index_of_5000(tmp_path_factory):
    vectors, queries = clustered(5000, 64)
    store = filled(tmp_path_factory.mktemp("indexed") / "s", vectors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "ROWS_PER_CELL", 100)  # 50 cells, as 200,000 rows would have
        assert index_status(store) is None
        assert build_index(store) == IndexStatus(indexed=5000, unindexed=0)
    yield store, vectors, queries
    store.close()


@pytest.fixture
def indexed(index_of_5000, monkeypatch):
    """As if 5,000 rows were many."""
    monkeypatch.setattr(search_module, "EXACT_LIMIT", 500)
    monkeypatch.setattr(search_module, "ROWS_PER_CELL", 100)
    monkeypatch.setattr(search_module, "FEWEST_CELLS", 8)
    return index_of_5000


def found_by(monkeypatch, store: EmbeddingStore, *arguments, **keywords) -> tuple[list[list[Hit]], bool]:
    """The answer, and whether the index gave it."""
    used = []
    real = search_module._approximately
    monkeypatch.setattr(search_module, "_approximately", lambda *a: used.append(a) or real(*a))
    return search(store, *arguments, **keywords), bool(used)


@pytest.fixture
def by_codes(monkeypatch):
    """Filtered searches go by the codes of the index, as where many rows pass."""
    monkeypatch.setattr(flat, "FILTER_BYTES", 0)
    monkeypatch.setattr(flat, "FILTER_BYTES_AGAIN", 0)
    flat._PASSING.clear()


@pytest.mark.parametrize("where, keep", [(None, 1), ("width % 4 = 0", 4)])
def test_the_index_finds_nearly_all_true_neighbours(indexed, monkeypatch, by_codes, where, keep):
    store, vectors, queries = indexed
    answers, used = found_by(monkeypatch, store, queries, where=where)
    assert used
    kept = (np.arange(5000) + 1) % keep == 0
    shared = 0
    for query, hits in zip(queries, answers):
        true = dict(by_hand(vectors, query, 10, kept))
        shared += len(true.keys() & {hit.path for hit in hits})
        assert all(kept[int(hit.path[:5])] for hit in hits)
        for hit in hits:  # scores are exact whoever found them
            if hit.path in true:
                assert hit.score == pytest.approx(true[hit.path], abs=1e-9)
    assert shared / (10 * len(queries)) >= 0.95


def test_the_index_does_less_than_a_scan(indexed):
    plan = indexed[0].table.search(np.ones(64, np.float32)).distance_type("cosine").nprobes(8).limit(3).explain_plan()
    assert "ANN" in plan


def test_rows_that_pass_a_filter_are_all_compared_at_once_or_again_and_exact_on_demand_is_a_scan(indexed, monkeypatch):
    store, vectors, queries = indexed
    expected = [[path for path, _ in by_hand(vectors, query, 10, np.arange(5000) < 900)] for query in queries[:2]]
    row = 4 * vectors.shape[1]
    monkeypatch.setattr(flat, "FILTER_BYTES_AGAIN", 900 * row)
    for at_once, by_codes in ((900, [False, False]), (899, [True, False])):
        monkeypatch.setattr(flat, "FILTER_BYTES", at_once * row)
        flat._PASSING.pop(store, None)
        for used_before in by_codes:
            hits, used = found_by(monkeypatch, store, queries[:2], where="width <= 900")
            assert used == used_before
            assert [[hit.path for hit in some] for some in hits] == expected
    monkeypatch.setattr(flat, "FILTER_BYTES_AGAIN", 899 * row)
    flat._PASSING.pop(store, None)
    assert [found_by(monkeypatch, store, queries[0], where="width <= 900")[1] for _ in range(3)] == [True] * 3
    hits, used = found_by(monkeypatch, store, queries[1], exact=True)
    assert not used
    assert [hit.path for hit in hits] == [path for path, _ in by_hand(vectors, queries[1], 10)]


def test_behind_a_tight_filter_the_index_looks_into_all_cells_and_finds_what_a_scan_finds(
    indexed, monkeypatch, by_codes
):
    store, _, queries = indexed
    for query in queries[:5]:
        hits, used = found_by(monkeypatch, store, query, where="width <= 150")
        assert used
        assert hits == search(store, query, where="width <= 150", exact=True)


def test_candidates_are_filtered_and_where_too_few_pass_the_filter_comes_first(tmp_path, monkeypatch, by_codes):
    vectors, queries = clustered(2000, 64)
    query = queries[0]
    vectors = vectors[np.argsort(-(vectors @ query))]  # image 0 is most like the query, image 1999 least
    calls = []
    real = search_module._nearest
    monkeypatch.setattr(search_module, "_nearest", lambda *a: calls.append(a) or real(*a))
    with filled(tmp_path / "s", vectors) as store:
        build_index(store)
        for where, passes, most, filter_first in (
            ("width % 2 = 0", lambda width: width % 2 == 0, 20_000, False),
            ("width > 1000", lambda width: width > 1000, 20_000, True),  # none of the candidates passes
            ("width % 2 = 0", lambda width: width % 2 == 0, 10, True),  # more candidates than are worth it
        ):
            calls.clear()
            monkeypatch.setattr(search_module, "MOST_CANDIDATES", most)
            hits = search(store, query, where=where, exact=False)
            assert len(calls) == filter_first
            assert len(hits) == 10
            assert all(passes(hit.width) for hit in hits)


@pytest.mark.parametrize("bytes_", [0, 1 << 20])
def test_rows_of_another_version_than_the_filter_s_are_searched_again(indexed, monkeypatch, bytes_):
    store, _, queries = indexed
    monkeypatch.setattr(flat, "FILTER_BYTES", bytes_)
    monkeypatch.setattr(flat, "FILTER_BYTES_AGAIN", bytes_)
    flat._PASSING.clear()
    expected = search(store, queries[:3], where="width <= 150")
    stale = dataclasses.replace(flat.passing(store, "width <= 150"), version=-1, flat=None)
    monkeypatch.setattr(search_module, "passing", lambda store, where: stale)
    calls = []
    real = search_module._nearest
    monkeypatch.setattr(search_module, "_nearest", lambda *a: calls.append(a) or real(*a))
    assert search(store, queries[:3], where="width <= 150") == expected
    assert len(calls) == 3


def test_a_filter_is_read_once_for_each_version_and_the_last_few_are_kept(tmp_path, monkeypatch):
    vectors, queries = clustered(600, D)
    with filled(tmp_path / "s", vectors) as store:
        build_index(store)
        assert search(store, queries[0], where="height = 480", exact=False, top=600)
        first = flat.passing(store, "height = 480")
        assert flat.passing(store, "height = 480") is first
        store.append([Row("new.jpg", "h", "1", 1, 480, queries[0])])
        assert search(store, queries[0], where="height = 480", exact=False)[0].path == "new.jpg"
        store.remove(["new.jpg"])
        assert search(store, queries[0], where="height = 480", exact=False)[0].path != "new.jpg"
        assert flat.passing(store, "height = 480") is not first
        for width in range(flat.FILTERS_CACHED):
            assert len(flat.passing(store, f"width > {width}").ids) == 600 - width
        assert list(flat._PASSING[store]) == [f"width > {width}" for width in range(flat.FILTERS_CACHED)]
        assert search(store, queries[0], where="width > 10000", exact=False) == []


def test_a_tighter_filter_looks_into_more_cells():
    at_a_million = [search_module._cells_to_look_into(1_000_000, kept) for kept in (1.0, 0.5, 0.01)]
    assert at_a_million == [37, 74, 244]


def test_images_newer_than_the_index_are_found_and_compaction_takes_them_in(tmp_path, monkeypatch):
    monkeypatch.setattr(search_module, "EXACT_LIMIT", 100)
    vectors, _ = clustered(600, D)
    with filled(tmp_path / "s", vectors) as store:
        build_index(store)
        new = -vectors[0]
        store.append([Row("new.jpg", "h", "1", 1, 1, new)])
        status = index_status(store)
        assert status == IndexStatus(600, 1)
        assert status.stale
        hits, used = found_by(monkeypatch, store, new, top=1)
        assert used
        assert hits[0].path == "new.jpg"
        store.remove(["00000.jpg"])
        assert "00000.jpg" not in {hit.path for hit in search(store, vectors[0])}
        store.compact()
        assert not index_status(store).stale
        assert search(store, new, top=1)[0].path == "new.jpg"
        assert "00000.jpg" not in {hit.path for hit in search(store, vectors[0])}


def test_a_store_too_small_for_an_index_is_told_so(tmp_path):
    with filled(tmp_path / "s", clustered(20, D)[0]) as store, pytest.raises(StoreError, match="20 images are too few"):
        build_index(store)


# ------------------------------------------------------------------------------------------------------- the sheet


def test_the_sheet_shows_the_images_and_a_grey_tile_where_there_is_none(tmp_path):
    Image.new("RGB", (300, 100), "red").save(tmp_path / "query.png")
    Image.new("RGBA", (50, 400), (0, 0, 255, 255)).save(tmp_path / "blue.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not an image")
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    there = ["blue.png", "gone.png", "broken.jpg", "pipe.jpg"]
    hits = [Hit(n, name, 0.9, 1, 1) for n, name in enumerate(there, start=1)]
    sheet(tmp_path / "query.png", hits, tmp_path / "sheet.png", root=tmp_path)
    with Image.open(tmp_path / "sheet.png") as drawn:
        colours = {colour: count for count, colour in drawn.convert("RGB").getcolors(1 << 24)}
        width, height = drawn.size
    side, big = drawing.TILE, drawing.TILE + drawing.TILE // 3
    assert colours[(255, 0, 0)] == pytest.approx(big * big / 3, rel=0.03)
    assert colours[(0, 0, 255)] == pytest.approx(side * side / 8, rel=0.05)
    assert 2.7 < colours[drawing.GREY] / side**2 < 3.05  # three tiles, less the letters, plus a hairline
    assert width > height


def test_the_sheet_draws_members_of_containers_and_escaped_names(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    Image.new("RGB", (30, 30), "lime").save(tmp_path / "lime.png")
    Image.new("RGB", (30, 30), "blue").save(tmp_path / "blue.png")
    with tarfile.open(tmp_path / "a#1.tar", "w") as tar:
        tar.add(tmp_path / "red.png", "sub/red.png")
    images = [None, (tmp_path / "lime.png").read_bytes()]
    parquet.write_table(pa.table({"image": images}), tmp_path / "b.parquet")
    (tmp_path / "blue.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    names = ["a#1.tar#sub/red.png", "b.parquet#1", r"caf\xe9.png", "a#1.tar#gone.png"]
    hits = [Hit(n, name, 0.9, 1, 1) for n, name in enumerate(names, start=1)]
    sheet(Image.new("RGB", (9, 9)), hits, tmp_path / "sheet.png", root=tmp_path)
    with Image.open(tmp_path / "sheet.png") as drawn:
        colours = {colour: count for count, colour in drawn.convert("RGB").getcolors(1 << 24)}
    assert [colours.get(c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))] == [drawing.TILE**2] * 3
    assert colours[drawing.GREY] < 1.05 * drawing.TILE**2  # the one that is gone


def test_names_with_control_characters_are_drawn_escaped(tmp_path):
    name = "a" + chr(10) + "b.png"
    Image.new("RGB", (30, 10), "red").save(tmp_path / name)
    sheet(
        tmp_path / name, [Hit(1, name, 0.9, 1, 1)], tmp_path / "sheet.png", root=tmp_path
    )  # a line break has no width
    image = Image.new("RGB", (50, 50))
    plain, control = (drawing.boxes_over(image, [[0, 0, 9, 9]], [n], [(9, 9, 9)]) for n in (printable(name), name))
    assert plain.tobytes() == control.tobytes()


def test_the_sheet_turns_images_upright_and_takes_open_ones(tmp_path):
    sideways = Image.new("RGB", (400, 100), "lime")
    exif = sideways.getexif()
    exif[0x0112] = 6  # to be turned by 90°
    sideways.save(tmp_path / "a.png", exif=exif)
    sheet(Image.new("RGB", (10, 10), "red"), [Hit(1, "a.png", 1.0, 100, 400)], tmp_path / "sheet.png", root=tmp_path)
    with Image.open(tmp_path / "sheet.png") as drawn:
        green = np.all(np.asarray(drawn.convert("RGB")) == (0, 255, 0), axis=-1)
    tall, wide = green.any(axis=1).sum(), green.any(axis=0).sum()
    assert tall == drawing.TILE
    assert wide == pytest.approx(drawing.TILE / 4, abs=1)


@pytest.mark.parametrize("count", [0, 1, 5, 6, 23])
def test_every_number_of_neighbours_makes_a_sheet(tmp_path, count):
    hits = [Hit(n + 1, f"{n}.png", 0.5, 1, 1) for n in range(count)]
    sheet(Image.new("L", (10, 10)), hits, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as drawn:
        assert drawn.height > (count + 4) // 5 * drawing.TILE


def test_a_sheet_that_cannot_be_written_is_a_sentence(tmp_path):
    with pytest.raises(StoreError, match="cannot write the contact sheet"):
        sheet(Image.new("L", (10, 10)), [], tmp_path / "no" / "such" / "folder.png")


def test_long_names_are_shortened_in_the_middle():
    from PIL import ImageFont

    font = ImageFont.load_default(size=13)
    name = "holiday_in_the_mountains_with_everybody_2024_08_17_0042.jpg"
    short = drawing._shortened(name, font, 220)
    assert font.getlength(short) <= 220
    assert short.startswith("holiday")
    assert short.endswith("0042.jpg")
    assert drawing._shortened("a.jpg", font, 220) == "a.jpg"


def test_a_sheet_replaces_a_sheet_but_no_photograph(tmp_path):
    photo, drawn = tmp_path / "a.png", tmp_path / "sheet.png"
    Image.new("RGB", (10, 10), "red").save(photo)
    before = photo.read_bytes()
    for _ in range(2):
        sheet(photo, [], drawn)
    with pytest.raises(DinoError, match=r"a.png exists already: give another name, or --overwrite"):
        sheet(photo, [], photo)
    assert photo.read_bytes() == before
    sheet(photo, [], photo, overwrite=True)
    assert photo.read_bytes() != before


@pytest.mark.parametrize(
    "where, reason",
    [
        ("width > 3; DROP TABLE images", "'; DROP TABLE images' is no part"),
        ("width >", "nothing follows its last '>'"),
        ("repeat('a', 1000000000) = 'a'", "repeat is a function"),
        ("label = repeat ('a', 9)", "repeat is a function"),
        ("width > 3 -- or not", "'-- or not' is no part"),
        ("width > 3 /* all */", r"'/\* all \*/' is no part"),
        ("(" * 60 + "width > 3" + ")" * 60, "more than 50 brackets"),
        ("(width > 3", "brackets do not match"),
        ("width > 3)", "brackets do not match"),
        ("label = 'it", "is no part"),
        ("CAST(width AS STRING) = '3'", "CAST is a function"),
    ],
)
def test_a_filter_is_one_comparison_of_columns(small, where, reason):
    with pytest.raises(StoreError, match=reason) as caught:
        small[0].count(where)
    assert "it compares columns with values" in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "where",
    [
        "width > -5 AND NOT (label = 'even' OR label IN ('x', 'it''s (;)'))",
        "label LIKE 'o%' AND width BETWEEN 1 AND 1000 AND stamp IS NOT NULL AND label <> 'a--b'",
        'width + 2 * 3 >= 1 and `label` != "path" and true',
    ],
)
def test_a_filter_may_use_every_comparison(small, where):
    assert small[0].count(where) > 0
