"""A real Slurm of two nodes, both on this machine: as root, without systemd, cgroups or munge; two made-up GPUs a node.

A requeued job may start after a second instead of the usual two minutes. Nothing outlives the block.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from rigs.children import PATIENCE_S, free_port

ROOT = Path(__file__).parents[2]
DAEMONS = ("slurmctld", "slurmd", "srun", "sbatch")
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
MpiDefault=none
ReturnToService=2
JobRequeue=1
SlurmdParameters=config_overrides
KillWait=5
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=4 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES State=UP
"""


def why_not() -> str | None:
    """Returns why there can be no Slurm here, None if there can."""
    missing = [name for name in DAEMONS if not _program(name)]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurm-wlm)"
    return None if os.geteuid() == 0 else "Slurm's daemons need root"


class Slurm:
    """What can be done with the cluster; `folder` is where commands run, and where their files lie."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        (folder / "bin").mkdir()
        self.work.mkdir()
        for command in ("train", "explain"):  # of this tree, whatever is installed
            script = folder / "bin" / f"sae-{command}"
            script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cli.{command} "$@"\n', encoding="utf-8")
            script.chmod(0o755)
        path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SAE_"))}
        self.environment = {**ours, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}
        self.environment |= {"PYTHONPATH": f"{ROOT}:{ours.get('PYTHONPATH', '')}", "SAE_CACHE": str(folder / "cache")}

    def call(self, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end, which must be a good one if `check`."""
        done = subprocess.run(
            list(map(str, words)),
            cwd=self.work,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def submit(self, *words: object) -> str:
        """Submits a job by sbatch and returns its number."""
        return self.call("sbatch", "--parsable", *words).stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Returns what Slurm says of a job: JobState, Restarts, ExitCode, ..."""
        shown = self.call("scontrol", "show", "job", "--oneliner", number).stdout
        return dict(re.findall(r"(\w+(?:/\w+)*)=(\S*)", shown))

    def log(self, number: str) -> str:
        """Returns what a job has printed; it names its file with %j."""
        files = self.work.glob(f"*{number}*.log")
        return "".join(file.read_text(encoding="utf-8", errors="replace") for file in sorted(files))

    def wait(self, number: str, said: str | None = None) -> dict[str, str]:
        """Waits until a job has printed what matches a pattern, or else until it has ended; returns what it is then."""
        end = time.monotonic() + PATIENCE_S
        while True:
            found = self.job(number)
            if said and re.search(said, self.log(number)):
                return found
            if found["JobState"] not in ALIVE:
                assert not said, f"ended without {said!r}:\n{self.log(number)}"
                return found
            assert time.monotonic() < end, f"waited in vain: {found}\n{self.log(number)}"
            time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        """Returns all processes that know this cluster, daemons included."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    found.append(process)
        return found


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Starts the cluster below a folder, and ends all that came of it."""
    ports = [free_port() for _ in range(3)]
    for name in ("n1", "n2"):
        (folder / "spool" / name).mkdir(parents=True)
    (folder / "state").mkdir()
    conf = CONF.format(host=socket.gethostname(), port=ports[0], ports=ports[1:], folder=folder)
    (folder / "slurm.conf").write_text(conf, encoding="utf-8")
    (folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-1]\n", encoding="utf-8")
    cluster, started = Slurm(folder), []
    try:
        for words in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]):
            with open(folder / "daemons.log", "a", encoding="utf-8") as log:
                dying = ["setpriv", "--pdeathsig", "KILL"]  # with whoever runs the tests
                program = [*dying, _program(words[0]), *words[1:]]
                started.append(
                    subprocess.Popen(program, env=cluster.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
                )
        end = time.monotonic() + PATIENCE_S
        while cluster.call("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).stdout.strip() != "2":
            dead = [process for process in started if process.poll() is not None]
            assert not dead, f"ended: {dead}\n{(folder / 'daemons.log').read_text()}"
            assert time.monotonic() < end, f"no nodes\n{(folder / 'daemons.log').read_text()}"
            time.sleep(0.1)
        yield cluster
    finally:
        cluster.call("scancel", "--user=root", check=False)
        for process in started:
            process.kill()
        for process in started:
            process.wait(PATIENCE_S)
        while left := cluster.processes():  # what the daemons had begun, once they begin no more
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.05)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
