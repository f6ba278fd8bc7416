"""What every dated result file says about where it was measured."""

import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in GiB, load, system."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 1),
        "system": platform.platform(),
    }


def write(name: str, packages: list[str], results: Mapping[str, Any]) -> Path:
    """Write benchmarks/results/NAME-DATE.json: the results with machine, versions and the command; its path.

    The environment's RESULTS_DIR is another folder, for what is not to be kept.
    """
    date = datetime.date.today().isoformat()
    path = Path(os.environ.get("RESULTS_DIR", Path(__file__).parent / "results")) / f"{name}-{date}.json"
    path.parent.mkdir(exist_ok=True)
    facts = {
        "date": date,
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
    }
    path.write_text(json.dumps(facts | dict(results), indent=2) + "\n")
    return path
