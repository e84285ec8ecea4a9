"""The embedding store: what goes in comes out, mistakes are sentences, and SIGKILL at any moment loses nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT

pytest.importorskip("lancedb")

from dinov3.embedding import schema as schema_module
from dinov3.embedding import store as store_module
from dinov3.embedding.schema import Failure, Row, StoreFacts
from dinov3.embedding.store import EmbeddingStore
from dinov3.errors import MissingExtra, StoreError, UnknownName

D = 8
FACTS = StoreFacts(
    model="tiny@1234", dim=D, preprocessing="s224", preprocessing_json='{"size": 224}', model_name="tiny"
)


def row(name: str, seed: int = 0, stamp: str = "1", **more: object) -> Row:
    vector = np.random.default_rng([seed, *name.encode()]).standard_normal(D).astype(np.float32)
    return Row(name, "ab" * 32, stamp, 640, 480, vector, **more)  # type: ignore[arg-type]


def rows(*names: str) -> list[Row]:
    return [row(name) for name in names]


@pytest.fixture
def store(tmp_path):
    with EmbeddingStore.create(tmp_path / "s", FACTS) as made:
        yield made


# ------------------------------------------------------------------------------------------------------ in and out


def test_appended_rows_come_back_as_they_were(store):
    store.append(rows("a.jpg", "it's.jpg"))
    back = EmbeddingStore.open(store.uri)
    assert len(back) == 2
    assert back.known() == {"a.jpg": "1", "it's.jpg": "1"}
    paths, vectors = back.vectors()
    np.testing.assert_array_equal(vectors, np.stack([row(p).vector for p in paths]))
    (one,) = back.rows(where="path = 'a.jpg'").to_pylist()
    assert one == {
        "path": "a.jpg",
        "content_hash": "ab" * 32,
        "stamp": "1",
        "width": 640,
        "height": 480,
        "model": "tiny@1234",
        "preprocessing": "s224",
    }


def test_facts_survive_every_operation_that_rewrites_the_table(store):
    store.append(rows("a", "b", "c"))
    store.add_column("label", {"a": "x"})
    store.add_column("area", "width * height")
    store.replace([row("a", seed=1)])
    store.set_metadata({"b": {"label": "y"}})
    store.remove(["c"])
    store.compact()
    assert EmbeddingStore.open(store.uri).facts == FACTS


def test_float16_vectors_are_kept_in_half_the_bytes_and_too_large_ones_are_refused(tmp_path):
    with EmbeddingStore.create(tmp_path / "s", dataclasses.replace(FACTS, vector_dtype="float16")) as store:
        store.append(rows("a"))
        assert str(store.table.schema.field("vector").type.value_type) == "halffloat"
        _, vectors = store.vectors()
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors[0], row("a").vector, rtol=1e-3)
        with pytest.raises(StoreError, match="'b' is zero, infinite"):
            store.append([dataclasses.replace(row("b"), vector=np.full(D, 1e6))])


@pytest.mark.parametrize("precision, tolerance", [("float32", 0.0), ("float16", 1e-3), ("int8", 0.5 / 127)])
def test_patches_of_differing_grids_come_back_within_their_precision(tmp_path, precision, tolerance):
    grids = {name: np.random.default_rng(h).standard_normal((h, w, D)) for name, h, w in [("a", 2, 3), ("b", 4, 1)]}
    with EmbeddingStore.create(tmp_path / "s", dataclasses.replace(FACTS, patches=precision)) as store:
        store.append([row(name, patches=grid) for name, grid in grids.items()])
        assert "patches" not in store.rows().schema.names
        for name, back in zip(["b", "a"], store.patches(["b", "a"])):
            assert back.dtype == np.float32
            assert back.shape == grids[name].shape
            np.testing.assert_allclose(back, grids[name].astype(np.float32), atol=tolerance * np.abs(grids[name]).max())
        with pytest.raises(UnknownName, match="no image 'c'"):
            store.patches(["c"])
        with pytest.raises(StoreError, match=r"expected \(h, w, 8\)"):
            store.append(rows("without"))


def test_patches_may_be_narrower_than_the_vector(tmp_path):
    with EmbeddingStore.create(tmp_path / "s", dataclasses.replace(FACTS, patches="float32", patch_dim=4)) as store:
        store.append([row("a", patches=np.ones((2, 3, 4)))])
        assert EmbeddingStore.open(store.uri).patches(["a"])[0].shape == (2, 3, 4)
        with pytest.raises(StoreError, match=r"expected \(h, w, 4\)"):
            store.append([row("b", patches=np.ones((2, 3, D)))])


def test_zero_patches_survive_int8(tmp_path):
    with EmbeddingStore.create(tmp_path / "s", dataclasses.replace(FACTS, patches="int8")) as store:
        store.append([row("a", patches=np.zeros((1, 2, D)))])
        assert not store.patches(["a"])[0].any()


def test_a_store_without_patches_refuses_and_does_not_offer_them(store):
    with pytest.raises(StoreError, match="created without them"):
        store.append([row("a", patches=np.zeros((1, 1, D)))])
    with pytest.raises(StoreError, match="keeps no patch features"):
        store.patches(["a"])


def test_replace_changes_and_adds_rows_and_keeps_added_columns(store):
    store.append(rows("a", "b"))
    store.add_column("label", {"a": "cat"})
    store.replace([row("a", seed=7, stamp="2"), row("c")])
    assert store.known() == {"a": "2", "b": "1", "c": "1"}
    assert {r["path"]: r["label"] for r in store.rows(["path", "label"]).to_pylist()} == {
        "a": "cat",
        "b": None,
        "c": None,
    }
    paths, vectors = store.vectors()
    np.testing.assert_array_equal(vectors[paths.index("a")], row("a", seed=7).vector)


def test_remove_forgets_the_path_so_that_it_can_be_appended_again(store):
    store.append(rows("a", "it's"))
    assert store.remove(["it's", "never there"]) == 1
    store.append(rows("it's"))
    assert sorted(store.known()) == ["a", "it's"]


def test_failures_are_remembered_updated_and_cleared(store):
    assert store.known_failed() == {}
    store.record_failures([Failure("a", "1", "broken"), Failure("b", "1", "empty")])
    store.record_failures([Failure("a", "2", "still broken")])
    reader = EmbeddingStore.open(store.uri)
    assert reader.known_failed() == {"a": "2", "b": "1"}
    store.clear_failures(["a"])
    assert reader.failures() == [Failure("b", "1", "empty")]


# ---------------------------------------------------------------------------------------------------- added columns


def test_columns_can_be_added_from_a_mapping_a_function_and_sql(store):
    store.append(rows("a.jpg", "b.jpg"))
    store.add_column("label", {"a.jpg": "cat"})
    store.add_column("stem", lambda path: path.split(".")[0])
    store.add_column("area", "width * height")
    store.append(rows("c.jpg"))  # comes without values, also where the SQL had none that are null
    got = store.rows(["path", "label", "stem", "area"]).to_pylist()
    assert sorted(got, key=lambda r: r["path"]) == [
        {"path": "a.jpg", "label": "cat", "stem": "a", "area": 307200},
        {"path": "b.jpg", "label": None, "stem": "b", "area": 307200},
        {"path": "c.jpg", "label": None, "stem": None, "area": None},
    ]


def test_a_constant_sql_column_killed_before_it_may_be_null_is_mended_by_the_next_writer(store):
    store.append(rows("a"))
    store.table.add_columns({"source": "'camera'"})  # what add_column does first
    store.close()
    with EmbeddingStore.open(store.uri) as later:
        later.append(rows("b"))
        assert later.count("source IS NULL") == 1


def test_metadata_is_set_by_path_and_leaves_the_rest_alone(store):
    store.append(rows("a", "b"))
    store.add_column("label", {"a": "cat", "b": "dog"})
    store.add_column("stars", {"a": 1, "b": 2})
    store.set_metadata({"a": {"label": "lion"}, "b": {"stars": 5}})
    got = {r["path"]: (r["label"], r["stars"]) for r in store.rows(["path", "label", "stars"]).to_pylist()}
    assert got == {"a": ("lion", 1), "b": ("dog", 5)}
    _, vectors = store.vectors("path = 'a'")
    np.testing.assert_array_equal(vectors[0], row("a").vector)


@pytest.mark.parametrize(
    "act, error, words",
    [
        (lambda s: s.add_column("width", {"a": 1}), StoreError, "has a column 'width' already"),
        (lambda s: s.add_column("My label", {"a": 1}), StoreError, "lower-case"),
        (lambda s: s.add_column("x", {"a": None}), StoreError, "no value at all"),
        (lambda s: s.add_column("x", {"b": 1}), UnknownName, "no image 'b'"),
        (lambda s: s.add_column("x", {"a": object()}), StoreError, "share a type"),
        (lambda s: s.add_column("x", "widht * 2"), UnknownName, "no column 'widht'; did you mean 'width'"),
        (lambda s: s.add_column("x", "widht *"), StoreError, "cannot compute column 'x'"),
        (lambda s: s.set_metadata({"a": {"lable": "x"}}), UnknownName, "did you mean 'label'"),
        (lambda s: s.set_metadata({"b": {"label": "x"}}), UnknownName, "no image 'b'"),
        (lambda s: s.set_metadata({"a": {"stamp": "x"}}), StoreError, "cannot be set"),
        (lambda s: s.set_metadata({"a": {"label": 3}}), StoreError, "does not fit"),
        (lambda s: s.rows(["pth"]), UnknownName, "did you mean 'path'"),
        (lambda s: s.count("lable = 'x'"), UnknownName, "did you mean 'label'"),
        (lambda s: s.rows(where="label ==== 'x'"), StoreError, "the filter"),
    ],
)
def test_mistakes_with_columns_are_one_sentence(store, act, error, words):
    store.append(rows("a"))
    store.add_column("label", {"a": "cat"})
    before = store.columns
    with pytest.raises(error, match=words) as caught:
        act(store)
    assert "\n" not in str(caught.value)
    assert ".rs" not in str(caught.value)
    assert store.columns == before
    assert len(store) == 1


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "batch, words",
    [
        ([row("new"), row("new")], "'new' comes twice"),
        ([row("new"), row("old")], "'old' is in the store"),
        ([dataclasses.replace(row("new"), vector=np.zeros(D))], "is zero"),
        ([dataclasses.replace(row("new"), vector=np.full(D, np.nan))], "not a number"),
        ([dataclasses.replace(row("new"), vector=np.ones(D + 1))], r"shape \(9,\), not \(8,\)"),
        ([dataclasses.replace(row("new"), width="wide")], "do not fit"),
        ([dataclasses.replace(row("new"), stamp=None)], "do not fit|cannot write"),
    ],
)
def test_a_batch_with_one_bad_row_is_refused_whole(store, batch, words):
    store.append(rows("old"))
    with pytest.raises(StoreError, match=words):
        store.append([row("good"), *batch])
    assert list(store.known()) == ["old"]


@pytest.mark.parametrize(
    "name, other, way_out",
    [
        ("model", "tiny@9999", "--model"),
        ("preprocessing", "s512", "--size"),
        ("pooling", "mean", "pooling"),
        ("dim", 16, "--model"),
        ("patches", "int8", "patch precision"),
        ("layer", 3, "layer"),
    ],
)
def test_a_store_of_another_kind_names_the_difference_and_the_way_out(store, name, other, way_out):
    store.close()
    with pytest.raises(StoreError) as caught:
        EmbeddingStore.open_or_create(store.uri, dataclasses.replace(FACTS, **{name: other}))
    message = str(caught.value)
    assert repr(getattr(FACTS, name)) in message
    assert repr(other) in message
    assert "another --out" in message
    assert way_out in message


def test_moved_weights_are_still_the_same_store(store):
    store.close()
    with EmbeddingStore.open_or_create(
        store.uri, dataclasses.replace(FACTS, weights="/elsewhere.safetensors")
    ) as again:
        assert again.facts == FACTS


def test_unknown_precisions_are_refused():
    with pytest.raises(StoreError, match=r"patches is one of none, float16, .*, not 'int4'"):
        dataclasses.replace(FACTS, patches="int4")


def test_what_is_no_store_is_said_so(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    with pytest.raises(StoreError, match=r"no such file or folder: .*missing"):
        EmbeddingStore.open(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    with pytest.raises(StoreError, match="is not an embedding store"):
        EmbeddingStore.open(tmp_path / "photos")
    with pytest.raises(StoreError, match="holds other files"):
        EmbeddingStore.open_or_create(tmp_path / "photos", FACTS)
    with pytest.raises(StoreError, match="is a file"):
        EmbeddingStore.create(tmp_path / "file", FACTS)
    EmbeddingStore.create(tmp_path / "s", FACTS).close()
    with pytest.raises(StoreError, match="already holds"):
        EmbeddingStore.create(tmp_path / "s", FACTS)


def test_a_table_of_somebody_else_and_a_newer_store_are_refused(tmp_path):
    import lancedb

    lancedb.connect(tmp_path / "other").create_table("images", [{"path": "a"}])
    with pytest.raises(StoreError, match="not made by dinov3"):
        EmbeddingStore.open(tmp_path / "other")
    schema = schema_module.arrow_schema(FACTS)
    about = json.loads(schema.metadata[schema_module.FACTS_KEY]) | {"schema_version": 99, "colour": "new"}
    schema = schema.with_metadata({schema_module.FACTS_KEY: json.dumps(about)})
    lancedb.connect(tmp_path / "newer").create_table("images", schema=schema)
    with pytest.raises(StoreError, match="schema version 99, made by a newer dinov3"):
        EmbeddingStore.open(tmp_path / "newer")


def test_stores_of_older_versions_say_to_embed_again(tmp_path):
    import lancedb

    about = dataclasses.asdict(FACTS) | {"schema_version": 1}
    schema = schema_module.arrow_schema(FACTS).with_metadata({schema_module.FACTS_KEY: json.dumps(about)})
    for table, reason in (("images", "schema version 1"), ("pictures", "another form")):
        folder = tmp_path / table
        lancedb.connect(folder).create_table(table, schema=schema)
        for opening in (EmbeddingStore.open, lambda uri: EmbeddingStore.open_or_create(uri, FACTS)):
            with pytest.raises(StoreError, match=rf"{reason}.*older dinov3: embed its images again into a new folder"):
                opening(folder)


def test_a_mistyped_store_is_given_the_nearest_name(tmp_path):
    EmbeddingStore.create(tmp_path / "store", FACTS).close()
    with pytest.raises(StoreError, match=r"no such file or folder: .*stroe; did you mean 'store'\?"):
        EmbeddingStore.open(tmp_path / "stroe")


def test_damage_is_said_and_never_written_over(store):
    store.append(rows("a", "b"))
    store.close()
    table = Path(store.uri) / "images.lance"
    for manifest in (table / "_versions").iterdir():
        manifest.write_bytes(b"junk")
    with pytest.raises(StoreError, match="may be damaged"):
        EmbeddingStore.open(store.uri)
    for manifest in (table / "_versions").iterdir():
        manifest.unlink()
    data = sorted((table / "data").iterdir())
    for opening in (EmbeddingStore.open, lambda uri: EmbeddingStore.open_or_create(uri, FACTS)):
        with pytest.raises(StoreError, match="is damaged"):
            opening(store.uri)
    assert data
    assert sorted((table / "data").iterdir()) == data


def test_damaged_rows_are_said_when_they_are_read(store):
    store.append(rows("a", "b"))
    store.close()
    for data in (Path(store.uri) / "images.lance" / "data").iterdir():
        data.write_bytes(b"junk")
    with pytest.raises(StoreError, match="cannot read the store"):
        EmbeddingStore.open(store.uri).known()


def test_without_lancedb_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(MissingExtra, match=r"pip install .*\[search\]'"):
        EmbeddingStore.create(tmp_path / "s", FACTS)


# -------------------------------------------------------------------------------------------- writers and readers


def test_a_second_writer_is_refused_and_a_reader_sees_every_commit(store):
    reader = EmbeddingStore.open(store.uri)
    store.append(rows("a"))
    assert len(reader) == 1
    store.append(rows("b"))
    assert sorted(reader.known()) == ["a", "b"]
    with pytest.raises(StoreError, match=f"process {os.getpid()} on .* is writing"):
        reader.append(rows("c"))
    with pytest.raises(StoreError, match="is writing"):
        EmbeddingStore.open_or_create(store.uri, FACTS)
    store.close()
    reader.append(rows("c"))
    assert len(store) == 3
    reader.close()


def test_a_writer_that_was_dropped_without_close_gives_its_lock_back(tmp_path):
    EmbeddingStore.create(tmp_path / "s", FACTS)
    EmbeddingStore.open_or_create(tmp_path / "s", FACTS).close()


def test_a_writer_sees_what_another_added_before_it_and_refuses_it(store):
    first = EmbeddingStore.open(store.uri)
    store.append(rows("a"))
    store.close()
    with first, pytest.raises(StoreError, match="in the store"):
        first.append(rows("a"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_neither_uses_the_store_nor_keeps_its_lock(store, tmp_path):
    store.append(rows("a"))
    child = os.fork()
    if child == 0:  # nothing but os._exit may end this process
        code = 1
        with contextlib.suppress(BaseException):
            try:
                len(store)
            except StoreError as error:
                code = 0 if "fork" in str(error) else 2
        if code == 0:
            while not (tmp_path / "stop").exists():
                time.sleep(0.01)
        os._exit(code)
    try:
        store.close()
        EmbeddingStore.open_or_create(store.uri, FACTS).close()  # though the child lives
    finally:
        (tmp_path / "stop").touch()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_object_storage_goes_the_same_way(tmp_path):
    uri = f"file-object-store://{tmp_path}/bucket"  # Lance's object-store code over a folder
    with pytest.raises(StoreError, match="there is no embedding store"):
        EmbeddingStore.open(uri)
    with EmbeddingStore.open_or_create(uri, FACTS) as store:
        store.append(rows("a", "b"))
    with EmbeddingStore.open_or_create(uri, FACTS) as store:
        store.record_failures([Failure("c", "1", "broken")])
        store.compact()
        assert (len(store), store.known_failed()) == (2, {"c": "1"})
    with pytest.raises(StoreError, match="already holds"):
        EmbeddingStore.create(uri, FACTS)


# ------------------------------------------------------------------------------------------- fragments and kills


def test_fragments_do_not_pile_up_and_compaction_leaves_one_version(store, monkeypatch):
    monkeypatch.setattr(store_module, "FEWEST_FRAGMENTS", 10)
    monkeypatch.setattr(store_module, "MANIFEST_BYTES_PER_FRAGMENT", 1e9)  # the bytes of the rows decide nothing here
    for n in range(40):
        store.append(rows(f"{n}a", f"{n}b"))
    assert store.table.stats()["fragment_stats"]["num_fragments"] <= 10
    reader = EmbeddingStore.open(store.uri)
    assert len(reader) == 80
    store.compact()
    assert store.table.stats()["fragment_stats"]["num_fragments"] == 1
    assert len(list((Path(store.uri) / "images.lance" / "_versions").glob("*.manifest"))) == 1
    assert len(reader.known()) == 80  # though the files it knew are gone


def test_a_reader_whose_files_were_compacted_away_reads_again(store, monkeypatch):
    connect = store_module.connect
    store.append(rows("a"))
    with monkeypatch.context() as patch:  # a reader that is always late, as one in the middle of a scan is
        patch.setattr(store_module, "connect", lambda uri, fresh=True: connect(uri, fresh=False))
        reader = EmbeddingStore.open(store.uri)
    store.append(rows("b"))
    store.compact()
    with pytest.raises(RuntimeError):
        reader.table.search().select(["path"]).to_arrow()
    assert sorted(reader.known()) == ["a", "b"]


@pytest.mark.parametrize("remains", ["", "images.lance", "images.lance/_versions", "images.lance/_transactions"])
def test_a_store_whose_creation_was_cut_short_is_completed(tmp_path, remains):
    (tmp_path / "s" / remains).mkdir(parents=True)
    (tmp_path / "s" / ".writer.lock").write_text("process 1 on nowhere\n")  # of the process that died
    with pytest.raises(StoreError, match=r"interrupted|no table"):
        EmbeddingStore.open(tmp_path / "s")
    with EmbeddingStore.open_or_create(tmp_path / "s", FACTS) as store:
        store.append(rows("a"))
        assert len(store) == 1


BATCH = 5
WRITER = """
import os
import sys
import numpy as np
from dinov3.embedding import store as store_module
from dinov3.embedding.schema import Failure, Row, StoreFacts
from dinov3.embedding.store import EmbeddingStore
import lancedb  # the slow import, before the clock starts
store_module.FEWEST_FRAGMENTS = 4  # compactions, too, are to be killed
uri, run, facts = sys.argv[1], int(sys.argv[2]), StoreFacts(model="tiny@1234", dim=8, preprocessing="s224")
def acknowledge(*what):  # one write, so that what arrives are whole lines
    os.write(1, (" ".join(map(str, what)) + "\\n").encode())

