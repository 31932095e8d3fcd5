"""Two ranks gather what one gathers, bit for bit, also after both were killed, and whoever goes on."""

import signal
import time
from functools import partial

import pytest
from rigs.children import Child, die
from rigs.children import ranks as as_ranks
from rigs.interp_evidence import PlantedCodes, passes, planted, result, write_documents

import interp.evidence.first_pass
import interp.evidence.second_pass
from sae.parallel import ranks


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of a text and of what one process finds in it."""
    folder = tmp_path_factory.mktemp("one")
    source = write_documents(folder / "text.jsonl", [30, 64, 100, 500] * 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_CACHE", str(folder / "cache"))
        assert passes(source, folder / "run") == 0
    return folder


@pytest.fixture
def run(tmp_path, one):
    """Returns (name, number of ranks, what to break) -> exit codes and output."""
    source = one / "text.jsonl"

    def started(name, n_ranks, first=None):
        environments = as_ranks(n_ranks) if n_ranks > 1 else [{}]
        children = [
            Child(tmp_path / f"{name}-{rank}.txt", partial(passes, source, tmp_path / name, first), environment)
            for rank, environment in enumerate(environments)
        ]
        codes = [child.wait() for child in children]
        return codes, "".join(child.output for child in children)

    started.folder, started.one = tmp_path, one / "run"
    return started


def at_block(number, module, act, patch) -> None:
    """Has every rank act when it is about to read a block for the given time."""
    calls = []

    def read(codes, rows):
        calls.extend([None] * (codes.reader == module))
        if len(calls) == number:
            act()
        return planted(codes.rows.tokens(rows))

    patch.setattr(PlantedCodes, "read", read)


def be_late(patch) -> None:
    """Has the second rank look at what is done when the first has long begun, unless that waits."""
    if ranks.rank() == 1:
        slow(patch, interp.evidence.first_pass, "load_tensors")
        slow(patch, interp.evidence.first_pass._Pass, "_take_in")
        slow(patch, interp.evidence.second_pass, "ShardWriter")


def slow(patch, where, name) -> None:
    original = getattr(where, name)

    def slowly(*args, **kwargs):
        time.sleep(0.3)
        return original(*args, **kwargs)

    patch.setattr(where, name, slowly)


def test_two_ranks_find_what_one_finds(run):
    codes, output = run("two", 2, be_late)
    assert codes == [0, 0], output
    assert result(run.folder / "two") == result(run.one)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "later"), [("evidence", 1), ("evidence", 3), ("windows", 2)])
def test_killed_together_they_go_on_as_many_as_they_are(run, module, later):
    codes, output = run("killed", 2, partial(at_block, 4, module, die))
    assert -9 in codes, output  # the other one may hear of it before its own
    assert 0 not in codes, output
    codes, output = run("killed", later)
    assert codes == [0] * later, output
    assert result(run.folder / "killed") == result(run.one)


def stop_one(number, which, patch):
    """Returns a stop flag that is set on one rank, at its third look."""
    looks = []

    def should_stop() -> bool:
        looks.append(None)
        return ranks.rank() == which and len(looks) >= number

    return should_stop


@pytest.mark.slow
def test_a_stop_of_one_rank_stops_both(run):
    codes, output = run("stopped", 2, partial(stop_one, 3, 1))
    assert codes == [75, 75], output
    codes, output = run("stopped", 2)
    assert codes == [0, 0], output
    assert result(run.folder / "stopped") == result(run.one)


def fail_one(patch) -> None:
    if ranks.rank() == 1:
        patch.setattr(PlantedCodes, "read", lambda codes, rows: 1 / 0)


@pytest.mark.slow
def test_an_error_of_one_rank_ends_both(run):
    codes, output = run("failed", 2, fail_one)
    assert all(code not in (0, -signal.SIGKILL) for code in codes)
    assert "division by zero" in output
    assert run("failed", 2)[0] == [0, 0]
    assert result(run.folder / "failed") == result(run.one)
