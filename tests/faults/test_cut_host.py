"""Two hosts, as network namespaces, and the wire between them cut in the middle of a run."""

import ctypes
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from functools import partial

import pytest
from rigs.children import Child, free_port, sae_train
from rigs.fakes import tiny_config
from rigs.losses import DEADLINE_S, SLACK_S
from rigs.runs import lines

from sae.base.settings import to_yaml

CLONE_NEWUTS, CLONE_NEWNET = 0x04000000, 0x40000000
SIDES = ("left", "right")
NET = "10.77.31"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Yields two network namespaces that see each other, by the name of the host they stand for."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the command ip (iproute2)")
    spaces = {side: f"sae-{os.getpid()}-{side}" for side in SIDES}
    try:
        for space in spaces.values():
            try:
                ip("netns", "add", space)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
        left, right = spaces.values()
        ip("-n", left, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", right)
        for number, space in enumerate(spaces.values(), 1):
            ip("-n", space, "addr", "add", f"{NET}.{number}/24", "dev", "wire")
            for name in ("lo", "wire"):
                ip("-n", space, "link", "set", name, "up")
        yield spaces
    finally:
        for space in spaces.values():
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)


def enter(space: str, name: str) -> None:
    """Moves this process to a namespace, as a host of a name of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{space}", encoding="utf-8") as file:
        assert libc.setns(file.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    assert libc.unshare(CLONE_NEWUTS) == 0, os.strerror(ctypes.get_errno())
    socket.sethostname(name)


@pytest.mark.slow
def test_a_wire_that_is_cut_ends_both_sides_and_each_names_the_other(hosts, tmp_path, tiny_model, tiny_text):
    changes = {"tokens": 10**7, "checkpoints.every_steps": 10, "ranks.deadline_s": DEADLINE_S}
    config, run, port = tmp_path / "config.yaml", tmp_path / "run", str(free_port())
    config.write_text(to_yaml(tiny_config(tiny_model, tiny_text, changes)), encoding="utf-8")
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": f"{NET}.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "wire"}
    children = [
        Child(
            tmp_path / f"{side}.txt",
            partial(sae_train, ["--config", str(config), "--run-dir", str(run)], partial(enter, space, side)),
            {**shared, "RANK": str(rank), "LOCAL_RANK": "0"},
        )
        for rank, (side, space) in enumerate(hosts.items())
    ]
    children[0].wait_for(lambda: (run / "metrics.jsonl").exists() and len(lines(run)) > 20)
    ip("-n", hosts["right"], "link", "set", "wire", "down")
    began = time.monotonic()
    assert [child.wait() for child in children] == [1, 1], [child.output for child in children]
    assert time.monotonic() - began < DEADLINE_S + SLACK_S
    for child, lost in zip(children, (1, 0), strict=True):
        name = f"error: rank {lost} ({SIDES[lost]}, pid {children[lost].process.pid}) was last heard "
        assert child.output.splitlines()[-1].startswith(name), child.output
