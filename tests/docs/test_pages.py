"""Every page is run: Python blocks, commands, what they print; links, paths, anchors and the tree are there."""

import argparse
import ast
import contextlib
import io
import json
import os
import re
import runpy
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from rigs.interp_examples import RIGHT, SINGLE, label, planted
from rigs.markdown import NEEDS, ROOT, Block, anchors, blocks, links, pages, prose

import interp
import sae
from cli.common import read_config
from cli.parsing import Parser
from interp.client.requests import Reply
from interp.explainers import Explainer
from interp.scorers import Scorer, Trial
from sae.base.errors import ConfigError
from sae.base.plugins import names
from sae.coder.coder import SparseCoder
from sae.coder.initialization import initialize
from sae.coder.spec import CoderSpec
from sae.formats import formats
from sae.objectives import Objective
from sae.selection import Selection
from sae.training.config import TrainConfig

PAGES = pages()
BLOCKS = [block for page, text in PAGES.items() for block in blocks(page, text)]
COMMANDS = {
    "sae-train": "cli.train",
    "sae-eval": "cli.evaluate",
    "sae-explain": "cli.explain",
    "sae-load": "cli.load",
    "sae-view": "cli.view",
    "sae-steer": "cli.steer",
}
SMALL = {
    "sae-train": "--tokens 8192 --text.max_tokens 20000 --eval.tokens 1000 --activations.statistics_tokens 4096",
    "sae-explain": "--latents random:20 --evidence.tokens 40000",
}
LAUNCHERS = ("torchrun", "srun", "mpirun", "accelerate")
RUN, MODEL = "runs/quickstart", "quickstart"
STANDS_FOR = {  # what a page writes where a reader puts something of their own
    **dict.fromkeys(("RUN", "RUN_A", "RUN_B", "RUN_DIR", "A"), RUN),
    "/usr/share/doc/python3.11/html/_sources": MODEL,
    **dict.fromkeys(("MODEL", "FOLDER_OR_HUB_ID", "FOLDER_OR_GGUF", "TEXT", "FOLDER_OR_FILE_OR_DATASET"), MODEL),
}


def of(language: str, run: bool) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and (block.needs is None) == run]


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Returns what runs the words of one of our commands and gives what it prints, in a folder that all tests share.

    The quickstart has been trained there, on few tokens. Each command runs once, on whichever worker comes first.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "pages"
    folder.mkdir(exist_ok=True)
    known = folder / "printed.json"

    def run(words: list[str]) -> str:
        with FileLock(folder / "lock"), pytest.MonkeyPatch.context() as patch:
            printed = json.loads(known.read_text()) if known.exists() else {}
            if " ".join(words) not in printed:
                patch.setenv("SAE_CACHE", str(folder / "cache"))
                long = not any("list" in word or "help" in word for word in words)
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    code = main_of(words)([*words[1:], *(SMALL.get(words[0], "").split() if long else [])])
                assert code == 0, f"{' '.join(words)} ended with {code}"
                known.write_text(json.dumps(printed | {" ".join(words): out.getvalue()}))
                return out.getvalue()
            return printed[" ".join(words)]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in BLOCKS:  # a file that a page shows is there for its commands
            if block.language == "yaml" and (name := re.match(r"# ([\w.]+\.yaml)\n", block.text)):
                Path(name[1]).write_text(block.text, encoding="utf-8")
        run(["sae-train"])
        yield run


def main_of(words: list[str]):
    return import_module(COMMANDS[words[0]]).main


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in of("python", run=True)}))
def test_python_runs(page, shell, monkeypatch):
    """The blocks of a page are one program; a plug-in is forgotten again."""
    for family in (Selection, Objective, Explainer, Scorer):
        monkeypatch.setattr(family, "_choice_registry", dict(family._choice_registry))
    known = {"__name__": "page"}
    for block in of("python", run=True):
        if block.page == page:
            exec(compile("\n" * (block.line - 1) + block.text, ROOT / page, "exec"), known)
    if page == "README.md":
        out, z, coder = known["out"], known["z"], known["coder"]
        assert out.shape == (2, 5, coder.spec.d_out)
        assert (coder.decode(z) - out).abs().max() < 1e-5
    if page == "CONTRIBUTING.md":
        trial = Trial(label(RIGHT), known["Topic"]().tasks(planted(n=12), "test", {}), SINGLE)
        asked = known["Topic"]().requests(trial)
        found = known["Topic"]().judgements(trial, [Reply(probabilities={"yes": 0.6, "no": 0.2})] * len(asked))
        assert [judgement.value for judgement in found] == pytest.approx([0.75] * len(trial.tasks))
        coder = SparseCoder(CoderSpec(8, 8, 64, known["TopShare"](0.9)))
        initialize(coder, torch.zeros(8), 0)
        dense = coder.encode(torch.randn(32, 8)).to_dense()
        largest = dense.amax(1, keepdim=True)
        assert ((dense == 0) | (dense >= 0.9 * largest)).all()
        assert (largest > 0).all()
        with pytest.raises(ConfigError, match=r"selection.share: 0 is not above 0"):
            CoderSpec(8, 8, 64, known["TopShare"](0))


