"""A real Slurm cluster of two nodes on this machine, with accounting, in a directory of its own.

munged, mariadbd, slurmdbd, slurmctld and one slurmd for each of the nodes `n1` and `n2` run on free ports with
configuration of their own; a command knows of the cluster only if it gets `Cluster.env` as its environment.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import psutil

from tests.slurm.daemons import Daemon, free_ports, listens, until
from tests.slurm.guardian import is_step_daemon
from tests.slurm.processes import JobProcess, job_processes
from tests.slurm.settings import NODES, PARTITION, name_nodes, write_settings

PROGRAMS = ("sbatch", "srun", "slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db")
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
HISTORY_FIELDS = ("JobID", "JobName", "State", "ExitCode", "NodeList", "Start", "End")
REPOSITORY = Path(__file__).parents[2]


def why_not() -> str | None:
    """Why a cluster cannot be started here, in one line; None if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)} not found): run .ci/install as root on Debian"
    return None if os.geteuid() == 0 else "a Slurm cluster for tests needs root"


class Cluster:
    """Starts on construction; use it as a context manager or call `stop`."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.root.chmod(0o755)  # munged insists that its socket can be reached
        self.slurm_conf = self.root / "slurm.conf"
        self.env = self._environment()
        self._daemons: dict[str, Daemon] = {}
        guard = [sys.executable, "-m", "tests.slurm.guardian", str(self.root)]
        self._guardian = subprocess.Popen(guard, cwd=REPOSITORY, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _environment(self) -> dict[str, str]:
        """This process's environment with this cluster in it and without a trace of any other."""
        outer = {name: value for name, value in os.environ.items() if not re.match("(SLURM|SBATCH|SRUN|SACCT)", name)}
        return outer | {"PATH": f"{outer['PATH']}:{SYSTEM_PATH}", "SLURM_CONF": str(self.slurm_conf)}

    def _start(self) -> None:
        names = ("slurmctld_port", "slurmdbd_port", "n1_port", "n2_port")
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        name_nodes()
        write_settings(self.root, ports)
        self._start_munge()
        self._start_database(ports["slurmdbd_port"])
        controller = self._daemon("slurmctld", "slurmctld", "-D", "-f", str(self.slurm_conf))
        controller.wait_until(lambda: listens(ports["slurmctld_port"]))
        for node in NODES:
            self.start_node(node)

    def _daemon(self, name: str, *command: str, **env: str) -> Daemon:
        log = self.root / "logs" / f"{name}.log"
        self._daemons[name] = Daemon(list(command), log, self.env | env)
        return self._daemons[name]

    def _start_munge(self) -> None:
        socket = self.root / "munge.socket"
        files = {"key": "munge.key", "pid": "munged.pid", "log": "logs/munged.log", "seed": "munge.seed"}
        options = [f"--{kind}-file={self.root / file}" for kind, file in files.items()]
        munged = self._daemon("munged", "munged", "--foreground", f"--socket={socket}", *options)
        munged.wait_until(socket.exists)

    def _start_database(self, port: int) -> None:
        data = self.root / "database"
        data.mkdir(mode=0o700)
        socket = data / "socket"
        options = ["--no-defaults", "--user=root", f"--datadir={data}", "--innodb-log-file-size=4M"]
        install = ["mariadb-install-db", *options, "--auth-root-authentication-method=normal", "--skip-test-db"]
        subprocess.run(install, env=self.env, check=True, capture_output=True)
        mariadb = self._daemon("mariadbd", "mariadbd", *options, f"--socket={socket}", "--skip-networking")
        mariadb.wait_until(socket.exists)
        slurmdbd = self._daemon("slurmdbd", "slurmdbd", "-D", MYSQL_UNIX_PORT=str(socket))
        slurmdbd.wait_until(lambda: listens(port))

    def stop(self) -> None:
        """End all daemons and all that jobs still run, and remove the directory; a second call does nothing."""
        for name in (*NODES, "slurmctld", "slurmdbd", "mariadbd", "munged"):
            if name in self._daemons:
                self._daemons.pop(name).stop()
        self._guardian.communicate()

    def clear(self) -> None:
        """Cancel all jobs, wait until they have ended, and start the nodes that are down."""
        for node in NODES:
            if node not in self._daemons:
                self.start_node(node)
        jobs = self.run("squeue", "--noheader", "--format=%A").split()
        if jobs:
            self.run("scancel", *jobs)
        until(lambda: not self.run("squeue", "--noheader"), "all jobs to end", timeout=60)

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node and wait until jobs can run there."""
        daemon = self._daemon(node, "slurmd", "-D", "-N", node, "-f", str(self.slurm_conf))
        daemon.wait_until(lambda: self._is_ready(node))

    def _is_ready(self, node: str) -> bool:
        try:
            return self.node_state(node) in ("idle", "mixed", "allocated", "completing")
        except RuntimeError:  # a controller that has just opened its port may not answer yet
            return False

    def kill_node(self, node: str, tasks: bool = True) -> None:
        """SIGKILL for a node's slurmd and for all that jobs run there, as if the machine had lost its power.

        With `tasks=False` only slurmd dies: slurmstepd and the tasks go on, as they do when slurmd crashes alone.
        """
        self._daemons.pop(node).kill()
        if tasks:
            lost = [step for step in psutil.process_iter() if is_step_daemon(step, self.root / "spool" / node)]
            lost += [psutil.Process(process.pid) for process in self.processes() if process.node == node]
            for process in lost:
                process.kill()
            psutil.wait_procs(lost, timeout=5)

    def run(self, *command: object) -> str:
        """The output of a Slurm command; raises RuntimeError with what it printed if it fails."""
        arguments = [str(part) for part in command]
        result = subprocess.run(arguments, env=self.env, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(arguments)}: code {result.returncode}\n{result.stdout}{result.stderr}")
        return result.stdout.strip()

    def submit(self, script: Path, *options: object) -> int:
        """The id of a new job that runs a batch script, queued by `sbatch OPTIONS SCRIPT`."""
        return int(self.run("sbatch", "--parsable", *options, script))

    def node_state(self, node: str) -> str:
        """`idle`, `mixed`, `allocated`, `down`, ...; with `*` at the end while the node does not answer."""
        return self.run("sinfo", "--noheader", "--Node", f"--nodes={node}", f"--partition={PARTITION}", "--format=%T")

    def job(self, job_id: object) -> dict[str, str]:
        """The fields of `scontrol show job`: JobState, Reason, Restarts, ExitCode, BatchHost, NodeList, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).split()
        return {name: value for name, separator, value in (word.partition("=") for word in words) if separator}

    def state(self, job_id: object) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, TIMEOUT, ...; `job_id` may be "12_3" too."""
        return self.job(job_id)["JobState"]

    def restarts(self, job_id: object) -> int:
        """How often the job was requeued; its environment has it as SLURM_RESTART_COUNT, if it is not zero."""
        return int(self.job(job_id)["Restarts"])

    def wait_for(self, job_id: object, states: str | Sequence[str], timeout: float = 60) -> str:
        """The state that the job reaches, one of `states`.

        Raises RuntimeError if it ends in another one, and TimeoutError.
        """
        wanted = (states,) if isinstance(states, str) else states
        until(lambda: self.state(job_id) in (*wanted, *ENDED), f"job {job_id} to be {' or '.join(wanted)}", timeout)
        state = self.state(job_id)
        if state not in wanted:
            raise RuntimeError(f"job {job_id} is {state} instead of {' or '.join(wanted)}: {self.job(job_id)}")
        return state

    def wait_for_restart(self, job_id: object, restarts: int, timeout: float = 90) -> None:
        """Wait until the job runs, or has run, for the `restarts`-th time after its first.

        A requeued job waits some 6 s. `StartTime=now` would cut that short, but a job that starts again within the
        second in which it was stopped fails with "Job credential revoked".
        """
        until(lambda: self.restarts(job_id) >= restarts, f"job {job_id} to be requeued", timeout)
        self.wait_for(job_id, ("RUNNING", "COMPLETED"), timeout)

    def processes(self, job_id: int | None = None) -> list[JobProcess]:
        """What runs of this job, or of all jobs, by pid; the daemons are not among them."""
        found = job_processes(self.slurm_conf)
        return [process for process in found if job_id is None or process.job_id == job_id]

    def tasks(self, job_id: int) -> list[JobProcess]:
        """The job's tasks that `srun` started, one per rank, by rank."""
        tasks = (process for process in self.processes(job_id) if process.is_task and process.step != "batch")
        return sorted(tasks, key=lambda task: task.rank)

    def history(self, job_id: object) -> list[dict[str, str]]:
        """Rows of `sacct`, oldest first: JobID, JobName, State, ExitCode, NodeList, Start, End.

        Each start of the job has a row of its own, with State REQUEUED for those that were requeued, and so has each
        step ("12.batch", "12.0"). Accounting lags up to 5 s behind `state`; until then rows are missing or incomplete.
        """
        options = ["--duplicates", "--noheader", "--parsable2", f"--format={','.join(HISTORY_FIELDS)}"]
        rows = self.run("sacct", *options, "--jobs", job_id).splitlines()
        return [dict(zip(HISTORY_FIELDS, row.split("|"), strict=True)) for row in rows]
