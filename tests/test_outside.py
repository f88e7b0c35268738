"""Outside weights in every naming fill an encoder, and what does not fit is named."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline import InputError
from pipeline.encoders import build_encoder
from pipeline.outside import load_outside

from .conftest import Malicious

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def donor() -> nn.Module:
    """A ResNet-18 of torchvision's whose batch norms have statistics of their own."""
    torch.manual_seed(1)
    model = torchvision.models.resnet18(num_classes=7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def features(donor: nn.Module) -> Tensor:
    """What the donor computes before its classifier."""
    body = nn.Sequential(*list(donor.children())[:-1], nn.Flatten())
    return body.eval()(IMAGES)


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def other(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the same shapes that are not the donor's."""
    return {key: torch.zeros_like(value) for key, value in state.items()}


def as_torchvision(state: dict[str, Tensor]) -> Any:
    return state


def as_moco(state: dict[str, Tensor]) -> Any:
    """moco/builder.py within DistributedDataParallel: two encoders, the queue, the optimizer."""
    both = prefixed(state, "module.encoder_q.") | prefixed(other(state), "module.encoder_k.")
    queue = {"module.queue": torch.zeros(128, 16), "module.queue_ptr": torch.zeros(1)}
    momentum = {0: {"momentum_buffer": torch.zeros(64, 3, 7, 7)}}
    optimizer = {"state": momentum, "param_groups": [{"lr": 0.03}]}
    return {"epoch": 200, "arch": "resnet18", "state_dict": both | queue, "optimizer": optimizer}


def as_moco_v3(state: dict[str, Tensor]) -> Any:
    both = prefixed(state, "module.base_encoder.") | prefixed(
        other(state), "module.momentum_encoder."
    )
    return {"state_dict": both}


def as_simclr(state: dict[str, Tensor]) -> Any:
    return {"state_dict": prefixed(state, "backbone.")}


def as_simclr_distributed(state: dict[str, Tensor]) -> Any:
    return {"model": prefixed(state, "module.backbone.")}


def as_simclr_with_projector(state: dict[str, Tensor]) -> Any:
    return prefixed(state, "encoder.") | {"projector.0.weight": torch.zeros(512, 512)}


def as_simclr_convnet(state: dict[str, Tensor]) -> Any:
    return prefixed(state, "convnet.")


def as_sequential(state: dict[str, Tensor]) -> Any:
    """lightly's: nn.Sequential(*list(resnet.children())[:-1]) as `backbone`."""
    places = [name for name, _ in torchvision.models.resnet18().named_children()]
    named = {f"backbone.{places.index(k.split('.')[0])}.{k.split('.', 1)[1]}": k for k in state}
    return {"state_dict": {new: state[old] for new, old in named.items() if "fc" not in old}}


NAMINGS = {
    as_torchvision: "",
    as_moco: "state_dict.module.encoder_q.",
    as_moco_v3: "state_dict.module.base_encoder.",
    as_simclr: "state_dict.backbone.",
    as_simclr_distributed: "model.module.backbone.",
    as_simclr_with_projector: "encoder.",
    as_simclr_convnet: "convnet.",
    as_sequential: "state_dict.backbone.",
}


@pytest.mark.parametrize(
    ("naming", "prefix"), NAMINGS.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_every_naming_gives_the_donors_features(
    naming: Any, prefix: str, donor: nn.Module, tmp_path: Path
) -> None:
    file = tmp_path / "weights.pth.tar"
    torch.save(naming(donor.state_dict()), file)
    encoder = build_encoder("resnet18")
    report = load_outside(str(file), encoder)
    assert (report.prefix, report.unfilled) == (prefix, [])
    torch.testing.assert_close(encoder.eval()(IMAGES), features(donor))


def test_the_head_is_listed_as_not_used(donor: nn.Module, tmp_path: Path) -> None:
    save_file(donor.state_dict(), tmp_path / "weights.safetensors")
    report = load_outside(str(tmp_path / "weights.safetensors"), build_encoder("resnet18"))
    assert sorted(report.unused) == ["fc.bias", "fc.weight"]
    assert "not used: fc.weight" in str(report)


def test_timms_own_file_of_a_convnext(tmp_path: Path) -> None:
    donor = timm.create_model("test_convnext", num_classes=5).eval()
    torch.save(donor.state_dict(), tmp_path / "weights.pt")
    encoder = build_encoder("test_convnext")
    report = load_outside(str(tmp_path / "weights.pt"), encoder)
    assert report.unfilled == []
    expected = donor.forward_head(donor.forward_features(IMAGES), pre_logits=True)
    torch.testing.assert_close(encoder.eval()(IMAGES), expected)


def test_torchvisions_vision_transformer(tmp_path: Path) -> None:
    donor = torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=5).eval()
    nn.init.normal_(donor.class_token)
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    options = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    encoder = build_encoder("vit_tiny_patch16_224", **options).eval()
    report = load_outside(str(tmp_path / "weights.pth"), encoder)
    assert (report.unfilled, report.unused) == ([], ["heads.head.weight", "heads.head.bias"])
    donor.heads = nn.Identity()
    torch.testing.assert_close(encoder(IMAGES), donor(IMAGES))


def test_another_stem_is_listed_and_stays_random(donor: nn.Module, tmp_path: Path) -> None:
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    encoder = build_encoder("resnet18", "low_stride")
    before = encoder.conv1.weight.clone()
    report = load_outside(str(tmp_path / "weights.pth"), encoder)
    assert report.unfilled == ["conv1.weight: [64, 3, 7, 7] is given, [64, 3, 3, 3] is expected"]
    assert torch.equal(encoder.conv1.weight, before)
    assert torch.equal(encoder.bn1.running_mean, donor.bn1.running_mean)


def test_weights_of_another_network_are_refused_with_the_list(tmp_path: Path) -> None:
    donor = torchvision.models.resnet50()
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    encoder = build_encoder("resnet18")
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    with pytest.raises(InputError, match="do not fit the encoder") as refusal:
        load_outside(str(tmp_path / "weights.pth"), encoder)
    assert "layer1.0.conv1.weight: [64, 64, 1, 1] is given, [64, 64, 3, 3] is" in str(refusal.value)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_a_malicious_pickle_is_refused_and_nothing_runs(donor: nn.Module, tmp_path: Path) -> None:
    trace, file = tmp_path / "it-ran", tmp_path / "weights.pth"
    torch.save({"state_dict": donor.state_dict(), "args": Malicious(trace)}, file)
    with pytest.raises(InputError, match="refused"):
        load_outside(str(file), build_encoder("resnet18"))
    assert not trace.exists()
    torch.load(file, weights_only=False)  # the file does what it says where it is not refused
    assert trace.exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("weights.npz", b"", "'timm' or a file is expected"),
        ("weights.pth", b"not weights", "weights.pth"),
        ("weights.safetensors", b"not weights", "not a safetensors file"),
        ("absent.pth", None, "there is no such file"),
    ],
)
def test_other_files_are_refused(
    name: str, content: bytes | None, reason: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason):
        load_outside(str(tmp_path / name), build_encoder("resnet18"))


def test_timm_without_a_network_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service\nnot known")

    encoder = build_encoder("resnet18")
    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(InputError, match=r"could not be fetched \(Name or service not known\)"):
        load_outside("timm", encoder)


def test_timms_weights_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the download replaced: the donor is asked for by name and tag, and fills the encoder."""
    donor, encoder, asked = build_encoder("resnet18"), build_encoder("resnet18"), []
    monkeypatch.setattr(timm, "create_model", lambda name, **_: asked.append(name) or donor)
    assert load_outside("timm", encoder).unfilled == []
    assert asked == ["resnet18.a1_in1k"]
    assert torch.equal(encoder.conv1.weight, donor.conv1.weight)


def test_timm_has_no_weights_for_it() -> None:
    encoder = build_encoder("resnet18")
    encoder.pretrained_cfg = {"architecture": "resnet10t_none"}
    with pytest.raises(InputError, match="no pretrained weights for 'resnet10t_none'"):
        load_outside("timm", encoder)
