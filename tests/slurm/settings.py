"""The configuration files of a test cluster: everything below one directory, on ports of its own."""

import os
import socket
from pathlib import Path

NODES = ("n1", "n2")
CPUS_PER_NODE = 4
PARTITION = "test"
URGENT_PARTITION = "urgent"
HOSTS = Path("/etc/hosts")

# cred_expire is also how long a requeued job waits before it starts again; 120 s by default.
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={slurmctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CryptoType=crypto/munge
MailProg=/bin/true
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldDebug=info
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={slurmdbd_port}
AccountingStoragePass={root}/munge.socket
MessageTimeout=10
InactiveLimit=0
KillWait=60
MinJobAge=86400
SlurmdTimeout=10
ReturnToService=2
JobRequeue=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1_port} CPUs={cpus} RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2_port} CPUs={cpus} RealMemory=8000
PartitionName={partition} Nodes=n[1-2] Default=YES MaxTime=60 GraceTime=10 State=UP
PartitionName={urgent} Nodes=n[1-2] PriorityTier=10 MaxTime=60 State=UP
"""

SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo={root}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={slurmdbd_port}
SlurmUser=root
PidFile={root}/slurmdbd.pid
DebugLevel=info
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=accounting
"""


def write_settings(root: Path, ports: dict[str, int]) -> None:
    """Write `slurm.conf` and `slurmdbd.conf`, a munge key, and make the directories that they name."""
    for name in ("state", "spool", "logs"):
        (root / name).mkdir()
    host = socket.gethostname().split(".")[0]
    values = {"root": root, "host": host, "cpus": CPUS_PER_NODE, "partition": PARTITION, "urgent": URGENT_PARTITION}
    for name, template in (("slurm.conf", SLURM_CONF), ("slurmdbd.conf", SLURMDBD_CONF)):
        _write_private(root / name, template.format(**values, **ports).lstrip().encode())
    _write_private(root / "munge.key", os.urandom(128))


def _write_private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def name_nodes() -> None:
    """Make the nodes' names resolve on this machine: a line in the hosts file, added once and left there."""
    lines = HOSTS.read_text().splitlines()
    names = {name for line in lines for name in line.partition("#")[0].split()[1:]}
    if not names.issuperset(NODES):
        with HOSTS.open("a") as hosts:
            hosts.write(f"127.0.0.1 {' '.join(NODES)}\n")
