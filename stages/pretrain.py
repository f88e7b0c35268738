"""Pretrain an encoder without labels.

python -m stages.pretrain --recipe recipes/demo.yaml
accelerate launch --multi_gpu --num_processes 8 -m stages.pretrain --recipe recipes/spring21.yaml

Reads data_manifests/CONTEST/contest.json and data/CONTEST/SPLIT.npy; writes runs/ENTRY/pretrain/
{encoder.safetensors, checkpoint.pt, plan.json, history.json, curve.png, tensorboard,
provenance.json} and, with supervision, the labels that it learned from, trained_on.csv.
Stopped or killed and started again, it goes on from the last checkpoint.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline import config, runs
from pipeline.checkpoint import save_tensors
from pipeline.figures import curve
from pipeline.machine import make_accelerator, peak_memory
from pipeline.manifest import load_contest, write_manifest
from pipeline.plan import check_budget, minutes_of
from pipeline.pretraining import check_inputs, pretrainer
from pipeline.recipe import Recipe
from pipeline.supervision import SupervisedContrast


@dataclass(frozen=True)
class Options(config.Force):
    plan_only: bool = field(
        default=False, metadata={"help": "Write plan.json, which fixes the steps, and stop."}
    )


def run(
    recipe: Recipe, plain: dict[str, Any], force: bool = False, plan_only: bool = False
) -> None:
    """Pretrain as `recipe` says, unless its finished result is there; `plan_only` makes no step."""
    c, contest = recipe.pretrain, load_contest(recipe.data.contest)
    folder = runs.entry_folder(recipe.entry) / "pretrain"
    facts = runs.Run.of(folder, plain, ("encoder", "pretrain"), [contest.folder / "contest.json"])
    if facts.is_current() and not force:
        runs.say(f"{folder} is up to date (--force runs it anew)")
        return
    check_budget(c)
    pool = check_inputs(recipe, contest)
    accelerator = make_accelerator(c.precision, folder)
    trainer = pretrainer(recipe, contest, pool, accelerator, facts)
    facts.begin(anew=force)  # everything is in order: what was finished here no longer is
    plan = trainer.plan(c, len(pool), c.resolutions)
    shares = ", ".join(
        f"{n:,} at {r} px" for r, n in zip(plan.resolutions, plan.steps, strict=True)
    )
    several = f" on {n} processes" if (n := accelerator.num_processes) > 1 else ""
    runs.say(f"{len(pool):,} images, {plan.total:,} steps of {c.batch_size} ({shares}){several}")
    if plan_only:
        runs.say(f"wrote {folder}/plan.json; next: make pretrain")
        return
    history = trainer.fit(plan, "pretrain")
    if accelerator.is_main_process:
        metadata = {
            "encoder": asdict(recipe.encoder),
            "mean": contest.mean,
            "std": contest.std,
            "resolution": plan.resolutions[-1],
        }
        weights = trainer.module.encoder.state_dict()  # type: ignore[union-attr]
        save_tensors(folder / "encoder.safetensors", weights, metadata)
        runs.write_json(folder / "history.json", history)
        (folder / "trained_on.csv").unlink(missing_ok=True)
        if isinstance(supervision := trainer.module.supervision, SupervisedContrast):
            write_manifest(folder / "trained_on.csv", supervision.learned(contest))
        drawn = ("step", "loss", "knn")  # the other signs are in TensorBoard
        points = [{k: h[k] for k in drawn if k in h} for h in history]
        curve(folder / "curve.png", points, "pretraining")
    images = plan.total * c.batch_size
    facts.finish(
        steps=plan.total,
        images_seen=images,
        minutes=minutes_of(history, c.batch_size),
        knn=next((h["knn"] for h in reversed(history) if "knn" in h), None),
        peak_memory_mib=peak_memory(),
    )
    runs.say(f"wrote {folder}/encoder.safetensors after {images:,} images; next: make embed")


def main() -> None:
    recipe, options, plain = config.parse(__doc__, Options)
    run(recipe, plain, options.force, options.plan_only)


if __name__ == "__main__":
    runs.stage(main)
