"""The panels of a live page, and what they say when the server fails: nothing that is typed is lost."""

import contextlib
import re
from collections import Counter

import pytest
from rigs.browser import faults, needs_browser, opened
from rigs.explained_runs import HOSTILE, write_explained_run
from rigs.live_server import Server, serving

import interp
from interp.view.reporting.live import LIVE_SCRIPTS, LivePage
from interp.view.reporting.report import SCRIPTS, START
from sae.base.visible import visible
from sae.pages.page import CORE, text_of

pytestmark = needs_browser()
TOKENS = ["<s>", "The", " cat", visible(HOSTILE), "\\n"]
FIRES = [[508, 3.0, 0.5], [3, -1.25, -0.125]]
PROMPT = {
    "model": "m", "site": "s", "d_sae": 48, "tokens": TOKENS, "token_ids": [*range(5)], "mask": [False] + [True] * 4,
    "shown_with": [0, 1, 2, 3, 4], "follows": [*TOKENS[1:], " sat"], "logits": [1.0] * 5, "no_effects": "",
    "latents": [
        {"latent": 508, "label": HOSTILE, "value": 3.0, "position": 2, "fires": 1, "effect": 0.5, "positions": [2],
         "values": [3.0], "effects": [0.5], "raised": [[" sat", 0.5]], "lowered": []},
        {"latent": 3, "label": None, "value": 2.5, "position": 3, "fires": 2, "effect": -0.125, "positions": [2, 3],
         "values": [-1.25, 2.5], "effects": [-0.125, 0.0], "raised": [], "lowered": []},
    ],
    "at": [[], [], FIRES, [[3, 2.5, 0.0]], []], "labels": {"508": visible(HOSTILE)},
}  # fmt: skip
EDIT = {
    "latent": 3, "how": "clamp", "strength": 2.0, "unit": "largest", "where": "answer", "when": "12>1",
    "value": 8.0, "largest": 4.0, "largest_from": "in the evidence",
}  # fmt: skip
DONE = {
    "kl": [0.5, 1.0], "tokens": [" sat", "\\n"], "mean_kl": 0.75, "perplexity": {"plain": 2.5, "steered": None},
    "note": "it does not rise steadily", "strengths": [EDIT], "read": {"tokens": 9, "masked": 1, "changed": 3},
    "pieces": {"plain": [" sat", "\\n"], "steered": [" ran"]},
}  # fmt: skip
STREAM = [{"side": "plain", "text": " sat"}, {"side": "steered", "text": " ran"}, {"side": "plain", "text": "\\n"}]
STREAM += [{"done": DONE}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return interp.results(write_explained_run(tmp_path_factory.mktemp("runs") / "explain", 12))


@pytest.fixture
def server(run):
    made = Server(run)
    made.answers = {"prompt": PROMPT, "steer": STREAM, "search": {"found": [], "by": "words"}}
    return made


def ask(page, tab, name, text, button):
    page.get_by_role("link", name=tab).click()
    page.get_by_role("textbox", name=name, exact=True).fill(text)
    page.get_by_role("button", name=button).click()


def edit(page, latent, text):
    page.evaluate(f"location.hash = 'latent={latent}'")
    page.get_by_role("button", name="Edit label").click()
    page.get_by_label(f"Label of latent {latent}").fill(text)


def test_all_data_of_the_page_is_asked_for(run):
    page = LivePage(run)
    text = "".join(page.html())
    assert '<script type="text/plain"' not in text
    assert "connect-src &#39;self&#39;" in text
    assert page.block("main")["live"]
    assert page.block("0/0")["latents"]
    with pytest.raises(KeyError):
        page.block("0/9")


def test_a_text_is_shaded_and_a_label_is_kept(server):
    """The quick draw of all that a browser is asked about here."""
    with serving(server) as url, opened(url) as (page, seen):
        ask(page, "Try a text", "Text", "The cat", "Show what fires")
        token = page.get_by_role("button", name='token 2: " cat", 2 latents fire')
        token.hover()
        rows = page.locator(".side tbody tr")
        assert [row.split("\t") for row in rows.all_inner_texts()] == [
            ["508", "3", "+0.5", visible(HOSTILE)],
            ["3", "-1.25", "-0.125", run_label(server, 3)],
        ]
        page.locator("table.fired tbody tr").nth(1).hover()
        shades = page.locator(".token mark").evaluate_all("some => some.map((one) => one.className)")
        assert shades == ["", "", "down5", "up9", ""]
        assert server.asked == [("prompt", {"text": "The cat"})]
        edit(page, 3, HOSTILE.replace("\n", " "))
        page.get_by_role("button", name="Save").click()
        page.locator(".edited").wait_for()
        assert server.notes[3]["label"] == HOSTILE.replace("\n", " ")
        page.reload()
        assert page.locator(".edited").inner_text().startswith(visible(HOSTILE.replace("\n", " ")))
        assert not seen.errors


def run_label(server, latent):
    label = server.run[latent].label
    return label.text or "not explained"


@pytest.mark.slow
def test_what_is_typed_outlives_a_server_that_is_away(server):
    with serving(server) as url:
        port = int(url.strip("/").rpartition(":")[2])
        browser = opened(url)
        page, _ = browser.__enter__()
        ask(page, "Steer", "Prompt", "a prompt", "Add an edit")
        edit(page, 3, "mine")
    with contextlib.ExitStack() as stack:
        stack.callback(browser.__exit__, None, None, None)
        page.get_by_role("button", name="Save").click()
        page.locator(".away").wait_for()
        assert "Not saved: the server does not answer" in page.locator(".notebar").inner_text()
        page.get_by_label("Label of latent 3").press_sequentially(" and more")
        stack.enter_context(serving(server, port))
        page.get_by_text("The server is back.").wait_for()
        page.reload()
        assert page.get_by_label("Label of latent 3").input_value() == "mine and more"
        page.get_by_role("link", name="Notes").click()
        assert "not saved yet: latent 3" in page.get_by_role("note").inner_text()
        page.get_by_role("link", name="latent 3").click()
        page.get_by_role("button", name="Save").click()
        page.locator(".edited").wait_for()
        assert server.notes[3]["label"] == "mine and more"
        page.get_by_role("link", name="Steer", exact=True).click()
        assert page.get_by_role("textbox", name="Prompt").input_value() == "a prompt"


@pytest.mark.slow
def test_a_label_that_somebody_else_has_changed_is_not_overwritten_unseen(server):
    with serving(server) as url, opened(url) as (page, _):
        edit(page, 3, "mine")
        server.notes[3] = {"latent": 3, "bookmark": True, "label": "theirs", "changed": "2026-01-01T00:00:00+00:00"}
        page.get_by_role("button", name="Save").click()
        page.locator(".conflict").wait_for()
        assert page.locator(".conflict q").inner_text() == "theirs"
        assert page.get_by_label("Label of latent 3").input_value() == "mine"
        page.reload()
        assert page.get_by_label("Label of latent 3").input_value() == "mine"
        page.get_by_role("button", name="Save mine in its place").click()
        page.locator(".edited").wait_for()
        assert server.notes[3]["label"] == "mine"
        assert server.notes[3]["bookmark"]
        edit(page, 3, "mine again")
        server.notes[3]["label"] = "theirs"
        page.get_by_role("button", name="Save").click()
        page.get_by_role("button", name="Take theirs").click()
        assert page.locator(".edited").inner_text().startswith("theirs")
        assert server.notes[3]["label"] == "theirs"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ((429, {"error": "too many requests"}, {"retry-after": "7"}), "Too many requests; try again in 7 s."),
        ((400, {"error": "text: 3,000 tokens; together 512 are taken"}), "Text: 3,000 tokens; together 512 are taken."),
        ((401, {"error": "token"}), "The server asks for its token: reload the page and give it."),
        ((500, []), "The server refuses (500)."),
    ],
)
def test_a_refusal_is_one_line_and_the_text_stays(server, fault, told):
    server.faults["prompt"] = fault
    with serving(server) as url, opened(url) as (page, _):
        ask(page, "Try a text", "Text", "The cat", "Show what fires")
        assert page.locator(".work [role=alert]").inner_text() == told
        assert page.locator("[aria-busy]").count() == 0
        server.faults.clear()
        page.get_by_role("button", name="Show what fires").click()
        page.locator(".token").first.wait_for()
        assert page.locator(".work [role=alert]").count() == 0


