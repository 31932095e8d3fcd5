"""Every page is run: Python blocks, commands, what they print; links, paths, anchors and the tree are there."""

import argparse
import contextlib
import io
import re
import runpy
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from rigs.markdown import NEEDS, ROOT, Block, anchors, blocks, links, pages, prose

from cli.common import Parser, read_config
from interp.explainers import Explainer
from interp.scorers import Scorer
from sae.base.plugins import names
from sae.formats import formats
from sae.objectives import Objective
from sae.selection import Selection
from sae.training.config import TrainConfig

PAGES = pages()
BLOCKS = [block for page, text in PAGES.items() for block in blocks(page, text)]
COMMANDS = {"sae-train": "cli.train", "sae-eval": "cli.evaluate", "sae-explain": "cli.explain", "sae-load": "cli.load"}
SMALL = {
    "sae-train": "--tokens 20000 --text.max_tokens 60000 --eval.tokens 2000",
    "sae-explain": "--latents 20 --evidence.tokens 40000",
}
COMING = ("sae/formats/README.md", "interp/README.md")
RUN, MODEL = "runs/quickstart", "quickstart"
STANDS_FOR = {  # what a page writes where a reader puts something of their own
    **dict.fromkeys(("RUN", "RUN_A", "RUN_B", "RUN_DIR", "A"), RUN),
    **dict.fromkeys(("MODEL", "FOLDER_OR_HUB_ID", "FOLDER_OR_GGUF", "TEXT", "FOLDER_OR_FILE_OR_DATASET"), MODEL),
}


def of(language: str, run: bool) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and (block.needs is None) == run]


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Returns what runs the words of one of our commands and gives what it prints; each command is run once.

    All share a folder, in which the quickstart has been trained, on few tokens.
    """
    folder, printed = tmp_path_factory.mktemp("pages"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SAE_CACHE", str(folder / "cache"))

        def run(words: list[str]) -> str:
            command, key = import_module(COMMANDS[words[0]]), tuple(words)
            if key not in printed:
                out = io.StringIO()
                small = (
                    SMALL.get(words[0], "").split()
                    if not any("list" in word or "help" in word for word in words)
                    else []
                )
                with contextlib.redirect_stdout(out):
                    code = command.main([*words[1:], *small])
                assert code == 0, f"{' '.join(words)} ended with {code}"
                printed[key] = out.getvalue()
            return printed[key]

        run(["sae-train"])
        yield run


@pytest.mark.parametrize("page", sorted({block.page for block in of("python", run=True)}))
def test_python_runs(page, shell):
    """The blocks of a page are one program."""
    known = {"__name__": "page"}
    for block in of("python", run=True):
        if block.page == page:
            exec(compile("\n" * (block.line - 1) + block.text, ROOT / page, "exec"), known)
    if page == "README.md":
        out, z, coder = known["out"], known["z"], known["coder"]
        assert out.shape == (2, 5, coder.spec.d_out)
        assert (coder.decode(z) - out).abs().max() < 1e-5


@pytest.mark.parametrize("block", of("python", run=False), ids=lambda block: block.where)
def test_python_that_cannot_run_here_compiles(block):
    compile(block.text, block.where, "exec")


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
    """Returns a printed line without its figures and quotations."""
    line = re.sub(r'"[^"]*"(, "[^"]*")*', '"..."', line)
    return re.sub(r"-?\d[\d,.]*", "#", " ".join(line.split()))


def installed(words: list[str]) -> str:
    """Takes `pip install` of this project as done, if the extras that it names are declared."""
    assert words[:2] == ["pip", "install"], f"{words[0]}: not a command of ours; say what the block needs"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [extra for word in words for extra in re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*)\]", word)))]
    assert set(extras) <= set(project["optional-dependencies"])
    return ""


@pytest.mark.parametrize("block", of("sh", run=False), ids=lambda block: block.where)
def test_commands_that_cannot_run_here_parse(block, shell, monkeypatch):
    for words in block.commands:
        words = [STANDS_FOR.get(word, word) for word in words]
        if words[0] == "torchrun":
            module = words[words.index("-m") + 1]
            words = [next(name for name, home in COMMANDS.items() if home == module), *words[words.index(module) + 1 :]]
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
        words[0] == "sae-explain" and words[1] not in ("merge", "compare", "export", "import")
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
        read_config(TrainConfig, None, rest)
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
    assert not re.findall(r"^(?: {4}|```).*", prose(PAGES[page]), re.MULTILINE), "blocks stand between ```"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in links(PAGES[page]):
        if "://" in target or target.endswith(COMING):
            continue
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target
    for path in re.findall(r"`((?:sae|interp|cli|configs|tests|docs)/[\w/.*-]+)`", PAGES[page]):
        assert list(ROOT.glob(path.rstrip("/"))), path


def test_options_named_are_known(shell):
    """Also those in tables and sentences."""
    for page, text in PAGES.items():
        for command, option in re.findall(r"`(sae-\w+) (?:[A-Z][A-Z_]* )?(--[a-z-]+)", text):
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
    ("page", "told"),
    [
        ("sae/selection/README.md", (*names(Selection), *names(Objective))),
        ("interp/README.md", (*names(Explainer), *names(Scorer))),
        ("sae/formats/README.md", tuple(formats())),
    ],
)
def test_plug_ins_are_all_told(page, told):
    if page not in COMING:
        assert [name for name in told if f"`{name}`" not in PAGES[page]] == []


def test_the_front_door_is_small():
    assert len(PAGES["README.md"].encode()) <= 9216


@pytest.mark.parametrize("script", sorted((ROOT / "tests" / "benchmarks").rglob("*.py")), ids=lambda path: path.name)
def test_benchmarks_compile(script):
    compile(script.read_text(encoding="utf-8"), script, "exec")