def test_python_that_cannot_run_here_compiles():
    for block in of("python", run=False):
        compile(block.text, block.where, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("block", of("sh", run=True), ids=lambda block: block.where)
def test_commands_run_and_print_what_is_shown(block, shell):
    printed = "".join(shell(words) if words[0] in COMMANDS else installed(words) for words in block.commands)
    after = BLOCKS[BLOCKS.index(block) + 1 :][:1]
    if not (after and after[0].language == "text" and after[0].page == block.page and follows(block, after[0])):
        return
    lines = iter(map(form, printed.splitlines()))
    for line in map(form, after[0].text.splitlines()):
        assert line in lines, f"{after[0].where}: no line of the form {line!r} in this order in\n{printed}"


def follows(block: Block, other: Block) -> bool:
    """Whether a block stands right below another, with nothing between them."""
    return other.line == block.line + block.text.count("\n") + 3


def form(line: str) -> str:
    """Returns a printed line without its figures, quotations, and the outcomes that there happen to be."""
    line = re.sub(r'".*', '"..."', line)
    line = re.sub(r"-?\d[\d,.]*", "#", " ".join(line.split()))
    return re.sub(r": # \w+(, # \w+)*$", ": # of each outcome", line)


def installed(words: list[str]) -> str:
    """Takes `pip install` of this project as done, if the extras that it names are declared."""
    assert words[:2] == ["pip", "install"], f"{words[0]}: not a command of ours; say what the block needs"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [extra for word in words for extra in re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*)\]", word)))]
    assert set(extras) <= set(project["optional-dependencies"])
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("block", of("sh", run=False), ids=lambda block: block.where)
def test_commands_that_cannot_run_here_parse(block, shell, monkeypatch):
    for words in block.commands:
        words = [STANDS_FOR.get(word, word) for word in words]
        if words[0] == "sbatch":
            name = next(word for word in words if word.endswith(".sbatch"))
            assert (ROOT / "configs" / "slurm" / name).is_file(), name
            command = "sae-explain" if name == "explain.sbatch" else "sae-train"
            words = [command, *(STANDS_FOR.get(word, word) for word in words[words.index(name) + 1 :])]
        elif words[0] in LAUNCHERS:
            words = words[next(i for i, word in enumerate(words) if word in COMMANDS or word.startswith("tests/")) :]
            words = words if words[0] in COMMANDS else ["python", *words]
        if words[0] in COMMANDS:
            parse(words)
        elif words[0] == "python" and words[1].startswith("tests/"):
            parse_script(words[1:], monkeypatch)


class Parsed(Exception):
    """The words were understood; nothing was done."""


def parse(words: list[str]) -> None:
    """Raises ConfigError unless a command understands its words; the config of a run is read and checked too."""
    command = import_module(COMMANDS[words[0]]).command
    if words[0] == "sae-train" or (
        words[0] == "sae-explain" and words[1] not in ("show", "merge", "compare", "import")
    ):
        with contextlib.redirect_stdout(io.StringIO()):
            assert command([*words[1:], "--print-config"]) == 0
        return
    depth, known = 0, Parser.parse_known_args

    def parse_known_args(self, *arguments, **options):
        nonlocal depth
        depth += 1
        namespace, rest = known(self, *arguments, **options)
        depth -= 1
        if depth:
            return namespace, rest
        assert words[0] == "sae-eval" or not rest, f"{rest[0]}: not known"
        read_config(TrainConfig, {}, rest)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_known_args", parse_known_args)
        with pytest.raises(Parsed):
            command(words[1:])


def parse_script(words: list[str], monkeypatch) -> None:
    """Raises SystemExit unless a script of ours understands its words."""

    def parse_args(self, *_):
        rest = self.parse_known_args()[1]
        assert not rest, f"{words[0]}: {rest[0]} is not known"
        raise Parsed

    script = ROOT / words[0]
    monkeypatch.setattr(sys, "argv", list(words))
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    before = set(sys.modules)
    try:
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(ROOT / "tests" / "benchmarks"):
                del sys.modules[name]


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_are(page):
    for block in BLOCKS:
        if block.page == page:
            assert block.language in ("python", "sh", "text", "yaml", "json"), block.where
            assert block.needs is None or block.needs in NEEDS, f"{block.where}: one of {', '.join(NEEDS)}"
    plain = re.sub(r"^::: .*\n(?:    .*\n)*", "", prose(PAGES[page]), flags=re.MULTILINE)
    assert not re.findall(r"^(?: {4}|```).*", plain, re.MULTILINE), "blocks stand between ```"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in links(PAGES[page]):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target
    for path in re.findall(r"`((?:sae|interp|cli|configs|tests|docs)/[\w/.*-]+)`", PAGES[page]):
        assert list(ROOT.glob(path.rstrip("/"))), path