@pytest.mark.slow
def test_what_came_of_a_stream_that_breaks_off_stands(server):
    server.answers["steer"] = [STREAM[0], {"error": "the model has no room"}]
    with serving(server) as url, opened(url) as (page, _):
        ask(page, "Steer", "Prompt", "The cat", "Write both")
        assert page.locator(".work [role=alert]").inner_text() == "The model has no room."
        server.answers["steer"], server.faults["steer"] = STREAM, 2
        page.get_by_role("button", name="Write both").click()
        page.locator(".work [role=alert]").wait_for()
        assert (
            "what came stands here" in page.locator(".work").inner_text()
            or "kept" in page.locator(".work").inner_text()
        )
        assert page.get_by_role("region", name="Steered").locator(".window").inner_text() == " ran"
        server.faults.clear()
        page.get_by_role("button", name="Write both").click()
        page.get_by_text("KL 0.75 nats, the mean over 2 tokens").wait_for()
        facts = page.locator(".facts").inner_text()
        assert "2 \u00d7 4, its largest activation, in the evidence) in the answer where 12>1." in facts
        assert "It does not rise steadily." in facts
        assert "2.5 plain, n/a steered" in facts
        shades = page.locator("[aria-label=Plain] mark").evaluate_all("some => some.map((one) => one.className)")
        assert shades == ["up5", "up9"]


