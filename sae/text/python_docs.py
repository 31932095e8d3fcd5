"""The embedded default: text that every machine already has.

The corpus is the documentation of the running Python: its language reference (what `help("topics")` shows) and the
docstrings of the standard library and of the installed packages this project depends on. Sources are only ever parsed
with `ast`, never imported: nothing of them runs, and a broken one costs one count.

A document is one module-level class or function, with its methods, or one module docstring or reference topic. Such a
unit is about one thing, which makes for legible latents; at a few hundred tokens it is mostly seen whole; and there are
tens of thousands of them to split by. (One document per source file would mean a quarter as many, long mixtures.)
"""

import ast
import importlib.metadata
import importlib.util
import platform
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from sae.base.seeding import uniform

BUILDER_VERSION = 1  # raise it whenever the same machine would yield other documents
HELD_OUT_SHARE = 0.08
MIN_CHARS = 80  # "Return the size." teaches nobody anything

# import name -> distribution name; whatever is not installed is left out
PACKAGES = {
    "accelerate": "accelerate",
    "datasets": "datasets",
    "draccus": "draccus",
    "fsspec": "fsspec",
    "gguf": "gguf",
    "huggingface_hub": "huggingface-hub",
    "jaxtyping": "jaxtyping",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "numpy": "numpy",
    "openai": "openai",
    "pandas": "pandas",
    "psutil": "psutil",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "sympy": "sympy",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "transformers": "transformers",
}
# folders whose sources are not documentation of the package they lie in
SKIPPED_FOLDERS = frozenset({"test", "tests", "site-packages", "dist-packages", "__pycache__"})
TOPICS_FILE = "pydoc_data/topics.py"
# what reading and parsing may raise: bad syntax, bad encoding or NUL bytes, no access, nesting too deep for `ast`
UNREADABLE = (SyntaxError, ValueError, OSError, RecursionError, MemoryError)
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def fingerprint() -> dict:
    """What `documents()` depends on: equal fingerprints mean equal documents (JSON-ready)."""
    versions = {}
    for name, distribution in PACKAGES.items():
        if importlib.util.find_spec(name):
            try:
                versions[name] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:  # a source tree on the path
                versions[name] = "unknown"
    return {"builder": BUILDER_VERSION, "python": platform.python_version(), "packages": versions}


def is_held_out(document_id: str) -> bool:
    """Whether the bundled model never saw a document: true for `HELD_OUT_SHARE` of all ids, the same ones everywhere.

    It is the draw of `is_held_out` of any text, so what a run holds out at a smaller share is new to the model as well.
    """
    return uniform("held-out", document_id) < HELD_OUT_SHARE


def documents(
    max_chars: int | None = None, sources: Iterable[Path] | None = None, counts: Counter[str] | None = None
) -> Iterator[tuple[str, str]]:
    """Yields (document id, text) pairs, with ids such as "json/decoder.py:JSONDecoder" or "pydoc/assert".

    Files come in the order of a hash of their name and are parsed as they are needed, so any prefix is a uniform sample
    of the files of all packages, and the first million tokens take seconds.

    Args:
        max_chars: stop after the document that reaches this many characters; None for all.
        sources: package folders and single modules to read instead of `source_roots()`.
        counts: filled with the number of "files" read and "skipped" (unreadable, or not valid Python), of "docstrings"
            used and of those dropped as "short" (or absent) or "repeated", of "documents" and of "chars".
    """
    counts = Counter() if counts is None else counts
    files = dict(_python_files(source_roots() if sources is None else sources))
    topics = _reference_topics(files.pop(TOPICS_FILE, None))
    seen: set[str] = set()
    for name in sorted([*files, *topics], key=lambda name: uniform("order", name)):
        if name in topics:
            found = {name: [(name.rpartition("/")[2], topics[name])]}
        else:
            try:
                found = _file_docstrings(name, files[name])
            except UNREADABLE:
                counts["skipped"] += 1
                continue
            counts["files"] += 1
        for document_id, docstrings in found.items():
            long = [(title, text) for title, text in docstrings if len(text) >= MIN_CHARS]
            fresh = [(title, text) for title, text in long if _is_new(text, seen)]
            counts.update(docstrings=len(fresh), short=len(docstrings) - len(long), repeated=len(long) - len(fresh))
            if fresh:
                text = "\n\n".join(f"{title}\n\n{text}" for title, text in fresh)
                counts.update(documents=1, chars=len(text))
                yield document_id, text
                if max_chars is not None and counts["chars"] >= max_chars:
                    return


def source_roots() -> list[Path]:
    """The standard library's folder, and the folder (or single module) of every installed package of `PACKAGES`."""
    roots = [Path(sysconfig.get_path("stdlib"))]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)  # finds a top-level name without importing anything
        if spec is not None:
            roots += [Path(folder) for folder in spec.submodule_search_locations or [spec.origin] if folder]
    return roots


def _python_files(roots: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """Yields (name, path) of every source file: names begin with the package, "json/decoder.py", on every machine."""
    standard_library = Path(sysconfig.get_path("stdlib"))
    for root in roots:
        base = root if root == standard_library else root.parent
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            relative = path.relative_to(base)
            if path.suffix == ".py" and SKIPPED_FOLDERS.isdisjoint(relative.parts):
                yield relative.as_posix(), path


def _parse(path: Path) -> ast.Module:
    """The syntax tree of a file, in the encoding it declares."""
    with warnings.catch_warnings(action="ignore"):  # SyntaxWarnings about others' escape sequences
        return ast.parse(path.read_bytes())


def _file_docstrings(name: str, path: Path) -> dict[str, list[tuple[str, str]]]:
    """The (qualified name, docstring) pairs of a file, by document id; methods belong to their class's document."""
    tree = _parse(path)
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    found = {name: [(module, _docstring(tree))]}
    for node in tree.body:
        if isinstance(node, DEFINITIONS):  # one name defined twice is one document
            found.setdefault(f"{name}:{node.name}", []).extend(_walk(node, node.name))
    return found


def _walk(node: Definition, title: str) -> Iterator[tuple[str, str]]:
    """Yields (qualified name, docstring) of a function, or of a class and all its methods."""
    yield title, _docstring(node)
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, DEFINITIONS):
                yield from _walk(child, f"{title}.{child.name}")


def _docstring(node: ast.Module | Definition) -> str:
    """The docstring without indentation, "" if there is none; lone surrogates, which UTF-8 cannot hold, are dropped."""
    return (ast.get_docstring(node) or "").encode(errors="ignore").decode()


def _reference_topics(path: Path | None) -> dict[str, str]:
    """The chapters of the language reference: {"pydoc/assert": text}; the file is one dict literal called `topics`."""
    if path is None:  # some distributions of Python leave it out
        return {}
    try:
        assigned = [node.value for node in _parse(path).body if isinstance(node, ast.Assign)]
        literals = [ast.literal_eval(value) for value in assigned if isinstance(value, ast.Dict)]
    except UNREADABLE:
        return {}
    return {f"pydoc/{topic}": text.strip() for literal in literals for topic, text in literal.items()}


def _is_new(text: str, seen: set[str]) -> bool:
    """Whether less than half of a text repeats, line by line, what was seen; if so, its lines are added to `seen`.

    This one rule drops exact copies, copies under another name (transformers has a `BertConfig` per model) and
    docstrings that are boilerplate all through.
    """
    lines = [line.strip() for line in text.splitlines()]
    repeated = sum(len(line) for line in lines if line in seen)
    if 2 * repeated >= sum(map(len, lines)):
        return False
    seen.update(lines)
    return True
