"""Runs beside each other: what the files of a finished entry say, and a table of several."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import InputError, runs
from pipeline.draws import learned_labels
from pipeline.manifest import Contest
from pipeline.metrics import knn_accuracy

K = 20  # neighbors of the kNN accuracy that is compared
_HEAD = (
    "| recipe | method | seeds | kNN | linear | fine-tuned | images seen | minutes | peak MiB |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|---:|"
)
Records = list[dict[str, Any]]


def outcome(entry: str, contest: Contest) -> dict[str, Any]:
    """Scores on val in percent, and cost, as the finished stages of an entry wrote them."""
    folder = runs.entry_folder(entry)
    tuned = runs.finetune_folder(entry, runs.label_rounds(contest.folder, folder))
    pretrained = runs.read_json(folder / "pretrain" / "provenance.json", "make pretrain")
    evaluated = runs.read_json(folder / "evaluate" / "scores.json", "make evaluate")
    results = runs.read_json(tuned / "provenance.json", "make finetune")["results"]
    own, scores = pretrained["results"], evaluated["scores"]
    return {
        "contest": contest.name,
        "images_of_val": evaluated["images"],
        "knn": scores[f"knn_{K}_majority"]["1"],
        "linear": scores["linear"]["1"],
        "finetuned": results["val_top1"],
        "finetuned_top5": results["val_top5"],
        "knn_on_train": _knn_on_train(contest, folder),
        **{key: own[key] for key in ("images_seen", "steps", "minutes", "peak_memory_mib")},
        **{key: pretrained[key] for key in ("commit", "versions")},
    }


def entry_outcome(folder: Path, pretrained: bool) -> dict[str, Any]:
    """Scores in percent and minutes of training of an entry: of its latest fine-tuning, with the
    minutes of all and, where it `pretrained` itself, of that.
    """
    made_by = "make finetune"
    tuned = [runs.read_json(f / "provenance.json", made_by) for f in runs.finetune_folders(folder)]
    found = {key: tuned[-1]["results"][key] for key in ("val_top1", "val_top5", "holdout_top1")}
    found["minutes_of_finetuning"] = sum(made["results"]["minutes"] for made in tuned)
    if pretrained and (file := folder / "pretrain" / "provenance.json").is_file():
        found["minutes_of_pretraining"] = runs.read_json(file, "")["results"]["minutes"]
    return found | {key: tuned[-1][key] for key in ("commit", "versions")}


def _knn_on_train(contest: Contest, entry: Path) -> float | None:
    """kNN accuracy in percent of one half of train on the other, by an entry's embeddings; with
    supervision of the labels that pretraining did not learn, on those that it did; None where
    either is empty.
    """
    train, learned = contest.manifest("train").usable(), learned_labels(entry)
    train = train.take(np.random.default_rng(0).permutation(np.flatnonzero(train.label >= 0)))
    half = len(train) // 2
    if len(learned):
        known = train.among(learned)
        train, half = train.take(np.argsort(~known, kind="stable")), int(known.sum())
    if not 0 < half < len(train):
        return None
    x = np.load(runs.require(entry / "embeddings" / "train.npy", "make embed"))[train.index]
    return knn_accuracy(x[:half], train.label[:half], x[half:], train.label[half:], K)


def holds(old: Any, new: Any, default: Any) -> bool:
    """Whether all that decided a run is the same now; what a recipe could not say then has to be at
    its default, which is what the run was made with.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        default = default if isinstance(default, dict) else {}
        added = [key for key in new if key not in old]
        return (
            all(k in new and holds(v, new[k], default.get(k)) for k, v in old.items())
            and all(key in default and new[key] == default[key] for key in added)
        )  # fmt: skip
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        one = default[0] if isinstance(default, list) and default else None
        return all(holds(*pair, one) for pair in zip(old, new, strict=True))
    return bool(old == new)


def table(rows: dict[str, tuple[str, Records]], command: str) -> str:
    """A Markdown table, best first, of {recipe: (method, records of its seeds)}."""
    done = {name: row for name, row in rows.items() if row[1]}
    order = sorted(done, key=lambda name: -_mean(done[name][1], "finetuned"))
    lines = [_HEAD, *(_row(name, *done[name]) for name in order)]
    lines += [
        f"| {name} | {method} | 0 | not run yet | | | | | |"
        for name, (method, records) in rows.items()
        if not records
    ]
    every = [record for _, records in done.values() for record in records]
    return "\n".join([*lines, "", f"Written by `{command}`{_notes(every)}."])


def request_table(records: Records, floor: str, facts: dict[str, Any]) -> str:
    """A Markdown table of strategies, best first: top-1 on val, and what it is above random
    requests with the same seed, both ± the standard error over the seeds.
    """
    by: dict[str, dict[int, float]] = {}
    for record in records:
        by.setdefault(record["strategy"], {})[record["seed"]] = record["val_top1"]
    lines = ["| strategy | seeds | top-1 | above random |", "|---|---:|---:|---:|"]
    for name in sorted(by, key=lambda name: -statistics.fmean(by[name].values())):
        own, random = by[name], by["Random"]
        more = [own[seed] - random[seed] for seed in own.keys() & random.keys()]
        shown = "control" if name == "Random" else mean_and_error(more, "+.2f")
        label = "no request" if name == floor else name
        lines.append(f"| {label} | {len(own)} | {mean_and_error([*own.values()])} | {shown} |")
    steps = ", ".join(sorted({f"{record['steps']:,}" for record in records}))
    return "\n".join(lines) + (
        f"\n\n{facts['budget']:,} labels asked for on {facts['contest']}, each time fine-tuned in "
        f"{steps} steps from one encoder; ± the standard error over the seeds. Written by "
        f"`{facts['command']}` on {facts['machine']}."
    )


