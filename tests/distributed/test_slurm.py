"""On a real Slurm: the shipped job files, stopped, requeued, killed; and what srun, sbatch and torchrun make of ranks.

Without Slurm, the same files with stand-ins for srun and scontrol.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rigs.children import PATIENCE_S, Child, free_port, ranks, sae_train
from rigs.fakes import tiny_config
from rigs.interp_runs import SMALL as INTERP
from rigs.interp_runs import tiny_coder
from rigs.runs import assert_equal, checkpoints, lines
from rigs.slurm import ALIVE, slurm, why_not

from sae.base.settings import to_yaml

FILES = Path(__file__).parents[2] / "configs" / "slurm"
TRAINING = ("train-node", "train-nodes", "train-from-store", "store", "train-torchrun")
SMALL = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=30")
LONG = {"tokens": 400 * 128, "checkpoints.every_steps": 25}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    with slurm(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model, tiny_text):
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(to_yaml(tiny_config(tiny_model, tiny_text, LONG)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory, config):
    """The run of two ranks that nobody disturbs."""
    folder = tmp_path_factory.mktemp("by-hand")
    argv = ["--config", str(config), "--run-dir", str(folder / "run")]
    own = {"SAE_CACHE": str(folder / "cache")}
    started = [Child(folder / f"{i}.log", partial(sae_train, argv), own | one) for i, one in enumerate(ranks(2))]
    assert [child.wait() for child in started] == [0, 0], started[0].output
    return folder / "run"


def wait_beyond(run: Path, step: int, cluster, job: str) -> None:
    """Waits until a job has taken a step."""
    end = time.monotonic() + PATIENCE_S
    while not ((run / "metrics.jsonl").exists() and len(lines(run)) > step):
        assert cluster.job(job)["JobState"] in ALIVE, cluster.log(job)
        assert time.monotonic() < end, cluster.log(job)
        time.sleep(0.05)


@pytest.mark.slow
def test_two_tasks_of_srun_are_one_run(cluster, config, by_hand):
    run = cluster.work / "srun"
    done = cluster.call("srun", "-N", 2, "-n", 2, "sae-train", "--config", config, "--run-dir", run)
    assert re.search(r"ranks +2 \(srun\) on \d hosts? \(\S+\); cpu; gloo", done.stderr), done.stderr
    assert len(re.findall("^run folder", done.stderr, re.MULTILINE)) == 2  # at the start and at the end, of rank 0
    assert_equal(run, by_hand)


@pytest.mark.slow
def test_stopped_before_its_time_is_over_goes_on_and_ends_the_same(cluster, config, by_hand):
    run = cluster.work / "requeued"
    job = cluster.submit(*SMALL, FILES / "train-nodes.sbatch", "--config", config, "--run-dir", run)
    for number, beyond in enumerate((30, 150)):
        wait_beyond(run, beyond, cluster, job)
        cluster.call("scancel", "--signal=USR1", job)  # as --signal does: to the steps alone
        cluster.wait(job, rf"(?s)(stopped at step \d+ of 400, checkpoint written.*){{{number + 1}}}")
    found = cluster.wait(job)
    log = cluster.log(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "2"), log
    assert "Exited with exit code 75" in log
    assert len(re.findall(r"^continuing \S+ at step \d+ of 400", log, re.MULTILINE)) == 2
    assert_equal(run, by_hand)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_task_ends_the_job_which_goes_on_when_requeued(cluster, config, by_hand, rank):
    run = cluster.work / f"killed-{rank}"
    job = cluster.submit(*SMALL, FILES / "train-nodes.sbatch", "--config", config, "--run-dir", run)
    cluster.wait(job, "run folder")
    wait_beyond(run, 60, cluster, job)
    ours = [process for process in cluster.processes() if process.environ().get("SLURM_JOB_ID") == job]
    task = [one for one in ours if one.environ().get("SLURM_PROCID") == str(rank) and "cli.train" in one.cmdline()]
    task[0].kill()
    found = cluster.wait(job)
    assert found["JobState"] == "FAILED", cluster.log(job)
    assert f"task {rank}: Killed" in cluster.log(job)
    assert checkpoints(run)
    assert len(lines(run)) < 400
    cluster.call("scontrol", "requeue", job)
    found = cluster.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    assert_equal(run, by_hand)


@pytest.mark.slow
def test_torchrun_on_every_node_is_one_run_and_goes_on(cluster, config, by_hand):
    run = cluster.work / "torchrun"
    where = f"--export=ALL,MASTER_ADDR=127.0.0.1,MASTER_PORT={free_port()}"  # n1 is no name outside of this Slurm
    job = cluster.submit(*SMALL, where, FILES / "train-torchrun.sbatch", "--config", config, "--run-dir", run)
    cluster.wait(job, r"ranks +2 \(torchrun\)")
    wait_beyond(run, 60, cluster, job)
    cluster.call("scancel", "--signal=USR1", "--batch", job)  # as --signal=B: does: to the script alone
    found = cluster.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    assert re.search(r"stopped at step \d+ of 400, checkpoint written", cluster.log(job))
    assert_equal(run, by_hand)


@pytest.mark.slow
def test_a_command_in_the_script_of_two_tasks_runs_alone(cluster, config):
    script = cluster.work / "plain.sbatch"
    script.write_text('#!/bin/sh\n[ "$SLURM_NTASKS" = 2 ] && sae-train "$@"\n', encoding="utf-8")
    run = cluster.work / "plain"
    job = cluster.submit("--ntasks=2", "--output=%j.log", script, "--config", config, "--run-dir", run, "--tokens=2048")
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    assert "ranks " not in cluster.log(job)
    assert len(lines(run)) == 16


@pytest.mark.slow
def test_tasks_that_are_no_group_are_refused(cluster, config):
    run = cluster.work / "refused"
    words = ["torchrun", "--standalone", "--no-python", "--nproc-per-node", 1, "sae-train", "--config", config]
    done = cluster.call("srun", "-n", 2, *words, "--run-dir", run, check=False)
    assert done.returncode
    told = (
        "error: torchrun: srun has started 2 tasks, and each of them is a group of 1 by itself; give torchrun --nnodes"
    )
    assert done.stderr.count(told) == 2, done.stderr
    assert not run.exists()


@pytest.mark.slow
def test_a_second_job_on_the_folder_is_refused(cluster, config):
    run = cluster.work / "shared"
    words = ("--config", config, "--run-dir", run, "--tokens", 100_000 * 128)
    first = cluster.submit(*SMALL, FILES / "train-nodes.sbatch", *words)
    wait_beyond(run, 5, cluster, first)
    second = cluster.submit(*SMALL, FILES / "train-nodes.sbatch", *words)
    third = cluster.submit("--nodes=1", *SMALL[1:], FILES / "train-node.sbatch", "--resume", run)
    for job in (second, third):
        assert cluster.wait(job)["JobState"] == "FAILED", cluster.log(job)
        assert len(re.findall(r"error: run_dir: .*(in use|holds a run)", cluster.log(job))) == 1, cluster.log(job)
    wait_beyond(run, len(lines(run)), cluster, first)  # which does not mind
    cluster.call("scancel", first)
    assert cluster.wait(first)["JobState"] == "CANCELLED"


SERVER = """
import sys, time
sys.path.insert(0, "{tests}")
from rigs.fake_llm import FakeLLM
said = '{"explanation": "tokens that end in a letter"}'
with FakeLLM(lambda asked: said, port=int(sys.argv[1])):
    time.sleep(3600)
