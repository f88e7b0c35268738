"""prepare: what it packs, what it refuses and in which words, and what it leaves behind."""

import errno
import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import InputError, config, contest_layout, duplicates, packed, runs
from pipeline.manifest import load_contest, read_manifest
from stages import prepare
from tests.conftest import ROOT, Malicious, make_contest_folder

TINY = {"unlabeled": 12, "train": 8, "val": 8}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A contest of a few 16×16 pictures; the working directory is its parent."""
    monkeypatch.chdir(tmp_path)
    return make_contest_folder(Path("given"), TINY, 16)


def run(root: Path, *argv: str, **options: bool) -> None:
    given = ["--data.root", str(root), "--data.contest", "tiny", "--data.workers", "2", *argv]
    recipe, _, plain = config.parse(prepare.__doc__, argv=given)
    prepare.run(recipe, plain, **options)


def facts() -> dict:
    return json.loads(Path("data_manifests/tiny/contest.json").read_text())


def refusal(root: Path, *argv: str, **options: bool) -> str:
    """The message that prepare ends with; nothing may be left behind."""
    with pytest.raises(InputError) as raised:
        run(root, *argv, **options)
    left = [p for f in ("data", "data_manifests") for p in Path(f).rglob("*") if p.is_file()]
    assert [p for p in left if p.name != "defects.txt"] == []
    return str(raised.value)


def picture(seed: int = 9, size: int = 16) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))


def test_pixels_labels_digests_and_statistics_are_those_of_the_files(root: Path):
    run(root)
    contest = load_contest("tiny")
    for split, images in TINY.items():
        array, manifest = contest.packed(split), contest.manifest(split)
        assert len(array) == len(manifest) == images
        for n in range(images):
            file = root / split / f"{n}.png"
            assert np.array_equal(array[n], Image.open(file))
            assert manifest.index[n] == n
            assert manifest.file[n] == f"{split}/{n}.png"
            assert manifest.sha256[n].decode() == hashlib.sha256(file.read_bytes()).hexdigest()
    assert contest.labels("val").tolist() == [n % 4 for n in range(8)]
    pixels = contest.packed("unlabeled").reshape(-1, 3) / 255
    assert np.allclose(contest.mean, pixels.mean(0), rtol=1e-12)
    assert np.allclose(contest.std, pixels.std(0), rtol=1e-12)
    assert (contest.rehearsal, contest.root) == (False, root)


def test_many_images_are_packed_in_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(packed, "_TASK", 4)  # several tasks, with a part of one in the end
    root = make_contest_folder(Path("given"), {"unlabeled": 30, "train": 8}, 8)
    run(root)
    array = load_contest("tiny").packed("unlabeled")
    for n in range(30):
        assert np.array_equal(array[n], Image.open(root / "unlabeled" / f"{n}.png"))


def test_odd_modes_become_rgb(root: Path):
    folder = root / "unlabeled"
    for n, mode in enumerate(["L", "RGBA", "P"]):
        picture().convert(mode).save(folder / f"{n}.png")
    deep = np.arange(0, 65_536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(deep).save(folder / "3.png")
    run(root)
    array = load_contest("tiny").packed("unlabeled")
    for n in range(3):
        assert np.array_equal(array[n], Image.open(folder / f"{n}.png").convert("RGB"))
    # sixteen bits are clipped to eight, as the organizers' program does before it scores
    assert np.array_equal(array[3], Image.open(folder / "3.png").convert("RGB"))


def test_images_are_resized_when_asked(root: Path):
    picture(size=20).save(root / "train" / "3.png")
    run(root, "--data.size", "10")
    found = load_contest("tiny").packed("train")
    assert found.shape == (8, 10, 10, 3)
    expected = picture(size=20).resize((10, 10), Image.Resampling.BICUBIC)
    assert np.array_equal(found[3], expected)


def test_images_of_two_sizes_need_a_size(root: Path):
    for file in ("unlabeled/0.png", "train/3.png"):
        picture(size=20).save(root / file)
    (root / "train" / "4.png").write_bytes(b"")  # all of it in one report
    reason = "is 20 × 20, where 16 × 16 is expected as of the others (--data.size PIXELS resizes"
    lines = refusal(root).split("\n")
    assert lines[0] == "3 files are unusable"
    assert lines[1].startswith(f"  unlabeled/0.png: {reason}")
    assert lines[2].startswith(f"  train/3.png: {reason}")
    assert lines[3] == "  train/4.png: is empty"
    run(root, skip_bad=True)
    assert 0 not in load_contest("tiny").usable("unlabeled")


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header states a size that its data does not have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def spoil(root: Path) -> dict[str, str]:
    """Make most kinds of bad images; the start of each one's reason."""
    folder = root / "unlabeled"
    whole = io.BytesIO()
    picture().save(whole, "PNG")
    (folder / "1.png").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (folder / "2.png").unlink()
    (folder / "3.png").write_bytes(b"")
    (folder / "4.png").write_text("no image at all")
    (folder / "5.png").write_bytes(bomb(60_000, 60_000))
    (folder / "007.png").write_bytes((folder / "7.png").read_bytes())
    (folder / "notes.txt").write_text("mine")
    (folder / "deeper").mkdir()
    (folder / "99999999.png").write_bytes(whole.getvalue())
    (root / "train" / "6.png").unlink()
    (root / "train" / "5.png").unlink()
    (folder / ".DS_Store").write_text("ignored")
    name = "is misnumbered; the name N.png, without leading zeros, is expected"
    return {
        "unlabeled/007.png": name,
        "unlabeled/deeper": "is a folder; images N.png are expected",
        "unlabeled/notes.txt": name,
        "unlabeled/99999999.png": "is misnumbered; the split has only 12 images",
        "unlabeled/2.png": "missing",
        "train/5.png": "missing",
        "train/6.png": "missing",
        "unlabeled/1.png": "is truncated or damaged (image file is truncated",
        "unlabeled/3.png": "is empty",
        "unlabeled/4.png": "is no image (PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM are read)",
        "unlabeled/5.png": "has 60000 × 60000 pixels; data.max_pixels is 50,000,000",
    }


