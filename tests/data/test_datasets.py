"""Data sets from a line of text: layouts, indexes, labels, and a sentence for every mistake."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3.data.datasets import Folder, ImageNet, ImageNet22k, make_dataset, parse_dataset
from dinov3.errors import DinoError, ImageError, UnknownName


def jpeg(grey: int, size: tuple[int, int] = (8, 6)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (grey, grey, grey)).save(stream, "JPEG")
    return stream.getvalue()


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    root = tmp_path / "imagenet"
    for class_id, numbers in (("n02", (7, 10)), ("n01", (3,))):
        for n in numbers:
            write(root / "train" / class_id / f"{class_id}_{n}.JPEG", jpeg(n * 10))
    write(root / "train" / "n01" / "notes.txt", b"not an image")
    write(root / "val" / "n02" / "ILSVRC2012_val_00000005.JPEG", jpeg(50))
    for n in (1, 2):
        write(root / "test" / f"ILSVRC2012_test_{n:08d}.JPEG", jpeg(n))
    write(root / "labels.txt", b'n01,"tench, Tinca tinca"\nn02,goldfish\n')
    return root


@pytest.mark.parametrize("split, length", (("TRAIN", 3), ("VAL", 1), ("TEST", 2)))
def test_every_split_of_any_length_is_indexed_once_and_read_from_the_index(
    imagenet: Path, tmp_path: Path, split: str, length: int
) -> None:
    extra = tmp_path / "extra"
    ImageNet(split=ImageNet.Split[split], root=imagenet, extra=extra).dump_extra()
    data = make_dataset(f"ImageNet:split={split}:root={imagenet}:extra={extra}")
    assert len(data) == length
    entries = np.load(extra / f"entries-{split}.npy")
    assert entries.dtype["actual_index"] == entries.dtype["class_index"] == np.dtype("<u4")
    for i in range(length):
        image, target = data[i]
        assert image.size == (8, 6)
        assert (target is None) == (split == "TEST")
    if split == "TEST":
        assert entries["class_index"].tolist() == [4294967295] * 2
        assert entries["actual_index"].tolist() == [1, 2]


def test_classes_are_numbered_in_sorted_order_and_carry_their_names(imagenet: Path, tmp_path: Path) -> None:
    data = ImageNet(split=ImageNet.Split.TRAIN, root=imagenet, extra=tmp_path / "extra")
    data.dump_extra()
    assert [data.name(i) for i in range(3)] == ["train/n01/n01_3.JPEG", "train/n02/n02_10.JPEG", "train/n02/n02_7.JPEG"]
    assert [data.label(i) for i in range(3)] == [0, 1, 1]
    assert data.find_class_id(1) == "n02"
    assert data.find_class_name(0) == "tench, Tinca tinca"
    assert data.get_targets().tolist() == [0, 1, 1]
    assert np.asarray(data[1][0])[0, 0, 0] == pytest.approx(100, abs=2)


def test_without_an_index_folder_the_images_are_listed_when_opened(imagenet: Path) -> None:
    data = make_dataset(f"ImageNet:split=TRAIN:root={imagenet}")
    assert len(data) == 3
    assert data.find_class_name(1) == "goldfish"  # type: ignore[attr-defined]


def test_a_missing_index_names_the_command_that_writes_it(imagenet: Path, tmp_path: Path) -> None:
    data = make_dataset(f"ImageNet:split=VAL:root={imagenet}:extra={tmp_path / 'none'}")
    with pytest.raises(DinoError, match=r"entries-VAL\.npy does not exist.*ImageNet\.Split\.VAL.*dump_extra\(\)"):
        len(data)


@pytest.fixture
def imagenet22k(tmp_path: Path) -> Path:
    root = tmp_path / "22k"
    root.mkdir()
    for class_id, members in (("n05", [jpeg(10), gzip.compress(jpeg(20))]), ("n09", [jpeg(30, (500, 300))])):
        with tarfile.open(root / f"{class_id}.tar", "w") as archive:
            for i, data in enumerate(members):
                info = tarfile.TarInfo(f"{class_id}_{i}.JPEG")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return root


def test_imagenet22k_is_indexed_without_block_listings_and_every_sample_is_read(
    imagenet22k: Path, tmp_path: Path
) -> None:
    ImageNet22k(root=imagenet22k, extra=tmp_path / "x").dump_extra()
    data = make_dataset(f"ImageNet22k:root={imagenet22k}:extra={tmp_path / 'x'}")
    assert [data[i][0].size for i in range(3)] == [(8, 6), (8, 6), (500, 300)]
    assert [data[i][1] for i in range(3)] == [0, 0, 1]
    assert data.name(2) == "n09.tar#n09_0.JPEG"
    assert data.find_class_id(1) == "n09"  # type: ignore[attr-defined]


def test_a_truncated_tar_fails_for_the_member_that_is_cut(imagenet22k: Path, tmp_path: Path) -> None:
    ImageNet22k(root=imagenet22k, extra=tmp_path / "x").dump_extra()
    tar = imagenet22k / "n09.tar"
    tar.write_bytes(tar.read_bytes()[:700])
    data = ImageNet22k(root=imagenet22k, extra=tmp_path / "x")
    assert data.read(0)
    with pytest.raises(ImageError, match=r"n09\.tar ends inside of this member"):
        data.read(2)


def test_a_folder_takes_its_classes_from_the_first_subfolders(tmp_path: Path) -> None:
    for name in ("dogs/x/b.jpg", "cats/a.jpg", "loose.jpg"):
        write(tmp_path / name, jpeg(9))
    data = Folder(tmp_path)
    assert data.class_names == ["cats", "dogs"]
    assert {data.name(i): data.label(i) for i in range(3)} == {"cats/a.jpg": 0, "dogs/x/b.jpg": 1, "loose.jpg": None}
    assert data.get_targets().tolist().count(-1) == 1


def test_a_plain_folder_has_no_classes_and_a_bare_path_is_a_data_set(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", jpeg(1))
    data = make_dataset(str(tmp_path))
    assert isinstance(data, Folder)
    assert data.class_names == []
    assert data[0][1] is None


def test_a_listing_takes_at_most_64_bytes_an_image_and_no_stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(20):
        (tmp_path / f"n{n:08d}").mkdir()
        for i in range(250):
            (tmp_path / f"n{n:08d}" / f"n{n:08d}_{i}.JPEG").touch()
    Folder(tmp_path / "n00000000")  # what is imported and compiled at first use
    stats: list[object] = []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda *a, **k: (stats.append(a), real(*a, **k))[1])
    tracemalloc.start()
    data = Folder(tmp_path)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data) == 5000
    assert size / len(data) <= 64  # 560 with an object for each image
    assert len(stats) < 40  # of folders only
    assert data.name(4999) == "n00000019/n00000019_99.JPEG"
    assert (data.label(4999), data.get_targets().dtype) == (19, np.int32)


def test_a_split_names_reads_and_labels_its_own_images(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg", "b/4.jpg"):
        write(tmp_path / name, jpeg(int(name[2])))
    line = f"FolderSplit:root={tmp_path}:train_per_class=1:split="
    parts = [make_dataset(line + split) for split in ("train", "test")]
    assert [len(part) for part in parts] == [2, 2]
    found = {part.name(i): part.label(i) for part in parts for i in range(2)}
    assert found == {"a/1.jpg": 0, "a/2.jpg": 0, "b/3.jpg": 1, "b/4.jpg": 1}
    assert all(part.read(i) == jpeg(int(part.name(i)[2])) for part in parts for i in range(2))


def test_in_tar_shards_the_classes_are_the_members_first_folders(tmp_path: Path) -> None:
    for shard in ("s0.tar", "s1.tar"):
        with tarfile.open(tmp_path / shard, "w") as archive:
            for name in ("zebra/1.jpg", "ant/1.jpg"):
                info = tarfile.TarInfo(name)
                info.size = len(jpeg(3))
                archive.addfile(info, io.BytesIO(jpeg(3)))
    data = make_dataset(f"Folder:root={tmp_path}/*.tar")
    assert data.class_names == ["ant", "zebra"]  # type: ignore[attr-defined]
    assert sorted(data.label(i) or 0 for i in range(len(data))) == [0, 0, 1, 1]


def test_transforms_reach_image_and_target(tmp_path: Path) -> None:
    write(tmp_path / "c" / "a.jpg", jpeg(1))
    data = make_dataset(str(tmp_path), transform=lambda image: image.size, target_transform=lambda target: ())
    assert data[0] == ((8, 6), ())


def test_data_sets_survive_pickling_as_spawned_workers_need(imagenet: Path, imagenet22k: Path, tmp_path: Path) -> None:
    ImageNet22k(root=imagenet22k, extra=tmp_path / "x").dump_extra()
    for line in (
        f"ImageNet:split=TRAIN:root={imagenet}",
        f"ImageNet22k:root={imagenet22k}:extra={tmp_path / 'x'}",
        f"Folder:root={imagenet}",
    ):
        data = make_dataset(line)
        data[0]
        again = pickle.loads(pickle.dumps(data))
        assert again.read(1) == data.read(1)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    write(tmp_path / "bad.jpg", jpeg(1)[:40])
    with pytest.raises(ImageError, match=r"^bad\.jpg: "):
        Folder(tmp_path)[0]


def test_values_may_hold_colons_and_equals_signs() -> None:
    assert parse_dataset(r"Folder:root=C:\images") == ("Folder", {"root": r"C:\images"})
    assert parse_dataset("ImageNet22k:root=/a=b/c:d:extra=/e") == ("ImageNet22k", {"root": "/a=b/c:d", "extra": "/e"})


@pytest.mark.parametrize(
    "line, sentence",
    (
        ("ImageNe:split=TRAIN:root=/d", r"the data set is one of .*, not 'ImageNe'; did you mean 'ImageNet'"),
        ("imagenet:split=TRAIN:root=/d", r"did you mean 'ImageNet'"),
        ("Banana", r"there is no folder, list, tar or table 'Banana', and no data set of that name"),
        ("ImageNet:split=train:root=/d", r"the split is one of TRAIN, VAL, TEST, not 'train'; did you mean 'TRAIN'\?"),
        ("ImageNet:split=TRAIN", r"ImageNet needs root=…"),
        ("ImageNet:root=/d", r"ImageNet needs split=…"),
        ("ImageNet:rot=/d", r"ImageNet has no key 'rot'.*did you mean 'root'\?"),
        ("ImageNet22k:split=TRAIN:root=/d", r"ImageNet22k has no key 'split'"),
        ("ImageNet:TRAIN", r"'TRAIN' in 'ImageNet:TRAIN' is no key=value"),
        ("Folder:root=/a:root=/b", r"root is given twice"),
        ("/no/such/folder", r"no such file or folder: /no/such/folder"),
        ("ImageNet22k:root=/d", r"ImageNet22k needs extra=…"),
    ),
)
def test_every_mistake_in_a_line_gets_a_sentence(line: str, sentence: str) -> None:
    with pytest.raises(DinoError, match=sentence):
        make_dataset(line)


def test_an_unknown_name_is_its_own_kind_of_error() -> None:
    with pytest.raises(UnknownName):
        make_dataset("Nope:root=/d")


def test_a_wrong_root_says_which_folder_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DinoError, match=r"no folder .*train: ImageNet's TRAIN images are expected there"):
        ImageNet(split=ImageNet.Split.TRAIN, root=tmp_path, extra=tmp_path).dump_extra()
    with pytest.raises(DinoError, match=r"one tar per class"):
        ImageNet22k(root=tmp_path, extra=tmp_path).dump_extra()
