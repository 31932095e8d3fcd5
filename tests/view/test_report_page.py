"""The page of an explained run, in a browser: what a person does with it, by pointer and by keys."""

import json
import shutil

import pytest
from rigs.browser import WIDTHS, faults, needs_browser, opened
from rigs.explained_runs import HOSTILE, write_explained_run
from rigs.pages import blocks, latents_of_blocks

from interp.view.notes import Notes
from interp.view.reporting import report
from interp.view.reporting.report import write_report

pytestmark = needs_browser()
LATENTS = 120
LOOKS = (("phone", "light"), ("desk", "dark"), ("desk", "light"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_explained_run(tmp_path_factory.mktemp("run") / "explain", LATENTS)


@pytest.fixture(scope="module")
def path(folder):
    return write_report([folder])[0]


def look(page, anchor):
    """Goes to a place in the page, and waits until it is there."""
    page.evaluate("where => { location.hash = where }", anchor)
    page.wait_for_selector("#latent, .overview, [role=alert]")
    page.wait_for_timeout(60)


def ids(page):
    """Returns the latents of the rows that are shown."""
    return [int(text) for text in page.locator(".table tbody th[scope=row]").all_inner_texts()]


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_the_list_is_searched_sorted_and_filtered_and_the_address_holds_it(path):
    told = latents_of_blocks(blocks(path))
    with opened(path) as (page, seen):
        page.wait_for_selector(".overview")
        assert ids(page) == list(range(100))
        page.get_by_role("button", name="detection", exact=False).filter(has_text="detection").first.click()
        label = next(label for label in told[ids(page)[0]]["labels"] if label["explainer"] == "llm")
        best = max(
            one["value"][0] or 0
            for page_ in told.values()
            for one_label in page_["labels"]
            for one in one_label["scores"]
            if one_label["explainer"] == "llm" and one["scorer"] == label["scores"][0]["scorer"]
        )
        assert label["scores"][0]["value"][0] == best
        page.get_by_role("searchbox").fill("it fires on none of")
        assert sorted(ids(page)) == [3, 103]
        assert "list.q=it" in page.url
        assert page.get_by_role("status").filter(has_text="2 of 120 latents").is_visible()
        page.get_by_role("searchbox").fill("")
        page.get_by_title("Show the latents that are failed").click()
        page.wait_for_selector(".table [role=status]:has-text('1 of 120 latents')")
        assert sorted(ids(page)) == [31]
        address = page.url
        page.goto("about:blank")
        page.goto(address)
        page.wait_for_selector(".overview")
        assert sorted(ids(page)) == [31]
        assert not seen.errors
        assert not [one for one in seen.requests if not one.startswith(("about:", "file:"))]


def test_a_latent_is_opened_read_and_turned_by_keys(path):
    told = latents_of_blocks(blocks(path))
    with opened(path) as (page, seen):
        page.wait_for_selector(".overview")
        page.get_by_role("link", name="5", exact=True).first.click()
        page.wait_for_selector("#latent")
        assert page.locator("#latent").inner_text().startswith("Latent 5")
        assert page.evaluate("document.activeElement.id") == "latent"
        for label in told[5]["labels"]:
            assert label["text"] in page.locator(".labels").inner_text()
        page.keyboard.press("n")
        page.wait_for_selector("#latent:has-text('Latent 6')")
        page.keyboard.press("ArrowLeft")
        page.wait_for_selector("#latent:has-text('Latent 5')")
        page.go_back()
        page.wait_for_selector("#latent:has-text('Latent 6')")
        assert not seen.errors
        assert not seen.requests


@pytest.mark.slow
def test_values_are_told_to_pointers_and_keys(path):
    told = latents_of_blocks(blocks(path))[5]
    window = told["windows"][told["strongest"][0][0]]
    places = sorted(map(int, window[1]))
    with opened(path) as (page, seen):
        look(page, "latent=5")
        box = page.get_by_role("group", name="Strongest example 1")
        token = box.locator(f"[data-place='{places[0]}']")
        token.hover()
        said = page.locator(".tip b").inner_text()
        assert float(said.split()[0].replace(",", "")) == pytest.approx(window[1][str(places[0])], rel=1e-5)
        page.mouse.move(0, 0)
        assert page.locator(".tip").is_hidden()
        box.focus()
        page.keyboard.press("Home")
        assert page.get_by_role("status").filter(has_text=", 0").count() or places[0] == 0
        for _ in range(places[0]):
            page.keyboard.press("ArrowRight")
        live = page.locator("body > [role=status]").inner_text()
        assert f"{float(said.split()[0].replace(',', '')):g}"[:5] in live.replace(",", "")
        page.keyboard.press("Escape")
        assert page.locator(".tip").is_hidden()
        assert not seen.errors


@pytest.mark.slow
def test_judged_windows_are_chosen_by_kind_and_answer(path):
    told = latents_of_blocks(blocks(path))[5]
    score = told["labels"][0]["scores"][0]
    wrong = [one for one in score["judged"] if one["miss"] is not None and one["miss"] > 0.5]
    with opened(path) as (page, seen):
        look(page, "latent=5")
        part = page.locator("section").filter(has=page.locator("h3", has_text="Where the label fails")).first
        assert part.locator("ol.windows > li").count() == len(score["judged"])
        assert part.locator("ol.windows .badge.wrong").count() == len(wrong)
        part.get_by_label("Answer").select_option("right")
        assert part.locator("ol.windows .badge.wrong").count() == 0
        assert part.locator("ol.windows > li").count() == len(score["judged"]) - len(wrong) - sum(
            one["value"] is None for one in score["judged"]
        )
        assert not seen.errors


@pytest.mark.slow
def test_bins_of_scores_are_reached_by_keys_and_show_as_many_latents_as_they_say(path):
    with opened(path) as (page, seen):
        page.wait_for_selector(".overview")
        bins = page.locator(".card").first.get_by_role("button")
        told = [bin_.get_attribute("aria-label") for bin_ in bins.all()]
        assert [bin_.get_attribute("tabindex") for bin_ in bins.all()] == ["0"] + ["-1"] * (len(told) - 1)
        for at in range(len(told)):
            bins.first.focus()
            for _ in range(at):
                page.keyboard.press("ArrowRight")
            page.keyboard.press("Enter")
            many = told[at].split(": ")[1].split()[0]
            page.wait_for_selector(f".table [role=status]:has-text('{many} of {LATENTS} latents')")
            assert str(len(ids(page))) == many
        assert sum(int(one.split(": ")[1].split()[0]) for one in told) > 100
        assert not seen.errors


@pytest.mark.slow
def test_tokens_told_with_others_and_texts_of_any_length(path):
    with opened(path, WIDTHS["phone"]) as (page, seen):
        look(page, "latent=5")
        assert "decile 10, strongest" in page.locator(".failures").first.inner_text()
        assert " peaks, " in page.locator(".facts").inner_text()
        page.evaluate("""document.getElementById("main").replaceChildren(el("div", {class: "explained"},
            windowOf([["a", 0], ["b", 1]], 1, {label: "merged", first: 130, context: 128, tokens: [0, 3]}),
            el("p", {id: "long"}, brief("w".repeat(10000)))))""")
        page.get_by_role("group", name="merged").locator("[data-place='1']").hover()
        assert "token 5 of its row" in page.locator(".tip").inner_text()
        assert len(page.locator("#long").inner_text()) < 450
        page.get_by_role("button", name="all 10,000 characters").click()
        assert len(page.locator("#long > span > span").inner_text()) == 10_000
        assert overflow(page) <= 0
        assert not seen.errors


@pytest.mark.slow
def test_what_is_not_there_is_said_in_a_line(path):
    with opened(path) as (page, seen):
        look(page, "latent=100000")
        assert "There is no latent 100000: the coder has 0 to " in page.get_by_role("alert").inner_text()
        look(page, "latent=x")
        assert "There is no latent x" in page.get_by_role("alert").inner_text()
        look(page, "latent=3")
        assert "it fires on none" in page.locator(".labels").inner_text()
        look(page, "latent=31")
        assert "failed" in page.locator(".labels").inner_text()
        assert not seen.errors


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(WIDTHS[name], scheme) for name, scheme in LOOKS])
def test_no_fault_is_found_and_nothing_is_wider_than_the_screen(path, width, scheme):
    with opened(path, width, color_scheme=scheme) as (page, seen):
        for anchor in ("list.sort=-density", "latent=5", "latent=3", "latent=100000"):
            look(page, anchor)
            assert faults(page) == [], anchor
            assert overflow(page) <= 0, anchor
        assert not seen.errors
        assert not seen.requests