def precision_table(records: Records, control: str, facts: dict[str, Any]) -> str:
    """A Markdown table of predictors: the precision at each coverage, and what it is above the
    control's with the same classifier, both ± the standard error over the classifiers.
    """
    coverages = [key for key in records[0] if key.endswith("%")]
    by: dict[str, dict[str, dict[str, float]]] = {}
    for record in records:
        by.setdefault(record["predictor"], {})[record["classifier"]] = record
    heads = [f"right of {c}" for c in coverages] + [f"above {control}, {c}" for c in coverages]
    lines = [f"| predictor | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for name, own in by.items():
        cells = [mean_and_error([r[c] for r in own.values()]) for c in coverages]
        for c in coverages:
            more = [r[c] - by[control][of][c] for of, r in own.items()]
            cells.append("control" if name == control else mean_and_error(more, "+.2f"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    count = len(by[control])
    those = f"± the standard error over {count} classifiers" if count > 1 else "one classifier"
    return "\n".join(lines) + (
        f"\n\nPercent of right labels among the surest images of {facts['contest']}, by their true "
        f"labels; {those}. Written by `{facts['command']}` on {facts['machine']}."
    )


def entry_table(rows: dict[str, Records], control: str, command: str) -> str:
    """A Markdown table of {entry: records of its seeds}, best first: top-1 on val ± the standard
    error over the seeds, and its ratio to the control's.
    """
    done = {name: records for name, records in rows.items() if records}
    if not done:
        return "Not run yet."
    lines = [
        "| entry | seeds | top-1 | of the control | held out | minutes |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in sorted(done, key=lambda name: -_mean(done[name], "val_top1")):
        records = done[name]
        held = [r["holdout_top1"] for r in records if r.get("holdout_top1") is not None]
        ratio = "?" if control not in done else "control" if name == control else ""
        ratio = ratio or f"{_mean(records, 'val_top1') / _mean(done[control], 'val_top1'):.2f}"
        parts = "minutes_of_pretraining", "minutes_of_finetuning", "wall_minutes"
        minutes = [_mean(records, key) for key in parts if key in records[0]]
        cells = [name, str(len(records)), mean_and_error([r["val_top1"] for r in records]), ratio]
        cells += [mean_and_error(held) if held else "", " + ".join(f"{m:.1f}" for m in minutes)]
        lines.append(f"| {' | '.join(cells)} |")
    machines = "; ".join(sorted({r["machine"] for records in done.values() for r in records}))
    several = any(len(records) > 1 for records in done.values())
    error = ", ± the standard error over the seeds" if several else ""
    return "\n".join(lines) + (
        f"\n\nTop-1 in percent on val and on the labels held out of train{error}; minutes of "
        f"training, pretraining + fine-tuning (a peer's from start to end). Written by "
        f"`{command}` on {machines}."
    )


def mean_and_error(values: Sequence[float], form: str = ".2f") -> str:
    """The mean ± its standard error; alone where there is one value."""
    mean = f"{statistics.fmean(values):{form}}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}"


def _mean(records: Records, key: str) -> float:
    return statistics.fmean(record[key] for record in records)


def _row(name: str, method: str, records: Records) -> str:
    cells = [name, method, str(len(records))]
    for key in ("knn", "linear", "finetuned"):
        spread = statistics.stdev(r[key] for r in records) if len(records) > 1 else None
        cells.append(f"{_mean(records, key):.1f}" + (f" ± {spread:.1f}" if spread else ""))
    cells.append(f"{_mean(records, 'images_seen'):,.0f}")
    cells.append(f"{_mean(records, 'minutes'):.1f}")
    peaks = [r["peak_memory_mib"] for r in records if r["peak_memory_mib"] is not None]
    cells.append(f"{max(peaks):,.0f}" if peaks else "?")
    return f"| {' | '.join(cells)} |"


def _notes(records: Records) -> str:
    """What the numbers are, with the standard error of the most uncertain of them."""
    if not records:
        return ""
    images = records[0]["images_of_val"]
    shares = [r[key] / 100 for r in records for key in ("knn", "linear", "finetuned")]
    error = 100 * max(math.sqrt(p * (1 - p) / images) for p in shares)
    machines = "; ".join(sorted({r["machine"] for r in records}))
    return (
        f" on {machines}: top-1 in percent on the {images:,} images of val of "
        f"{records[0]['contest']} (binomial standard error up to {error:.1f}), ± the standard "
        f"deviation over seeds, of which the best by kNN on halves of train have several; kNN by "
        f"{K} neighbors; images seen, minutes of training and peak memory are the pretraining's"
    )


def marks(target: str) -> tuple[str, str]:
    """The comments around the table that `make target` writes into a Markdown file."""
    return f"<!-- table: make {target} -->", f"<!-- end of table: make {target} -->"


def put(path: Path, target: str, text: str) -> None:
    """Write `text` between the two comments of a Markdown file, at the end of one without any.

    Raises InputError where the comments are not there once, one after the other.
    """
    begin, end = marks(target)
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    if begin not in old and end not in old:
        old = f"{old.rstrip()}\n\n{begin}\n{end}\n".lstrip()
    head, _, rest = old.partition(begin)
    _, found, tail = rest.partition(end)
    if not found or old.count(begin) + old.count(end) > 2:
        raise InputError(f"{path}: {begin} and {end}, once each, are expected around the table")
    with runs.replacing(path) as aside:
        aside.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")


def of_one_contest(names: Sequence[str]) -> None:
    """InputError where recipes of several contests would be compared."""
    if several := sorted(set(names))[1:]:
        raise InputError(
            f"recipes of one contest are expected; these are of {min(names)} and {several[0]}"
        )
