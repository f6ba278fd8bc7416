"""The training runs of benchmarks/rehearsal.py: `nldist train` and `nldist audit` on two ranks."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from processes import Group, bytes_below, run, start_ranks, status
from rehearsal_data import DIM, NUM_CLASSES, factory

CLI = ("-m", "nldist.cli")
CONFIG = Path(__file__).with_name("rehearsal.yaml")
NUM_STEPS = 150  # of a method, before it is stopped
_SUBSET = "20000"
_SCANMIX = ("method.name=scanmix", "method.dividemix.warmup_epochs=1", "train.epochs=2", "mine.num_probe=4")
# What a method is given beside benchmarks/rehearsal.yaml, and the pass that is stopped within. Those that keep a row of
# all classes for every sample come first.
METHODS: dict[str, tuple[str, list[str]]] = {
    "selc": ("net0", []),
    "elr": ("net0", []),
    "lend": ("net0", []),
    "mixnn": ("net0", []),
    "pencil": ("net0", []),
    "cross_entropy": ("net0", []),
    "mixup": ("net0", []),
    "co_teaching": ("joint", []),
    "co_teaching_plus": ("joint", []),
    "m_correction": ("net0", []),
    "forward": ("net0", ["method.forward.estimate_epochs=1"]),
    "forward, matrix given": ("net0", ["method.name=forward", "method.forward.transition={folder}/transition.npy"]),
    "sanm": ("net0", ["method.name=dividemix", "method.ssl=sanm", f"method.dividemix.subset={_SUBSET}"]),
}
Row = dict[str, Any]


@dataclass
class Watched:
    """A job on two ranks, seen from outside."""

    group: Group
    run_dir: Path
    began: float = field(default_factory=time.time)
    passes: dict[str, float] = field(default_factory=dict)  # seconds until the first line of each

    def facts(self) -> dict[str, Any]:
        """Its status, once it has one."""
        facts = status(self.run_dir)
        return facts if facts.get("started", 0) >= self.began else {}

    def within(self, name: str, num_steps: int) -> bool:
        """Whether it has made so many steps of this pass, or is in a later one."""
        facts = self.facts()
        if "step" not in facts:
            return False
        present = facts["place"].split()[-1]
        self.passes.setdefault(present, round(self.group.seconds, 2))
        return name in self.passes and (present != name or facts["step"] >= num_steps)


class Runs:
    """The runs at one size."""

    def __init__(self, folder: Path, data: Path, num_samples: int, log: Path) -> None:
        self.folder, self.data, self._num, self.log = folder, data, num_samples, log

    def parts(self) -> dict[str, Callable[[], Row]]:
        """What there is to be done, by name."""
        return {
            "resume": self._resume,
            **{name: partial(self._some_steps, name, *METHODS[name]) for name in METHODS},
            "selc, whole run": self._whole_run,
            "audit": self._audit,
            "mine": self._mine,
            "cluster": self._cluster,
            "scanmix": self._scanmix,
            "simclr": partial(self._stage, "simclr"),
            "moco": partial(self._stage, "moco"),
            "dividemix": partial(self._some_steps, "dividemix", "net0", []),
        }

    def _start(self, run_dir: Path, *settings: str, stages: str | None = None) -> Watched:
        chosen = ["--stages", stages] if stages else []
        places = [f"run.dir={run_dir}", f"data.root={self.data}", "track.enabled=false"]
        return Watched(start_ranks(*CLI, "train", CONFIG, *places, *settings, *chosen, log=self.log), run_dir)

    def _stopped(self, job: Watched, pass_name: str, place: Path | None = None) -> Row:
        """Stop the job after some steps of a pass; what it came to. Its checkpoint is in `place`, or its own."""
        began = job.group.until(lambda: job.within(pass_name, 1))
        job.group.until(lambda: job.within(pass_name, NUM_STEPS))
        rate, seconds = job.facts().get("images_per_second"), job.group.seconds
        stopped = job.group.stop()
        calls = {"first step": began, "stop, checkpoint saved": stopped.seconds}
        facts = {"seconds": seconds + stopped.seconds, "peak_mib": round(stopped.peak_mib), "images_per_second": rate}
        row = facts | {"calls": calls, "passes": job.passes} | self._state(place or job.run_dir)
        shutil.rmtree(job.run_dir)
        return row

    def _state(self, run_dir: Path) -> Row:
        """What the newest checkpoint below a run's directory has of each sample."""
        every = run_dir.glob("**/checkpoints/e*/tables")
        tables = max(every, key=lambda path: path.stat().st_mtime, default=None)
        if tables is None:  # of few images the work is done before it can be stopped
            return {"disk_bytes": bytes_below(run_dir)}
        sizes = {file.name: file.stat().st_size - 128 for file in tables.iterdir()}  # .npy's header
        wide = sum(size for size in sizes.values() if size > self._num / 2 * NUM_CLASSES)
        return {
            "state_bytes": round(sum(sizes.values()) / self._num, 1),
            "disk_bytes": bytes_below(run_dir),
            "table_bytes": wide,
            "table_mib": wide / 2 / 2**20,  # of each of the two ranks
        }

    def _some_steps(self, name: str, pass_name: str, settings: list[str]) -> Row:
        if name == "forward, matrix given":
            np.save(self.folder / "transition.npy", np.full((NUM_CLASSES, NUM_CLASSES), 1 / NUM_CLASSES))
        chosen = [setting.format(folder=self.folder) for setting in settings]
        named = [] if any("method.name" in setting for setting in chosen) else [f"method.name={name}"]
        return self._stopped(self._start(self.folder / "run", *named, *chosen), pass_name)

    def _whole_run(self) -> Row:
        """SELC with a soft label of every sample, a subset trained on, and the sweep with five views over all."""
        run_dir = self.folder / "whole"
        settings = ["method.name=selc", f"method.selc.subset={_SUBSET}", "track.enabled=true"]
        job = self._start(run_dir, *settings)
        job.group.until(lambda: job.within("verdicts", 1))
        cost = job.group.end()
        calls = {f"until {name}": seconds for name, seconds in job.passes.items()}
        return {"seconds": cost.seconds, "peak_mib": round(cost.peak_mib), "calls": calls} | self._state(run_dir)

    def _audit(self) -> Row:
        run_dir = self.folder / "whole"
        cost = run(*CLI, "audit", run_dir, log=self.log)
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        size = bytes_below(run_dir / "audit")
        return {"seconds": cost.seconds, "peak_mib": round(cost.peak_mib), "disk_bytes": size}

    def _resume(self) -> Row:
        """A checkpoint within an epoch, all ranks killed, and the same command again."""
        run_dir = self.folder / "killed"
        job = self._start(run_dir, "method.name=selc", "train.checkpoint_every_steps=10")
        checkpoint = run_dir / "checkpoints" / "e0000-p00-s000000010"
        aside = checkpoint.with_name(checkpoint.name + ".part")
        began = job.group.until(lambda: aside.exists() or checkpoint.exists())
        saved = job.group.until(checkpoint.exists)
        peak = job.group.kill()
        again = self._start(run_dir, "method.name=selc", "train.checkpoint_every_steps=0")
        resumed = again.group.until(lambda: again.within("net0", 11))
        stopped = again.group.stop()
        calls = {"save": saved - began, "resume": resumed, "stop, checkpoint saved": stopped.seconds}
        row = {"seconds": saved + resumed + stopped.seconds, "peak_mib": round(max(peak, stopped.peak_mib))}
        row |= {"calls": calls} | self._state(run_dir)
        shutil.rmtree(run_dir)
        return row

    # Stages

    @property
    def _scan(self) -> list[str]:
        """Settings of ScanMix."""
        return [*_SCANMIX, f"mine.factory={factory(self._num)}"]

    @property
    def _shared(self) -> list[str]:
        """The same, for runs that share stages and begin from the whole run's network."""
        return [
            *self._scan,
            f"run.stages_dir={self.folder / 'stages'}",
            f"model.pretrained={self.folder / 'weights.pt'}",
        ]

    def _stage(self, name: str) -> Row:
        settings = [*self._scan, f"pretext.name={name}", "pretext.epochs=1"]
        return self._stopped(self._start(self.folder / "run", *settings, stages="pretext"), "net0")

    def _mine(self) -> Row:
        """Features of all images and their graph, of the whole run's network."""
        (self.folder / "weights.pt").unlink(missing_ok=True)
        run(*CLI, "export", self.folder / "whole", self.folder / "weights.pt", "--network", 0, log=self.log)
        job = self._start(self.folder / "scanmix", *self._shared, stages="pretext,mine")
        job.group.until(lambda: job.within("search", 1))
        cost = job.group.end()
        calls = {f"until {name}": seconds for name, seconds in job.passes.items()}
        size = bytes_below(next((self.folder / "stages").glob("mine-*")))
        row = {"seconds": cost.seconds, "peak_mib": round(cost.peak_mib), "calls": calls, "disk_bytes": size}
        return row | {"table_mib": 4 * DIM * self._num / 2 / 2**20, "state_bytes": 4 * DIM}

    def _cluster(self) -> Row:
        """Some steps; an epoch would take long, so that the network as it is stands for what it leaves."""
        run_dir, stages = self.folder / "scanmix", self.folder / "stages"
        job = self._start(run_dir, *self._shared, stages="cluster")
        row = self._stopped(job, "cluster0", stages)
        (place,) = stages.glob("cluster-*")
        (place / "weights").mkdir(exist_ok=True)
        shutil.copy(next(stages.glob("pretext-*/weights/last.pt")), place / "weights" / "best.pt")
        (place / "summary.json").write_text(json.dumps({"epochs": 1}))
        return row

    def _scanmix(self) -> Row:
        """Its warm-up: the epochs after it are DivideMix's, and the clustering's of another stage."""
        row = self._stopped(self._start(self.folder / "run", *self._shared), "net0")
        shutil.rmtree(self.folder / "stages")
        return row