"""


@pytest.mark.slow
def test_labels_are_made_by_a_server_within_the_job(cluster, tmp_path):
    coder = tiny_coder(tmp_path, documents=20)
    (tmp_path / "serve.py").write_text(SERVER.replace("{tests}", str(FILES.parents[1] / "tests")), encoding="utf-8")
    own = {"MODEL": "fake", "SERVE": f"python {tmp_path / 'serve.py'} $PORT", "SHARDS": "2"}
    words = [FILES / "explain.sbatch", coder, *INTERP, "--latents", "random:6", "--explain-only"]
    export = "--export=ALL," + ",".join(f"{name}={value}" for name, value in own.items())
    job = cluster.submit("--nodes=1", "--ntasks-per-node=2", *SMALL[2:], export, *words)
    found = cluster.wait(job)
    log = cluster.log(job)
    assert found["JobState"] == "COMPLETED", log
    assert re.search(r"ranks +2 \(srun\)", log), log
    rows = pq.read_table(coder / "explain" / "results.parquet").to_pylist()
    texts = {row["explanation"] for row in rows if row["explainer"] == "llm"}
    assert "tokens that end in a letter" in texts, rows
    assert len({row["latent"] for row in rows}) == 6
    assert sorted(path.name for path in (coder / "explain" / "shards").iterdir()) == ["1-of-2", "2-of-2"]
    assert not [process for process in cluster.processes() if "serve.py" in " ".join(process.cmdline())]


@pytest.mark.slow
def test_an_array_stores_and_a_job_trains_from_it(cluster, config, by_hand, tmp_path):
    """The same run as the live one's; a part that is killed is made when it is requeued."""
    run = cluster.work / "stored"
    array = cluster.submit("--array=0-2", *SMALL[2:], FILES / "store.sbatch", "--config", config)
    words = ("--config", config, "--run-dir", run)
    job = cluster.submit(*SMALL, f"--dependency=afterok:{array}", FILES / "train-from-store.sbatch", *words)
    found = cluster.wait(job)
    assert found["JobState"] == "COMPLETED", cluster.log(array) + cluster.log(job)
    assert_equal(run, by_hand)


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("code", [0, 2, 75, 137])
def test_a_job_is_requeued_if_it_was_stopped_and_tells_its_exit_code(name, code, tmp_path):
    """An exit code of srun by itself tells torchrun's stop from its failure no more than torchrun does."""
    done = job_file(name, tmp_path, f"exit {code}")
    assert done.returncode == code
    told = {"train-torchrun": [], "store": ["requeue 5_2"]}.get(name, ["requeue 7"])
    assert (tmp_path / "scontrol.txt").read_text().splitlines() == (told if code == 75 else [])


