"""Room on disks: of each file system by itself, all that is needed on it together."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from sae.base.errors import ConfigError
from sae.base.room import Need, check_room, shortage, taken


def test_what_one_disk_must_hold_adds_up_and_another_one_is_another(tmp_path, monkeypatch):
    free = {}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free[str(place)]))
    free[str(tmp_path)] = 1000
    one, two = Need("run_dir", tmp_path / "not" / "there", 600), Need("SAE_CACHE", tmp_path, 500)
    check_room(one)
    check_room(two)
    with pytest.raises(ConfigError) as told:
        check_room(one, two)
    assert str(told.value) == (
        f"run_dir and SAE_CACHE: 1.1 kB of disk are needed, 1 kB are free at {tmp_path}; make room, "
        "or choose another folder"
    )
    another = next(place for place in ("/dev/shm", "/usr") if Path(place).stat().st_dev != tmp_path.stat().st_dev)
    free[another] = 1000
    assert shortage(one, Need("SAE_CACHE", Path(another, "cache"), 500)) == ""
    assert shortage(Need("run_dir", tmp_path, -5)) == "", "what is there already is no need"


def test_what_is_there_is_counted(tmp_path):
    assert taken(tmp_path / "nothing") == 0
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_bytes(b"12345")
    assert taken(tmp_path) == 5
