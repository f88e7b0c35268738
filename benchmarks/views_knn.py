"""kNN accuracy after a short pretraining on our views, beside the same on lightly's
SimCLRTransform.

python -m benchmarks.views_knn [--contest mini98 --steps 100 --size 48]
The same contest (one that
`make data` prepared, or else synthetic images), encoder, initial weights, batches, steps and
optimizer on both sides; three seeds; kNN (k = 20, cosine, majority) of one half of the labeled
training images on the other.  The ratio is that of the mean accuracies.
"""

import json
import statistics
from argparse import ArgumentParser

import numpy as np
import torch
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import Tensor

from pipeline.batches import batch_at
from pipeline.encoders import build_encoder, features
from pipeline.inference import predict
from pipeline.manifest import load_contest
from pipeline.methods.simclr import SimCLR
from pipeline.metrics import knn_accuracy
from pipeline.optim import Optimizer, build_optimizer, schedule, set_lr
from pipeline.packed import Pool
from pipeline.progress import progress
from pipeline.synthetic import make
from pipeline.views import View, Views, matmul_dtype, uniforms

SEEDS = (0, 1, 2)
BATCH = 128
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images_of(contest: str | None) -> tuple[Pool, Pool, np.ndarray]:
    """The pool to pretrain on, the labeled images and their labels."""
    if contest is None:
        parts = {}
        for split, per_class in (("unlabeled", 300), ("train", 100)):
            made = list(make(split, 10, per_class, 96, 0))
            parts[split] = np.stack([m[0] for m in made]), np.array([m[1] for m in made])
        (unlabeled, _), (train, labels) = parts["unlabeled"], parts["train"]
        return (
            Pool([(unlabeled, np.arange(len(unlabeled)))]),
            Pool([(train, np.arange(len(train)))]),
            labels,
        )
    c = load_contest(contest)
    rows, labels = c.usable("train"), c.labels("train")
    rows = np.random.default_rng(0).permutation(rows[labels[rows] >= 0])
    pool = Pool([(c.packed(s), c.usable(s)) for s in ("unlabeled", "train")])
    return pool, Pool([(c.packed("train"), rows)]), labels[rows]


def pretrained(pool: Pool, seed: int, steps: int, size: int, ours: bool) -> torch.nn.Module:
    """An encoder after `steps` steps of SimCLR."""
    torch.manual_seed(seed)
    transform = SimCLRTransform(input_size=size)
    method = SimCLR(build_encoder("resnet18"), 0.2).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(Optimizer(), {method: 1.0}, BATCH)
    dtype = matmul_dtype(torch.device("cpu"))
    make = Views([View()], MEAN, STD, dtype)

    def views(step: int) -> list[Tensor]:
        images = pool.gather(batch_at(len(pool), BATCH, seed, step))
        if ours:
            u = uniforms(seed, step, BATCH, 2)
            return make(torch.from_numpy(images), make.draw(u, *images.shape[1:3]), size)
        pairs = [transform(Image.fromarray(image)) for image in images]
        return [torch.stack([p[k] for p in pairs]).to(dtype) for k in (0, 1)]

    with progress(f"{'ours' if ours else 'lightly'}, seed {seed}", steps * BATCH, "images") as go:
        for step in range(steps):
            set_lr(optimizer, 0.06 * schedule(step / steps, 0.1))
            x = [v.contiguous(memory_format=torch.channels_last) for v in views(step)]
            with torch.autocast("cpu", torch.bfloat16, dtype == torch.bfloat16):
                loss = method(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            go(BATCH)
    return method.encoder


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--contest")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--size", type=int, default=48)
    o = parser.parse_args()
    pool, labeled, labels = images_of(o.contest)
    half = len(labels) // 2
    scores: dict[bool, list[float]] = {True: [], False: []}
    for seed in SEEDS:
        for ours in (True, False):
            encoder = pretrained(pool, seed, o.steps, o.size, ours)
            x = np.empty((len(labeled), features(encoder)), np.float32)
            predict(encoder, labeled, o.size, MEAN, STD, x, unit=True)
            score = knn_accuracy(x[:half], labels[:half], x[half:], labels[half:], 20)
            scores[ours].append(score)
            print(f"seed {seed}, {'ours' if ours else 'lightly'}: {score:.2f} %", flush=True)
    a, b = statistics.mean(scores[True]), statistics.mean(scores[False])
    found = {"ours": round(a, 2), "peer": round(b, 2), "ratio": round(a / b, 3)}
    print(json.dumps({"benchmark": "views_knn", **found, "unit": "% kNN top-1"}))


if __name__ == "__main__":
    main()
