"""Callbacks: what they are told; a run is the same whatever they do, ends where they ask, and outlives them."""

import contextlib
import logging
import os
import random
import signal
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from rigs.children import Child, ranks
from rigs.fakes import tiny_config
from rigs.runs import assert_equal, checkpoints, lines

import sae
from sae.base.errors import Stopped
from sae.objectives.l0 import L0
from sae.objectives.reconstruction import Reconstruction
from sae.parallel.mesh import ParallelConfig
from sae.selection.jumprelu import JumpReLU
from sae.training.callbacks import HOOKS, Moment
from sae.training.trainer import CoderTrainer

STEPS = 10
CHANGES = {
    "tokens": STEPS * 256,
    "batch_tokens": 256,
    "dead_after_tokens": 1024,
    "log.every_steps": 2,
    "optim.ema": 0.9,
    "eval.tokens": 64,
    "eval.every_steps": 4,
    "checkpoints.every_steps": 3,
    "grid": {"coder.selection.k": [2, 4]},
}
CALLS = {"on_step": 10, "on_evaluate": 3, "on_save": 4, "on_end": 1}
"""How often each hook is called in a run that nothing disturbs."""
JUMPS = {"reconstruction": Reconstruction(), "l0": L0(target_l0=2.0)}


@pytest.fixture
def config(quick, tiny_model, tiny_text):
    return tiny_config(tiny_model, tiny_text, CHANGES)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def whole(kept, config):
    """The folder of a run without callbacks."""
    if not kept.exists():
        sae.train(config, run_dir=kept, progress=False)
    return kept


def hearing(act, hooks=HOOKS):
    """Returns a callback that calls `act(hook, number of the call from 1, moment)`."""
    counts = dict.fromkeys(hooks, 0)

    def hook(name):
        def call(self, moment):
            counts[name] += 1
            act(name, counts[name], moment)

        return call

    return type("Hearing", (sae.Callback,), {name: hook(name) for name in hooks})()


def raising(hook, call, error):
    """Returns a callback that raises in one call of one hook."""

    def act(_, number, __):
        if number == call:
            raise error

    return hearing(act, (hook,))


def test_every_moment_is_told_as_the_log_has_it(config, tmp_path, whole):
    told: list[tuple[str, Moment]] = []
    result = sae.train(config, run_dir=tmp_path / "run", callbacks=[hearing(lambda h, _, m: told.append((h, m)))])
    assert_equal(tmp_path / "run", whole)
    names = [name for name, _ in told]
    assert {name: names.count(name) for name in HOOKS} == CALLS
    assert names[-3:] == ["on_save", "on_evaluate", "on_end"]
    for name, moment in told:
        assert (moment.steps, moment.tokens, moment.run_dir) == (STEPS, moment.step * 256, tmp_path / "run")
        if name == "on_save":
            assert moment.checkpoint == tmp_path / "run" / "checkpoints" / f"step-{moment.step:09d}"
            assert moment.metrics == {}
    logged = {(line["step"], line["coder"]): line for line in lines(whole) if "fvu" in line}
    steps = {m.step: m.metrics for name, m in told if name == "on_step"}
    assert list(steps) == list(range(1, STEPS + 1))
    assert len(logged) == STEPS  # every second step, two coders
    for (step, coder), line in logged.items():
        assert {"step": step, "coder": coder, **steps[step][coder]} == line
    held_out = {(line["step"], line["coder"]): line["held_out"] for line in lines(whole) if "held_out" in line}
    seen = {(m.step, c): f for name, m in told if name == "on_evaluate" for c, f in m.metrics.items() if m.step < STEPS}
    assert seen == held_out
    assert told[-1][1].metrics == result.metrics


def test_the_coders_are_those_that_would_be_saved_now(config, tmp_path):
    seen = {}

    def act(hook, number, moment):
        seen[hook, number] = moment.coders
        assert moment.coders is seen[hook, number]

    sae.train(config, run_dir=tmp_path, callbacks=[hearing(act)])
    assert len(seen) == sum(CALLS.values())
    for name, coder in seen["on_end", 1].items():
        saved = sae.load(tmp_path / "coders" / name)
        for key, tensor in saved.state_dict().items():
            assert torch.equal(coder.state_dict()[key], tensor)
        assert coder.spec == saved.spec
        assert not torch.equal(coder.W_dec, seen["on_step", 1][name].W_dec)


