"""Every method: through the launcher on two nodes, killed there, and on DeepSpeed."""

import random
from pathlib import Path

import pytest
import torch

from tests.golden.runs import RUNS
from tests.jobs import run_job
from tests.slurm.cluster import Cluster
from tests.slurm.test_launcher import finish, kill_rank, submit, wait_for_step
from tests.test_train import assert_same_weights, epoch_records, weights

COMMON = ("train.batch_size=64", "dist.device=cpu", "train.checkpoint_every_steps=3")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_it_ends_as_two_local_ranks_do_after_a_kill_on_two_nodes_and_on_deepspeed(
    name: str, slurm: Cluster, digits: Path, tmp_path: Path
) -> None:
    arguments = (f"data.root={digits}", *COMMON, *RUNS[name])
    local, zero, nodes = tmp_path / "local", tmp_path / "zero", tmp_path / "nodes"
    assert run_job(local, *arguments, world_size=2) == [0, 0]

    job = submit(slurm, digits, nodes, *COMMON, *RUNS[name])
    num_epochs = len(epoch_records(local))
    draw = random.Random(name)
    wait_for_step(nodes, f"epoch {draw.randint(1, num_epochs)}/", draw.randint(1, 9))
    kill_rank(slurm, job)
    finish(slurm, job, nodes)
    assert slurm.restarts(job) == 1
    assert_same_weights(local, nodes)
    assert epoch_records(local) == epoch_records(nodes)

    assert run_job(zero, *arguments, "engine.name=deepspeed", "engine.zero_stage=2", world_size=2) == [0, 0]
    for network, same in zip(weights(local), weights(zero), strict=True):
        for key, value in network.items():
            torch.testing.assert_close(same[key], value, rtol=0, atol=1e-3)
