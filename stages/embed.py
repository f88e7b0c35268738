"""Embed every split with the pretrained encoder.

python -m stages.embed --recipe recipes/demo.yaml
Reads runs/ENTRY/pretrain/encoder.safetensors and data/CONTEST/SPLIT.npy; writes
runs/ENTRY/embeddings/SPLIT.npy, float32 [images, d] of unit length (rows of skipped images are
zero).
"""

from typing import Any

from pipeline import config, runs
from pipeline.checkpoint import load_tensors
from pipeline.encoders import features
from pipeline.inference import check_size, encoder_for, predict_split
from pipeline.machine import make_accelerator
from pipeline.manifest import load_contest
from pipeline.recipe import Recipe


def run(recipe: Recipe, plain: dict[str, Any], force: bool = False) -> None:
    """Embed the splits, unless the finished embeddings of these weights are there."""
    contest, entry = load_contest(recipe.data.contest), runs.entry_folder(recipe.entry)
    weights = contest.finished(entry / "pretrain", "make pretrain") / "encoder.safetensors"
    inputs = [contest.folder / "contest.json", weights]
    decides = plain | {"evaluate": {k: plain["evaluate"][k] for k in ("resolution", "unlabeled")}}
    facts = runs.Run.of(entry / "embeddings", decides, ("evaluate",), inputs)
    if facts.is_current() and not force:
        runs.say(f"{facts.folder} is up to date (--force runs it anew)")
        return
    accelerator = make_accelerator("auto", facts.folder)
    tensors, meta = load_tensors(weights)
    encoder = encoder_for(meta["encoder"])
    encoder.load_state_dict(tensors)
    encoder.to(accelerator.device)
    size = recipe.evaluate.resolution or meta["resolution"]
    check_size(encoder, size)
    facts.begin()
    for split in contest.splits_with(unlabeled=recipe.evaluate.unlabeled):
        file = facts.folder / f"{split}.npy"
        width, batch = features(encoder), recipe.evaluate.batch_size
        predict_split(encoder, contest, split, file, width, size, batch, unit=True)
        runs.say(f"{file}: {contest.splits[split]['images']:,} × {width}")
    facts.finish(resolution=size)
    runs.say(f"wrote {facts.folder}; next: make evaluate")


def main() -> None:
    recipe, options, plain = config.parse(__doc__, config.Force)
    run(recipe, plain, options.force)


if __name__ == "__main__":
    runs.stage(main)