def test_a_torchrun_that_is_asked_to_stop_is_requeued(tmp_path):
    """The exit code of torchrun itself is 1, then."""
    ready = tmp_path / "ready"
    asked = f"trap 'sleep 0.1; exit 1' USR1; touch {ready}; while :; do sleep 0.01; done"
    done = job_file("train-torchrun", tmp_path, asked, once_there=ready)
    assert done.returncode == 1
    assert (tmp_path / "scontrol.txt").read_text().splitlines()[-1] == "requeue 7"


def job_file(name: str, folder: Path, srun: str, once_there: Path | None = None) -> subprocess.Popen:
    """Runs a job file as job 7 with stand-ins for srun and scontrol; sends it USR1 once a file is there."""
    said = {"srun": srun, "scontrol": f'[ "$1" = show ] && echo n1 || echo "$@" >> {folder}/scontrol.txt'}
    (folder / "scontrol.txt").touch()
    for command, does in said.items():
        (folder / command).write_text(f"#!/bin/bash\n{does}\n", encoding="utf-8")
        (folder / command).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "2"}
    job |= {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3"}
    environment = {**os.environ, **job, "SLURM_GPUS_ON_NODE": "2", "PATH": f"{folder}:{os.environ['PATH']}"}
    process = subprocess.Popen(["bash", FILES / f"{name}.sbatch", "--tokens", "5"], env=environment)
    end = time.monotonic() + PATIENCE_S
    while once_there and not once_there.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    if once_there:
        process.send_signal(signal.SIGUSR1)
    process.wait(PATIENCE_S)
    return process


@pytest.mark.parametrize("path", sorted(FILES.glob("*.sbatch")), ids=lambda path: path.stem)
def test_job_files_are_sound(path):
    text = path.read_text(encoding="utf-8")
    assert re.search(rf"sbatch .*{path.name} ", text)
    for option in ("job-name", "time", "output=%x-", "cpus-per-task", "open-mode=append", "requeue"):
        assert f"#SBATCH --{option}" in text
    assert not shutil.which("shellcheck") or not subprocess.run(["shellcheck", path]).returncode
