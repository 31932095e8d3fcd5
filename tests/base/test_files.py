"""Files are whole or absent, whatever happens while they are written."""

import contextlib
import errno
import json
import os
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.base import files
from sae.base.errors import ConfigError, DataError, Stopped, nearest
from sae.base.files import (
    FolderLock,
    atomic_write,
    cache_dir,
    explained,
    is_complete,
    load_tensors,
    publish,
    read_json,
    remove_stale,
    replacing,
    safe_join,
    save_tensors,
    sha256_file,
    verify,
    write_json,
)
from sae.base.progress import Watch

ROOT = Path(files.__file__).parents[2]
TENSORS = {
    "w": torch.arange(12.0).reshape(3, 4),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "none": torch.zeros(0, 5),
}


def run_python(script: str, *arguments: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_with(code: int):
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


# One file


@pytest.mark.parametrize("data", [b"bytes \x00", "text \u00e9\n", b"", ""])
def test_atomic_write_round_trip_in_a_folder_with_space_and_unicode(tmp_path, data):
    path = tmp_path / "new folder" / "\u00fcn\u00efcode \u6587" / "file.txt"
    atomic_write(path, "old")
    atomic_write(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("place", ["fsync", "replace", "mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("write", [lambda p: atomic_write(p, b"new"), lambda p: save_tensors(p, TENSORS)])
def test_a_full_or_read_only_disk_is_named_and_leaves_the_old_file(tmp_path, monkeypatch, place, code, write):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, place, fail_with(code))
    with pytest.raises(OSError, match=r"cannot write .*/file: ") as caught:
        write(path)
    monkeypatch.undo()
    assert caught.value.errno == code
    assert os.strerror(code) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_path_that_is_named_is_not_named_again_by_what_is_written_around_it(tmp_path):
    told = pytest.raises(OSError, match=r"^\[Errno 28\] cannot write [^:]*/inner: No space left on device$")
    with told, replacing(tmp_path / "outer"), explained(tmp_path / "inner"):
        fail_with(errno.ENOSPC)()
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_flushes_no_folders_takes_files_and_folders(tmp_path, monkeypatch, code):
    def fsync(descriptor, of=stat.S_ISDIR):
        if of(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_write(tmp_path / "file", b"new")
    with publish(tmp_path / "folder") as draft:
        atomic_write(draft / "inner" / "file", b"new")
    verify(tmp_path / "folder")
    assert (tmp_path / "file").read_bytes() == b"new"
    monkeypatch.setattr(os, "fsync", partial(fsync, of=stat.S_ISREG))
    with pytest.raises(OSError, match=r"cannot write .*/other: "):  # a file must be on disk
        atomic_write(tmp_path / "other", b"new")


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match=r"cannot write .*/file/a\.json: Not a directory"):
        write_json(tmp_path / "file" / "a.json", {})


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from sae.base.files import atomic_write, publish, save_tensors
from sae.base.store import ShardWriter

folder = Path(sys.argv[1])
big = torch.zeros(1 << 18)
writer = ShardWriter(folder / "store", "test", {})
writer.write(0, {"x": torch.ones(3)})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))  # the kernel cuts files off here, in mid-write


def in_folder():
    with publish(folder / "published") as draft:
        save_tensors(draft / "x.safetensors", {"x": big})


for write in (
    lambda: atomic_write(folder / "a", bytes(1 << 20)),
    lambda: save_tensors(folder / "b", {"x": big}),
    lambda: writer.write(1, {"x": big}),
    in_folder,
):
    try:
        write()
    except OSError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_file_cut_off_by_the_kernel_never_gets_its_name(tmp_path):
    with run_python(FULL_DISK, tmp_path) as process:
        output, errors = process.communicate(timeout=900)
    assert not errors
    lines = output.splitlines()
    assert len(lines) == 4
    assert all("File too large" in line and "cannot write" in line for line in lines)
    assert names(tmp_path) == ["store"]
    assert names(tmp_path / "store") == ["header.json", "shard-000000.safetensors", "shards-0.jsonl"]


# JSON


def test_json_round_trip_sorts_keys_and_keeps_unicode(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5, None, True], "a": "\u00e9"})
    assert read_json(path) == {"a": "\u00e9", "b": [1, 2.5, None, True]}
    assert path.read_text(encoding="utf-8").index('"a"') < path.read_text(encoding="utf-8").index('"b"')


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_what_is_no_number(tmp_path, value):
    with pytest.raises(ValueError, match=r"a\.json"):
        write_json(tmp_path / "a.json", {"loss": value})
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, None])
def test_broken_or_missing_json_is_named(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json"):
        read_json(path)


# Tensors


def test_tensors_round_trip(tmp_path):
    save_tensors(tmp_path / "t.safetensors", {**TENSORS, "transposed": TENSORS["w"].T}, {"format": "pt"})
    found = load_tensors(tmp_path / "t.safetensors")
    for name, tensor in {**TENSORS, "transposed": TENSORS["w"].T}.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_equal_tensors_and_metadata_give_equal_bytes(tmp_path):
    metadata = {f"key \u00e9 {i}": 'quote " backslash \\ \x01 \x7f newline \n' for i in range(8)}
    for i in range(8):
        save_tensors(tmp_path / str(i), dict(reversed(TENSORS.items())) if i % 2 else TENSORS, metadata)
    assert len({(tmp_path / str(i)).read_bytes() for i in range(8)}) == 1
    assert torch.equal(load_tensors(tmp_path / "0")["w"], TENSORS["w"])


def test_reading_a_file_while_it_is_replaced_keeps_the_old_values(tmp_path):
    save_tensors(tmp_path / "t", {"x": torch.ones(10_000)})
    old = load_tensors(tmp_path / "t")["x"]
    save_tensors(tmp_path / "t", {"x": torch.zeros(10_000)})
    assert old.sum() == 10_000


def test_truncated_or_missing_tensors_are_named(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(DataError, match=r"t\.safetensors"):
        load_tensors(path)
    save_tensors(path, TENSORS)
    whole = path.read_bytes()
    for length in (0, 7, 8, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"t\.safetensors"):
            load_tensors(path)


@settings(max_examples=100, deadline=None)
@given(header=st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)), size=st.integers(0, 2**63))
def test_hostile_headers_end_in_a_data_error(tmp_path_factory, header, size):
    path = tmp_path_factory.getbasetemp() / "hostile"
    path.write_bytes(size.to_bytes(8, "little") + header)
    with pytest.raises(DataError, match="hostile"):
        load_tensors(path)


