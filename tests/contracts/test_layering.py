"""Who may import whom, as rules over the source: lazy imports and those for types alone count like any other.

CONTRIBUTING tells the same as a tree. A message says where, and why the rule is there.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
HEAVY = ("torch", "transformers", "datasets", "openai", "accelerate", "matplotlib")
FLOORS = {
    "sae": "base assets < kernels parallel text pages < lm selection encoders optimizers < coder stream untrusted"
    " < formats objectives evaluation < loading steering < training",
    "interp": "records < prompts client evidence < scoring < explainers < scorers < run < exchange view",
}
"""The rooms, from below; rooms of one floor do not know each other."""
FLOOR = {
    f"{package}.{room}": number
    for package, floors in FLOORS.items()
    for number, floor in enumerate(floors.split("<"))
    for room in floor.split()
}
NEVER = {
    ("sae", "interp cli"): "what trains and loads coders stands alone; explanations and commands are built on it",
    ("interp", "cli sae.training"): "explaining starts from a coder, whoever trained it; only commands do both",
    ("sae.lm sae.stream", "sae.coder"): "a language model is read by everything above it, and knows no coder",
    ("interp.client", "interp.evidence"): "asking a model is the same whatever is asked about",
    ("sae interp", "tests rigs"): "what is shipped does not need what tests it",
}
"""(who, what it never imports): why."""
ALONE = {
    "torch.distributed": ("sae.parallel", "one place knows of ranks, and everything else gives the same on any number"),
    "openai": ("interp.client.remote", "one place pays, waits, and knows what a failure means"),
    "transformers": ("sae.lm interp.client.local", "models change their interface; two places follow"),
    "sae.untrusted": ("sae.untrusted sae.formats sae.loading cli", "bytes of strangers end where coders begin"),
    "pickle dill joblib cloudpickle": ("", "a pickle runs what its writer likes"),
    "fcntl grp pty pwd resource syslog termios tty": ("", "Windows lacks them"),
    "multiprocessing os.fork": (
        "",
        "what is forked off has threads and locks that nobody holds; macOS and Windows spawn",
    ),
}
"""What: (who alone imports it, why)."""
POSIX = re.compile(
    r"os\.(chown|fork|get(e?uid|e?gid|pgid)|kill|killpg|mkfifo|nice|sched_\w+|setsid|statvfs|sysconf|uname|wait\w*)"
    r"|signal\.(SIG(HUP|KILL|USR.)|alarm|setitimer|pthread_\w+)"
)
FAMILIES = ("sae.selection", "sae.encoders", "sae.objectives", "sae.optimizers", "interp.explainers", "interp.scorers")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("sae", "interp", "cli")
    for path in sorted((ROOT / package).rglob("*.py"))
}


@cache
def trees() -> dict[str, ast.Module]:
    """Returns the source of every module; not read by processes that run other tests."""
    return {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}


def operands(node: ast.Compare) -> list[ast.expr]:
    return [node.left, *node.comparators]


def dotted(node: ast.expr) -> str:
    """Returns a name as it is written, "a.b" or "a"; ".b" where it is one of something that has no name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id if isinstance(node, ast.Name) else "", *reversed(parts)])


def under(name: str, prefixes: str) -> bool:
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes.split())


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def at(module: str, node: ast.AST) -> str:
    return f"{MODULES[module].relative_to(ROOT)}:{node.lineno}"


