"""What a person watching sees: rate, time left, share of time waiting for data."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from nldist.dist.world import World
from nldist.run.status import clock


class Meter:
    """Running means of a pass's metrics; stays on the device until asked."""

    def __init__(self, state: Mapping[str, list[float]] | None = None) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, float] = {}
        for name, (total, count) in (state or {}).items():
            self._sums[name], self._counts[name] = total, count

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Take in one step's values."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double()
            self._counts[name] = self._counts.get(name, 0.0) + 1

    def state_dict(self) -> dict[str, list[float]]:
        """Name -> [sum, count]."""
        return {name: [float(total), self._counts[name]] for name, total in self._sums.items()}

    def reduce(self, world: World) -> dict[str, float]:
        """The means over all ranks' steps. A collective: every rank has the same metrics."""
        names = sorted(self._sums)
        if not names:
            return {}
        pairs = torch.tensor([[float(self._sums[n]), self._counts[n]] for n in names], dtype=torch.float64)
        sums, counts = world.all_reduce(pairs).unbind(1)
        return dict(zip(names, (sums / counts).tolist(), strict=True))

    def means(self) -> dict[str, float]:
        """This rank's means so far."""
        return {name: float(total) / self._counts[name] for name, total in self._sums.items()}


class Watch:
    """The time of one pass: prints a line every `every_seconds`."""

    def __init__(self, title: str, num_steps: int, start_step: int, every_seconds: float) -> None:
        self.title, self.num_steps, self._start_step = title, num_steps, start_step
        self._every, self.began = every_seconds, time.perf_counter()
        self._last = self.began

    @property
    def seconds(self) -> float:
        """Time since the pass began here."""
        return time.perf_counter() - self.began

    def due(self) -> bool:
        """Whether a line is due; asking starts the next interval when it is."""
        now = time.perf_counter()
        if now - self._last < self._every:
            return False
        self._last = now
        return True

    def rates(self, num_images: int, wait_seconds: float) -> dict[str, float]:
        """Images per second of all ranks, and the share of time that this one waited for data."""
        seconds = max(self.seconds, 1e-9)
        return {"images_per_second": num_images / seconds, "data_wait_share": wait_seconds / seconds}

    def line(self, step: int, rates: Mapping[str, float], means: Mapping[str, float]) -> str:
        """One line of progress after `step` steps."""
        done = max(step - self._start_step, 1)
        left = self.seconds / done * (self.num_steps - step)
        values = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        reading = f"{rates['images_per_second']:,.0f} img/s  data wait {rates['data_wait_share']:.0%}  "
        if not rates["images_per_second"]:  # the pass reads none
            reading = ""
        return f"{self.title}  step {step}/{self.num_steps}  {reading}left {clock(left)}  {values}"


def peak_memory_gib(device: torch.device) -> float:
    """Largest GPU memory held so far in GiB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