# Paths


def test_safe_join_stays_inside(tmp_path):
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "root" / "inner").symlink_to(tmp_path / "root" / "sub")
    (tmp_path / "root" / "outer").symlink_to(tmp_path)
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root" / "loop")
    root = tmp_path / "root"
    assert safe_join(root, "sub", "a..b/c") == root / "sub" / "a..b" / "c"
    assert safe_join(root, "inner", "x") == root / "inner" / "x"
    for parts in (("..",), ("sub/../..",), ("sub", "../x"), ("/etc/passwd",), ("outer", "x"), ("..\\x",), ("a\0b",)):
        with pytest.raises(DataError, match="refused"):
            safe_join(root, *parts)


def test_cache_dir_is_the_environments_or_the_home_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("SAE_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("SAE_CACHE")
    assert cache_dir() == tmp_path / "shared" / "sae-interp"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # "all paths must be absolute", and others are to be ignored
    for unset in (lambda: monkeypatch.setenv("SAE_CACHE", ""), lambda: monkeypatch.delenv("SAE_CACHE")):
        unset()
        assert cache_dir() == Path("/home/someone/.cache/sae-interp")


def test_nearest():
    assert nearest("topkk", ["topk", "relu"]) == " Did you mean 'topk'?"
    assert nearest("zzz", ["topk", "relu"]) == ""
    assert nearest("x", []) == ""


# Published folders


def published(folder: Path) -> Path:
    with publish(folder) as draft:
        (draft / "sub").mkdir()
        save_tensors(draft / "sub" / "w.safetensors", TENSORS)
        write_json(draft / "state.json", {"step": 1})
        (draft / ".hidden").write_text("not ours")
    return folder


def test_publish_makes_a_whole_folder(tmp_path):
    folder = published(tmp_path / "new" / "step 1")
    assert is_complete(folder)
    verify(folder)
    assert names(folder) == [".hidden", "COMPLETE", "manifest.json", "state.json", "sub"]
    assert names(folder.parent) == ["step 1"]
    listed = read_json(folder / "manifest.json")["files"]
    assert sorted(listed) == ["state.json", "sub/w.safetensors"]
    assert listed["state.json"] == {
        "bytes": (folder / "state.json").stat().st_size,
        "sha256": sha256_file(folder / "state.json"),
    }


def test_nothing_is_visible_before_the_end_nor_left_after_an_error(tmp_path):
    def interrupted() -> None:
        with publish(tmp_path / "step") as draft:
            (draft / "a").write_text("a")
            assert not (tmp_path / "step").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["fsync", "rename"])
