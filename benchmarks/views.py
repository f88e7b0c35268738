"""Two SimCLR views of 96×96 images per second on one thread, beside lightly's SimCLRTransform.

python -m benchmarks.views [--images 512] The same operations and ranges on both sides; lightly's
transform runs on Pillow images that are decoded already, ours on the packed pixels.  The two are
timed in turns.
"""

import json
import statistics
import time
from argparse import ArgumentParser

import numpy as np
import torch
from lightly.transforms import SimCLRTransform
from PIL import Image

from pipeline.views import View, Views, uniforms

ROUNDS = 7
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photographs(n: int) -> np.ndarray:
    """Smooth random images with noise, [n, 96, 96, 3] uint8: the time does not depend on the
    content.
    """
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (n, 6, 6, 3), np.uint8)
    smooth = np.stack([np.asarray(Image.fromarray(c).resize((96, 96))) for c in coarse])
    return (smooth + rng.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512)
    count = parser.parse_args().images
    torch.set_num_threads(1)
    images = photographs(count)
    pillow, packed = [Image.fromarray(i) for i in images], torch.from_numpy(images)
    make, transform = Views([View()], MEAN, STD), SimCLRTransform(input_size=96)

    def ours(step: int) -> float:
        began = time.perf_counter()
        for start in range(0, count, 256):
            part = packed[start : start + 256]
            make(part, make.draw(uniforms(0, step, len(part), 2), 96, 96), 96)
        return count / (time.perf_counter() - began)

    def theirs() -> float:
        began = time.perf_counter()
        for image in pillow:
            transform(image)
        return count / (time.perf_counter() - began)

    ours(0), theirs()
    pairs = [(ours(k), theirs()) for k in range(ROUNDS)]
    for a, b in pairs:
        print(f"ours {a:,.0f} images/s, lightly {b:,.0f} images/s, ratio {a / b:.2f}")
    a, b = (statistics.median(p[k] for p in pairs) for k in (0, 1))
    ratio = round(statistics.median(x / y for x, y in pairs), 2)
    found = {"ours": round(a, 1), "peer": round(b, 1), "ratio": ratio, "unit": "images/s"}
    print(json.dumps({"benchmark": "views", **found}))


if __name__ == "__main__":
    main()
