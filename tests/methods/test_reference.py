"""A step of DivideMix and one of ScanMix against benchmarks/reference, on the same weights, views and targets."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.reference import dividemix, scanmix
from benchmarks.reference.network import TwoHeads
from nldist.config.file import load_config
from nldist.data.stream import Batch
from nldist.methods.build import build_method
from nldist.methods.scanmix import ScanMix
from tests.conftest import REPOSITORY
from tests.contexts import open_context

SETTINGS = (
    *("method.name=scanmix", "model.name=preact_resnet18", "train.batch_size=16"),
    "method.dividemix.peers=sequential",
)
# Of the norm; in float32 some activations fall on the other side of 0.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3}
DTYPES = pytest.mark.parametrize("dtype", [*TOLERANCE], ids=["float64", "float32"])


def method_in(dtype: torch.dtype, digits: Path) -> ScanMix:
    """ScanMix, whose first pass is DivideMix's, with networks and views of this type."""
    config = load_config(REPOSITORY / "tests" / "digits.yaml", (f"data.root={digits}", *SETTINGS))
    method = build_method(open_context(config))
    assert isinstance(method, ScanMix)
    method.noise_rate = 0.5
    view = method.context.view
    method.context.view = lambda *args: view(*args).to(dtype)  # type: ignore[method-assign]
    for number, engine in enumerate(method.engines):
        engine.model.to(dtype)
        method.context.table[f"clean{number}"].numpy()[:] = np.random.default_rng(number).random(
            len(method.context.train)
        )
    return method


def copy_of(network: nn.Module, dtype: torch.dtype) -> TwoHeads:
    made = TwoHeads(10).to(dtype)
    made.load_state_dict(network.state_dict())
    return made


def read(method: ScanMix, task: Any) -> dict[str, Batch]:
    return next(iter(method.context.stream("train", task.plan())))


def assert_alike(got: Tensor, wanted: Tensor | None) -> None:
    assert wanted is not None
    assert float((got - wanted).norm()) <= TOLERANCE[wanted.dtype] * max(float(wanted.norm()), 1e-3)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the next backward pass into `model`, which an engine uses up."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: found.update({name: p.grad.clone()}))  # type: ignore[no-untyped-call,misc]
    return found


def assert_same_step(
    found: Mapping[str, Tensor], terms: Mapping[str, Tensor], gradients: Mapping[str, Tensor], net: TwoHeads
) -> None:
    """The terms of a step and its gradients are those of the reference, `terms` and the gradients in `net`."""
    for name, term in terms.items():
        assert_alike(found[name], term.detach())
    assert {name for name, p in net.named_parameters() if p.grad is not None} == set(gradients)
    for name, gradient in gradients.items():
        assert_alike(gradient, net.get_parameter(name).grad)


@DTYPES
def test_dividemixs_step(dtype: torch.dtype, digits: Path) -> None:
    method = method_in(dtype, digits)
    task, own = method.ssl(method, 0, 12), method.engines[0].model
    batches = read(method, task)
    task.start(5, 0)
    net, peer = copy_of(own, dtype).train(), copy_of(method.engines[1].model, dtype).eval()
    labelled = batches["labelled"]
    x, u = task._views(labelled), task._views(batches["unlabelled"])
    generator = method.context.generator("net0", "mix", 12, 0, 0)
    weight = float(generator.beta(4.0, 4.0))
    permutation = torch.from_numpy(generator.permutation(2 * (len(x[0]) + len(u[0]))))
    clean = torch.from_numpy(method.context.table["clean1"].numpy())[labelled.ids].to(dtype)
    terms = dividemix.losses(
        net, peer, x, u, labelled.labels, clean, max(weight, 1 - weight), permutation, temperature=0.5
    )
    (terms["loss_x"] + task._lambda_u(0) * terms["loss_u"] + terms["prior"]).backward()  # type: ignore[no-untyped-call]

    gradients = gradients_of(own)
    assert_same_step(task.step(batches, 0), terms, gradients, net)
    for name, buffer in net.named_buffers():
        assert_alike(own.get_buffer(name).to(dtype), buffer.to(dtype))


@DTYPES
def test_scanmixs_clustering_step(dtype: torch.dtype, digits: Path) -> None:
    method = method_in(dtype, digits)
    task, own = method._cluster(0, 12), method.engines[0].model
    anchors = read(method, method.ssl(method, 0, 12))["labelled"]
    # Neighbours are other images; the draw names the pair.
    neighbours = replace(anchors, images=anchors.images.roll(1, 0), ids=anchors.ids.roll(1))
    pairs = {"anchors": anchors, "neighbours": neighbours}
    task.start(5, 0)
    views = [method.context.view(batch, 12, f"cluster0/{role}", method.cluster_view) for role, batch in pairs.items()]
    net = copy_of(own, dtype).train()
    terms = scanmix.losses(net, *views)
    (terms["loss_agree"] + 5 * terms["loss_entropy"]).backward()  # type: ignore[no-untyped-call]

    gradients = gradients_of(own)
    assert_same_step(task.step(pairs, 0), terms, gradients, net)
