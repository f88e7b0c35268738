"""Manifests: written and read back, checked, drawn from; the contest that they describe."""

import json
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import InputError
from pipeline.draws import choose_labels, hold_out, training_set
from pipeline.manifest import (
    DOUBTFUL,
    LABELS,
    PREPARED,
    PSEUDO_LABELS,
    Contest,
    Manifest,
    load_contest,
    read_manifest,
    write_manifest,
)

TEXT = st.text(string.ascii_letters + ' ,"é\n', max_size=8)
LABELS_DRAWN = st.lists(st.integers(-1, 5), min_size=1, max_size=80).map(np.array)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(-1, 900), st.floats(0, 1), TEXT), max_size=30))
def test_a_manifest_reads_back_as_written(tmp_path_factory: pytest.TempPathFactory, rows: list):
    label, confidence, note = (list(c) for c in zip(*rows, strict=True)) if rows else ([], [], [])
    n = len(rows)
    split = ["train", "val"] * n
    written = Manifest.of(
        split[:n], np.arange(n)[::-1], label, confidence, note, note, note, ["ab" * 32] * n
    )
    path = tmp_path_factory.mktemp("m") / "m.csv"
    write_manifest(path, written, ("split", *PREPARED[1:], "confidence", "source"))
    found = read_manifest(path)
    for column in ("split", "index", "label", "note", "source", "file", "sha256"):
        assert getattr(found, column).tolist() == getattr(written, column).tolist(), column
    assert np.allclose(found.confidence, written.confidence, rtol=1e-5)


def test_columns_that_a_file_lacks_have_their_defaults(tmp_path: Path):
    path = tmp_path / "m.csv"
    path.write_text("split,index,label\nunlabeled,3,7\nunlabeled,1,\n")
    found = read_manifest(path)
    assert found.label.tolist() == [7, -1]
    assert found.confidence.tolist() == [1, 1]
    assert found.note.tolist() == found.source.tolist() == ["", ""]


def test_the_columns_of_each_kind(tmp_path: Path):
    manifest = Manifest.of("unlabeled", [4, 2], [1, 0], [0.5, 0.25], source="pseudo")
    write_manifest(tmp_path / "labels.csv", manifest, LABELS)
    write_manifest(tmp_path / "pseudo.csv", manifest, PSEUDO_LABELS)
    assert (tmp_path / "labels.csv").read_text() == (
        "split,index,label,source\nunlabeled,4,1,pseudo\nunlabeled,2,0,pseudo\n"
    )
    assert (tmp_path / "pseudo.csv").read_text().splitlines()[1] == "unlabeled,4,1,0.5,pseudo"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "row 1 is ''; a header is expected with split,index,label and none but "),
        ("split,index\ntrain,1\n", "row 1 is 'split,index'; a header is expected with"),
        ("split,index,label,lable\n", "row 1 is 'split,index,label,lable'; a header is"),
        ("split,index,label\ntrain,0,1\ntrain,1\n", "row 3 has 2 values; 3 are expected"),
        (
            "split,index,label\ntrain,x,1\n",
            "row 2: index is 'x'; a number from 0 is expected",
        ),
        (
            "split,index,label\ntrain,-1,1\n",
            "row 2: index is '-1'; a number from 0 is expected",
        ),
        ("split,index,label\ntrain,,1\n", "row 2: index is ''; a number from 0 is expected"),
        (
            "split,index,label\ntrain,0,\ntrain,1,-1\n",
            "row 3: label is '-1'; a number from 0, or nothing, is expected",
        ),
        (
            "split,index,label,confidence\ntrain,0,0,nan\n",
            "row 2: confidence is 'nan'; a number from 0 to 1, or nothing, is expected",
        ),
        (
            "split,index,label,confidence\ntrain,0,0,1.5\n",
            "row 2: confidence is '1.5'; a number from 0 to 1, or nothing, is expected",
        ),
        (
            "split,index,label\ntrain,7,1\nval,7,1\ntrain,7,0\n",
            "rows 2 and 4 are both train 7; each image is expected once",
        ),
    ],
)
def test_a_bad_manifest_is_refused_with_file_and_row(tmp_path: Path, text: str, message: str):
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(InputError) as raised:
        read_manifest(path)
    assert str(raised.value).startswith(f"{path}: {message}")


