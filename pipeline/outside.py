"""Outside weights, for comparisons with transfer learning: fitted to an encoder by key names."""

import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from pipeline import InputError
from pipeline.checkpoint import load_tensors, load_torch

_ENDINGS = (".pth", ".pt", ".tar", ".bin", ".ckpt", ".safetensors")

# torchvision's own names in vision transformers; in ResNets, VGGs and DenseNets they are timm's.
_TORCHVISION_VIT = (
    (r"\bclass_token$", "cls_token"),
    (r"\bconv_proj\.", "patch_embed.proj."),
    (r"\bencoder\.pos_embedding$", "pos_embed"),
    (r"\bencoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"(\bblocks\.\d+)\.ln_([12])\.", r"\1.norm\2."),
    (r"(\bblocks\.\d+)\.self_attention\.in_proj_", r"\1.attn.qkv."),
    (r"(\bblocks\.\d+)\.self_attention\.out_proj\.", r"\1.attn.proj."),
    (r"(\bblocks\.\d+)\.mlp\.(?:0|linear_1)\.", r"\1.mlp.fc1."),
    (r"(\bblocks\.\d+)\.mlp\.(?:3|linear_2)\.", r"\1.mlp.fc2."),
    (r"\bencoder\.ln\.", "norm."),
)


@dataclass(frozen=True)
class Outside:
    """What became of outside weights: what was filled, and everything that did not fit."""

    source: str
    prefix: str
    """What stood before the encoder's own key names, as 'state_dict.module.encoder_q.'."""
    filled: list[str]
    """Tensors of the encoder that the weights gave."""
    unfilled: list[str]
    """Tensors of the encoder that keep their random values, each with the reason."""
    unused: list[str]
    """Keys under the prefix that the encoder has no place for, as a classifier's."""
    elsewhere: int
    """Number of tensors that are not under the prefix (momentum encoder, optimizer, projector)."""

    def __str__(self) -> str:
        return self.report()

    def report(self, shown: int | None = None) -> str:
        """One line for all, one for each key that does not fit: the first `shown` of them."""
        total = len(self.filled) + len(self.unfilled)
        lines = [f"{self.source}: {len(self.filled)} of the encoder's {total} tensors filled"]
        lines[0] += f", from {self.prefix!r}" if self.prefix else ""
        lines += [f"  left as it was: {line}" for line in self.unfilled]
        lines += [f"  not used: {key}" for key in self.unused]
        lines += [f"  not used: {self.elsewhere} tensors of other parts"] if self.elsewhere else []
        if shown is not None and len(lines) > shown + 1:
            lines[shown + 1 :] = [f"  … and {len(lines) - shown - 1} more"]
        return "\n".join(lines)


def load_outside(source: str, encoder: nn.Module) -> Outside:
    """Fill a timm encoder with outside weights and report every key that does not fit.

    `source` is 'timm' (the weights that timm gives this architecture, downloaded) or a local file
    in timm's, torchvision's, MoCo's, SimCLR's or a Sequential's key naming, in any wrapper: the
    prefix under which most of the encoder's tensors are found by name and shape is the encoder's
    (of equals the first: MoCo's encoder_q, not its momentum encoder).  Heads are dropped.

    Raises InputError, with the report, where less than half of the encoder's weights (biases and
    norms aside) are found; where the file is missing, damaged or could run a program; where timm
    has no weights or no network.
    """
    own = {k: v for k, v in encoder.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = _read(source, encoder)
    names = {name: key for key in own for name in (key, _positional(key, encoder))}
    prefix = _prefix(given, own, names)
    under = {k[len(prefix) :]: k for k in given if k.startswith(prefix)}
    found = {names[rest]: key for rest, key in under.items() if rest in names}
    fits = {
        own_key: key for own_key, key in found.items() if given[key].shape == own[own_key].shape
    }
    unfilled = [
        f"{k}: {list(given[found[k]].shape)} is given, {list(v.shape)} is expected"
        if k in found
        else f"{k}: not given"
        for k, v in own.items()
        if k not in fits
    ]
    unused = [
        rest for rest in under if rest not in names and not rest.endswith("num_batches_tracked")
    ]
    report = Outside(source, prefix, list(fits), unfilled, unused, len(given) - len(under))
    matrices = [k for k, v in own.items() if v.ndim > 1]  # vectors fit by chance
    if 2 * sum(k in fits for k in matrices) < len(matrices):
        raise InputError(f"these weights do not fit the encoder\n{report.report(20)}")
    encoder.load_state_dict({k: given[key] for k, key in fits.items()}, strict=False)
    return report


def _read(source: str, encoder: nn.Module) -> dict[str, Tensor]:
    """The tensors of `source` by flat key, in the file's order, in timm's naming."""
    if source == "timm":
        return _from_timm(encoder)
    path = Path(source)
    if path.suffix not in _ENDINGS:
        raise InputError(
            f"outside weights {source!r}: 'timm' or a file is expected, ending in one of "
            f"{', '.join(_ENDINGS)}"
        )
    if not path.is_file():
        raise InputError(f"outside weights {source!r}: there is no such file")
    given = load_tensors(path)[0] if path.suffix == ".safetensors" else _flat(load_torch(path))
    if any("encoder_layer_" in key for key in given):
        given = {_rename(key): value for key, value in given.items()}
    return given


def _from_timm(encoder: nn.Module) -> dict[str, Tensor]:
    facts: dict[str, Any] = getattr(encoder, "pretrained_cfg", None) or {}
    name = ".".join(filter(None, (facts.get("architecture"), facts.get("tag"))))
    if not timm.is_model_pretrained(name):
        raise InputError(f"timm has no pretrained weights for {name!r}; see timm.list_pretrained()")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are no news
    try:
        return dict(timm.create_model(name, pretrained=True, num_classes=0).state_dict())
    except Exception as error:  # every hub client raises errors of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"timm's weights for {name!r} could not be fetched ({reason}); "
            f"without a network give a local file as finetune.weights"
        ) from None


def _flat(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """Tensors in nested dicts by dotted path: wrappers as 'state_dict' become part of the key."""
    if isinstance(value, Tensor):
        return {prefix[:-1]: value}
    if not isinstance(value, dict):
        return {}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}{key}.").items()}


def _rename(key: str) -> str:
    for pattern, replacement in _TORCHVISION_VIT:
        key = re.sub(pattern, replacement, key)
    return key


def _positional(key: str, encoder: nn.Module) -> str:
    """The key's name in nn.Sequential(*encoder.children()), as lightly and others keep encoders."""
    first, _, rest = key.partition(".")
    places = [name for name, _ in encoder.named_children()]
    return f"{places.index(first)}.{rest}" if first in places else key


def _prefix(given: dict[str, Tensor], own: dict[str, Tensor], names: dict[str, str]) -> str:
    """What stands before the names of most of the encoder's tensors, the first of equals."""
    votes: Counter[str] = Counter()
    for key, value in given.items():
        parts = key.split(".")
        for start in range(len(parts)):
            name = ".".join(parts[start:])
            if name in names and own[names[name]].shape == value.shape:
                votes[key[: len(key) - len(name)]] += 1
    return max(votes, key=votes.__getitem__, default="")