def test_publish_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch, place):
    def full() -> None:
        with publish(tmp_path / "step") as draft:
            (draft / "a").write_text("a")
            monkeypatch.setattr(os, place, fail_with(errno.ENOSPC))

    with pytest.raises(OSError, match=r"cannot write .*/step.*No space left"):
        full()
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_publish_refuses_what_is_there_but_fills_an_empty_folder(tmp_path):
    folder = published(tmp_path / "step")
    before = sha256_file(folder / "manifest.json")
    with pytest.raises(FileExistsError, match="exists already"), publish(folder):
        pytest.fail("the block must not start")
    assert sha256_file(folder / "manifest.json") == before
    (tmp_path / "empty").mkdir()
    verify(published(tmp_path / "empty"))


def test_the_first_of_two_publishers_stays(tmp_path):
    with publish(tmp_path / "step") as slow:
        (slow / "slow").write_text("slow")
        published(tmp_path / "step")
    verify(tmp_path / "step")
    assert not (tmp_path / "step" / "slow").exists()
    assert names(tmp_path) == ["step"]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: _flip(f / "sub" / "w.safetensors"), "w.safetensors is damaged"),
        (lambda f: os.truncate(f / "state.json", 3), "state.json is damaged"),
        (lambda f: (f / "state.json").unlink(), "state.json is missing"),
        (lambda f: (f / "sub" / "more").write_text("x"), "more does not belong"),
        (lambda f: _flip(f / "manifest.json"), "manifest.json is damaged"),
        (lambda f: (f / "COMPLETE").unlink(), "incomplete"),
        (lambda f: (f / "manifest.json").unlink(), "incomplete"),
    ],
)
def test_verify_names_what_is_wrong(tmp_path, damage, named):
    folder = published(tmp_path / "step")
    damage(folder)
    with pytest.raises(DataError, match=named):
        verify(folder)


# Kills

KILLED_SAVES = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from sae.base.files import is_complete, load_tensors, publish, remove_stale, save_tensors, verify, write_json

root = Path(sys.argv[1])
random.seed(0)
torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # counted below; a kill loses nothing that was written


def save(step):
    with publish(root / f"step-{step:06d}") as draft:
        save_tensors(draft / "w.safetensors", {"w": torch.full((20_000,), float(step))})
        write_json(draft / "state.json", {"step": step})


def die_at(call):  # the process is killed right before its n-th change to the file system
    left = [call]
    for name in ("mkdir", "fsync", "replace", "rename", "rmdir", "unlink"):
        def counted(*arguments, original=getattr(os, name), **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)
        setattr(os, name, counted)


def check():
    steps = sorted(path for path in root.glob("step-*"))
    assert all(is_complete(path) for path in steps), "a folder without COMPLETE has a final name"
    verify(steps[-1])
    assert (load_tensors(steps[-1] / "w.safetensors")["w"] == int(steps[-1].name[5:])).all()
    remove_stale(root)
    assert all(path.name.startswith("step-") for path in root.iterdir()), "a temporary was left"
    return int(steps[-1].name[5:])


save(0)
step, call, finished, kills = 1, 0, False, 0
while not finished:  # at every single change
    child = os.fork()
    if child == 0:
        die_at(call)
        save(step)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    finished = status == 0
    kills += os.WIFSIGNALED(status)
    call += 1
    step = check() + 1