def test_rows_are_numbered_beyond_the_first_block(tmp_path: Path):
    path = tmp_path / "m.csv"
    rows = "".join(f"train,{n},0\n" for n in range(2500))
    path.write_text(f"split,index,label\n{rows}train,oops,0\n")
    with pytest.raises(InputError, match=r"row 2502: index is 'oops'"):
        read_manifest(path)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"m\.csv is not there; a CSV file with split,index,label"):
        read_manifest(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_bytes(b"split,index,label\n\xff\xfe,1,2\n")
    with pytest.raises(InputError, match=r"m\.csv: no CSV file in UTF-8"):
        read_manifest(tmp_path / "m.csv")


def test_usable_leaves_out_what_has_a_note():
    manifest = Manifest.of("unlabeled", [0, 1, 2], note=["", "skipped: missing", ""])
    assert manifest.usable().index.tolist() == [0, 2]


@settings(deadline=None)
@given(LABELS_DRAWN, st.floats(0.01, 1), st.integers(0, 9))
def test_chosen_labels_are_the_fraction_of_each_class(labels, fraction: float, seed: int):
    chosen = choose_labels(labels, fraction, None, seed)
    assert np.array_equal(chosen, np.unique(chosen))
    for k in range(6):
        n = (labels == k).sum()
        assert (labels[chosen] == k).sum() == (max(1, np.rint(fraction * n)) if n else 0)
    assert (labels[chosen] >= 0).all()
    smaller = choose_labels(labels, fraction / 2, None, seed)
    assert np.isin(smaller, chosen).all()
    assert np.array_equal(chosen, choose_labels(labels, fraction, None, seed))


@settings(deadline=None)
@given(LABELS_DRAWN, st.integers(0, 30), st.integers(0, 9))
def test_chosen_labels_are_the_number_of_each_class(labels, per_class: int, seed: int):
    chosen = choose_labels(labels, 1.0, per_class, seed)
    for k in range(6):
        assert (labels[chosen] == k).sum() == min(per_class, (labels == k).sum())
    assert (labels[chosen] >= 0).all()


def test_another_seed_chooses_other_images():
    labels = np.zeros(100, np.int64)
    assert not np.array_equal(
        choose_labels(labels, 0.3, None, 0), choose_labels(labels, 0.3, None, 1)
    )


@settings(deadline=None)
@given(LABELS_DRAWN, st.floats(0, 0.99), st.integers(0, 9))
def test_held_out_images_leave_some_of_each_class(labels, fraction: float, seed: int):
    index = np.random.default_rng(seed).permutation(2 * len(labels))[: len(labels)]
    images = Manifest.of("train", index, labels)
    held = hold_out(images, fraction)
    assert not (hold_out(images, fraction / 2) & ~held).any()
    order = np.random.default_rng(seed).permutation(len(labels))  # the image decides, no place
    assert np.array_equal(hold_out(images.take(order), fraction), held[order])
    for k in range(6):
        n, out = (labels == k).sum(), held[labels == k].sum()
        if n < 2 or fraction == 0:
            assert out == 0
        else:
            assert out == np.clip(np.rint(fraction * n), 1, n - 1)
    assert not held[labels < 0].any()


@settings(deadline=None)
@given(LABELS_DRAWN, st.floats(0, 0.99), st.lists(st.integers(0, 20), min_size=300, max_size=300))
def test_no_copy_of_an_image_that_is_learned_is_held_out(labels, fraction: float, content):
    digests = [f"{k:064x}" for k in content[: len(labels)]]
    images = Manifest.of("train", np.arange(len(labels)), labels, sha256=digests)
    held = hold_out(images, fraction)
    learned = images.sha256[~held & (labels >= 0)]
    assert not np.isin(images.sha256[held], learned).any()
    assert not (hold_out(images, fraction / 2) & ~held).any()
    plain = hold_out(Manifest.of("train", np.arange(len(labels)), labels), fraction)
    alone = ~np.isin(images.sha256, images.sha256[~plain & (labels >= 0)])
    assert np.array_equal(held, plain & alone)


def test_a_training_set_counts_an_image_once_and_holds_out_of_the_first_file(tmp_path: Path):
    train, more = tmp_path / "train.csv", tmp_path / "pseudo-0.csv"
    labels = np.arange(40) % 4
    note = ["skipped: missing"] + [""] * 39
    write_manifest(train, Manifest.of("train", np.arange(40), labels, note=note), PREPARED)
    pseudo = Manifest.of(["train", "unlabeled", "unlabeled"], [5, 5, 6], [3, 2, -1], 0.5)
    write_manifest(more, pseudo, PSEUDO_LABELS)
    used, held = training_set([train, more], 1.0, None, 0.2, seed=0)
    alone, held_alone = training_set([train], 1.0, None, 0.2, seed=0)
    assert np.array_equal(held.index, held_alone.index)
    assert set(held.split) == {"train"}
    assert len(used) == len(alone) + 1
    assert (used.split[-1], used.index[-1], used.label[-1]) == ("unlabeled", 5, 2)
    assert used.confidence[-1] == 0.5
    everything = sorted([*used.index[:-1], *held.index])
    assert everything == list(range(1, 40))
    few, _ = training_set([train, more], 1.0, 2, 0.0, seed=0)
    assert np.bincount(few.label[:-1]).tolist() == [2, 2, 2, 2]


def test_doubtful_labels_are_held_out_as_before_but_not_trained_on(tmp_path: Path):
    train, clean = tmp_path / "train.csv", tmp_path / "clean.csv"
    labels, doubtful = np.arange(40) % 4, np.arange(0, 40, 3)
    write_manifest(train, Manifest.of("train", np.arange(40), labels), PREPARED)
    note = np.where(np.isin(np.arange(40), doubtful), DOUBTFUL, "").tolist()
    noted = Manifest.of("train", np.arange(40), labels, note=note)
    write_manifest(clean, noted, ("split", "index", "label", "note"))
    used, held = training_set([train], 1.0, None, 0.2, 0)
    less, same = training_set([clean], 1.0, None, 0.2, 0)
    assert same.index.tolist() == held.index.tolist()
    assert np.isin(held.index, doubtful).any()
    assert less.index.tolist() == [n for n in used.index.tolist() if n % 3]
    mended = Manifest.of("train", doubtful, (doubtful + 1) % 4)
    write_manifest(tmp_path / "mended.csv", mended)
    more, again = training_set([clean, tmp_path / "mended.csv"], 1.0, None, 0.2, 0)
    assert again.index.tolist() == held.index.tolist()
    assert more.index.tolist() == less.index.tolist() + used.index[used.index % 3 == 0].tolist()
    assert (more.label[len(less) :] == (more.index[len(less) :] + 1) % 4).all()


def test_a_row_without_a_label_hides_no_later_one(tmp_path: Path):
    (tmp_path / "a.csv").write_text("split,index,label\ntrain,0,0\ntrain,2,\n")
    (tmp_path / "b.csv").write_text("split,index,label\ntrain,0,1\ntrain,2,1\n")
    train, _ = training_set([tmp_path / "a.csv", tmp_path / "b.csv"], 1.0, None, 0.0, 0)
    assert (train.index.tolist(), train.label.tolist()) == ([0, 2], [0, 1])


def test_what_the_encoder_learned_is_not_held_out(tmp_path: Path):
    train = tmp_path / "train.csv"
    write_manifest(train, Manifest.of("train", np.arange(40), np.arange(40) % 4), PREPARED)
    _, held = training_set([train], 1.0, None, 0.5, 0)
    for seed in range(3):
        used, less = training_set([train], 1.0, None, 0.5, seed, held.take(held.label < 2))
        assert less.index.tolist() == held.index[held.label >= 2].tolist()
        assert sorted([*used.index, *less.index]) == list(range(40))


def test_a_training_set_without_labels_is_refused(tmp_path: Path):
    write_manifest(tmp_path / "m.csv", Manifest.of("train", [0, 1]))
    with pytest.raises(InputError, match=r"no labeled image in .*m\.csv"):
        training_set([tmp_path / "m.csv"], 1.0, None, 0.1, 0)


def test_a_contest_gives_its_splits(tiny_contest: Path):
    contest = load_contest("tiny")
    assert (contest.size, contest.classes, contest.layout) == ((32, 32), 4, "contest")
    assert contest.packed("val").shape == (40, 32, 32, 3)
    assert contest.usable("train").tolist() == list(range(80))
    assert contest.labels("train").tolist() == [n % 4 for n in range(80)]
    assert (contest.labels("unlabeled") == -1).all()
    with pytest.raises(InputError, match=r"no split 'vall'; it has unlabeled, train, val, test"):
        contest.packed("vall")


def test_a_pool_follows_a_manifest_over_splits(tiny_contest: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever their order, each split is opened once: a process may open only so many files."""
    contest = load_contest("tiny")
    wanted = Manifest.of(["val", "val", "train", "val", "train"], [3, 1, 0, 9, 7], [0] * 5)
    opened: list[str] = []
    packed = Contest.packed
    monkeypatch.setattr(Contest, "packed", lambda c, s: (opened.append(s), packed(c, s))[1])
    pool = contest.pool(wanted)
    assert sorted(opened) == ["train", "val"]
    for k, image in zip((4, 0, 2, 1, 3), pool.gather(np.array([4, 0, 2, 1, 3])), strict=True):
        assert np.array_equal(image, packed(contest, str(wanted.split[k]))[wanted.index[k]])
    assert len(contest.pool(wanted.take(np.arange(0)))) == 0
    with pytest.raises(InputError, match="a manifest gives val 40 label 0; there are 40 images"):
        contest.pool(Manifest.of("val", [40], [0]))
    with pytest.raises(InputError, match="gives val 1 label 4; there are 40 images and 4 classes"):
        contest.pool(Manifest.of("val", [1], [4]))


def test_a_contest_that_was_not_prepared_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"contest\.json is not there; `make data ROOT=… CONTEST="):
        load_contest("none")


def test_changed_files_of_a_contest_are_refused(tiny_contest: Path):
    folder = Path("data_manifests/tiny")
    contest = load_contest("tiny")
    with (folder / "val.csv").open("a") as f:
        f.write("val,40,val/40.png,,1,\n")
    with pytest.raises(InputError, match=r"val\.csv was changed since contest\.json was written"):
        contest.manifest("val")
    np.save("data/tiny/train.npy", np.zeros((3, 32, 32, 3), np.uint8))
    with pytest.raises(InputError, match=r"train\.npy holds \[3, 32, 32, 3\] where contest\.json"):
        contest.packed("train")
    facts = json.loads((folder / "contest.json").read_text())
    del facts["mean"]
    (folder / "contest.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"contest\.json lacks 'mean'; `make data"):
        load_contest("tiny")