def test_every_bad_image_is_in_one_report(root: Path):
    reasons = spoil(root)
    lines = refusal(root).split("\n")
    assert lines[0] == "11 files are unusable"
    assert lines[-1] == "mend them, or go on without them: --skip-bad"
    del reasons["train/6.png"], reasons["train/5.png"]
    assert "  train/5.png to 6.png (2 files): missing" in lines
    lines.remove("  train/5.png to 6.png (2 files): missing")
    for line, (file, reason) in zip(lines[1:-1], reasons.items(), strict=True):
        assert line.startswith(f"  {file}: {reason}")


def test_skip_bad_goes_on_and_says_so(root: Path, capsys: pytest.CaptureFixture):
    reasons = spoil(root)
    run(root, skip_bad=True)
    contest = load_contest("tiny")
    assert {d["file"] for d in contest.skipped} == set(reasons)
    assert contest.usable("unlabeled").tolist() == [0, 6, 7, 8, 9, 10, 11]
    assert contest.usable("train").tolist() == [0, 1, 2, 3, 4, 7]
    array, manifest = contest.packed("unlabeled"), contest.manifest("unlabeled")
    assert len(array) == 12
    assert not array[1:6].any()
    assert np.array_equal(array[6], Image.open(root / "unlabeled" / "6.png"))
    assert [manifest.note[n] for n in (0, 2, 3)] == ["", "skipped: missing", "skipped: is empty"]
    assert contest.labels("train").tolist() == [n % 4 for n in range(8)]
    pixels = array[contest.usable("unlabeled")].reshape(-1, 3) / 255
    assert np.allclose(contest.mean, pixels.mean(0), rtol=1e-12)
    assert "skipped as unusable: 11 (contest.json lists them)" in capsys.readouterr().out
    run(root, skip_bad=True)
    assert "is up to date" in capsys.readouterr().out
    with pytest.raises(InputError, match="11 files are unusable"):
        run(root)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (torch.arange(7), "has 7 entries; one int64 label for each of 8 images is expected"),
        (torch.arange(8.0), "holds float32 of shape [8]; one int64 label for each of 8 images"),
        (torch.arange(8).int(), "holds int32 of shape [8]; one int64 label for each of 8"),
        (torch.zeros(8, 1, dtype=torch.int64), "holds int64 of shape [8, 1]; one int64 label"),
        ({"labels": torch.arange(8)}, "holds a dict; one int64 label for each of 8 images"),
        (
            torch.tensor([0, 1, -1, 3, 0, 1, 2, 3]),
            "entry 2 is -1, where 0 to 3 is expected (1 such entries; data.classes states",
        ),
        (
            torch.tensor([0, 1, 2, 9, 0, 1, 2, 9]),
            "entry 3 is 9, where 0 to 3 is expected (2 such entries; data.classes states",
        ),
    ],
)
def test_a_bad_label_file_is_reported_and_never_skipped(root: Path, labels: object, reason: str):
    torch.save(labels, root / "train_label_tensor.pt")
    for skip_bad in (False, True):
        lines = refusal(root, skip_bad=skip_bad).split("\n")
        assert lines[0] == "1 file is unusable"
        assert lines[1].startswith(f"  train_label_tensor.pt: {reason}")
        assert lines[2] == "mend them; --skip-bad does not go on without train_label_tensor.pt"


