"""What a run was started from, as tags of its MLflow run."""

import contextlib
import subprocess

import nldist

_COMMIT_TAG = "mlflow.source.git.commit"  # MLflow's page shows it
_GIT_SECONDS = 5


def source_tags() -> dict[str, str]:
    """The version of nldist and, where the working directory is in a git repository, its commit."""
    tags = {"nldist": nldist.__version__}
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git, no repository
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=_GIT_SECONDS
        )
        tags[_COMMIT_TAG] = commit.stdout.strip()
    return tags
