"""The pages that people read: every README, and what lies in docs/. Taken apart into blocks, links and headings.

A fenced block names its language. One that cannot run here has a comment in front of it that says what it needs:

    <!-- needs: a network -->
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDS = ("a network", "a server", "a GPU", "another library", "another model", "a cluster", "minutes")
FENCE = re.compile(r"(?:<!-- needs: ([^>]*?) -->\n\n?)?^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    needs: str | None
    """What it takes to run it, of what is not here; None if it runs."""

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """Returns the words of each command of a shell block: `a && b` and `a; b` apart, comments gone."""
        found: list[list[str]] = []
        for line in self.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&;")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in lexer:
                if word in ("&&", ";"):
                    found.append(words)
                    words = []
                else:
                    words.append(word)
            found.append(words)
        return [words for words in found if words]


def pages() -> dict[str, str]:
    """Returns {path from the root: text} of every page, in order."""
    below = [
        path for top in ("docs", "sae", "interp", "cli", "configs", "tests") for path in (ROOT / top).rglob("*.md")
    ]
    found = [*ROOT.glob("*.md"), *below]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(found)}


def blocks(page: str, text: str) -> list[Block]:
    """Returns the fenced blocks of a page."""
    return [Block(page, text.count("\n", 0, m.start(2)) + 1, m[2], m[3], m[1]) for m in FENCE.finditer(text)]


def prose(text: str) -> str:
    """Returns a page without its fenced blocks."""
    return FENCE.sub("", text)


def links(text: str) -> list[str]:
    """Returns the targets of a page's links."""
    return LINK.findall(re.sub(r"`[^`\n]*`", "", prose(text)).replace("``", ""))


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in plain}