def test_where_the_contest_lies_is_no_fact_of_it(root: Path):
    """A contest that was moved, or named by another path, is the same: runs on it stay valid."""
    run(root)
    file = Path("data_manifests/tiny/contest.json")
    before = file.read_bytes()
    moved = root.rename("moved").resolve()
    run(moved)
    assert file.read_bytes() == before
    assert load_contest("tiny").root == moved


def labels_of(root: Path, train: list[int], val: list[int]) -> None:
    torch.save(torch.tensor(train), root / "train_label_tensor.pt")
    torch.save(torch.tensor(val), root / "val_label_tensor.pt")


def test_a_class_may_have_no_label(root: Path, capsys: pytest.CaptureFixture[str]):
    labels_of(root, [0, 1, 3, 4, 0, 1, 3, 4], [0, 1, 2, 3, 4, 4, 0, 0])
    run(root)
    assert load_contest("tiny").classes == 5
    assert "train has no label of 1 of 5 classes" in capsys.readouterr().out


def test_val_has_no_classes_beyond_those_of_train(root: Path):
    labels_of(root, [0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 0, 0])
    line = refusal(root).split("\n")[1]
    assert line.startswith("  val_label_tensor.pt: entry 4 is 4, where 0 to 3 is expected")
    run(root, "--data.classes", "5")
    assert load_contest("tiny").classes == 5


def test_images_missing_at_the_end_are_seen_by_their_labels(root: Path):
    for n in (6, 7):
        (root / "train" / f"{n}.png").unlink()
    lines = refusal(root).split("\n")
    reason = "missing, as train_label_tensor.pt has 8 entries"
    assert lines[:2] == ["2 files are unusable", f"  train/6.png to 7.png (2 files): {reason}"]
    run(root, skip_bad=True)
    assert load_contest("tiny").usable("train").tolist() == [0, 1, 2, 3, 4, 5]
    assert load_contest("tiny").images("train") == 8


def test_a_missing_or_damaged_label_file_is_reported(root: Path):
    (root / "train_label_tensor.pt").unlink()
    (root / "val_label_tensor.pt").write_bytes(b"nothing")
    lines = refusal(root).split("\n")
    assert lines[1] == (
        "  train_label_tensor.pt: missing; one int64 label for each of 8 images is expected"
    )
    assert lines[2].startswith("  val_label_tensor.pt: ")
    assert lines[0] == "2 files are unusable"


def test_a_malicious_label_file_is_refused_and_does_not_run(root: Path):
    torch.save(Malicious(Path("ran").absolute()), root / "val_label_tensor.pt")
    lines = refusal(root).split("\n")
    assert lines[1].startswith("  val_label_tensor.pt: refused, it holds more than tensors")
    assert not Path("ran").exists()


def test_a_long_report_is_cut_and_written_whole(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contest_layout, "_SHOWN", 3)
    for n in range(6):
        (root / "val" / f"{n}.png").write_bytes(b"")
    lines = refusal(root).split("\n")
    assert lines[0] == "6 files are unusable"
    assert lines[4] == "  … and 3 more; the whole list: data/tiny/defects.txt"
    whole = Path("data/tiny/defects.txt").read_text().splitlines()
    assert whole == [f"val/{n}.png: is empty" for n in range(6)]


