"""A real SLURM on this machine: slurmctld, slurmd and munge on the loopback, no systemd, no cgroups."""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SYSTEM_CONF = Path(
    "/etc/slurm/slurm.conf"
)  # where the plugin's inner srun looks, whatever SLURM_CONF says
LOCK = Path("/var/lock/saeflow-slurm.lock")
PACKAGES = "munge slurmctld slurmd slurm-client"
PROGRAMS = (
    "munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "sinfo", "setpriv", "unshare",
)  # fmt: skip
START_S = 30

CONF = """\
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={daemon_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
MinJobAge=3600
KillWait=20
MailProg=/bin/true
DefMemPerCPU=512
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=cpu Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be started here, in one line; None where it can."""
    if "/usr/sbin" not in os.environ["PATH"].split(":"):
        os.environ["PATH"] += ":/usr/sbin:/sbin"
    if os.geteuid() != 0:
        return "the test cluster is started as root"
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"missing {', '.join(missing)}: apt-get install --no-install-recommends {PACKAGES}"
    named = subprocess.run(["unshare", "--uts", "hostname", "localhost"], capture_output=True)
    if named.returncode:
        return "a UTS namespace cannot be made here (CAP_SYS_ADMIN)"
    if SYSTEM_CONF.exists() and not SYSTEM_CONF.is_symlink():
        return f"{SYSTEM_CONF} belongs to a real cluster"
    return None


class Cluster:
    """One node with two partitions' worth of nothing else; a context manager."""

    def __init__(self) -> None:
        # Short and open to the munge user: a socket's path ends at 107 characters.
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.root.chmod(0o755)
        self.daemons: list[tuple[str, subprocess.Popen[bytes]]] = []
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        lock = self.stack.enter_context(LOCK.open("w"))  # one cluster at a time has SYSTEM_CONF
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in ("munge", "state", "spool", "log", "run"):
            (self.root / name).mkdir()
        key = self.root / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        for path in (key.parent, key):
            shutil.chown(path, "munge", "munge")
        munge = self.root / "munge"
        self._spawn(
            "munged", "setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", "-F",
            f"--key-file={key}", f"--socket={munge}/socket", f"--pid-file={munge}/pid",
            f"--seed-file={munge}/seed", f"--log-file={munge}/log",
        )  # fmt: skip
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20 - 512
        controller, daemon = free_ports(2)
        conf = self.root / "slurm.conf"
        conf.write_text(
            CONF.format(
                root=self.root, controller_port=controller, daemon_port=daemon,
                cpus=os.cpu_count(), memory=memory,
            )
        )  # fmt: skip
        SYSTEM_CONF.parent.mkdir(exist_ok=True)
        SYSTEM_CONF.unlink(missing_ok=True)  # a link that a killed session left
        SYSTEM_CONF.symlink_to(conf)
        self._wait(lambda: (munge / "socket").exists())
        for program in ("slurmctld", "slurmd"):  # named localhost, whatever this machine is called
            command = f"hostname localhost && exec {program} -D -c -f {conf}"
            self._spawn(program, "unshare", "--uts", "sh", "-c", command)
        self._wait(lambda: ask("sinfo", "-h", "-p", "cpu", "-o", "%T") == "idle")

    def _spawn(self, name: str, *command: str) -> None:
        out = self.stack.enter_context((self.root / "log" / f"{name}.out").open("wb"))
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
        self.daemons.append((name, process))

    def _wait(self, is_ready: Callable[[], bool]) -> None:
        end = time.monotonic() + START_S
        while not is_ready():
            dead = [name for name, process in self.daemons if process.poll() is not None]
            if dead or time.monotonic() > end:
                logs = [*self.root.glob("log/*"), *self.root.glob("munge/log")]
                text = "".join(f"\n== {path.name}\n{path.read_text()[-3000:]}" for path in logs)
                raise RuntimeError(f"the cluster did not come up (ended: {dead}){text}")
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        if any(name == "slurmctld" and p.poll() is None for name, p in self.daemons):
            self.clear()
        for _name, process in reversed(self.daemons):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        if SYSTEM_CONF.is_symlink() and os.readlink(SYSTEM_CONF).startswith(str(self.root)):
            SYSTEM_CONF.unlink()
        self.stack.close()
        shutil.rmtree(self.root, ignore_errors=True)

    def clear(self) -> None:
        """Cancel every job, and wait until none is left."""
        subprocess.run(["scancel", "--user=root"], capture_output=True, timeout=20)
        end = time.monotonic() + 30
        while time.monotonic() < end and ask("squeue", "-h"):
            time.sleep(0.2)


def ask(*command: str) -> str:
    """Return the output of a SLURM command."""
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [one.getsockname()[1] for one in sockets]
