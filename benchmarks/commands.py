"""Commands that several benchmarks run, as a user types them."""

import os
import subprocess
import sys

from nldist.errors import UserError


def run_python(*arguments: str, quiet: bool = False) -> None:
    """Run `python ARGUMENTS` with one thread per process; stop here if it fails. If quiet, without what it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    out = subprocess.DEVNULL if quiet else None
    code = subprocess.run([sys.executable, *arguments], env=environment, stdout=out, check=False).returncode
    if code != 0:
        raise UserError(f"python {' '.join(arguments)} ended with code {code}")


def train(config: str, *settings: str, ranks: int = 2) -> None:
    """`nldist train` on local ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    run_python(*torchrun, "-m", "nldist.cli", "train", config, *settings)
