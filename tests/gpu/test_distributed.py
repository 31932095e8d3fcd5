"""The script that checks ranks on a card: what it needs no card for."""

import pytest
from gpu import distributed
from gpu.distributed import CHECKS, LIMITS, main, parsed


def test_it_takes_names_of_checks_and_has_eight_minutes_for_all(capsys):
    assert parsed([]).only == list(CHECKS) == list(LIMITS)
    assert parsed(["--device", "cpu", "--only", "cost", "memory"]).only == ["cost", "memory"]
    assert sum(LIMITS.values()) <= 8 * 60
    with pytest.raises(SystemExit, match="2"):
        parsed(["--only", "speed"])
    assert "invalid choice: 'speed'" in capsys.readouterr().err


def test_a_check_that_breaks_does_not_hide_the_next(monkeypatch, capsys):
    def broken(place):
        yield "first", True, "1"
        raise RuntimeError("no such thing")

    checks = {"cost": broken, "lost": lambda place: iter([("a", None, "no card"), ("b", True, str(place.device))])}
    monkeypatch.setattr(distributed, "CHECKS", checks)
    assert main(["--device", "cpu", "--only", "cost", "lost"]) == 1
    told = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert [line for line in told if line[1] in ("pass", "FAIL", "skipped")] == [
        ["cost", "pass", "first"],
        ["cost", "FAIL", "not"],
        ["lost", "skipped", "a"],
        ["lost", "pass", "b"],
    ]
    assert main(["--device", "cpu", "--only", "lost"]) == 0


@pytest.mark.slow
def test_on_a_cpu_collectives_are_counted_and_a_run_in_a_group_of_one_is_that_without(capsys):
    code = main(["--device", "cpu", "--only", "cost", "nccl"])
    told = capsys.readouterr().out
    assert code == 0, told
    assert told.count("skipped") == 2
    assert "3 collectives" in told
