"""The live page of a real server, which is killed in the middle of an edit: nothing that is saved is lost."""

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rigs.browser import faults, needs_browser, opened
from rigs.explained_runs import HOSTILE

import sae
from sae.base.visible import visible

pytestmark = [needs_browser(), pytest.mark.slow]
ROOT = Path(__file__).parents[2]
TYPED = HOSTILE.replace("\n", " ")
TEXT = 'w3 <script>"\u202e'  # so short that it fits into the context of a tiny model


@pytest.fixture
def run(explained_coder, tmp_path):
    return Path(shutil.copytree(explained_coder, tmp_path / "coder"))


@contextlib.contextmanager
def served(run, port=0):
    """Yields the process of a server and its address."""
    command = [sys.executable, "-m", "cli.view", str(run), "--serve", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def edit(page, latent, text):
    page.evaluate(f"location.hash = 'latent={latent}'")
    press(page, "Edit label")
    page.get_by_label(f"Label of latent {latent}").fill(text)


def try_text(page, text):
    page.get_by_role("link", name="Try a text").click()
    page.get_by_label("Text", exact=True).fill(text)
    with page.expect_response("**/api/prompt") as answer:
        press(page, "Show what fires")
    assert answer.value.ok, answer.value.text()
    page.locator(".token").first.wait_for()
    return answer.value.json()


def dense(run, ids):
    """The codes of tokens under full context, of what the model's own block gives."""
    coder, seen = sae.load(run), []
    lm = sae.load_language_model(coder.spec.reads[0].model)
    lm.model.model.layers[1].register_forward_hook(
        lambda block, given, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        lm.model(torch.tensor([ids]))
        return coder.encode_dense(seen[0].reshape(len(ids), -1).float())


def test_what_is_shown_is_what_the_coder_encodes_and_all_is_there_after_a_reload(run):
    with served(run) as (_, url), opened(url) as (page, seen):
        found = try_text(page, TEXT)
        codes = dense(run, found["token_ids"])
        for place, some in enumerate(found["at"]):
            fires = {latent: value for latent, value, _ in some}
            counted = codes[place] if found["mask"][place] else torch.zeros_like(codes[place])
            assert set(fires) == set(counted.nonzero().flatten().tolist())
            assert all(value == pytest.approx(float(counted[latent]), rel=1e-4) for latent, value in fires.items())
        place = max(range(len(found["at"])), key=lambda i: len(found["at"][i]))
        page.locator(f".token[data-place='{place}']").hover()
        shown = [row.split("\t")[:2] for row in page.locator(".side tbody tr").all_inner_texts()]
        assert [int(latent) for latent, _ in shown] == [latent for latent, *_ in found["at"][place]]
        assert [float(value) for _, value in shown] == pytest.approx([one[1] for one in found["at"][place]], rel=1e-3)

        edit(page, 3, TYPED)
        press(page, "Save")
        page.locator(".edited").wait_for()
        page.locator(".star").click()
        page.locator(".star[aria-pressed=true]").wait_for()
        page.get_by_role("link", name="Steer with it").click()
        page.get_by_role("textbox", name="Prompt").fill("w3 w5")
        press(page, "Write both")
        page.get_by_text("nats, the mean over").wait_for()
        assert "Latent 3 is clamped to" in page.locator(".facts").inner_text()
        page.get_by_role("link", name="Search").click()
        page.get_by_label("Latents about").fill("alert onerror")
        page.locator(".hits li").wait_for()
        assert visible(TYPED) in page.locator(".hits li").inner_text()
        page.reload()
        page.locator(".hits li").wait_for()
        page.get_by_role("link", name="Notes").click()
        assert [row.split("\t")[:2] for row in page.locator(".live tbody tr").all_inner_texts()] == [["\u2605", "3"]]
        assert visible(TYPED) in page.locator(".live tbody tr").inner_text()
        page.get_by_role("link", name="Try a text").click()
        assert page.get_by_label("Text", exact=True).input_value() == TEXT
        assert faults(page) == []
        assert not seen.errors
        assert all(one.startswith(url) for one in seen.requests)


def test_a_kill_in_the_middle_of_an_edit_loses_nothing(run):
    with contextlib.ExitStack() as stack:
        process, url = stack.enter_context(served(run))
        page, _ = stack.enter_context(opened(url))
        edit(page, 3, "saved")
        press(page, "Save")
        page.locator(".edited").wait_for()
        edit(page, 5, "half of a lab")
        process.kill()
        process.wait()
        press(page, "Save")
        page.locator(".away").wait_for()
        page.get_by_label("Label of latent 5").press_sequentially("el")
        stack.enter_context(served(run, int(url.strip("/").rpartition(":")[2])))
        page.get_by_text("The server is back.").wait_for()
        page.reload()
        assert page.get_by_label("Label of latent 5").input_value() == "half of a label"
        press(page, "Save")
        page.locator(".edited").wait_for()
        page.evaluate("location.hash = 'latent=3'")
        page.locator(".edited").wait_for()
        assert page.locator(".edited").inner_text().startswith("saved")


def test_two_tabs_see_what_the_other_saves_and_overwrite_nothing(run):
    with served(run) as (_, url), opened(url) as (first, seen):
        second = first.context.new_page()
        second.goto(url)
        edit(second, 3, "second")
        edit(first, 3, "first")
        press(first, "Save")
        first.locator(".edited").wait_for()
        second.locator(".conflict q").wait_for()
        assert second.locator(".conflict q").inner_text() == "first"
        assert second.get_by_label("Label of latent 3").input_value() == "second"
        press(second, "Save mine in its place")
        first.get_by_text("second").first.wait_for()
        assert try_text(second, "w3 w5")["tokens"] != try_text(first, "w7")["tokens"]
        assert not seen.errors


def test_the_keyboard_alone_tries_a_text_and_edits_a_label(run):
    with served(run) as (_, url), opened(url, 390) as (page, seen):
        keys = page.keyboard

        def reach(name):
            for _ in range(60):
                keys.press("Tab")
                label = "(one => one.getAttribute('aria-label') || (one.labels && one.labels[0] || one).textContent)"
                if name in page.evaluate(f"{label}(document.activeElement)"):
                    return
            raise AssertionError(f"no key leads to {name}")

        page.locator("nav.tabs").wait_for()
        reach("Try a text")
        keys.press("Enter")
        page.locator("#try").wait_for()
        reach("Text")
        keys.type("w3 w5 w7")
        keys.press("Control+Enter")
        page.locator(".token").first.wait_for()
        reach("token 0")
        keys.press("ArrowRight")
        keys.press("Enter")
        assert page.locator(".token[aria-pressed=true]").count() == 1
        assert page.locator(".side h3").inner_text().endswith("token 1")
        page.evaluate("location.hash = 'latent=3'")
        page.locator(".star").wait_for()
        reach("Edit label")
        keys.press("Enter")
        keys.press("Control+a")
        keys.type("by keys")
        keys.press("Enter")
        page.locator(".edited").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert not seen.errors
