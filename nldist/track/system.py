"""What this node does beside a run: CPU, memory, disk, network and GPU use, in RUN/system.jsonl."""

import contextlib
import time
from pathlib import Path

from nldist.track.jsonl import JsonLines, read_lines

SYSTEM_FILE = "system.jsonl"


def sample_system(run_dir: Path, interval_seconds: float) -> None:
    """Write a line of CPU, memory, disk, network and GPU use to RUN/system.jsonl every interval, for ever.

    The numbers and their names are those of mlflow's own monitors. Its `SystemMetricsMonitor` around them is
    not used: it asks the server for the run at every sample and ends for good when that fails once.
    """
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(ImportError, RuntimeError):  # no NVIDIA GPU here
        monitors.append(GPUMonitor())
    lines = JsonLines(run_dir / SYSTEM_FILE)
    step = sum(1 for _ in read_lines(run_dir / SYSTEM_FILE))
    monitors[0].collect_metrics()  # psutil measures CPU use between two calls
    monitors[0].clear_metrics()
    while True:
        time.sleep(interval_seconds)
        values: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            values.update({f"system/{key}": value for key, value in monitor.aggregate_metrics().items()})
            monitor.clear_metrics()
        lines.append({"time": round(time.time(), 3), "step": step, **values})
        step += 1