def copy(root: Path, source: str, *targets: str) -> None:
    for target in targets:
        (root / target).write_bytes((root / source).read_bytes())


@pytest.mark.parametrize("keep", [False, True])
def test_unlabeled_copies_of_val_are_left_out(
    root: Path, keep: bool, capsys: pytest.CaptureFixture
):
    copy(root, "val/2.png", "unlabeled/1.png", "unlabeled/4.png", "train/7.png")
    run(root, "--data.keep_duplicates", str(keep).lower())
    contest = load_contest("tiny")
    left_out = [] if keep else [1, 4]
    expected = [n for n in range(12) if n not in left_out]
    assert contest.usable("unlabeled").tolist() == expected
    if not keep:
        note = contest.manifest("unlabeled").note
        assert note[1] == note[4] == "excluded: same bytes as val/2.png"
    assert contest.duplicates["within"] == {"unlabeled": 1}
    assert contest.duplicates["across"] == {
        "unlabeled and train": 2,
        "unlabeled and val": 2,
        "train and val": 1,
    }
    assert contest.duplicates["excluded"] == len(left_out)
    assert ["unlabeled/4", "val/2"] in contest.duplicates["examples"]
    pixels = contest.packed("unlabeled")[expected].reshape(-1, 3) / 255
    assert np.allclose(contest.mean, pixels.mean(0), rtol=1e-12)
    assert "byte-identical in unlabeled and val: 2 images" in capsys.readouterr().out


def test_copies_of_unlabeled_test_images_are_left_out(root: Path):
    (root / "test").mkdir()
    copy(root, "unlabeled/3.png", "test/0.png")
    run(root)
    assert 3 not in load_contest("tiny").usable("unlabeled")
    assert load_contest("tiny").labels("test").tolist() == [-1]


def test_first_match_against_a_plain_search():
    rng = np.random.default_rng(0)
    a, b = (rng.choice([b"", b"p", b"q", b"r", b"s"], 300).astype("S64") for _ in range(2))
    b[b == b"s"] = b"t"
    for x, found in zip(a, duplicates.first_match(a, b), strict=True):
        places = [k for k, y in enumerate(b) if x == y and x]
        assert found == (places[0] if places else -1)


def test_an_image_folder_is_read_in_sorted_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    root = Path("images")
    for k, file in enumerate(["b/2.jpg", "b/10.jpg", "a/x.png"]):
        for split in ("train", "test"):
            (root / split / file).parent.mkdir(parents=True, exist_ok=True)
            picture(k + 10 * (split == "test")).save(root / split / file)
    (root / "unlabeled").mkdir()
    picture(50).save(root / "unlabeled" / "z.png")
    copy(root, "test/a/x.png", "unlabeled/copy.png")
    run(root)
    contest = load_contest("tiny")
    assert (contest.layout, contest.class_names, contest.classes) == ("folder", ["a", "b"], 2)
    assert contest.manifest("train").file.tolist() == [
        "train/a/x.png",
        "train/b/10.jpg",
        "train/b/2.jpg",
    ]
    assert contest.labels("train").tolist() == [0, 1, 1]
    assert list(contest.splits) == ["unlabeled", "train", "val"]
    assert contest.manifest("val").file[0] == "test/a/x.png"
    note = contest.manifest("unlabeled").note.tolist()
    assert note == ["excluded: same bytes as test/a/x.png", ""]
    for n, file in enumerate(contest.manifest("train").file):
        assert np.array_equal(contest.packed("train")[n], Image.open(root / file))


