"""The audit: planted copies and planted wrong labels are found, and nothing is changed."""

import csv
from pathlib import Path

import numpy as np
import pytest

from pipeline import InputError
from pipeline.audit import (
    Copies,
    counts,
    doubtful_labels,
    find_copies,
    hashes,
    of_every_kind,
    thumbnails,
)
from pipeline.manifest import Manifest, write_manifest
from pipeline.packed import Pool
from pipeline.runs import read_json, sha256
from stages import audit
from tests.conftest import unit
from tests.fake_run import label, parsed


def pictures(n: int = 40) -> np.ndarray:
    """Smooth random images [n, 24, 30, 3] uint8."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (n, 8, 10, 3))
    return coarse.repeat(3, 1).repeat(3, 2).astype(np.uint8)


def pool(images: np.ndarray) -> Pool:
    return Pool([(images, np.arange(len(images)))])


def test_thumbnails_are_means_of_parts() -> None:
    images = pictures(3)[:, :, :27]  # 9 columns of 3 pixels
    gray = images @ np.array([0.299, 0.587, 0.114])
    expected = gray.reshape(3, 8, 3, 9, 3).mean((2, 4))
    np.testing.assert_allclose(thumbnails(pool(images)), expected, atol=0.51)


def test_hashes_survive_noise_and_tell_images_apart() -> None:
    images = pictures()
    noise = np.random.default_rng(1).integers(-2, 3, images.shape)
    noisy = (images + noise).clip(0, 255).astype(np.uint8)
    a, b, mirrored = (hashes(thumbnails(pool(i))) for i in (images, noisy, images[:, :, ::-1]))
    assert (a == b).mean() > 0.7
    assert len(np.unique(a)) == 40
    assert not (a == mirrored).any()


def test_copies_are_found_by_embedding_and_by_hash() -> None:
    x, images = unit(np.random.default_rng(0).standard_normal((40, 16))), pictures()
    x[7] = unit(x[[3]] + 0.01)[0]  # looks the same to the encoder
    images[[21, 30]] = images[11]  # the same pixels
    found = find_copies(x, thumbnails(pool(images)), 0.98)
    pairs = list(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert pairs[0] == (3, 7)
    assert set(pairs) == {(3, 7), (11, 21), (11, 30), (21, 30)}
    assert found.hashed.tolist() == [pair[0] > 3 for pair in pairs]
    np.testing.assert_allclose(found.cosine, [x[a] @ x[b] for a, b in pairs], rtol=1e-5)
    names = ["train" if k < 10 else "val" for k in range(40)]
    assert counts(names, found) == {"train": 1, "val": 3}


def test_pictures_show_pairs_of_every_kind() -> None:
    first, second = np.array([0, 1, 2, 3, 8, 0]), np.array([1, 2, 3, 9, 9, 8])
    hashed = np.array([False, False, True, False, False, False])
    copies = Copies(first, second, np.linspace(1, 0.9, 6, dtype=np.float32), hashed)
    splits = ["train"] * 8 + ["val"] * 2
    assert of_every_kind(splits, copies).tolist() == [0, 2, 3, 4, 1, 5]


def test_flat_images_are_no_copies_by_their_hash() -> None:
    images = np.zeros((2, 16, 18, 3), np.uint8)
    images[1] = 200
    assert not len(find_copies(unit(np.eye(2)), thumbnails(pool(images)), 0.98).first)


def test_copies_of_one_hash_are_found_beside_other_images_of_it() -> None:
    """Flat images have one hash: the first, and two of another brightness that are copies."""
    images = np.zeros((3, 16, 18, 3), np.uint8)
    images[1:] = 200
    found = find_copies(unit(np.eye(3)), thumbnails(pool(images)), 0.98)
    assert (found.first.tolist(), found.second.tolist()) == ([1], [2])


def test_wrong_labels_are_found_and_mended() -> None:
    """5 % of the labels of six clusters are wrong."""
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(6), 50)
    x = unit(np.eye(6, 12)[truth] + 0.15 * rng.standard_normal((300, 12)))
    given, wrong = truth.copy(), rng.permutation(300)[:15]
    given[wrong] = (given[wrong] + rng.integers(1, 6, 15)) % 6
    found = doubtful_labels(x, given, 8, 10.0, 0)
    hits = np.isin(found.rows, wrong)
    assert hits.sum() >= 13
    assert hits[:10].all()  # the most doubtful first
    assert (found.suggested[hits] == truth[found.rows[hits]]).all()
    assert found.confidence[hits].max() < 0.5
    assert found.agreement[hits].max() < 0.2


def test_labels_are_doubted_by_the_nearest_where_no_line_divides_the_classes() -> None:
    """Eight arcs of a circle, of two classes in turn, each with one wrong label."""
    rng = np.random.default_rng(0)
    arc = np.repeat(np.arange(8), 30)
    angle = arc * np.pi / 4 + rng.uniform(0, 0.1, 240)
    x, given = unit(np.stack([np.cos(angle), np.sin(angle)], 1)), arc % 2
    given[::30] = 1 - given[::30]
    found = doubtful_labels(x, given, 2, 10.0, 0)
    wrong = set(range(0, 240, 30))
    assert wrong <= set(found.rows.tolist())
    of_wrong = np.isin(found.rows, list(wrong))
    assert (found.suggested[of_wrong] == arc[found.rows[of_wrong]] % 2).all()
    assert (found.agreement[of_wrong] == 0).all()
    given[0] = 2  # the only one of its class
    assert 0 not in doubtful_labels(x, given, 3, 10.0, 0).rows


def test_the_stage_shows_and_changes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = np.load("runs/entry/embeddings/val.npy")
    x[5] = np.load("runs/entry/embeddings/train.npy")[2]
    np.save("runs/entry/embeddings/val.npy", x)
    before = {file: sha256(file) for file in Path("data_manifests").rglob("*") if file.is_file()}
    audit.run(parsed().recipe, cosine=0.999, write_clean=True)
    assert before == {f: sha256(f) for f in Path("data_manifests").rglob("*") if f.is_file()}
    with Path("runs/entry/audit/duplicates.csv").open() as file:
        pairs = list(csv.DictReader(file))
    pair = next(p for p in pairs if float(p["cosine"]) > 0.9999)
    assert (pair["split"], pair["index"], pair["split_b"], pair["index_b"]) == (
        "train",
        "2",
        "val",
        "5",
    )
    names = ["ant", "bee", "cat", "dog"]
    assert (pair["label"], pair["label_b"]) == (names[label("train", 2)], names[label("val", 5)])
    with Path("runs/entry/audit/labels.csv").open() as file:
        wrong = [int(row["index"]) for row in csv.DictReader(file)]
    with Path("runs/entry/audit/clean.csv").open() as file:
        noted = {int(row["index"]): row["note"] for row in csv.DictReader(file)}
    assert [n for n, note in noted.items() if note] == sorted(wrong)
    assert sorted(noted) == list(range(20))
    assert f"{len(wrong)} of 20 labels of train look wrong" in capsys.readouterr().out
    assert Path("runs/entry/audit/duplicates.png").is_file()
    assert Path("runs/entry/audit/labels.png").is_file()
    made = read_json(Path("runs/entry/audit/provenance.json"), "")
    assert made["results"]["doubtful_labels"] == len(wrong)
    assert str(Path("runs/entry/embeddings/val.npy")) in made["inputs"]


def test_an_encoder_that_learned_the_labels_is_no_judge(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_manifest(Path("runs/entry/pretrain/trained_on.csv"), Manifest.of("train", [1, 2, 5]))
    audit.run(parsed().recipe)
    assert "pretraining learned 3 of the 20, so wrong ones look right" in capsys.readouterr().out


def test_the_same_audit_is_made_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is asked for later is made of what it found."""
    recipe = parsed().recipe
    audit.run(recipe, write_clean=True)
    clean, written = Path("runs/entry/audit/clean.csv"), Path("runs/entry/audit/labels.csv")
    rows, made = clean.read_text(), written.stat().st_mtime_ns
    clean.unlink()
    audit.run(recipe, write_clean=True)
    assert "audit is up to date" in capsys.readouterr().out
    assert (clean.read_text(), written.stat().st_mtime_ns) == (rows, made)
    audit.run(recipe, cosine=0.9)
    assert not clean.exists()  # that of another audit
    assert "was edited" not in capsys.readouterr().out
    audit.run(recipe, cosine=0.9, force=True)
    assert "up to date" not in capsys.readouterr().out


