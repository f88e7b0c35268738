"""Pack a contest's images and write its manifests.

python -m stages.prepare --data.root ROOT --data.contest NAME [--recipe recipes/demo.yaml]
Reads ROOT, a contest (SPLIT/N.png, SPLIT_label_tensor.pt) or an image folder (train/CLASS/*,
val/CLASS/*, unlabeled/*); writes data/NAME/SPLIT.npy, data_manifests/NAME/SPLIT.csv and, last,
data_manifests/NAME/contest.json.
"""

import json
import re
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import InputError, config, runs
from pipeline.contest_layout import Defect, Layout, Split, read_layout, report
from pipeline.config import Data, Recipe
from pipeline.duplicates import count_duplicates, first_match
from pipeline.manifest import PREPARED, Manifest, write_manifest
from pipeline.packed import Form, Packed, create, decoders, mean_std, pack, read_size, sha256
from pipeline.progress import progress


@dataclass(frozen=True)
class Options:
    force: bool = field(default=False, metadata={"help": "Run even where nothing has changed."})
    skip_bad: bool = field(default=False, metadata={"help": "Go on without images that are bad."})


def run(
    recipe: Recipe, plain: dict[str, Any], force: bool = False, skip_bad: bool = False
) -> None:
    """Pack and describe the recipe's contest, unless that was done and nothing has changed."""
    data, folder = recipe.data, runs.contest_folder(recipe.data.contest)
    layout = read_layout(_root(data))
    inputs = {"fingerprint": layout.fingerprint, "data": _facts(data)}
