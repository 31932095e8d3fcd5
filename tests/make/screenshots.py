"""Makes docs/images: the report of an explained run, and the live page of its server, as a reader of README sees them.

python tests/make/screenshots.py runs/quickstart
"""

import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from rigs.browser import opened  # noqa: E402

import interp  # noqa: E402
from interp.view.reporting.report import write_report  # noqa: E402

IMAGES = ROOT / "docs" / "images"
TEXT = 'def load(path):\n    """Return the number of lines in the file, or None\n    if the process is not valid."""'
HEIGHT = 900
COLORS = 64  # a page has few: so a file is small


def report(run: Path) -> None:
    """Takes the page of the latent whose label scores best."""
    file = write_report([run])[0]
    with opened(file) as (page, _):
        best = interp.results(run).summary["best"]["token_lookup"][0]["latent"]
        page.evaluate(f"location.hash = 'latent={best}'")
        page.locator(".windows").first.wait_for()
        save(page, "report.png")


def live(run: Path) -> None:
    """Takes what fires in a text, with a token chosen."""
    command = [sys.executable, "-m", "cli.view", str(run), "--serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            with opened(process.stdout.readline().strip()) as (page, _):  # type: ignore[union-attr]
                page.get_by_role("link", name="Try a text").click()
                page.get_by_label("Text", exact=True).fill(TEXT)
                page.get_by_role("button", name="Show what fires").click()
                page.get_by_role("button", name='" process"').first.click()
                save(page, "live.png")
        finally:
            process.kill()


def save(page, name: str) -> None:
    """Writes what the window shows, in few colors."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    page.set_viewport_size({"width": 1280, "height": HEIGHT})
    page.screenshot(path=IMAGES / name)
    Image.open(IMAGES / name).convert("RGB").quantize(COLORS).save(IMAGES / name, optimize=True)
    print(name, (IMAGES / name).stat().st_size)


if __name__ == "__main__":
    explained = Path(sys.argv[1]).resolve()
    report(explained)
    live(explained)
