"""A classifier's weights under the names that timm, or a plain backbone with a head, knows them by."""

import torch
from torch import Tensor, nn

from nldist.errors import UserError
from nldist.models.build import OWN_BACKBONES
from nldist.models.network import Network


def plain_state(network: Network, name: str) -> dict[str, Tensor]:
    """The state of the classifier `name`, in eval mode, as `timm.create_model(name, num_classes=C)` loads it.

    Of our own backbones: the backbone's keys, and "head.weight" and "head.bias". `build_model` takes either as
    pretrained weights.

    Raises:
        UserError: timm's classifier of this name is another one behind the backbone.
    """
    state, head = network.backbone.state_dict(), network.heads["classify"]
    if name in OWN_BACKBONES:
        return {**state, "head.weight": head.weight.detach(), "head.bias": head.bias.detach()}
    import timm

    model = timm.create_model(name, num_classes=head.out_features).eval()
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    for classifier in _names(model.default_cfg["classifier"]):
        for part in ("weight", "bias"):
            key, value = f"{classifier}.{part}", getattr(head, part).detach()
            # Of some it is a convolution, 1 x 1.
            state[key] = value.reshape(shapes[key]) if key in shapes and shapes[key].numel() == value.numel() else value
    try:
        model.load_state_dict(state)
        same = _agree(network, model)
    except RuntimeError:
        same = False
    if not same:
        raise UserError(f"timm's own {name} has another head: export an MLflow model (a directory), which holds ours")
    return state


def _names(classifier: str | tuple[str, ...]) -> tuple[str, ...]:
    """Of the linear heads: some have a second one for a token of distillation, and average both."""
    return (classifier,) if isinstance(classifier, str) else classifier


@torch.no_grad()
def _agree(network: Network, model: nn.Module) -> bool:
    """Whether both give the same logits, for noise."""
    images = torch.randn(1, *model.default_cfg["input_size"], generator=torch.Generator().manual_seed(0))  # type: ignore[index]
    return torch.allclose(network.logits(images), model(images), rtol=1e-3, atol=1e-4)
