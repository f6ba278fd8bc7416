import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from nldist.dist.engine import Backbone
from nldist.errors import UserError
from nldist.models import Network, build_model, check_revision, model_names
from tests.conftest import REPOSITORY
from tests.networks import Flat


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "num_classes", "millions", "num_features"),
    [
        ("preact_resnet18", 10, 11.17, 512),
        ("resnet18_cifar", 10, 11.17, 512),
        ("resnet18_cifar", 100, 11.22, 512),
        ("resnet34_cifar", 10, 21.28, 512),
        ("resnet50", 1000, 25.56, 2048),
        ("inception_resnet_v2", 1000, 55.84, 1536),
        ("vgg19_bn", 1000, 143.68, 4096),
    ],
)
def test_published_numbers_of_parameters(name: str, num_classes: int, millions: float, num_features: int) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes)
    assert num_parameters(model) / 1e6 == pytest.approx(millions, abs=0.006)
    assert model.num_features == num_features


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("small_cnn", 8),
        ("small_cnn", 33),
        ("preact_resnet18", 32),
        ("resnet18_cifar", 32),
        ("resnet34_cifar", 16),
        ("mobilenetv3_small_050", 64),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_logits_are_the_head_of_the_features(name: str, size: int, memory_format: torch.memory_format) -> None:
    model = build_model(name, 7).to(memory_format=memory_format).eval()  # type: ignore[call-overload]
    images = torch.randn(2, 3, size, size).contiguous(memory_format=memory_format)
    features = model.features(images)
    assert features.shape == (2, model.num_features)
    assert model.logits(images).shape == (2, 7)
    torch.testing.assert_close(model.logits(images), model.heads["classify"](features))