def test_bad_files_of_an_image_folder_are_in_one_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    root = Path("images")
    for folder in ("train/a/deep", "val/a", "val/b", "unlabeled/more"):
        (root / folder).mkdir(parents=True)
    for file in ("train/a/0.png", "train/a/2.png", "val/a/0.png"):
        picture(len(file)).save(root / file)
    (root / "train" / "stray.png").write_bytes(b"")
    (root / "train" / "a" / "1.png").write_bytes(b"none")
    os.mkfifo(root / "train" / "a" / "pipe.png")
    assert refusal(root).split("\n") == [
        "7 files are unusable",
        "  unlabeled/more: is a folder; image files are expected",
        "  train/a/pipe.png: is neither a file nor a folder",
        "  train/a/deep: is a folder; image files are expected",
        "  train/stray.png: lies in no class folder",
        "  val/b: is no class of train/",
        "  unlabeled/: holds no images",
        "  train/a/1.png: is no image (PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM are read)",
        "mend them; --skip-bad does not go on without unlabeled/",
    ]
    (root / "unlabeled" / "more").rmdir()
    (root / "unlabeled").rmdir()
    run(root, skip_bad=True)
    contest = load_contest("tiny")
    assert contest.usable("train").tolist() == [0, 2]
    pixels = contest.packed("train")[[0, 2]].reshape(-1, 3) / 255
    assert np.allclose(contest.mean, pixels.mean(0), rtol=1e-12)  # there is no unlabeled split


def test_a_second_run_does_nothing(root: Path, capsys: pytest.CaptureFixture):
    run(root)
    files = [p for f in ("data", "data_manifests") for p in Path(f).rglob("*") if p.is_file()]
    before = {p: p.stat().st_mtime_ns for p in files}
    capsys.readouterr()
    run(root)
    said = capsys.readouterr().out
    assert said == "data_manifests/tiny is up to date (--force runs it anew)\n"
    assert {p: p.stat().st_mtime_ns for p in files} == before
    run(root, force=True)
    assert {p: p.stat().st_mtime_ns for p in files} != before


@pytest.mark.parametrize("change", ["image", "option", "array", "manifest", "labels"])
def test_a_change_is_noticed(root: Path, change: str, capsys: pytest.CaptureFixture):
    run(root)
    argv = []
    if change == "image":
        picture(3).save(root / "val" / "3.png")
    elif change == "option":
        argv = ["--data.size", "8"]
    elif change == "array":
        Path("data/tiny/val.npy").unlink()
    elif change == "manifest":
        Path("data_manifests/tiny/val.csv").unlink()
    else:
        torch.save(torch.arange(8) // 2, root / "train_label_tensor.pt")
    capsys.readouterr()
    run(root, *argv)
    assert "wrote data/tiny and data_manifests/tiny" in capsys.readouterr().out
    load_contest("tiny").packed("val")


def test_touched_files_alone_do_not_change_contest_json(root: Path):
    run(root)
    before = Path("data_manifests/tiny/contest.json").read_bytes()
    os.utime(root / "val" / "3.png", (1, 1))
    run(root)
    assert Path("data_manifests/tiny/contest.json").read_bytes() == before


def test_a_refused_change_leaves_the_last_state_whole(root: Path):
    run(root)
    files = [p for f in ("data", "data_manifests") for p in Path(f).rglob("*") if p.is_file()]
    before = {p: p.read_bytes() for p in files}
    (root / "val" / "3.png").write_bytes(b"")
    with pytest.raises(InputError):
        run(root)
    assert {p: p.read_bytes() for p in files} == before


def test_labels_of_other_images_are_not_taken_over(root: Path):
    run(root)
    answer = Path("data_manifests/tiny/requested-1.csv")
    answer.write_text("split,index,label\nunlabeled,0,1\n")
    picture(3).save(root / "train" / "1.png")  # not what the answer is about
    run(root)
    picture(4).save(root / "unlabeled" / "1.png")
    with pytest.raises(InputError, match=r"^data_manifests/tiny/requested-1\.csv labels other im"):
        run(root)
    answer.unlink()
    run(root)


def test_a_fresh_clone_takes_labels_of_the_same_images_only(root: Path):
    """Which has the manifests but that of the unlabeled images, of which contest.json has the
    digest.
    """
    run(root)
    Path("data_manifests/tiny/requested-1.csv").write_text("split,index,label\nunlabeled,0,1\n")
    Path("data_manifests/tiny/unlabeled.csv").unlink()
    run(root, force=True)
    Path("data_manifests/tiny/unlabeled.csv").unlink()
    picture(4).save(root / "unlabeled" / "1.png")
    with pytest.raises(InputError, match=r"^data_manifests/tiny/requested-1\.csv labels other im"):
        run(root)


def test_an_oracle_beside_the_contest_makes_a_rehearsal(root: Path):
    torch.save(torch.zeros(12, dtype=torch.int64), root.with_name("given.oracle.pt"))
    run(root)
    assert facts()["rehearsal"] is True


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data.root", "nowhere"], "data.root is nowhere, which is no folder; --data.root ROOT"),
        (["--data.root", "null"], "data.root is not given; --data.root ROOT is expected, the"),
        (["--data.contest", "../x"], "data.contest is '../x'; a name for a folder is expected"),
        (["--data.root", "given/val"], "given/val holds no train/; a contest (train/N.png, train"),
    ],
)
def test_a_wrong_root_or_name_is_refused(root: Path, argv: list[str], message: str):
    assert refusal(root, *argv).startswith(message)


