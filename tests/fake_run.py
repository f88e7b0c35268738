"""A small contest and entry, every file of it written here as the stages before would leave it."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from pipeline import config

COUNTS = {"train": 20, "val": 24, "unlabeled": 60}
CLASSES = 4
SKIPPED, IN_VAL, LIKE_TRAIN, TWINS = 3, 7, 11, (20, 40)  # of unlabeled


def label(split: str, index: int) -> int:
    """Each class as often as the others, in no order."""
    return int(np.random.default_rng(len(split)).permutation(COUNTS[split])[index] % CLASSES)


def write_run(root: Path, rehearsal: bool = True, val: bool = True) -> None:
    """A contest and the embeddings of an entry as prepare and embed leave them."""
    rng = np.random.default_rng(0)
    folder = root / "data_manifests" / "small"
    folder.mkdir(parents=True)
    splits: dict[str, Any] = {}
    for split, n in COUNTS.items():
        if split == "val" and not val:
            continue
        rows = ["split,index,file,sha256,label,note"]
        for k in range(n):
            note, sha = "", hashlib.sha256(f"{split}{k}".encode()).hexdigest()
            if split == "unlabeled":
                note = {
                    SKIPPED: "skipped: truncated",
                    IN_VAL: "excluded: same bytes as val/1.png",
                }.get(k, "")
                sha = hashlib.sha256(b"train5").hexdigest() if k == LIKE_TRAIN else sha
                sha = hashlib.sha256(b"twins").hexdigest() if k in TWINS else sha
            known = "" if split == "unlabeled" else label(split, k)
            rows.append(f"{split},{k},{split}/{k}.png,{sha},{known},{note}")
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")
        truth = np.array([label(split, k) for k in range(n)])
        colors = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [180, 180, 30]])
        images = colors[truth][:, None, None] + rng.integers(-30, 31, (n, 16, 16, 3))
        packed = root / "data" / "small" / f"{split}.npy"
        packed.parent.mkdir(parents=True, exist_ok=True)
        np.save(packed, images.clip(0, 255).astype(np.uint8))
        x = np.eye(CLASSES, 8)[truth] + 0.35 * rng.standard_normal((n, 8))
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        if split == "unlabeled":
            x[[SKIPPED]] = 0
        out = root / "runs" / "entry" / "embeddings" / f"{split}.npy"
        out.parent.mkdir(parents=True, exist_ok=True)
        np.save(out, x.astype(np.float32))
        manifest = hashlib.sha256((folder / f"{split}.csv").read_bytes()).hexdigest()
        splits[split] = {"images": n, "usable": n, "manifest": f"{split}.csv"}
        splits[split] |= {"manifest_sha256": manifest, "packed_sha256": ""}
    facts = {"contest": "small", "root": "given", "layout": "contest", "rehearsal": rehearsal}
    facts |= {"size": [16, 16], "classes": CLASSES, "class_names": ["ant", "bee", "cat", "dog"]}
    facts |= {
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "splits": splits,
        "skipped": [],
        "duplicates": {},
    }
    (folder / "contest.json").write_text(json.dumps(facts))
    made_from = Path("data_manifests/small/contest.json")  # as the stages name it
    digest = hashlib.sha256((root / made_from).read_bytes()).hexdigest()
    made = {"inputs": {str(made_from): digest}, "results": {}}
    (root / "runs/entry/embeddings/provenance.json").write_text(json.dumps(made))


def write_finetune(number: int = 0, held: bool = True, sharp: float = 4.0) -> Path:
    """runs/entry/finetune-K as fine-tuning leaves it: logits that are mostly right."""
    folder = Path("runs/entry") / f"finetune-{number}"
    (folder / "logits").mkdir(parents=True)
    rng = np.random.default_rng(number)
    for split, n in COUNTS.items():
        truth = np.array([label(split, k) for k in range(n)])
        logits = sharp * np.eye(CLASSES)[truth] + 1.5 * rng.standard_normal((n, CLASSES))
        np.save(folder / "logits" / f"{split}.npy", logits.astype(np.float32))
    rows = [f"train,{k},{label('train', k)},train.csv" for k in range(20)]
    apart, used = (rows[::2], rows[1::2]) if held else ([], rows)
    for name, those in (("holdout", apart), ("trained_on", used)):
        (folder / f"{name}.csv").write_text("\n".join(["split,index,label,source", *those]) + "\n")
    save_file({}, folder / "classifier.safetensors", {"json": "{}"})
    facts = Path("data_manifests/small/contest.json")
    inputs = {str(facts): hashlib.sha256(facts.read_bytes()).hexdigest()}
    (folder / "provenance.json").write_text(json.dumps({"inputs": inputs}))
    return folder


@cache
def parsed(*argv: str) -> config.Invocation:
    """The recipe of the small contest, with these overrides."""
    return config.parse("", argv=["--data.contest", "small", *argv])


def start(stage: Any, *argv: str, **options: Any) -> Any:
    """Run a stage of the entry."""
    recipe, _, plain = parsed(*argv)
    return stage.run(recipe, plain, **options)