def test_a_moment_is_not_asked_for_coders_that_have_moved_on(config, tmp_path):
    told = []
    sae.train(config, run_dir=tmp_path, callbacks=told.append)
    with pytest.raises(RuntimeError, match=r"moment\.coders: the hook has returned"):
        _ = told[0].coders


def meddle(hook, number, moment):
    """Does to a run whatever comes to mind."""
    torch.manual_seed(number)
    torch.rand(3), np.random.rand(3), random.random()
    for coder in moment.coders.values():
        coder.requires_grad_(True).train()
        out, _ = coder(torch.randn(4, coder.spec.d_in))
        out.square().sum().backward()
        if (hook, number) == ("on_save", 1):
            sae.evaluate(coder, tokens=64)
        with torch.no_grad():
            for parameter in coder.parameters():
                parameter.fill_(torch.nan)
        coder.spec.training["tokens"] = "none"
        coder.double()
    moment.metrics.clear()
    moment.coders.clear()
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.set_default_device("meta")
    os.chdir("/")


def test_a_run_is_the_same_whatever_callbacks_do(config, tmp_path, whole, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = sae.train(config, run_dir="run", callbacks=[hearing(meddle)])
    assert_equal(tmp_path / "run", whole)
    assert result.metrics == sae.train(config, run_dir="run", resume=True).metrics
    assert all(coder.W_dec.isfinite().all() for coder in result.coders.values())
    assert (torch.is_grad_enabled(), torch.get_num_threads()) == (True, 1)
    assert (torch.tensor(0.0).dtype, torch.tensor(0.0).device.type) == (torch.float32, "cpu")
    assert not torch.overrides._get_current_function_mode_stack()  # one would slow down every call from now on


FAULTS = [
    ("on_step", 5, RuntimeError("mine")),
    ("on_evaluate", 2, SystemExit(3)),
    ("on_save", 2, RuntimeError("mine")),
]
MORE_FAULTS = [
    ("on_step", 6, KeyError("at a checkpoint")),
    ("on_step", 10, RuntimeError("at the last one")),
    ("on_evaluate", 1, RuntimeError("mine")),
    ("on_save", 4, RuntimeError("of the last one")),
    ("on_step", 1, KeyboardInterrupt()),
    ("on_save", 1, MemoryError()),
]


@pytest.mark.parametrize(
    ("hook", "call", "error"),
    [*FAULTS, *(pytest.param(*fault, marks=pytest.mark.slow) for fault in MORE_FAULTS)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_a_callback_raises_ends_a_run_that_goes_on_as_if_nothing_had_happened(
    config, tmp_path, whole, hook, call, error
):
    run, later = tmp_path / "run", []
    with pytest.raises(type(error)) as caught:
        sae.train(config, run_dir=run, callbacks=[raising(hook, call, error), lambda moment: later.append(moment.step)])
    assert caught.value is error
    step = {"on_step": call, "on_evaluate": 4 * call, "on_save": min(3 * call, STEPS)}[hook]
    (note,) = error.__notes__
    assert note == (
        f"raised by the callback Hearing.{hook} at step {step}; a checkpoint of it is written: "
        "continue with resume=True"
    )
    assert checkpoints(run)[-1] == step
    assert later == list(range(1, step + (hook != "on_step")))  # nobody is told of anything after it
    sae.train(config, run_dir=run, resume=True)
    assert_equal(run, whole)


@pytest.mark.parametrize(("hook", "call"), [pytest.param("on_evaluate", 3, marks=pytest.mark.slow), ("on_end", 1)])
def test_what_is_raised_after_the_end_loses_nothing(config, tmp_path, whole, hook, call):
    with pytest.raises(ValueError, match="mine") as caught:
        sae.train(config, run_dir=tmp_path, callbacks=[raising(hook, call, ValueError("mine"))])
    assert caught.value.__notes__ == [
        f"raised by the callback Hearing.{hook} at step 10; the run is finished, and all is saved in {tmp_path}"
    ]
    assert_equal(tmp_path, whole)


@pytest.mark.parametrize(
    ("hook", "call"),
    [
        ("on_step", 5),
        ("on_end", 1),
        pytest.param("on_evaluate", 1, marks=pytest.mark.slow),
        pytest.param("on_save", 2, marks=pytest.mark.slow),
    ],
)
def test_an_end_that_is_asked_for_finishes_the_run_which_may_still_go_on(config, tmp_path, whole, hook, call):
    told = []
    result = sae.train(
        config,
        run_dir=tmp_path,
        callbacks=[raising(hook, call, sae.StopTraining()), hearing(lambda h, _, m: told.append((h, m.step)))],
    )
    step = {"on_step": 5, "on_evaluate": 4, "on_save": 6, "on_end": STEPS}[hook]
    assert told[-1] == ("on_end", step)
    assert told.count((hook, step)) == (2 if hook == "on_evaluate" else 1)  # its own, and the last evaluation
    assert checkpoints(tmp_path)[-1] == step
    for name in result.coders:
        coder = sae.load(tmp_path / "coders" / name)
        assert coder.spec.training["tokens"] == step * 256
        assert result.metrics[name]["training"]["steps"] == step
        assert torch.equal(coder.W_dec, result.coders[name].W_dec)
    sae.train(config, run_dir=tmp_path, resume=True)
    assert_equal(tmp_path, whole)


def test_a_signal_goes_before_a_callbacks_wish_to_end(config, tmp_path, whole):
    def act(*_):
        signal.raise_signal(signal.SIGTERM)
        raise sae.StopTraining

    with pytest.raises(Stopped, match="at step 2 of 10, checkpoint written; continue with --resume") as caught:
        sae.train(config, run_dir=tmp_path, callbacks=[hearing(lambda h, n, m: n == 2 and act(), ("on_step",))])
    assert caught.value.__notes__ == ["In Python, that is sae.train(..., resume=True)."]
    sae.train(config, run_dir=tmp_path, resume=True)
    assert_equal(tmp_path, whole)


def train_on_a_rank(config, run, resume, error):
    torch.set_num_threads(1)
    try:
        sae.train(config, run_dir=run, resume=resume, callbacks=[raising("on_evaluate", 1, error)] if error else None)
    except BaseException as caught:
        print(f"{type(caught).__name__}: {caught}", flush=True)
        return 1
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError("mine"), pytest.param(KeyboardInterrupt(), marks=pytest.mark.slow)])
def test_an_error_on_the_first_rank_ends_all_of_them(config, tmp_path, error):
    def run(name, resume, error):
        work = partial(train_on_a_rank, config, tmp_path / name, resume, error)
        children = [Child(tmp_path / f"{env['RANK']}.txt", work, env) for env in ranks(2)]
        return [child.wait() for child in children], [child.output for child in children]

    codes, told = run("run", False, error)
    assert codes == [1, 1], told
    assert f"{type(error).__name__}: {error}" in told[0]
    assert "PeerError: another rank failed, and said why" in told[1]
    assert checkpoints(tmp_path / "run") == [3, 4]
    codes, told = run("run", True, None)
    assert codes == [0, 0], told
    assert run("undisturbed", False, None)[0] == [0, 0]
    assert_equal(tmp_path / "run", tmp_path / "undisturbed")


def hear_on_the_first_rank_alone(config, folder, latents):
    """The work of a rank: trains with a callback on the first alone, where a step meets NaN and others lack room."""
    original = CoderTrainer.step

    def step(self, batch, index):
        if index == 4 and os.environ["RANK"] == "1":
            batch.x[0, 0] = float("nan")
        with pytest.MonkeyPatch.context() as patch:
            if index == 6:
                patch.setattr(self.chooser, "_room", lambda n: 1)
            return original(self, batch, index)

    CoderTrainer.step = step
    heard = []
    config = replace(
        config, max_bad_steps=2, parallel=ParallelConfig(1, latents), eval=replace(config.eval, every_steps=0)
    )
    callbacks = [lambda moment: heard.append(moment.step)] if os.environ["RANK"] == "0" else []
    sae.train(config, run_dir=folder, callbacks=callbacks)
    print(f"heard {len(heard)}", flush=True)
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("latents", [1, 2])
def test_a_callback_of_the_first_rank_alone_hears_steps_that_are_repeated_or_wrong(config, tmp_path, latents):
    config = replace(config, coder=replace(config.coder, selection=JumpReLU(), objectives=JUMPS), grid={})
    work = partial(hear_on_the_first_rank_alone, config, tmp_path / "run", latents)
    children = [Child(tmp_path / f"{env['RANK']}.txt", work, env) for env in ranks(2)]
    assert [child.wait() for child in children] == [0, 0], [child.output for child in children]
    assert "heard 10" in children[0].output


class Unknown(sae.Callback):
    def on_step_end(self, args, state, control, **kwargs):
        """As transformers has it."""


class Greedy(sae.Callback):
    def on_step(self, step, metrics):
        """Takes too much."""


class Waiting(sae.Callback):
    async def on_save(self, moment):
        """Is never waited for."""


WRONG = {
    "a name": (["wandb"], r"callbacks\[0\]: the text 'wandb' was given; it takes a function of a step, or an object"),
    "a path": ("callbacks.py", r"callbacks\[0\]: the text 'callbacks\.py' was given"),
    "nothing": ([None], r"callbacks\[0\]: None was given"),
    "no hook": ([sae.Callback()], r"callbacks\[0\]: sae\.Callback was given; .* any of on_step, on_evaluate, on_save"),
    "another's": ([print, Unknown], r"callbacks\[1\]: on_step_end is no hook; there are .* Did you mean 'on_step'\?"),
    "arguments": ([Greedy()], r"callbacks\[0\]\.on_step: it is called with one argument, .*'metrics'"),
    "none": ([lambda: None], r"callbacks\[0\]: it is called with one argument"),
    "async": ([Waiting()], r"callbacks\[0\]\.on_save: it is async"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_callback_is_a_type_error_before_anything_is_done(config, tmp_path, no_model, wrong):
    given, message = WRONG[wrong]
    with pytest.raises(TypeError, match=message):
        sae.train(config, run_dir=tmp_path / "run", callbacks=given)
    assert not (tmp_path / "run").exists()


def test_a_class_a_function_and_any_object_with_a_hook_are_callbacks(config, tmp_path):
    heard = []

    class Saves:
        def on_save(self, moment):
            heard.append(("class", moment.step))

    ends = type("Ends", (), {})()
    ends.on_end = lambda moment: heard.append(("object", moment.step))
    each = lambda moment: moment.step == 1 and heard.append(("function", 1))  # noqa: E731
    sae.train(config, run_dir=tmp_path, callbacks=(Saves, ends, each))
    assert heard == [("function", 1), *(("class", step) for step in (3, 6, 9, 10)), ("object", 10)]


@pytest.mark.parametrize("how", [pytest.param(torch.no_grad, marks=pytest.mark.slow), torch.inference_mode])
def test_a_run_within_no_grad_is_the_same(config, tmp_path, whole, how):
    with how():
        sae.train(config, run_dir=tmp_path)
    assert_equal(tmp_path, whole)


def test_a_run_in_a_thread_is_the_same_and_sets_no_signals(config, tmp_path, whole):
    before = signal.getsignal(signal.SIGINT)
    seen = []
    work = partial(
        sae.train, config, run_dir=tmp_path, callbacks=lambda _: seen.append(signal.getsignal(signal.SIGINT))
    )
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_equal(tmp_path, whole)
    assert set(seen) == {before}


@pytest.mark.slow
def test_interrupting_twice_in_python_raises_and_leaves_a_run_that_goes_on(config, tmp_path, whole):
    def twice(hook, number, moment):
        if moment.step == 5:
            signal.raise_signal(signal.SIGINT)
            with contextlib.suppress(RuntimeError):  # which it is not
                signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started by nohup has none
    try:
        with pytest.raises(KeyboardInterrupt):
            sae.train(config, run_dir=tmp_path, callbacks=[hearing(twice, ("on_step",))])
    finally:
        signal.signal(signal.SIGINT, before)
    sae.train(config, run_dir=tmp_path, resume=True)
    assert_equal(tmp_path, whole)


def test_progress_tells_every_stage_of_a_run(config, tmp_path):
    told = []
    sae.train(config, run_dir=tmp_path, progress=told.append)
    assert list(dict.fromkeys(at.what for at in told)) == ["tokenizing", "measuring", "training", "evaluating"]
    (last,) = [at for at in told if at.what == "training" and at.done]
    assert (last.n, last.total) == (STEPS, STEPS)
    assert {"fvu", "l0", "dead", "tokens_per_s"} == last.figures.keys()


@pytest.mark.slow
def test_a_run_leaves_the_process_as_it_was(config, tmp_path):
    def state():
        root = logging.getLogger()
        return root.level, root.handlers, torch.get_num_threads(), signal.getsignal(signal.SIGINT), os.getcwd()

    random_state, before = torch.get_rng_state(), state()
    sae.train(config, run_dir=tmp_path, callbacks=lambda moment: moment.coders)
    assert state() == before
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.slow
def test_silence_is_silence(config, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setattr("sae.base.progress.SECONDS_BETWEEN_LINES", 0.0)
    sae.train(config, run_dir=tmp_path, progress=False)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