def test_a_full_disk_is_noticed_before_packing(root: Path, monkeypatch: pytest.MonkeyPatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: usage)
    assert refusal(root) == (
        "data/tiny has 0.0 GB free; 0.0 GB are needed for 28 images of 16 × 16"
    )


def test_a_disk_that_fills_up_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)  # the workers are forked
    assert refusal(root) == "the packed images cannot be written: No space left on device"


def test_what_a_disk_takes_in_parts_is_written_whole(root: Path, monkeypatch: pytest.MonkeyPatch):
    whole, write = {}, os.pwrite
    for part in (1 << 30, 1000):
        monkeypatch.setattr(os, "pwrite", lambda fd, x, at, n=part: write(fd, x[:n], at))
        run(root, force=True)
        whole[part] = Path("data/tiny/unlabeled.npy").read_bytes()
    assert whole[1 << 30] == whole[1000]


def test_a_contest_may_be_the_current_folder(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir("given")
    run(root, "--data.root", ".")
    assert facts()["splits"]["train"]["images"] > 0


def test_a_decoder_that_dies_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packed, "decode", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    message = refusal(root)
    assert message.startswith("a decoding process was killed, for want of memory perhaps")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_half_written(root: Path, kind: int):
    run(root)
    contest, slow = Path("data_manifests/tiny/contest.json"), Path("slow.py")
    before = contest.read_bytes()
    slow.write_text(
        "import signal, time\nfrom pipeline import packed, runs\nfrom stages import prepare\n"
        # a shell's background jobs, and so their children, ignore Ctrl-C
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "decode = packed.decode\n"
        "def slowly(*a):\n    print('decoding', flush=True)\n    time.sleep(60)\n"
        "packed.decode = slowly\nruns.stage(prepare.main)\n"
    )
    command = [sys.executable, "slow.py", "--data.root", str(root), "--data.contest", "tiny"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command += ["--data.workers", "2", "--data.size", "8"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "decoding\n"
        began = time.monotonic()
        process.send_signal(kind)
        process.stdout.read()  # until every worker is gone too
        process.wait()
    assert time.monotonic() - began < 20
    assert contest.read_bytes() == before
    half = list(Path("data/tiny").glob(".*.tmp"))
    if kind == signal.SIGKILL:
        run(root, "--data.size", "8")
        half = list(Path("data/tiny").glob(".*.tmp"))
    assert half == []


def test_the_manifests_of_a_contest_are_text(root: Path):
    run(root)
    path = Path("data_manifests/tiny/train.csv")
    header, first, *_ = path.read_text().splitlines()
    assert header == "split,index,file,sha256,label,note"
    assert first.startswith("train,0,train/0.png,")
    assert first.endswith(",0,")
    assert len(read_manifest(path)) == 8


def test_the_stage_runs_from_the_command_line(root: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    argv = ["prepare", "--data.root", "given", "--data.contest", "tiny", "--skip-bad"]
    monkeypatch.setattr(sys, "argv", argv)
    before = signal.getsignal(signal.SIGTERM)
    try:
        prepare.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().out.splitlines() == [
        "unlabeled: 12 images, 12 usable",
        "train: 8 images, 8 usable",
        "val: 8 images, 8 usable",
        "wrote data/tiny and data_manifests/tiny; next: make pretrain RECIPE=…",
    ]