def imported(module: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yields (name in the file, what it names), of one import in a module; the relative ones of cli/ too."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.asname or alias.name, alias.name
    elif isinstance(node, ast.ImportFrom):
        package = module if MODULES[module].stem == "__init__" else module.rpartition(".")[0]
        origin = resolve_name("." * node.level + (node.module or ""), package)
        for alias in node.names:
            yield alias.asname or alias.name, f"{origin}.{alias.name}"


@cache
def imports(of_types: bool = True) -> list[tuple[str, str, str]]:
    """Returns (module, where, what it imports); `of_types`: also those for type checkers alone."""
    found = []
    for module, tree in trees().items():
        ifs = [n for n in ast.walk(tree) if isinstance(n, ast.If)] if not of_types else []
        unseen = [n for n in ifs if "TYPE_CHECKING" in ast.unparse(n.test)]
        skipped = {id(node) for block in unseen for node in ast.walk(block)}
        for node in ast.walk(tree):
            if id(node) not in skipped:
                found += [(module, at(module, node), name) for _, name in imported(module, node)]
    return found


def module_of(name: str) -> str:
    """Returns the module of ours that a name is in, or is."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def upward() -> Iterator[str]:
    for module, where, name in imports():
        here, there = room(module), room(module_of(name))
        known = here in FLOOR and there in FLOOR and here.split(".")[0] == there.split(".")[0]
        if known and here != there and FLOOR[there] >= FLOOR[here]:
            yield f"{where} imports {name}: a room knows lower floors alone, and {there} is not below {here}"


def homeless() -> Iterator[str]:
    for module in MODULES:
        if not under(module, "cli") and module.count(".") and room(module) not in FLOOR:
            yield f"{module}: is in no room; FLOORS says where each one stands"


def forbidden() -> Iterator[str]:
    for (who, what), why in NEVER.items():
        yield from (f"{w} imports {name}: {why}" for m, w, name in imports() if under(m, who) and under(name, what))


def strays() -> Iterator[str]:
    for what, (who, why) in ALONE.items():
        for module, where, name in imports(of_types=what not in ("torch.distributed", "openai", "transformers")):
            if under(name, what) and not under(module, who):
                yield f"{where} imports {name}, which only {who or 'nobody'} may: {why}"
    for module, tree in trees().items():
        for node in ast.walk(tree):
            used = isinstance(node, ast.Attribute) and dotted(node) == "torch.distributed"
            if used and not under(module, "sae.parallel"):
                yield f"{at(module, node)} uses torch.distributed, which only sae.parallel may"


def circles() -> Iterator[str]:
    known: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, _, name in imports():
        if module_of(name) not in ("", module):
            known[module].add(module_of(name))
    try:
        TopologicalSorter(known).prepare()
    except CycleError as error:
        yield f"{' <- '.join(error.args[1])}: of two modules that import each other neither is read or changed alone"


def type_tests() -> Iterator[str]:
    for module, tree in trees().items():
        names = {name: full for node in ast.walk(tree) for name, full in imported(module, node)}
        for node in ast.walk(tree):
            tested: list[ast.expr] = []
            if isinstance(node, ast.Call) and dotted(node.func) in ("isinstance", "issubclass"):
                tested = node.args[1:]
            elif isinstance(node, ast.Compare) and any(
                isinstance(n, ast.Call) and dotted(n.func) == "type" for n in operands(node)
            ):
                tested = operands(node)
            elif isinstance(node, ast.MatchClass):
                tested = [node.cls]
            for kind in (kind for test in tested for kind in getattr(test, "elts", [test])):
                first, _, rest = ast.unparse(kind).partition(".")
                full = f"{names.get(first, '')}.{rest}".strip(".")
                for family in FAMILIES:
                    if under(full, family) and not under(module, f"{family} sae.formats"):
                        yield f"{at(module, node)} asks whether something is {full}: a plug-in answers that itself"


def renames() -> Iterator[str]:
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and module != "sae.base.files":
                of_path = node.func.attr == "replace" and len(node.args) == 1 and not node.keywords
                if of_path or node.func.attr == "rename" or dotted(node.func) in ("os.replace", "shutil.move"):
                    yield f"{at(module, node)} renames a file: base/files.py alone does, where flushing is right"


def of_one_system() -> Iterator[str]:
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and POSIX.fullmatch(dotted(node)):
                yield f"{at(module, node)} uses {dotted(node)}: Windows lacks it, or means something else by it"


def of_one_locale() -> Iterator[str]:
    for module, tree in trees().items():
        for node in ast.walk(tree):
            name = dotted(node.func) if isinstance(node, ast.Call) else ""
            binary = name == "open" and any(isinstance(n, ast.Constant) and "b" in str(n.value) for n in node.args)
            text = name == "open" or name.endswith((".read_text", ".write_text"))
            if text and not binary and "encoding=" not in ast.unparse(node):
                yield f"{at(module, node)} reads or writes text in whichever encoding this machine has: say encoding="


def long() -> Iterator[str]:
    for module, path in MODULES.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > 400:
            yield f"{module} has {lines} lines: none has over 400, as one reading holds no more"


def helpers() -> Iterator[str]:
    marks = dict.fromkeys(FAMILIES, "register_subclass(") | {"sae.formats": "def detect("}
    for module, tree in trees().items():
        family, _, name = module.rpartition(".")
        if family in marks and not name.startswith("_") and marks[family] not in ast.unparse(tree):
            yield f"{module} is no plug-in: its folder holds those alone, and the names of helpers begin with _"


ELSEWHERE = {"contracts", "faults", "distributed", "docs", "gpu", "golden", "make", "benchmarks", "rigs"}
"""Folders of tests that go by something else than a module."""
MIRRORLESS = {
    "cli/test_fields.py": "every field of a run, whichever module reads it",
    "cli/test_from_the_hub.py": "a whole run against a hub",
    "cli/test_quickstart_run.py": "the main command as typed on a fresh machine",
    "kernels/test_steps.py": "whole steps of training by each path",
    "lm/test_quantized.py": "models quantized by packages that need not be there",
    "lm/test_two_devices.py": "all that is done with a model, of which a part lies on a second device",
    "lm/test_transformerlens_names.py": "names of sae.lm.sites, in each model that they are of",
    "pages/test_core.py": "scripts that all pages share, in a browser",
    "pages/test_plots.py": "plots.js, in a browser",
    "pages/test_table.py": "table.js, in a browser",
    "run/test_planted.py": "known latents through scorers and what scores them",
    "run/test_planted_end_to_end.py": "known latents through all of interp",
    "view/test_report_page.py": "the page of an explained run, in a browser",
    "view/test_report_size.py": "what the page of many latents takes",
    "training/test_families.py": "each family of coders through all of training",
    "training/test_older_runs.py": "a run of the version before, from its folder to its end",
    "training/test_scaling.py": "a law, in runs of many sizes",
}
"""Tests of no module by itself: what they are of."""


def mirrors() -> Iterator[str]:
    yield from (f"tests/{name} is gone; MIRRORLESS tells of it" for name in MIRRORLESS if not (TESTS / name).exists())
    for path in sorted(TESTS.glob("**/test_*.py")):
        folder, name = path.parent.name, path.stem.removeprefix("test_")
        packages = "cli" if folder == "cli" else f"sae.{folder} interp.{folder}"
        if folder in ELSEWHERE or f"{folder}/{path.name}" in MIRRORLESS:
            continue
        if not any(under(m, packages) and m.endswith(f".{name}") for m in MODULES):
            yield f"tests/{folder}/{path.name} mirrors no module of that name; MIRRORLESS says why one may"


RULES = [
    upward,
    homeless,
    forbidden,
    strays,
    circles,
    type_tests,
    renames,
    of_one_system,
    of_one_locale,
    long,
    helpers,
    mirrors,
]


@pytest.mark.parametrize("rule", RULES)
def test_every_room_keeps_its_promise(rule):
    broken = list(rule())
    assert not broken, "\n".join(broken)


def test_relative_imports_are_seen():
    found = {(module, name) for module, _, name in imports()}
    assert {("cli.running", "cli.ended_by"), ("cli.load", "cli.parsing.Parser")} <= found
    assert ("cli.explain", "cli.exchange") in found


@pytest.mark.parametrize("module", ["cli.train", "cli.evaluate", "cli.explain", "cli.load"])
def test_help_loads_nothing_heavy(module):
    code = f"""
import sys
import {module} as command
try:
    command.main(["--help"])
except SystemExit as ended:
    assert ended.code == 0
print("LOADED", *[name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "usage: sae-" in done.stdout
    loaded = done.stdout.splitlines()[-1].split()[1:]
    assert not loaded
