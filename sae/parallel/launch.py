"""How this process was started: alone, or as one of several ranks by torchrun, srun, `accelerate launch` or mpirun.

Read from the environment alone, without torch: a command asks before it imports anything.
"""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from sae.base.errors import ConfigError

ALONE, BY_HAND, TORCHRUN, ACCELERATE = "no launcher", "RANK and WORLD_SIZE", "torchrun", "accelerate launch"
SRUN, MPIRUN = "srun", "mpirun"
MPI = (  # rank, number of ranks, rank on this host, ranks on this host
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMIX_RANK", "PMIX_SIZE", "PMIX_LOCAL_RANK", "PMIX_LOCAL_SIZE"),
)
FIRST_PORT, PORTS = 15_000, 15_000  # below those that the system takes for other connections


@dataclass(frozen=True)
class Launch:
    """What a launcher says of one process."""

    launcher: str = ALONE
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """The number among the ranks of this host."""
    address: str = ""
    """Of rank 0's host, where the ranks meet."""
    port: int = 0
    step: str = ""
    """Slurm's name of the job step; a job that is requeued counts its steps anew, so that this one has it again."""
    agent: str = ""
    """The torchrun that started it, and that answers the end of a rank, whatever its exit code, by another start."""
    requeued: bool = False
    """Whether Slurm has started the job again."""

    @property
    def passes_on(self) -> bool:
        """Returns whether a signal may come twice: from whoever sent it to all, and from the launcher."""
        return self.world_size > 1 or bool(self.agent)


def launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Returns how this process was started; ConfigError names a variable that is missing or makes no sense.

    Also refused are several tasks of srun that are no group: each would train by itself.
    """
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", 1)  # SLURM_NTASKS stands in batch scripts, too
    if "WORLD_SIZE" in environment or "RANK" in environment:
        found = _from_variables(environment)
        by_agents = found.launcher != BY_HAND
        groups = _number(environment, "GROUP_WORLD_SIZE", 1) if by_agents else found.world_size
        if tasks > groups:
            what = "torchrun" if by_agents else "WORLD_SIZE"
            raise ConfigError(
                f"{what}: srun has started {tasks} tasks, and each of them is a group of {found.world_size} by itself; "
                + ("give torchrun --nnodes and --rdzv-endpoint" if by_agents else f"set it to {tasks}, or unset it")
            )
        return found
    for rank, size, local_rank, local_size in MPI:
        n = _number(environment, size, 1)
        if n > max(1, tasks):  # mpirun starts its own helper by srun, a task a node; srun sets some of these variables
            one_host = _number(environment, local_size, 0) == n
            return Launch(
                MPIRUN,
                _number(environment, rank, None),
                n,
                _number(environment, local_rank, 0),
                _address(environment, "127.0.0.1" if one_host else ""),
                _port(environment, environment.get("SLURM_JOB_ID", "")),
                **_job(environment),
            )
    return _from_slurm(environment, tasks) if tasks > 1 else Launch(**_job(environment))


def _from_variables(environment: Mapping[str, str]) -> Launch:
    """As torchrun and `accelerate launch` say it, or whoever sets the same variables by hand."""
    by_torchrun = "TORCHELASTIC_RUN_ID" in environment  # so does `accelerate launch`
    rank, n = _number(environment, "RANK", None), _number(environment, "WORLD_SIZE", None)
    if not 0 <= rank < n:
        raise ConfigError(f"RANK: {rank} is none of WORLD_SIZE {n}")
    return Launch(
        BY_HAND if not by_torchrun else ACCELERATE if _by_accelerate(environment) else TORCHRUN,
        rank,
        n,
        _number(environment, "LOCAL_RANK", 0),
        _address(environment, "127.0.0.1" if n == 1 else ""),
        _port(environment, ""),
        agent=_agent(environment["TORCHELASTIC_RUN_ID"]) if by_torchrun else "",
        **_job(environment),
    )


def _from_slurm(environment: Mapping[str, str], tasks: int) -> Launch:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
    step = f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '')}"
    return Launch(
        SRUN,
        _number(environment, "SLURM_PROCID", None),
        tasks,
        _number(environment, "SLURM_LOCALID", 0),
        environment.get("MASTER_ADDR") or _reachable(first_host(nodes)),
        _port(environment, step),
        **_job(environment),
    )


def first_host(nodes: str) -> str:
    """Returns the first host of Slurm's list of nodes: of "gpu[07-09,12],login1", gpu07. There is task 0."""
    match = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else ""


def _reachable(host: str) -> str:
    """Returns a host of Slurm's as what can be connected to: node names need not be known outside of Slurm."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        if command := shutil.which("scontrol"):
            said = subprocess.run([command, "show", "node", host], capture_output=True, text=True, check=False).stdout
            if found := re.search(r"NodeAddr=(\S+)", said):
                return found[1]
        raise ConfigError(f"MASTER_ADDR: not set, and {host!r}, where rank 0 runs, cannot be found; set it") from None
    return host


def _by_accelerate(environment: Mapping[str, str]) -> bool:
    return "ACCELERATE_MIXED_PRECISION" in environment


def _agent(run: str) -> str:
    """The process that started the rank, told from others of the same number; there may be a script in between."""
    agent = psutil.Process().parent()
    with suppress(psutil.Error):  # of somebody else, or gone
        while agent and agent.environ().get("TORCHELASTIC_RUN_ID") == run and (above := agent.parent()):
            agent = above
    with suppress(psutil.Error):
        return f"{socket.gethostname()} {agent.pid} {agent.create_time():.2f}" if agent else ""
    return ""


def _job(environment: Mapping[str, str]) -> dict[str, Any]:
    """What tells a step of Slurm's from others, also when its job is started again."""
    names = [environment.get(f"SLURM_{name}", "") for name in ("CLUSTER_NAME", "JOB_ID", "STEP_ID")]
    again = _number(environment, "SLURM_RESTART_COUNT", 0) > 0
    return {"step": " ".join(names).strip() if names[1] else "", "requeued": again}


def _number(environment: Mapping[str, str], name: str, default: int | None) -> int:
    text = environment.get(name, "")
    if text == "" and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}: {text!r} is no number" if text else f"{name}: not set, though others are") from None


def _address(environment: Mapping[str, str], default: str) -> str:
    found = environment.get("MASTER_ADDR") or default
    if not found:
        raise ConfigError("MASTER_ADDR: not set; it is the host of rank 0, where all ranks meet")
    return found


def _port(environment: Mapping[str, str], job: str) -> int:
    """Returns the port to meet on: the one that is set, or one that follows from the job, since all must know it."""
    digits = [int(part) for part in re.findall(r"\d+", job)]
    chosen = FIRST_PORT + sum(17**i * part for i, part in enumerate(reversed(digits))) % PORTS if digits else 29_500
    return _number(environment, "MASTER_PORT", chosen)
