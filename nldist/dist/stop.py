"""The request to stop: signals set it, ranks agree on it at a step's edge (see stop_check)."""

import signal
import time
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType


class Stop(IntEnum):
    """What a rank was asked to do; of several requests the greatest counts."""

    NONE = 0
    REQUEUE = 1  # stop, to be started again: SIGUSR2, before a time limit or a preemption
    END = 2  # stop: SIGTERM, Ctrl-C

    @property
    def exit_code(self) -> int:
        """The exit code of a run that has stopped so, with all saved."""
        return {Stop.NONE: 0, Stop.REQUEUE: EXIT_REQUEUE, Stop.END: EXIT_STOPPED}[self]


EXIT_STOPPED = 143  # as a process ended by SIGTERM: there is more to do
EXIT_REQUEUE = 144  # likewise, and it is to be started again; what submitit's local executor restarts on


@dataclass
class Request:
    """What this process was asked for by signals, and since when (time.monotonic)."""

    kind: Stop = Stop.NONE
    since: float | None = None

    def listen(self) -> None:
        """From now on SIGTERM, SIGUSR2 and SIGINT only set this flag; a second Ctrl-C interrupts."""
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._take)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self.kind == Stop.END and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.kind = max(self.kind, Stop.REQUEUE if number == signal.SIGUSR2 else Stop.END)
        self.since = self.since or time.monotonic()


REQUEST = Request()