for _ in range(20):  # and at random moments of saving in a loop
    child = os.fork()
    if child == 0:
        while True:
            save(step)
            step += 1
    time.sleep(random.uniform(0.001, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    step = check() + 1
print(kills)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_of_a_save_leaves_the_latest_checkpoint_whole(tmp_path):
    with run_python(KILLED_SAVES, tmp_path) as process:
        output, errors = process.communicate(timeout=900)
    assert not errors, errors
    assert int(output) > 10


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_remove_stale_takes_what_the_dead_left_and_nothing_else(tmp_path, monkeypatch):
    def temp(host: str, pid: int, launch: str = "00000000") -> str:
        folder = tmp_path / f".tmp-{host}-{pid}-{launch}-000001-step-1"
        (folder / "sub").mkdir(parents=True)
        return folder.name

    stale = [
        temp(files._HOST, dead_process()),
        temp(files._HOST, os.getpid()),  # an earlier process with our id
    ]
    alive = [temp(files._HOST, os.getppid()), temp(files._HOST, os.getpid(), files._LAUNCH)]
    elsewhere = temp("ffffffff", dead_process())
    for name in (".tmp-of-someone", ".hidden", "step-1"):
        (tmp_path / name).mkdir()
    assert sorted(path.name for path in remove_stale(tmp_path)) == sorted(stale)
    assert names(tmp_path) == sorted([*alive, elsewhere, ".tmp-of-someone", ".hidden", "step-1"])
    os.utime(tmp_path / elsewhere, (0, 0))
    assert [path.name for path in remove_stale(tmp_path)] == [elsewhere]
    assert remove_stale(tmp_path / "nowhere") == []


# Locks

HOLD = """
import sys, time
from sae.base.files import FolderLock
with FolderLock(sys.argv[1]):
    print("held", flush=True)
    while True:
        time.sleep(3600)
"""


def test_a_second_run_fails_at_once_naming_the_holder_and_a_killed_one_frees_the_folder(tmp_path, monkeypatch):
    folder = tmp_path / "my run"
    with run_python(HOLD, folder) as holder:  # waits for it, and closes its pipes, whatever happens here
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            monkeypatch.setattr(files.time, "sleep", lambda seconds: pytest.fail("it waited"))
            with pytest.raises(ConfigError, match=rf"my run is in use by process {holder.pid} \(started 20\d\d-"):
                FolderLock(folder).__enter__()
        finally:
            holder.kill()
    with FolderLock(folder):
        assert read_json(folder / ".lock")["pid"] == os.getpid()


def test_a_lock_excludes_within_a_process_too_and_can_be_taken_again(tmp_path):
    for _ in range(2):
        with FolderLock(tmp_path), pytest.raises(ConfigError, match=str(os.getpid())):
            FolderLock(tmp_path).__enter__()
    assert sorted(json.loads((tmp_path / ".lock").read_text())) == ["command", "pid", "started"]


def test_whoever_may_wait_gets_the_lock_when_it_is_free(tmp_path):
    first, polls = FolderLock(tmp_path), []
    first.__enter__()

    def poll() -> bool:
        polls.append(1)
        if len(polls) == 2:
            first.__exit__()
        return False

    with FolderLock(tmp_path, Watch(poll)):
        assert len(polls) == 2


def test_waiting_for_a_lock_ends_when_asked_to(tmp_path):
    with FolderLock(tmp_path), pytest.raises(Stopped, match=f"process {os.getpid()}"):
        FolderLock(tmp_path, Watch(lambda: True)).__enter__()


def test_a_lock_file_with_other_content_still_locks(tmp_path):
    with FolderLock(tmp_path):
        (tmp_path / ".lock").write_text("[]")
        with pytest.raises(ConfigError, match="in use by another process"):
            FolderLock(tmp_path).__enter__()


def test_a_folder_that_cannot_be_written_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"cannot write to .*/file/run: Not a directory"):
        FolderLock(tmp_path / "file" / "run").__enter__()


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "lock_descriptor", fail_with(errno.ENOLCK))
    with FolderLock(tmp_path):
        assert "cannot be locked" in caplog.text


# Windows: its rules, as far as they can be put on this system's calls


@pytest.fixture
def windows(monkeypatch):
    """No folder is opened or replaced, no file flushed that is open to be read alone, nothing removed that is open."""
    opened = Path("/proc/self/fd")

    def ruled(name, refused):
        real = getattr(os, name)

        def call(first, *arguments, **options):
            if refused(first, *arguments, **options):
                raise PermissionError(errno.EACCES, "as on Windows", str(first))
            return real(first, *arguments, **options)

        monkeypatch.setattr(os, name, call)

    def is_open(path, **_):
        with contextlib.suppress(OSError):
            return str(path) in [os.readlink(entry) for entry in opened.iterdir()]

    def only_read(number):
        flags = (opened.parent / "fdinfo" / str(number)).read_text().split("flags:")[1].split()[0]
        return not int(flags, 8) & (os.O_WRONLY | os.O_RDWR)

    ruled("open", lambda path, *_, **options: os.path.isdir(path) and "dir_fd" not in options)  # which shutil gives
    ruled("fsync", only_read)
    ruled("unlink", is_open)
    ruled("rename", lambda _, new: os.path.exists(new))
    monkeypatch.setattr(files, "_WINDOWS", True)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what is open")
@pytest.mark.usefixtures("windows")
def test_on_windows_files_folders_and_locks_are_as_elsewhere(tmp_path):
    atomic_write(tmp_path / "file", "old")
    atomic_write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new"):
        verify(published(folder))
    with FolderLock(tmp_path / "run"), pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        FolderLock(tmp_path / "run").__enter__()
    assert names(tmp_path) == ["empty", "file", "new"]


def test_who_holds_a_folder_is_told_without_the_byte_that_windows_locks(tmp_path):
    with FolderLock(tmp_path):
        with open(tmp_path / ".lock", "r+b") as file:
            file.write(b"?")
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
            FolderLock(tmp_path).__enter__()