def test_channels_last_gives_the_same_logits() -> None:
    images = torch.randn(4, 3, 32, 32)
    for name in ("small_cnn", "preact_resnet18", "resnet18_cifar"):
        model = build_model(name, 5).eval()
        expected = model.logits(images)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        got = model.logits(images.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_batch_norm_follows_the_mode() -> None:
    images = torch.randn(16, 3, 8, 8)
    model = build_model("small_cnn", 3)
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    model.eval()
    assert torch.allclose(model.logits(images[:1]), model.logits(images)[:1], atol=1e-6)
    assert all(torch.equal(value, buffers[key]) for key, value in model.named_buffers())
    model.train()
    assert not torch.allclose(model.logits(images[:8])[:1], model.logits(images)[:1], atol=1e-4)
    assert not all(torch.equal(value, buffers[key]) for key, value in model.named_buffers())


def test_resnet18_cifar_begins_from_kaiming_normal_convolutions() -> None:
    """He et al. 2015, section 2.2, by fan-out: as in ScanMix's and SCAN's codes."""
    torch.manual_seed(0)
    for name, expected in (("resnet18_cifar", True), ("resnet34_cifar", False), ("preact_resnet18", False)):
        for module in build_model(name, 10).modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
                std = (2 / (module.out_channels * module.weight[0, 0].numel())) ** 0.5
                assert (abs(module.weight.std() / std - 1) < 0.03) == expected, name
            elif isinstance(module, nn.BatchNorm2d):
                assert (module.weight == 1).all()
                assert (module.bias == 0).all()


def test_preact_resnet18_is_dividemixs_variant() -> None:
    model = build_model("preact_resnet18", 10)
    backbone = model.backbone
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 1 + 8 * 2  # one behind the stem, two in each block, none at the end or in shortcuts
    features = model.eval().features(torch.randn(8, 3, 32, 32))
    assert features.min() < 0  # no ReLU before the pooling


def convolved(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """What a layer makes of images (in a layout of their own), and the gradients of its weight and of them."""
    images = images.detach().requires_grad_()
    outputs = model(images)
    outputs.square().sum().backward()
    (weight,) = model.parameters()
    assert weight.grad is not None
    assert images.grad is not None
    assert weight.grad.stride() == weight.stride()
    return [outputs.detach(), weight.grad, images.grad]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_wide_convolution_is_torchs_in_whatever_layout_it_computes(memory_format: torch.memory_format) -> None:
    backbone = build_model("preact_resnet18", 10).backbone
    layer = backbone.get_submodule("stages.3.1.conv1").to(memory_format=memory_format)
    precise = nn.Conv2d(512, 512, 3, padding=1, bias=False).double()
    precise.load_state_dict(layer.state_dict())
    images = torch.randn(4, 512, 4, 4).contiguous(memory_format=memory_format)
    for got, wanted in zip(convolved(layer, images), convolved(precise, images.double()), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def by_formula(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that tests/released/networks.json tells of."""
    weights = {}
    for k, (name, old) in enumerate((name, value) for name, value in state.items() if value.is_floating_point()):
        wave = torch.sin(0.37 * torch.arange(old.numel(), dtype=torch.float64) + k).view(old.shape)
        if old.ndim > 1:
            weights[name] = wave * (2 / old[0].numel()) ** 0.5
        elif name.endswith(("running_mean", "bias")):
            weights[name] = 0.1 * wave
        else:
            weights[name] = 1 + (0.2 if name.endswith("running_var") else 0.1) * wave
    return weights


@pytest.mark.parametrize(
    ("name", "side", "tolerances"),
    [
        # Batch norm over three images of 1 x 1 maps makes 1e-5 of a processor's last bit.
        ("resnet34_cifar", 32, {"eval": 1e-9, "train": 1e-4}),
        ("inception_resnet_v2", 299, {"eval": 1e-9, "train": 1e-9}),
    ],
)
def test_networks_are_the_released_ones(name: str, side: int, tolerances: dict[str, float]) -> None:
    """MixNN's ResNet-34 and DivideMix's Inception-ResNet-v2; PreAct-ResNet-18 is in tests/methods."""
    released = json.loads((REPOSITORY / "tests" / "released" / "networks.json").read_text())[name]
    model = build_model(name, 10).double()
    model.load_state_dict(by_formula(model.state_dict()), strict=False)
    i = torch.arange(3 * 3 * side * side, dtype=torch.float64)
    images = torch.sin(0.01 * i + 0.05 * (i % 97)).view(3, 3, side, side)
    for mode, tolerance in tolerances.items():
        with torch.no_grad():
            logits = model.train(mode == "train").logits(images)
        expected = torch.tensor(released[f"logits_{mode}"], dtype=torch.float64)
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_what_was_saved_of_another_network_is_refused(tmp_path: Path) -> None:
    for saved, name in (
        ({"model_revision": 2}, "preact_resnet18"),
        ({}, "small_cnn"),
        ({"model_revision": 1}, "resnet50"),
    ):
        check_revision(saved, name, tmp_path)
    with pytest.raises(UserError, match=r"carry relu\(bn1\(x\)\).*use nldist 0\.1"):
        check_revision({}, "preact_resnet18", tmp_path)
    for name, revision in (("preact_resnet18", 3), ("resnet18_cifar", 2)):
        with pytest.raises(UserError, match=f"a {name} that this nldist does not know yet: update nldist"):
            check_revision({"model_revision": revision}, name, tmp_path)


def test_small_cnn_learns() -> None:
    torch.manual_seed(0)
    labels = torch.arange(64) % 4
    images = torch.randn(64, 3, 8, 8) * 0.5
    for label in range(4):
        images[labels == label, :, label * 2 : label * 2 + 2] += 1
    model = build_model("small_cnn", 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(15):
        loss = nn.functional.cross_entropy(model.logits(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert loss < 0.1


@pytest.mark.parametrize(("wrong", "right"), [("resnet_50", "resnet50"), ("smallcnn", "small_cnn")])
def test_an_unknown_name_gets_the_nearest_ones(wrong: str, right: str) -> None:
    assert right in model_names()
    with pytest.raises(UserError, match=rf"{wrong}.*\b{right}\b"):
        build_model(wrong, 10)


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_pretrained_classifier(tmp_path: Path, suffix: str) -> None:
    source = build_model("small_cnn", 6)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}, "epoch": 3}, path)
    else:
        save_file(source.state_dict(), path)
    assert same_weights(build_model("small_cnn", 6, pretrained=path), source)
    other = build_model("small_cnn", 9, pretrained=path)
    assert same_weights(other.backbone, source.backbone)
    assert other.heads["classify"].out_features == 9


def test_pretrained_timm_checkpoint(tmp_path: Path) -> None:
    source = timm.create_model("resnet10t", num_classes=12, pretrained=False)
    torch.save(source.state_dict(), tmp_path / "r.pth")
    images = torch.randn(2, 3, 64, 64)
    model = build_model("resnet10t", 12, pretrained=tmp_path / "r.pth").eval()
    torch.testing.assert_close(model.logits(images), source.eval()(images))
    fewer = build_model("resnet10t", 5, pretrained=tmp_path / "r.pth").eval()
    torch.testing.assert_close(fewer.features(images), model.features(images))


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(build_model("preact_resnet18", 10).state_dict(), path)
    with pytest.raises(UserError, match=r"lacks stages\.0\.0\.weight.*and \d+ more"):
        build_model("small_cnn", 10, pretrained=path)
    state = build_model("small_cnn", 10).state_dict()
    state["backbone.stages.1.1.weight"] = torch.zeros(3)
    torch.save(state, path)
    with pytest.raises(UserError, match=r"other shapes for stages\.1\.1\.weight"):
        build_model("small_cnn", 10, pretrained=path)


class Foreign:
    """Something that only an unsafe unpickler would build."""


@pytest.mark.parametrize("content", ["missing", "pickle", "garbage", "list", "bad safetensors"])
def test_an_unreadable_checkpoint_is_a_user_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / ("weights.safetensors" if "safetensors" in content else "weights.pt")
    if content == "pickle":
        torch.save({"state_dict": Foreign()}, path)
    elif content == "list":
        torch.save([torch.zeros(2)], path)
    elif content != "missing":
        path.write_bytes(b"no weights in here")
    with pytest.raises(UserError, match=r"weights\."):
        build_model("small_cnn", 10, pretrained=path)


@pytest.mark.parametrize(
    "name", ["small_cnn", "preact_resnet18", "resnet18_cifar", "resnet10t", "mobilenetv3_small_050"]
)
def test_every_backbone_gives_maps_and_features(name: str) -> None:
    """timm's two methods; the pooled features are what the linear head sees."""
    model = build_model(name, 3).eval()
    maps, features, logits = model((torch.randn(2, 3, 64, 64), "maps", "features", "classify"))
    assert maps.ndim == 4
    assert features.shape == (2, model.num_features)
    torch.testing.assert_close(logits, model.heads["classify"](features))


def small() -> Network:
    torch.manual_seed(2)
    backbone = Flat(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    return Network(backbone, 16, classify=nn.Linear(16, 3), cluster=nn.Linear(16, 5))


def test_calls_are_forwards_one_after_the_other() -> None:
    one, other = torch.randn(6, 3, 4, 4), torch.randn(9, 3, 4, 4)
    together, apart = small(), small()
    outputs = together((one, "classify"), (other, "cluster", "features"))
    expected = [apart.logits(one), *apart((other, "cluster", "features"))]
    for got, want in zip(outputs, expected, strict=True):
        assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(together.buffers(), apart.buffers(), strict=True))
    assert list(together.heads) == ["classify", "cluster"]
    assert list(together.drop("classify").heads) == ["cluster"]


@pytest.mark.parametrize(
    ("backbone", "learns", "follows"), [("learns", True, True), ("follows", False, True), ("stays", False, False)]
)
def test_what_becomes_of_the_backbone_is_said_with_the_call(backbone: Backbone, learns: bool, follows: bool) -> None:
    model = small().train()
    before = model.backbone[1].running_mean.clone()  # type: ignore[index]
    (logits,) = model((torch.randn(6, 3, 4, 4) + 1, "classify"), backbone=backbone)
    logits.sum().backward()
    assert (model.backbone[0].weight.grad is not None) == learns  # type: ignore[index]
    assert model.heads["classify"].weight.grad is not None
    assert (not torch.equal(model.backbone[1].running_mean, before)) == follows  # type: ignore[index]
    assert model.backbone.training, "the mode is the network's"


@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_of_the_release_before_fit(prefix: str) -> None:
    """Two heads around a classifier; several clusterings in one head; also within an average of the weights."""
    model, other = small(), small()
    nn.init.zeros_(other.backbone[0].weight)  # type: ignore[index,arg-type]
    for old_cluster, without in (("cluster_head.", ()), ("heads.", ("head.",))):
        state = {}
        for key, value in model.state_dict().items():
            if key.startswith("cluster_head."):
                state[prefix + key.replace("cluster_head.", old_cluster)] = value
            elif not key.startswith(without):
                state[f"{prefix}classifier.{key}"] = value
        target = other.drop("classify") if without else other
        holder = nn.ModuleDict({"module": target}) if prefix else target
        holder.load_state_dict(state)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in target.state_dict().items())