def test_hostile_text_is_text(tmp_path):
    folder = write_explained_run(tmp_path / "explain", 6, hostile=HOSTILE)
    with opened(write_report([folder])[0]) as (page, seen):
        page.on("dialog", lambda dialog: seen.errors.append(dialog.message))
        page.wait_for_selector(".overview")
        for anchor in ("", "latent=1", "latent=4"):
            look(page, anchor)
            assert "<img src=x onerror=alert(2)>" in page.locator("main").inner_text()
            assert page.locator("main img, main script").count() == 0
            assert "\u202e" not in page.locator("main").inner_text()
        assert not seen.errors
        assert not seen.requests


@pytest.mark.slow
def test_two_runs_stand_side_by_side(folder, tmp_path):
    a, b = (shutil.copytree(folder, tmp_path / name) for name in ("one", "other"))
    for one in (a, b):
        told = json.loads((one / "env.json").read_text())
        (one / "env.json").write_text(json.dumps({**told, "coder": "0123456789abcdef"}))
    Notes(b).change(7, label="months")
    made = write_report([a, b], tmp_path / "two.html")[0]
    with opened(made, WIDTHS["phone"]) as (page, seen):
        page.wait_for_selector(".compared")
        summary = page.get_by_role("region", name="Scores of both runs").locator("tr")
        cells = [[cell.bounding_box()["x"] for cell in row.locator("th, td").all()] for row in summary.all()]
        assert all(row == cells[0] for row in cells)  # every figure stands below the name of its run
        row = page.locator(".table tbody tr", has_text="months").inner_text()
        assert "edited" in row
        for name in ("embedding[tfidf], one", "embedding[tfidf], other", "difference", "status, other"):
            assert name in row
        assert overflow(page) <= 0
    with opened(made) as (page, seen):
        page.wait_for_selector(".compared")
        assert "joined by their ids" in page.locator("main").inner_text()
        look(page, "latent=5")
        assert page.locator(".side-of").count() == 2
        texts = page.locator(".side-of .labels").all_inner_texts()
        assert texts[0] == texts[1] != ""
        page.get_by_role("link", name="Next").click()
        page.wait_for_selector("#latent:has-text('Latent 6')")
        assert faults(page) == []
        page.get_by_role("link", name="other").click()
        page.wait_for_selector(".overview")
        assert len(ids(page)) == 100
        assert not seen.errors
        assert not seen.requests


@pytest.mark.slow
def test_a_folder_of_pages_leads_from_its_index_to_a_latent(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST", 60)
    with opened(write_report([folder], tmp_path / "report.html")[0]) as (page, seen):
        page.wait_for_selector(".overview")
        page.locator(".table tbody a").nth(70).click()
        page.wait_for_selector("#latent")
        assert "part-002.html" in page.url
        page.get_by_role("link", name="All latents").click()
        page.wait_for_selector(".overview")
        assert "This page has the latents 60 to the last" in page.locator("main").inner_text()
        page.get_by_role("link", name="The index lists all.").click()
        page.wait_for_selector(".overview")
        look(page, "latent=4")
        assert "another page" in page.locator("main").inner_text()
        assert not seen.errors
