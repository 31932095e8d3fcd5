"""What the site takes from elsewhere: READMEs and notebooks are pages; links to configs and measured rows become these.

A paragraph that is nothing but a link to a YAML file becomes the file. A paragraph "Measured: [A; B](PAGE#SECTION)"
becomes the rows of that section's table that are named "A", "B", or "A, ..."; "…" goes on with a row. A paragraph
"Fields: `NAME`" becomes the constants of the rule or loss term of that name, "Section: [TITLE](PAGE#SECTION)" the
section. Links to files that are no pages become their names. So no text and no figure stands twice.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "index.md": "README.md",
    "families/index.md": "sae/selection/README.md",
    "loading.md": "sae/formats/README.md",
    "explaining.md": "interp/README.md",
    "measured.md": "tests/benchmarks/README.md",
    "assets.md": "sae/assets/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
AT = {source: page for page, source in PAGES.items()}
FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
CONFIG = re.compile(r"^\[[^\]]+\]\(([^)\s]+\.yaml)\)$", re.MULTILINE)
FIELDS = re.compile(r"^Fields: `(\w+)`$", re.MULTILINE)
SECTION = re.compile(r"^Section: \[[^\]]+\]\(([^)\s#]+)#([^)\s]+)\)$", re.MULTILINE)
EQUATION = re.compile(r"^::: [\w.]+$", re.MULTILINE)
ALONE = "    options: {members: false, show_root_heading: false, show_root_toc_entry: false}"
MEASURED = re.compile(r"^Measured: \[([^\]]+)\]\(([^)\s#]+)#([^)\s]+)\)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the READMEs and notebooks as pages."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for path in (ROOT / "docs").glob("notebooks/*.ipynb"):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=of_notebook(path)))
    return files


def of_notebook(path: Path) -> str:
    """Returns a notebook as a page: its text, its code, and of what each cell shows the richest form."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            data = {kind: "".join(shown) for kind, shown in output.get("data", {}).items()}
            if "image/png" in data:
                parts.append(f'<img src="data:image/png;base64,{data["image/png"].strip()}" alt="">')
            elif "text/html" in data:
                parts.append(re.sub(r"\n\s*", "", data["text/html"]))  # an empty line would end it
            else:
                parts.append(f"```text\n{''.join(output.get('text', data.get('text/plain', ''))).rstrip()}\n```")
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Returns the page with configs and measured rows put in, and with links as they are on the site."""
    here = page.file.src_uri
    source = PAGES.get(here, f"docs/{here}")
    markdown = SECTION.sub(lambda found: section_of(at(source, found[1]), found[2]), markdown)
    markdown = CONFIG.sub(lambda found: yaml(at(source, found[1])), markdown)
    markdown = MEASURED.sub(lambda found: measured(found[1].split("; "), at(source, found[2]), found[3]), markdown)
    markdown = FIELDS.sub(lambda found: constants(found[1]), markdown)
    if here.startswith("families/"):
        markdown = EQUATION.sub(lambda found: f"{found[0]}\n{ALONE}", markdown)
    parts = FENCED.split(re.sub(r"^<!-- needs: .*? -->\n\n?", "", markdown, flags=re.MULTILINE))
    return "".join(
        part if part.startswith("```") else LINK.sub(lambda found: link(found, source, here), part) for part in parts
    )


def at(source: str, target: str) -> str:
    """Returns a link's target as a path from the root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def yaml(path: str) -> str:
    """Returns a config as a block."""
    text = (ROOT / path).read_text(encoding="utf-8").strip()
    return f'```yaml title="{path}"\n{text}\n```'


def section_of(path: str, section: str) -> str:
    """Returns what stands below a heading of a page."""
    parts = re.split(r"^##+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = [body for heading, body in zip(parts[1::2], parts[2::2], strict=True) if slug(heading) == section]
    if not found:
        raise PluginError(f"{path} has no section {section}")
    return found[0].strip() + "\n"


def measured(names: list[str], path: str, section: str) -> str:
    """Returns the rows of those names in a section's table, below its head."""
    body = section_of(path, section)
    for head, line, *rows in (table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE)):
        found, going, left = [], True, set(names)  # a row without a name belongs to the head
        for row in rows:
            cell = row.split("|")[1].strip()
            name = next((name for name in names if cell == name or cell.startswith(f"{name},")), None)
            left.discard(name)
            going = name is not None or (going and cell[:1] in ("", "…"))
            found += [row] * going
        if not left:
            return "\n".join([head, line, *found])
    raise PluginError(f"{path}#{section} has no rows {'; '.join(names)}")


def constants(name: str) -> str:
    """Returns a table of the constants of a rule or loss term."""
    from sae.base.fields import fields
    from sae.base.plugins import names
    from sae.objectives import Objective
    from sae.selection import Selection

    kind = (names(Selection) | names(Objective))[name]
    found = fields(f"{kind.__module__}:{kind.__qualname__}")
    rows = [f"| `{field.path}` | `{field.default}` | {field.doc} |" for field in found]
    return "\n".join(["| field | default | |", "|---|---|---|", *rows])


def slug(heading: str) -> str:
    """Returns the anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def link(found: re.Match[str], source: str, here: str) -> str:
    """Returns a link as it is on the site; of a file that is no page, its text."""
    text, target = found[1], found[2]
    if "://" in target or target.startswith("#"):
        return found[0]
    name, _, anchor = target.partition("#")
    path = at(source, name)
    in_docs = path.startswith("docs/") and path.endswith((".md", ".png"))
    page = AT.get(path) or (path.removeprefix("docs/") if in_docs else None)
    if page is None:
        return text
    return f"[{text}]({posixpath.relpath(page, posixpath.dirname(here) or '.')}{'#' if anchor else ''}{anchor})"