acknowledge("ready")
sys.stdin.readline()
store = EmbeddingStore.open_or_create(uri, facts)
acknowledge("opened")
rng = np.random.default_rng(run)
for batch in range(100000):
    rows = [Row(f"{run}-{batch}-{n}", "h", str(batch), 1, 1, rng.standard_normal(8)) for n in range(5)]
    store.append(rows)
    acknowledge("append", run, batch)
    if batch % 3 == 2:  # the same paths again, as if the images had changed
        store.replace([Row(r.path, "h", "changed", 1, 1, r.vector) for r in rows])
        acknowledge("replace", run, batch)
    if batch % 5 == 4:
        store.record_failures([Failure(f"{run}-{batch}", "1", "broken")])
        acknowledge("fail", run, batch)
    if batch % 7 == 6:
        store.compact()
"""


def _killed_writer(uri: Path, run: int, after: float) -> set[tuple[str, int, int]]:
    """What a writer acknowledged before it was killed, `after` seconds after it was told to begin."""
    command = [sys.executable, "-c", WRITER, str(uri), str(run)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as writer:
        assert writer.stdout.readline() == "ready\n", writer.stderr.read()
        writer.stdin.write("\n")
        writer.stdin.flush()
        time.sleep(after)
        os.kill(writer.pid, signal.SIGKILL)
        output, complaint = writer.stdout.read(), writer.stderr.read()
    assert "Error" not in complaint, complaint
    lines = re.findall(r"^(append|replace|fail) (\d+) (\d+)\n", output, re.MULTILINE)
    assert len(lines) == output.count("\n") - output.startswith("opened\n"), output  # and nothing else
    return {(what, int(r), int(b)) for what, r, b in lines}


def _kill_writers(uri: Path, moments: list[float]) -> int:
    acknowledged: set[tuple[str, int, int]] = set()
    for run, after in enumerate(moments):
        acknowledged |= _killed_writer(uri, run, after)
        with EmbeddingStore.open_or_create(uri, FACTS) as store:  # opens, and no lock was left behind
            paths = store.rows(["path"])["path"].to_pylist()
            known, failed = store.known(), store.known_failed()
            _, vectors = store.vectors()
        assert len(paths) == len(set(paths)), "a path is there twice"
        assert np.isfinite(vectors).all()
        batches: dict[tuple[int, int], list[str]] = {}
        for path, stamp in known.items():
            r, b, _ = path.split("-")
            batches.setdefault((int(r), int(b)), []).append(stamp)
        for (r, b), stamps in batches.items():
            assert len(stamps) == BATCH, f"batch {b} of run {r} is there in part"
            assert len(set(stamps)) == 1, f"batch {b} of run {r} was replaced in part"
        for what, r, b in acknowledged:
            assert (r, b) in batches or what == "fail", f"acknowledged batch {b} of run {r} is lost"
            if what == "replace":
                assert set(batches[r, b]) == {"changed"}, f"acknowledged replacement {b} of run {r} is lost"
            if what == "fail":
                assert f"{r}-{b}" in failed, f"acknowledged failure {b} of run {r} is lost"
        unacknowledged = set(batches) - {(r, b) for what, r, b in acknowledged}
        assert len(unacknowledged) <= run + 1, "at most the commit under way at each kill went unacknowledged"
    return len(acknowledged)


def test_nothing_acknowledged_is_lost_when_the_writer_is_killed_at_random_moments(tmp_path):
    moments = [0.0, 0.01, *(random.Random(0).uniform(0.02, 0.6) for _ in range(4))]
    assert _kill_writers(tmp_path / "s", moments) > 25  # the test saw real work


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_lost_in_a_hundred_kills_at_moments_that_differ_each_time(tmp_path):
    moments = [random.uniform(0.0, 1.0) for _ in range(60)]
    _kill_writers(tmp_path / "long", moments)
    for n in range(40):  # creation itself
        _kill_writers(tmp_path / f"short{n}", [random.uniform(0.0, 0.05)])


def test_importing_the_module_does_not_import_lancedb():
    code = (
        "import sys, dinov3.embedding.store, dinov3.embedding.search; "
        "print('lancedb' in sys.modules, 'pyarrow' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split() == ["False", "False"]


def test_lancedb_is_imported_without_its_rest_client_which_can_still_be_imported():
    code = (
        "import gc, sys; from dinov3.embedding.place import connect; connect('memory://')\n"
        "client = 'lance_namespace_urllib3_client'; apis = [m for m in sys.modules if m.startswith(client + '.api')]\n"
        "import lance_namespace_urllib3_client as c; print(apis, c.ApiClient.__name__, gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["[]", "ApiClient", "True"], done.stderr
