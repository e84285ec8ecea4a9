"""Every place images come from: complete, in order, readable alone and from anywhere, failures told."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import tarfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from paths import nested
from PIL import Image

from dinov3.data.images import open_image
from dinov3.data.sources import Item, Source, containers, open_source
from dinov3.data.sources.items import FORWARD
from dinov3.errors import DinoError, ImageError, UnknownName


def image(number: int, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 3), (number % 256, number // 256, 7)).save(out, kind)
    return out.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def names(source: Source) -> list[str]:
    return [item.path for item in source]


def contents(source: Source) -> dict[str, bytes]:
    return {item.path: item.read() for item in source}


def reason(item: Item) -> str:
    with pytest.raises(ImageError) as caught:
        item.read()
    return str(caught.value)


def check_contract(source: Source) -> None:
    """What every source promises: its length, unique names, the same list twice, items that travel."""
    items = list(source)
    assert len(items) == len(source)
    assert len({item.path for item in items}) == len(items)
    assert list(source) == items
    copies = pickle.loads(pickle.dumps(items))
    assert copies == items
    for item in items:
        assert item.path
        assert item.stamp
        item.path.encode("utf-8")


# ---- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_images_by_name_in_order(tmp_path: Path) -> None:
    for number, name in enumerate(["b.png", "a.jpg", "sub/deep/c.webp", "sub/A.PNG", "sub-x.gif"]):
        put(tmp_path / name, image(number))
    put(tmp_path / "notes.txt", b"hello")
    put(tmp_path / "data.bin", b"\0" * 100)
    source = open_source(tmp_path)
    assert names(source) == ["a.jpg", "b.png", "sub-x.gif", "sub/A.PNG", "sub/deep/c.webp"]
    assert contents(source)["sub/deep/c.webp"] == image(2)
    assert (source.kind, source.skipped, source.name) == ("folder", 2, str(tmp_path))
    check_contract(source)
    assert names(open_source(tmp_path, recursive=False)) == ["a.jpg", "b.png", "sub-x.gif"]


def test_hidden_files_and_folders_are_left_alone(tmp_path: Path) -> None:
    for name in ("a.png", ".b.png", ".cache/c.png", "._a.png"):
        put(tmp_path / name, image(1))
    source = open_source(tmp_path)
    assert names(source) == ["a.png"]
    assert source.skipped == 0


def test_a_image_without_a_suffix_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    put(tmp_path / "photo", image(1))
    put(tmp_path / "photo.dat", image(2, "JPEG"))
    put(tmp_path / "program", b"\x7fELF....")
    source = open_source(tmp_path)
    assert names(source) == ["photo", "photo.dat"]
    assert source.skipped == 1


def test_files_with_image_suffixes_are_listed_whatever_they_hold(tmp_path: Path) -> None:
    put(tmp_path / "page.jpg", b"<!DOCTYPE html>")
    put(tmp_path / "empty.png", b"")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    items = {item.path: item for item in open_source(tmp_path)}
    assert list(items) == ["empty.png", "gone.png", "loop.png", "page.jpg", "pipe.png"]
    assert items["empty.png"].read() == b""
    assert reason(items["gone.png"]) == "dangling link to nowhere.png"
    assert items["gone.png"].stamp == "missing"
    assert reason(items["loop.png"]) == "a link that leads to itself"
    assert reason(items["pipe.png"]) == "not a regular file"
    with pytest.raises(ImageError, match="begins with '<!DOCTYPE html'"):
        open_image(items["page.jpg"].read())


def test_a_image_that_vanishes_or_is_locked_says_so(tmp_path: Path) -> None:
    put(tmp_path / "a.png", image(1))
    put(tmp_path / "b.png", image(2)).chmod(0)
    vanished, locked = open_source(tmp_path)
    (tmp_path / "a.png").unlink()
    assert reason(vanished) == "no such file"
    if os.geteuid() != 0:
        assert reason(locked) == "permission denied"


def test_a_folder_that_cannot_be_listed_is_an_item_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.png", image(1))
    put(tmp_path / "secret" / "b.png", image(2))
    scan = os.scandir

    def guarded(path: str) -> object:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    items = list(open_source(tmp_path))
    assert [i.path for i in items] == ["a.png", "secret/"]
    assert reason(items[1]) == "this folder cannot be listed: permission denied"


def test_folders_that_link_to_each_other_are_listed_once(tmp_path: Path) -> None:
    for a in range(10):  # 8 such folders were 109,603 items, and 9 did not finish
        put(tmp_path / str(a) / "x.png", image(a))
        for b in set(range(10)) - {a}:
            (tmp_path / str(a) / f"to{b}").symlink_to(tmp_path / str(b))
    assert names(open_source(tmp_path)) == [f"{a}/x.png" for a in range(10)]
    assert len(open_source(tmp_path / "3")) == 10  # the others through their links


def test_folders_may_be_nested_deeply(tmp_path: Path) -> None:
    with nested(tmp_path) as deepest:
        os.close(os.open("x.png", os.O_CREAT, dir_fd=deepest))
        assert names(open_source(tmp_path)) == ["d/" * 1500 + "x.png"]
        os.unlink("x.png", dir_fd=deepest)


def test_names_of_other_bytes_stay_apart_from_names_that_spell_them(tmp_path: Path) -> None:
    for name in (b"a\xff.png", rb"a\xff.png", rb"a\x5cxff.png", rb"a\b.png"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(image(1))
    assert sorted(names(open_source(tmp_path))) == [r"a\b.png", r"a\x5cx5cxff.png", r"a\x5cxff.png", r"a\xff.png"]


def test_linked_folders_are_followed_but_never_in_circles(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "x.png", image(1))
    put(tmp_path / "in" / "sub" / "a.png", image(2))
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "sub" / "up").symlink_to("..")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    assert names(open_source(tmp_path / "in")) == ["linked/x.png", "sub/a.png"]


def test_the_stamp_changes_with_the_file(tmp_path: Path) -> None:
    path = put(tmp_path / "a.png", image(1))
    (before,) = open_source(tmp_path)
    os.utime(path, ns=(1, 1))
    (after,) = open_source(tmp_path)
    assert before.stamp != after.stamp
    assert after.stamp == f"{len(image(1))}-1"


def test_names_that_are_no_utf8_can_be_stored(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        with open(raw, "wb") as file:
            file.write(image(1))
    except OSError:
        pytest.skip("this file system wants UTF-8")
    source = open_source(tmp_path)
    assert names(source) == ["caf\\xe9.png"]
    assert contents(source)["caf\\xe9.png"] == image(1)
    check_contract(source)


def test_items_do_not_depend_on_where_a_process_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "photos" / "a.png", image(1))
    monkeypatch.chdir(tmp_path)
    sources = [open_source("photos"), open_source("photos/*.png"), open_source("photos/a.png")]
    monkeypatch.chdir("/")
    assert [list(contents(s).items()) for s in sources] == [[("a.png", image(1))]] * 3


def test_a_single_image_is_a_source(tmp_path: Path) -> None:
    source = open_source(put(tmp_path / "a.png", image(1)))
    assert contents(source) == {"a.png": image(1)}
    assert source.kind == "image"


# ---- globs, braces, mistakes ----------------------------------------------------------------------------------------


def test_a_glob_gives_images_named_from_its_fixed_folder(tmp_path: Path) -> None:
    for name in ("x/1/a.png", "x/2/b.png", "x/2/c.txt", "y/d.png"):
        put(tmp_path / name, image(1))
    assert names(open_source(f"{tmp_path}/x/*/*.png")) == ["1/a.png", "2/b.png"]
    assert names(open_source(f"{tmp_path}/*/2")) == ["x/2/b.png"]
    assert names(open_source(f"{tmp_path}/**/*.png")) == ["x/1/a.png", "x/2/b.png", "y/d.png"]
    assert names(open_source(f"{tmp_path}/{{y,x}}/**/*.png")) == ["x/1/a.png", "x/2/b.png", "y/d.png"]


def test_a_name_with_brackets_that_exists_is_no_pattern(tmp_path: Path) -> None:
    put(tmp_path / "set[1]" / "a.png", image(1))
    assert names(open_source(tmp_path / "set[1]")) == ["a.png"]


def test_the_error_of_a_missing_path_suggests_its_neighbour(tmp_path: Path) -> None:
    put(tmp_path / "holiday" / "a.png", image(1))
    with pytest.raises(DinoError, match=r"no such file or folder: .*holidays; did you mean 'holiday'\?"):
        open_source(tmp_path / "holidays")
    with pytest.raises(DinoError, match=r"\(there is no .*/hollyday\); did you mean 'holiday'"):
        open_source(tmp_path / "hollyday" / "sub" / "deeper")
    with pytest.raises(DinoError, match="nothing matches"):
        open_source(f"{tmp_path}/*.webp")


def test_the_error_of_an_empty_source_lists_the_known_kinds(tmp_path: Path) -> None:
    put(tmp_path / "list.csv", b"path\n")
    put(tmp_path / "b.bin", b"b")
    with pytest.raises(
        DinoError, match=r"no images in .*: looked .*jpg.*tar.*Parquet.* 2 other files were skipped"
    ) as e:
        open_source(tmp_path)
    assert "list.csv is a list of images, name that file" in str(e.value)
    put(tmp_path / "sub" / "a.png", image(1))
    with pytest.raises(DinoError, match="not in folders below"):
        open_source(tmp_path, recursive=False)


def test_a_column_without_a_table_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "a.png", image(1))
    with pytest.raises(DinoError, match=r"column 'image' was given, but .* holds no table"):
        open_source(tmp_path, column="image")


# ---- lists ----------------------------------------------------------------------------------------------------------


def test_a_text_that_is_no_list_of_images_is_one_sentence(tmp_path):
    text = put(tmp_path / "notes.txt", b"dear diary\n" + b"x" * 5000)
    with pytest.raises(DinoError, match=r"notes.txt is read as a list, .* none of its lines is one \('dear diary'\)"):
        open_source(text)
    put(tmp_path / "dear diary", b"a file without a suffix")
    assert len(open_source(text)) == 2
    assert len(open_source(put(tmp_path / "moved.txt", b"gone/a.jpg\n"))) == 1  # reported image by image


def test_a_list_file_keeps_its_order_and_its_missing_files(tmp_path: Path) -> None:
    put(tmp_path / "in" / "ä b.png", image(1))
    elsewhere = put(tmp_path / "else.png", image(2))
    lines = ["# my images", "", "z-missing.png", "ä b.png", str(elsewhere), "./ä b.png", "https://example.org/x.png"]
    source = open_source(put(tmp_path / "in" / "list.txt", ("\ufeff" + "\r\n".join(lines)).encode()))
    assert names(source) == ["z-missing.png", "ä b.png", str(elsewhere), "https://example.org/x.png"]
    items = list(source)
    assert reason(items[0]) == "no such file"
    assert [i.read() for i in items[1:3]] == [image(1), image(2)]
    assert reason(items[3]) == "a remote address; only files are read"
    assert source.kind == "list"
    check_contract(source)


@pytest.mark.parametrize("suffix, mark", [(".csv", ","), (".tsv", "\t")])
def test_a_table_of_paths_in_text_form_is_a_list(tmp_path: Path, suffix: str, mark: str) -> None:
    for n in range(2):
        put(tmp_path / f"{n}.png", image(n))
    rows = [["label", "File_Name", "other"], ["cat", "1.png", "0.png"], ["dog", "0.png", "1.png"]]
    path = put(tmp_path / f"list{suffix}", "\n".join(mark.join(r) for r in rows).encode())
    assert contents(open_source(path)) == {"1.png": image(1), "0.png": image(0)}
    assert names(open_source(path, column="other")) == ["0.png", "1.png"]
    with pytest.raises(UnknownName, match=r"no column 'othr'; did you mean 'other'"):
        open_source(path, column="othr")
    unnamed = put(tmp_path / f"unnamed{suffix}", mark.join(["x", "y"]).encode() + b"\n" + mark.join("34").encode())
    with pytest.raises(DinoError, match=r"no column of .* holds images or paths"):
        open_source(unnamed)


# ---- tars -----------------------------------------------------------------------------------------------------------

SHARD = {
    "000.jpg": image(0, "JPEG"),
    "000.json": b"{}",
    "000.cls": b"7",
    "./sub/001.png": image(1),
    ".hidden.png": b"x",
    "002": image(2),
    "003.bin": b"nothing",
    "é" * 60 + ".png": image(3),
}


@pytest.mark.parametrize("suffix, mode", [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz")])
def test_a_shard_gives_its_image_members_in_order(tmp_path: Path, suffix: str, mode: str) -> None:
    path = tar(tmp_path / f"shard{suffix}", SHARD, mode)
    source = open_source(path)
    name = path.name
    assert names(source) == [f"{name}#000.jpg", f"{name}#sub/001.png", f"{name}#002", f"{name}#{'é' * 60}.png"]
    assert [i.read() for i in source] == [SHARD[k] for k in ("000.jpg", "./sub/001.png", "002", "é" * 60 + ".png")]
    backwards = [i.read() for i in reversed(list(source))]
    assert backwards[0] == image(3)
    assert backwards[-1] == SHARD["000.jpg"]
    assert (source.kind, source.skipped) == ("tar", 3)
    check_contract(source)


def test_the_stamp_of_a_member_is_its_tars_and_its_offset(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"1.png": image(1), "2.png": image(2)})
    facts = path.stat()
    assert [i.stamp for i in open_source(path)] == [f"{facts.st_size}-{facts.st_mtime_ns}@{o}" for o in (512, 1536)]


def test_shards_come_from_folders_globs_and_braces(tmp_path: Path) -> None:
    for n in range(9, 12):
        tar(tmp_path / "s" / f"shard-{n:03d}.tar", {f"{n}.png": image(n)})
    expected = [f"shard-{n:03d}.tar#{n}.png" for n in range(9, 12)]
    for spec in ("s", "s/*.tar", "s/shard-{009..011}.tar", "s/shard-{009,010,011}.tar"):
        assert names(open_source(f"{tmp_path}/{spec}")) == expected
    with pytest.raises(DinoError, match=r"2 of the 5 files .* do not exist: .*shard-012.tar, .*shard-013.tar"):
        open_source(f"{tmp_path}/s/shard-{{009..013}}.tar")


def test_a_name_twice_in_a_tar_stays_two_images(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"a.png": image(1), "./a.png": image(2)})
    assert contents(open_source(path)) == {"a.tar#a.png": image(1), "a.tar#a.png~2": image(2)}


def test_links_in_a_tar_fail_by_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("l.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        archive.addfile(link)
    (item,) = open_source(tmp_path / "a.tar")
    assert item.path == "a.tar#l.png"
    assert "only plain members are read" in reason(item)


MEMBERS = {f"{n}.png": image(n) + os.urandom(3000) for n in range(4)}


def test_of_a_truncated_tar_the_whole_members_and_one_failure(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", MEMBERS)  # each takes 512 + 3584 bytes
    path.write_bytes(path.read_bytes()[: 2 * 4096 + 512 + 100])
    *whole, cut = open_source(path)
    assert [i.read() for i in whole] == list(MEMBERS.values())[:2]
    assert cut.path == "a.tar#2.png"
    assert reason(cut) == "truncated or damaged tar, after 2 images: ends inside of this member"


def test_a_tar_without_padding_behind_its_end_mark_is_whole(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", MEMBERS)
    path.write_bytes(path.read_bytes()[: 4 * 4096 + 1024])
    assert list(contents(open_source(path)).values()) == list(MEMBERS.values())


@pytest.mark.parametrize("kept", [2 * 4096, 2 * 4096 + 100])
def test_a_tar_cut_between_members_has_no_end_mark_and_says_so(tmp_path: Path, kept: int) -> None:
    path = tar(tmp_path / "a.tar", MEMBERS)
    path.write_bytes(path.read_bytes()[:kept])
    items = list(open_source(path))
    assert [i.read() for i in items[:2]] == list(MEMBERS.values())[:2]
    assert [i.path for i in items[2:]] == ["a.tar#end"]
    assert "no end mark" in reason(items[2])


def test_a_truncated_compressed_tar_gives_what_is_whole(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar.gz", MEMBERS, "w:gz")
    data = path.read_bytes()
    # how many members end before the cut depends on a byte or two of compression at the middle
    for kept, possible in ((len(data) // 2, (1, 2)), (len(data) * 9 // 10, (3,)), (40, (0,))):
        path.write_bytes(data[:kept])
        items = list(open_source(path))
        whole = items[:-1]
        assert [i.read() for i in whole] == list(MEMBERS.values())[: len(whole)]
        assert len(whole) in possible
        assert "truncated" in reason(items[-1])


def test_a_file_with_only_the_name_of_a_tar_is_one_failure(tmp_path: Path) -> None:
    put(tmp_path / "a.png", image(1))
    put(tmp_path / "no.tar", b"hello, I am a text that is long enough" * 30)
    put(tmp_path / "none.tar", b"")
    tar(tmp_path / "x.tar", {"a.png": image(1)}, "w:xz")
    source = open_source(tmp_path)
    items = {i.path: i for i in source}
    assert list(items) == ["a.png", "no.tar", "none.tar", "x.tar"]
    assert reason(items["no.tar"]).startswith("not a tar file (begins with bytes 68 65")
    assert reason(items["none.tar"]) == "empty file (0 bytes)"
    assert "bzip2 or xz" in reason(items["x.tar"])
    assert source.kind == "folder"


def test_a_tar_that_shrinks_later_fails_in_words(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", MEMBERS)
    items = list(open_source(path))
    path.write_bytes(path.read_bytes()[:1000])
    assert "truncated tar: a.tar ends inside" in reason(items[3])
    path.unlink()
    assert reason(items[0]) == "no such file"


def test_a_folder_of_images_and_shards_gives_both(tmp_path: Path) -> None:
    put(tmp_path / "z.png", image(1))
    tar(tmp_path / "sub" / "a.tar", {"1.png": image(2)})
    source = open_source(tmp_path)
    assert contents(source) == {"z.png": image(1), "sub/a.tar#1.png": image(2)}
    assert source.kind == "mixed"
    assert source.name == f"{tmp_path} (1 images, 1 tar)"
    check_contract(source)


# ---- tables ---------------------------------------------------------------------------------------------------------


def parquet(path: Path, columns: dict[str, list], rows: int = 3) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path


def structs(n: int) -> list[dict[str, object]]:
    return [{"bytes": image(i), "path": f"{i}.png"} for i in range(n)]


def test_parquet_rows_are_images_across_row_groups(tmp_path: Path) -> None:
    path = parquet(tmp_path / "train.parquet", {"label": list(range(10)), "image": structs(10)})
    source = open_source(path)
    assert contents(source) == {f"train.parquet#{n}": image(n) for n in range(10)}
    assert [i.read() for i in reversed(list(source))] == [image(n) for n in reversed(range(10))]
    assert source.kind == "parquet"
    check_contract(source)


def test_the_column_is_found_by_type_and_name(tmp_path: Path) -> None:
    one = [image(1)]
    put(tmp_path / "on-disk.png", image(2))
    cases: list[tuple[dict[str, list], bytes]] = [
        ({"thumb": [{"bytes": image(9)}], "image": structs(1)}, image(0)),
        ({"id": ["x"], "anything": one}, image(1)),
        ({"hash": [b"h"], "jpg": one}, image(1)),
        ({"caption": ["a"], "file_name": ["on-disk.png"]}, image(2)),
        ({"image": [{"bytes": None, "path": "on-disk.png"}]}, image(2)),
    ]
    for number, (columns, expected) in enumerate(cases):
        source = open_source(parquet(tmp_path / f"{number}.parquet", columns))
        assert [i.read() for i in source] == [expected], columns


def test_a_column_can_be_named_and_a_wrong_name_is_helped(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"left": [image(1)], "right": [image(2)], "n": [1], "words": ["a"]})
    assert [i.read() for i in open_source(path, column="right")] == [image(2)]
    with pytest.raises(UnknownName, match=r"no column 'rihgt'; did you mean 'right'\?"):
        open_source(path, column="rihgt")
    with pytest.raises(DinoError, match=r"several columns .*left, right.*column="):
        open_source(path)
    with pytest.raises(DinoError, match="is int64: neither images nor paths"):
        open_source(path, column="n")
    with pytest.raises(DinoError, match=r"no column of .* \(it has n\)"):
        open_source(parquet(tmp_path / "b.parquet", {"n": [1]}))


def test_empty_cells_and_missing_files_of_a_table_fail_alone(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"image": [image(1), None, image(2)]})
    items = list(open_source(path))
    assert reason(items[1]) == "empty cell (null)"
    assert items[2].read() == image(2)
    path = parquet(tmp_path / "b.parquet", {"path": ["nowhere.png", "gs://x/y.png", ""]})
    assert [reason(i) for i in open_source(path)] == [
        "no such file",
        "a remote address (gs://x/y.png); only files are read",
        "empty cell (null)",
    ]


def test_several_parquet_files_and_a_table_of_labels_beside_images(tmp_path: Path) -> None:
    for n in range(2):
        parquet(tmp_path / "d" / f"p-{n}.parquet", {"image": structs(2)})
    assert names(open_source(tmp_path / "d")) == ["p-0.parquet#0", "p-0.parquet#1", "p-1.parquet#0", "p-1.parquet#1"]
    assert names(open_source(f"{tmp_path}/d/*1.parquet")) == ["p-1.parquet#0", "p-1.parquet#1"]
    put(tmp_path / "e" / "a.png", image(1))
    parquet(tmp_path / "e" / "labels.parquet", {"n": [1]})
    source = open_source(tmp_path / "e")
    assert (names(source), source.skipped) == (["a.png"], 1)


def test_a_damaged_parquet_file_is_a_failure_with_its_name(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"image": structs(50)})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    (item,) = open_source(path)
    assert item.path == "a.parquet"
    assert reason(item).startswith("a.parquet cannot be read: ")
    path.write_bytes(data)
    items = list(open_source(path))
    path.unlink()
    assert reason(items[30]) == "no such file"


def test_a_cache_smaller_than_the_row_group_serves_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "BATCH", 4)
    monkeypatch.setattr(FORWARD, "CACHED", 1000)
    path = parquet(tmp_path / "a.parquet", {"image": structs(60)}, rows=60)
    items = list(open_source(path))
    order = [0, 59, 3, 30, 31, 2, 58, 0]
    assert [items[n].read() for n in order] == [image(n) for n in order]
    assert sum(size for _, size in FORWARD.cached.values()) == FORWARD.size <= 1000


def arrow(path: Path, n: int, first: int = 0, rows: int = 2, stream: bool = True) -> Path:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"label": list(range(n)), "image": structs(first + n)[first:]})
    path.parent.mkdir(parents=True, exist_ok=True)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, rows)
    return path


def test_a_saved_datasets_folder_is_read_in_its_own_order(tmp_path: Path) -> None:
    arrow(tmp_path / "data-b.arrow", 3)
    arrow(tmp_path / "data-a.arrow", 2, first=3)
    arrow(tmp_path / "cache-123.arrow", 2)
    put(tmp_path / "dataset_info.json", b"{}")
    state = {"_data_files": [{"filename": "data-b.arrow"}, {"filename": "data-a.arrow"}]}
    put(tmp_path / "state.json", json.dumps(state).encode())
    source = open_source(tmp_path)
    assert names(source) == [f"data-b.arrow#{n}" for n in range(3)] + [f"data-a.arrow#{n}" for n in range(2)]
    assert [i.read() for i in source] == [image(n) for n in range(5)]
    assert source.kind == "datasets"
    check_contract(source)


def test_arrow_files_of_both_kinds_and_cut_ones(tmp_path: Path) -> None:
    assert [i.read() for i in open_source(arrow(tmp_path / "f.arrow", 4, stream=False))] == [image(n) for n in range(4)]
    path = arrow(tmp_path / "s.arrow", 6)
    path.write_bytes(path.read_bytes()[:-500])
    items = list(open_source(path))
    assert [i.read() for i in items[:-1]] == [image(n) for n in range(4)]
    assert items[-1].path == "s.arrow#end"
    assert "truncated after 4 rows" in reason(items[-1])


# ---- from many threads and processes --------------------------------------------------------------------------------


def _everything(root: Path) -> Source:
    for n in range(6):
        put(root / "f" / f"{n}.png", image(n))
    tar(root / "t.tar", {f"{n}.png": image(n) for n in range(20)})
    tar(root / "t.tar.gz", {f"{n}.png": image(n) for n in range(20)}, "w:gz")
    parquet(root / "p.parquet", {"image": structs(20)})
    arrow(root / "a.arrow", 20)
    return open_source(root)


def _read(item: Item) -> tuple[str, bytes]:
    return item.path, item.read()


def test_threads_read_the_same_bytes(tmp_path: Path) -> None:
    source = _everything(tmp_path)
    expected = contents(source)
    assert len(expected) == 86
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(contents, source) for _ in range(2)]
        assert all(done.result() == expected for done in both)
        assert dict(pool.map(_read, reversed(list(source)))) == expected


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same_bytes(tmp_path: Path, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    source = _everything(tmp_path)
    expected = contents(source)  # this process holds open files and caches when it forks
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        assert dict(pool.map(_read, source, chunksize=43)) == expected


def test_tables_without_pyarrow_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "a.parquet", b"PAR1" + bytes(20) + b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(DinoError, match=r"pyarrow.*pip install .*\[search\]'"):
        open_source(path)


# ---- limits ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV3_MAX_IMAGE_MB", "1")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_member_beyond_the_limit_is_one_failure(tmp_path: Path, small_limit: None, mode: str) -> None:
    path = tar(tmp_path / "a.tar", {"a.png": image(1), "big.jpg": bytes(3 << 20), "b.png": image(2)}, mode)
    first, *rest = open_source(path)
    assert first.read() == image(1)
    failures = [reason(item) for item in rest if item.path.endswith(("big.jpg", "end"))]
    assert len(failures) == 1
    assert ("3 MB, more than the 1 MB" if mode == "w" else "big.jpg has 3 MB; unpack the archive") in failures[0]
    assert len(rest) == (2 if mode == "w" else 1)  # of a packed one, what follows is not searched for


def test_a_header_of_a_tar_is_never_read_as_a_whole_gigabyte(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", compresslevel=1) as archive:
        long = tarfile.TarInfo("x")
        long.type, long.size = tarfile.XHDTYPE, 1 << 28
        archive.fileobj.write(long.tobuf())
        for _ in range(8):
            archive.fileobj.write(bytes(1 << 20))
    (item,) = open_source(tmp_path / "a.tar.gz")
    assert "a header of 268,435,456 bytes" in reason(item)


def test_a_tar_of_long_names_only_does_not_recurse_for_ever(tmp_path: Path) -> None:
    long = tarfile.TarInfo("x")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 1
    (tmp_path / "a.tar").write_bytes((long.tobuf() + b"a".ljust(512, b"\0")) * 3000)
    (item,) = open_source(tmp_path / "a.tar")
    assert "recursion" in reason(item)


def test_cells_beyond_the_limit_and_bombs_are_failures(tmp_path: Path, small_limit: None) -> None:
    path = parquet(tmp_path / "one.parquet", {"image": [image(1), bytes(40 << 20), image(2)]})
    assert reason(next(iter(open_source(path)))).startswith("13 MB, more than the 1 MB")
    path = parquet(tmp_path / "many.parquet", {"image": [bytes([i]) * (900 << 10) for i in range(12)]}, rows=12)
    assert "these are no images" in reason(next(iter(open_source(path))))
    path = parquet(tmp_path / "two.parquet", {"image": [image(1), os.urandom(2 << 20), *map(image, range(9))]}, rows=11)
    first, large, third, *_ = open_source(path)
    assert (first.read(), third.read()) == (image(1), image(0))
    assert reason(large).startswith("2 MB, more than the 1 MB")


def test_more_rows_than_bytes_are_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "rows.parquet", {"image": [image(1)] * 300_000}, rows=300_000)
    (item,) = open_source(path)
    assert "300,000 rows in" in reason(item)


def test_one_value_in_every_row_is_not_laid_out_many_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "MOST_BATCH", 1 << 20)
    value = os.urandom(200 << 10)  # without the bound the first batch of 64 rows has 13 MB
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"image": [value] * 70}), tmp_path / "a.parquet", dictionary_pagesize_limit=1 << 30)
    assert list(open_source(tmp_path / "a.parquet"))[60].read() == value
    sizes = [size for (key, _), (_, size) in FORWARD.cached.items() if key[0] == str(tmp_path / "a.parquet")]
    assert max(sizes) <= 2 << 20
