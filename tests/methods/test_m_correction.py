from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nldist.estimate.beta_mixture import BetaMixture
from nldist.train.run_pass import run_pass
from tests.contexts import task_of
from tests.methods.baselines import PLAIN, assert_descended, build, one_step

SHORT = ("method.m_correction.warmup_epochs=2",)
MIXTURE = BetaMixture(np.array([1.0, 4.0]), np.array([6.0, 2.0]), np.array([0.6, 0.4]), 0.1, 4.0)


@pytest.mark.parametrize("bootstrap", ["hard", "soft"])
def test_one_step_against_the_equations(bootstrap: str, digits: Path) -> None:
    settings = (f"method.m_correction.bootstrap={bootstrap}", "method.m_correction.prior_weight=0.5")
    method = build(digits, "m_correction", *SHORT, *settings, *PLAIN)
    method.mixture = MIXTURE
    task = task_of(method, 3, "net0")
    done = one_step(method, task)
    model, (random, b) = done.models[0], (method.context.generator("net0", "step", 3, 0, 0), len(done.ids))
    with torch.no_grad():
        predicted = model.logits(done.images)  # in train mode: the averages of batch norm follow
        now = F.cross_entropy(model.eval().logits(done.images), done.labels, reduction="none")
    x = ((now - 0.10001) / (3.89999 + 1e-6)).clamp(1e-3, 1 - 1e-3).double().numpy()
    clean, noisy = 0.6 * 6 * (1 - x) ** 5, 0.4 * 20 * x**3 * (1 - x)  # Beta(1, 6) and Beta(4, 2)
    w = torch.from_numpy((noisy / (clean + noisy)).clip(1e-4, 1 - 1e-4)).float()[:, None]
    z = F.one_hot(predicted.argmax(1), 10).float() if bootstrap == "hard" else predicted.softmax(1)
    t = (1 - w) * F.one_hot(done.labels, 10) + w * z
    delta, order = random.beta(32, 32), torch.from_numpy(random.permutation(b))
    logits = model.train().logits(delta * done.images + (1 - delta) * done.images[order])
    p, log_p = logits.softmax(1), logits.log_softmax(1)
    corrected = -(delta * (t * log_p).sum(1) + (1 - delta) * (t[order] * log_p).sum(1)).mean()
    prior = (0.1 * (0.1 / p.mean(0)).log()).sum()
    torch.testing.assert_close(done.values["noisy"].float(), w.mean(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(done.values["corrected"], corrected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(done.values["prior"], prior.detach(), rtol=1e-4, atol=1e-5)
    assert_descended(model, method.engines[0].model, corrected + 0.5 * prior, 0.02)
    assert method.engines[0].model.training


def test_each_epoch_begins_with_the_mixture_over_the_losses(digits: Path) -> None:
    method = build(digits, "m_correction", *SHORT)
    for epoch in (0, 1):
        run_pass(method.context, task_of(method, epoch, "net0"))
    metrics = run_pass(method.context, task_of(method, 2, "sweep"))
    losses = method.context.table["loss0"].numpy()
    verdicts = method.verdicts()
    assert metrics["split_auc0"] > 0.75
    np.testing.assert_allclose(
        verdicts.clean_probability, 1 - method.mixture.noisy_probability(torch.from_numpy(losses)), rtol=1e-5
    )
    again = build(digits, "m_correction", *SHORT)
    again.load_state_dict(method.state_dict())
    assert again.mixture.state_dict() == method.mixture.state_dict()


def test_without_a_mixture_the_one_before_stays_and_at_first_all_labels_count(digits: Path) -> None:
    method = build(digits, "m_correction", *SHORT)
    for parameter in method.engines[0].model.heads["classify"].parameters():
        parameter.detach().zero_()  # all losses are alike
    run_pass(method.context, task_of(method, 2, "sweep"))
    assert method.mixture is None
    assert (method.verdicts().clean_probability == 1).all()
    method.mixture = MIXTURE
    run_pass(method.context, task_of(method, 3, "sweep"))
    assert method.mixture is MIXTURE
    method.mixture = None
    done = one_step(method, task_of(method, 2, "net0"))
    assert done.values["noisy"] == 0
