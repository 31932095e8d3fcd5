"""How a process finds out what started it, from the variables that launchers set."""

import os
import subprocess
import sys

import pytest

from sae.base.errors import ConfigError
from sae.parallel.launch import first_host, launch

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "host-a",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "none",
}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "localhost,nowhere[3-4]",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def facts(environment):
    found = launch(environment)
    return found.launcher, found.rank, found.world_size, found.local_rank, found.address


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("no launcher", 0, 1, 0, "")),
        (TORCHRUN, ("torchrun", 5, 8, 1, "host-a")),
        ({**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"}, ("accelerate launch", 5, 8, 1, "host-a")),
        (without(TORCHRUN, "TORCHELASTIC_RUN_ID"), ("RANK and WORLD_SIZE", 5, 8, 1, "host-a")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ("RANK and WORLD_SIZE", 0, 1, 0, "127.0.0.1")),
        (SRUN, ("srun", 3, 4, 1, "localhost")),
        ({**SRUN, "MASTER_ADDR": "head"}, ("srun", 3, 4, 1, "head")),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ("no launcher", 0, 1, 0, "")),
        (without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID"), ("no launcher", 0, 1, 0, "")),  # in a batch script
        ({**SRUN, **TORCHRUN, "SLURM_STEP_NUM_TASKS": "2"}, ("torchrun", 5, 8, 1, "host-a")),  # one torchrun a node
        (OPENMPI, ("mpirun", 1, 2, 1, "127.0.0.1")),
        ({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "a"}, ("mpirun", 1, 2, 1, "a")),
        (  # within Slurm, mpirun starts a helper on each of two nodes by srun, and that its ranks
            {**SRUN, **OPENMPI, "SLURM_STEP_NUM_TASKS": "2", "OMPI_COMM_WORLD_SIZE": "8", "MASTER_ADDR": "a"},
            ("mpirun", 1, 8, 1, "a"),
        ),
        ({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4"}, ("srun", 3, 4, 1, "localhost")),  # srun --mpi=pmi2
        ({"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "0", "MASTER_ADDR": "a"}, ("mpirun", 2, 3, 0, "a")),
    ],
)
def test_each_launcher_is_recognized(environment, expected):
    assert facts(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (without(TORCHRUN, "RANK"), "RANK: not set, though others are"),
        ({**TORCHRUN, "RANK": "8"}, "RANK: 8 is none of WORLD_SIZE 8"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' is no number"),
        (without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR: not set; it is the host of rank 0"),
        ({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "MASTER_ADDR: not set"),
        ({**SRUN, "SLURM_STEP_NODELIST": "no-such-host.invalid[1-2]"}, "'no-such-host.invalid1', where rank 0 runs"),
        # several tasks that are no group
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE: srun has started 4 tasks, .* a group of 1 by itself"),
        (
            {**SRUN, **TORCHRUN, "GROUP_WORLD_SIZE": "1"},
            "torchrun: srun has started 4 tasks, .*; give torchrun",
        ),
    ],
)
def test_what_makes_no_sense_is_one_line(environment, message):
    with pytest.raises(ConfigError, match=message) as caught:
        launch(environment)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[07-09,12],login", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("a-[1-2].cluster,b", "a-1.cluster"),
        ("rack2-n[10-11]", "rack2-n10"),
    ],
)
def test_the_first_of_slurms_hosts_is_found(nodes, first):
    assert first_host(nodes) == first


def test_steps_of_slurm_meet_on_ports_of_their_own_unless_one_is_set():
    ports = {launch({**SRUN, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step}).port for job in "12" for step in "01"}
    assert len(ports) == 4
    assert all(15_000 <= port < 30_000 for port in ports)
    assert launch({**SRUN, "MASTER_PORT": "4000"}).port == 4000
    assert launch(SRUN).port == launch({**SRUN, "SLURM_PROCID": "0"}).port


def test_a_requeued_step_is_known_again_and_another_is_not():
    first, again = launch(SRUN), launch({**SRUN, "SLURM_RESTART_COUNT": "1"})
    assert first.step == again.step
    assert not first.requeued
    assert again.requeued
    assert launch({**SRUN, "SLURM_STEP_ID": "1"}).step != first.step


def test_torchrun_is_known_by_its_process_also_where_a_script_starts_the_ranks():
    program = "from sae.parallel.launch import launch; print(launch().agent)"
    command, environment = [sys.executable, "-c", program], {**os.environ, **TORCHRUN}
    script = ["sh", "-c", f'"{sys.executable}" -c "{program}"; true']
    found = {subprocess.run(c, env=environment, capture_output=True, text=True).stdout for c in (command, script)}
    (agent,) = found
    assert f" {os.getpid()} " in agent


def test_torchrun_is_known_by_its_process():
    assert str(os.getppid()) in launch(TORCHRUN).agent
    assert not launch(SRUN).agent