def test_options_named_are_known():
    """Also those in tables and sentences."""
    for page, text in PAGES.items():
        for command, option in re.findall(r"`(sae-\w+) (?:[A-Z][A-Z_]* )?(--[a-z-]++)(?!\.)", text):
            with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
                import_module(COMMANDS[command]).command(["--help"])
            assert option in out.getvalue(), f"{page}: {command} {option}"


def test_the_tree_is_the_tree():
    """Every room is in README's tree, and no other."""
    tree = next(block.text for block in BLOCKS if block.page == "README.md" and block.text.startswith("sae/"))
    for top, part in re.findall(r"^(sae|interp)/(.*?)(?=^\w+/|\Z)", tree, re.DOTALL | re.MULTILINE):
        there = {path.parent.name for path in (ROOT / top).glob("*/__init__.py")}
        assert set(re.findall(r"^ +(\w+)", part, re.MULTILINE)) == there


@pytest.mark.parametrize(
    ("page", "head", "known"),
    [
        ("sae/selection/README.md", "`coder.selection.type`", names(Selection)),
        ("sae/selection/README.md", "`coder.objectives`", names(Objective)),
        ("sae/formats/README.md", "format", formats()),
        ("interp/README.md", "`explainers`", names(Explainer)),
        ("interp/README.md", "`scorers`", names(Scorer)),
    ],
)
def test_plug_ins_told_are_there(page, head, known):
    """A new one need not be told: it is one file."""
    table = PAGES[page].split(f"| {head} |", 1)[1].split("\n\n", 1)[0]
    told = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert told
    assert told <= set(known)


def test_the_api_pages_have_all_public_names():
    """Under the module that a name is of."""
    told = re.findall(
        r"^::: ([\w.]+)$", "".join(PAGES[page] for page in PAGES if page.startswith("docs/api/")), re.MULTILINE
    )
    homes = {name: home for package in (sae, interp) for name, home in package._HOMES.items()}
    assert [name for name, home in homes.items() if f"{home}.{name}" not in told] == []


def test_the_front_door_is_small():
    assert len(PAGES["README.md"].encode()) <= 9216


def test_errors_told_are_those_of_the_code():
    """Each on docs/errors.md is made of the constant parts of a message of ours, with values in between."""
    messages = [
        [part.value if isinstance(part, ast.Constant) else None for part in getattr(node, "values", [node])]
        for top in ("sae", "interp", "cli")
        for path in (ROOT / top).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]
    long = [parts for parts in messages if sum(map(len, filter(None, parts))) > 20]
    known = [re.compile("".join(".*?" if part is None else re.escape(part) for part in parts)) for parts in long]
    told = [block for block in BLOCKS if block.page == "docs/errors.md" and block.language == "text"]
    assert len(told) > 20
    assert [block.text for block in told if not any(pattern.search(block.text) for pattern in known)] == []


def test_importing_is_told_as_it_is_tested():
    source = ast.parse((ROOT / "tests/contracts/test_layering.py").read_text(encoding="utf-8"))
    found = [n.value for n in source.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "FLOORS"]
    told = next(b.text for b in BLOCKS if b.page == "CONTRIBUTING.md" and b.text.startswith("sae:"))
    lines = re.findall(r"^(\w+):((?:.*\n(?= )|.*)*)", told, re.MULTILINE)
    assert {name: rest.split() for name, rest in lines} == {
        name: floors.split() for name, floors in ast.literal_eval(found[0]).items()
    }


def test_walks_are_true():
    """Names in brackets behind a path, and calls in a table row with one, are names in that file."""
    rows = re.findall(r"^\|[^|]*\| `([\w/]+\.py)` \|(.*)\|$", PAGES["CONTRIBUTING.md"], re.MULTILINE)
    steps = [(path, " ".join(re.findall(r"`(\w+)\(", calls))) for path, calls in rows]
    assert len(steps) > 5
    steps += re.findall(r"`([\w/]+\.py)`,?\s\(?((?:`\w+`(?:,\s)?)+)\)?", PAGES["CONTRIBUTING.md"])
    assert len(steps) > 10
    for path, named in steps:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        there = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        assert set(re.findall(r"\w+", named)) <= there, path


@pytest.mark.parametrize("script", sorted((ROOT / "tests" / "benchmarks").rglob("*.py")), ids=lambda path: path.name)
def test_benchmarks_compile(script):
    compile(script.read_text(encoding="utf-8"), script, "exec")