def test_a_clean_manifest_that_was_edited_is_kept(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = parsed().recipe, Path("runs/entry/audit")
    audit.run(recipe, write_clean=True)
    first = (out / "clean.csv").read_text()
    edited = first.replace("doubtful", "")
    (out / "clean.csv").write_text(edited)
    audit.run(recipe, write_clean=True)  # up to date
    assert f"{out}/clean.csv was edited: it is kept as {out}/clean-1.csv" in capsys.readouterr().out
    assert ((out / "clean.csv").read_text(), (out / "clean-1.csv").read_text()) == (first, edited)
    (out / "clean.csv").write_text(edited + "\n")
    audit.run(recipe, cosine=0.9)
    assert (out / "clean-2.csv").read_text() == edited + "\n"
    assert not (out / "clean.csv").exists()


def test_few_labels_of_a_class_are_no_mistake_unless_there_is_one(
    recwarn: pytest.WarningsRecorder,
) -> None:
    x = np.repeat(np.eye(4, 8, dtype=np.float32), 3, axis=0)
    labels = np.repeat(np.arange(4), 3)
    labels[-2:] = 0
    assert doubtful_labels(x, labels, 4, 10.0, 0).rows.dtype == np.int64
    assert not [w for w in recwarn if w.category is UserWarning]
    assert not len(doubtful_labels(x[:3], np.arange(3), 4, 10.0, 0).rows)  # nothing to compare


def test_an_impossible_cosine_is_refused(here: Path) -> None:
    with pytest.raises(InputError, match=r"audit: cosine is 1\.5; above 0, up to 1 is expected"):
        audit.run(parsed().recipe, cosine=1.5)
