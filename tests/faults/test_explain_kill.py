"""kill -9 in the middle of explaining and scoring: the same command goes on, loses nothing and asks nothing twice."""

import json
from collections import Counter
from functools import partial

import pytest
from rigs.children import Child
from rigs.fake_llm import FakeLLM
from rigs.interp_runs import explained, scores, scripted, tiny_coder

AT_ONCE = 3


def work(argv):
    """The work of a child: sae-explain on one thread."""
    import torch

    from cli.explain import main

    torch.set_num_threads(1)
    return main(argv)


def fields(data, prefix=""):
    for key, value in data.items():
        if isinstance(value, dict):
            yield from fields(value, f"{prefix}{key}.")
        else:
            yield f"--{prefix}{key}={json.dumps(value) if not isinstance(value, str) else value}"


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    return tiny_coder(folder)


@pytest.mark.slow
@pytest.mark.parametrize("after", [25, 60])
def test_killed_and_continued(coder, tmp_path, after):
    """`after` calls are answered: in the midst of explaining, and of scoring."""
    with FakeLLM(scripted, logprobs=0, schemas=("json_schema",)) as server:
        changes = {
            "coder": {"path": str(coder)},
            "evidence": {"tokens": 30_000},
            "latents": "random:24",
            "examples": {"shown": 10, "contrast": 6, "valid": 6, "test": 12},
            "models": {"explainer": {"model": "fake", "base_urls": [server.url], "max_concurrency": AT_ONCE}},
            "scorers": {n: {"type": n, "layout": "batch", "windows_per_request": 24} for n in ("detection", "fuzzing")},
            "in_flight": AT_ONCE,
        }
        argv = list(fields(changes))
        whole = Child(tmp_path / "whole.log", partial(work, [*argv, f"--run-dir={tmp_path / 'whole'}"]))
        assert whole.wait() == 0, whole.output
        server.calls.clear()
        argv.append(f"--run-dir={tmp_path / 'run'}")
        child = Child(tmp_path / "log", partial(work, argv))
        child.wait_for(lambda: len(server.calls) >= after)
        child.kill()
        child.wait()
        again = Child(tmp_path / "log2", partial(work, argv))
        assert again.wait() == 0, again.output
        bodies = Counter(json.dumps(call.body, sort_keys=True) for call in server.calls if "=== " in str(call.body))
    lost = sum(count - 1 for count in bodies.values())
    assert lost <= AT_ONCE  # those that were under way have no answer
    assert scores(tmp_path / "run") == scores(tmp_path / "whole")
    assert explained(tmp_path / "run") == explained(tmp_path / "whole")