@pytest.mark.slow
def test_work_shows_and_is_stopped(server):
    server.wait_s = 1.0
    with serving(server) as url, opened(url) as (page, seen):
        ask(page, "Try a text", "Text", "The cat", "Show what fires")
        page.locator("[aria-busy=true]").wait_for(state="attached")
        assert page.locator(".work").inner_text().startswith("Asking the model ...")
        page.get_by_role("button", name="Stop").click()
        assert page.locator(".work").inner_text().strip() == "Stopped."
        assert page.locator("[aria-busy]").count() == 0
        ask(page, "Steer", "Prompt", "The cat", "Write both")
        page.get_by_role("region", name="Plain").get_by_text("sat").wait_for()
        page.get_by_role("button", name="Stop").click()
        assert page.locator(".work").inner_text().strip() == "Stopped."
        assert not seen.errors


@pytest.mark.slow
def test_a_panel_that_cannot_work_says_why(server):
    server.about = {
        **server.about,
        "can": {**server.about["can"], "steer": False},
        "why": {"steer": "coder: it splices nowhere"},
    }
    with serving(server) as url, opened(url) as (page, seen):
        page.get_by_role("link", name="Steer").click()
        assert page.get_by_role("note").inner_text() == "Coder: it splices nowhere."
        page.evaluate("location.hash = 'latent=5'")
        page.locator(".star").wait_for()
        assert page.get_by_role("link", name="Steer with it").count() == 0
        assert not seen.errors


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_panel_is_usable_and_without_serious_faults(server, width, scheme):
    with serving(server) as url, opened(url, width, color_scheme=scheme) as (page, seen):
        ask(page, "Try a text", "Text", "The cat", "Show what fires")
        page.locator(".token").first.wait_for()
        found = faults(page)
        for tab in ("Search", "Steer", "Notes"):
            page.get_by_role("link", name=tab).click()
            found += faults(page)
        edit(page, 3, "mine")
        found += faults(page)
        assert found == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert not seen.errors


def test_no_name_is_declared_twice_in_the_scripts_of_a_page():
    """They are one script: a name that two files declare ends all of them, or means the one that comes last."""
    text = "\n".join(map(text_of, (CORE[0], *SCRIPTS, *LIVE_SCRIPTS, START)))
    found = re.findall(r"^(?:async )?(?:function\*?|const|let|class) (\w+)", text, re.M)
    assert [name for name, times in Counter(found).items() if times > 1] == []
