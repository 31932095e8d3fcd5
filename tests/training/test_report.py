"""The page of a training run: what is on it is what was logged; in a browser."""

import json
import time

import pytest
from rigs.browser import WIDTHS, faults, needs_browser, opened
from rigs.pages import blocks
from rigs.recorded import BATCH, LATENTS, recorded

from sae.training.reporting.report import write_comparison, write_report

HOSTILE = "</script><img src=x onerror=alert(1)>\u202e\"'"
GRID = {f"layers.2/k={k}": (2 / k, float(k)) for k in (4, 8, 16)}


def logged(folder, coder, name):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"] * BATCH, line[name]) for line in lines if line["coder"] == coder and name in line]


def test_the_values_of_a_page_are_those_of_the_log(tmp_path):
    folder = recorded(tmp_path / "run", GRID, midway=10)
    found = blocks(write_report(folder))
    main, drawn = found["main"], found["curves"]
    assert [coder["name"] for coder in main["coders"]] == list(GRID)
    assert [coder["label"] for coder in main["coders"]] == ["k=4", "k=8", "k=16"]
    for coder, curves in zip(main["coders"], drawn, strict=True):
        for name in ("loss", "fvu", "l0", "dead_share", "lr"):
            line = curves["training"][name]
            assert list(zip(line["x"], line["y"], strict=True)) == logged(folder, coder["name"], name)
        assert curves["held_out"]["ce_recovered"]["x"] == [10 * BATCH, 20 * BATCH, 30 * BATCH, 40 * BATCH]
        fvu, l0 = GRID[coder["name"]]
        assert curves["held_out"]["fvu"]["y"] == [2 * fvu, 2 * fvu, 2 * fvu, fvu]
        assert (coder["figures"]["FVU"], coder["figures"]["L0"], coder["step"]) == (fvu, l0, 40)
        assert sum(coder["density"]["counts"]) == coder["size"] == LATENTS
        assert coder["density"]["counts"][0] == 16
    text = json.dumps(main)
    assert "Linux-host-7" not in text
    assert "/home/me" not in text


def test_a_page_tells_nothing_of_where_its_run_lies(tmp_path):
    folder = recorded(tmp_path / "run", GRID)
    lines = ["run_dir: /home/me/runs/a", "text:", "  source: '/home/me/secret/books.jsonl'", "  more:", "  - ~/me/b/c"]
    (folder / "config.yaml").write_text("\n".join(lines))
    environment = json.loads((folder / "env.json").read_text()) | {"model": {"name": "/home/me/models/mine"}}
    (folder / "env.json").write_text(json.dumps(environment))
    main = blocks(write_report(folder))["main"]
    assert "models/mine" in json.dumps(main["runs"][0]["environment"])
    assert "source: 'secret/books.jsonl'" in main["runs"][0]["config"]
    assert "- b/c" in main["runs"][0]["config"]
    assert "/me" not in json.dumps(main)
    assert str(tmp_path) not in json.dumps(main)


def test_a_resumed_run_took_as_long_as_all_its_processes(tmp_path):
    folder = recorded(tmp_path / "run", {"a": (0.2, 8.0)}, steps=4)
    timed = [(1, 1.5), (2, 3.0), (3, 2.0), (4, 4.0)]
    lines = [json.dumps({"step": step, "seconds": s, "tokens_per_s": BATCH * step / s}) + "\n" for step, s in timed]
    (folder / "timings.jsonl").write_text("".join(lines))
    run = blocks(write_report(folder))["main"]["runs"][0]
    assert run["seconds"] == 3.0 + 4.0
    assert run["speed"]["x"] == [BATCH * step for step, _ in timed]


def test_a_run_that_goes_on_has_a_page_of_what_there_is(tmp_path):
    folder = recorded(tmp_path / "run", GRID, finished=False)
    main = blocks(write_report(folder, tmp_path / "other.html"))["main"]
    assert not main["runs"][0]["finished"]
    assert main["coders"][0]["figures"]["FVU"] is None
    assert main["coders"][0]["training"]["fvu"] == logged(folder, "layers.2/k=4", "fvu")[-1][1]
    assert not (folder / "report.html").exists()


def test_explained_runs_are_linked_from_wherever_the_page_is(tmp_path):
    folder = recorded(tmp_path / "run", {"a": (0.2, 8.0)})
    for name in ("explain", "explain-b/x y"):
        (folder / name / "shards").mkdir(parents=True)
    (folder / "explain-b" / "x y" / "report.html").touch()
    both = [{"name": "explain", "href": None}, {"name": "explain-b/x y", "href": "./explain-b/x%20y/report.html"}]
    assert blocks(write_report(folder))["main"]["runs"][0]["explained"] == both
    elsewhere = blocks(write_report(folder, tmp_path / "pages" / "a.html"))["main"]["runs"][0]["explained"]
    assert elsewhere[1]["href"] == "./../run/explain-b/x%20y/report.html"
    (folder / "explained.html").touch()
    found = blocks(write_report(folder))["main"]["runs"][0]["explained"]
    assert found == [{"name": "all in one page", "href": "./explained.html"}, both[1]]


@pytest.mark.parametrize("steps", [5000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_a_long_log_is_a_small_page_soon(tmp_path, steps):
    folder = recorded(tmp_path / "run", {"a": (0.2, 8.0), "b": (0.1, 16.0)}, steps=steps)
    begun = time.perf_counter()
    path = write_report(folder)
    assert time.perf_counter() - begun < 10  # two for the longer one on a machine that does nothing else
    assert path.stat().st_size < 2_000_000
    found = blocks(path)
    assert found["main"]["thinned"] == 2000
    line = found["curves"][0]["training"]["fvu"]
    assert len(line["x"]) <= 2000
    assert set(zip(line["x"], line["y"], strict=True)) <= set(logged(folder, "a", "fvu"))


@needs_browser()
def test_a_page_is_read_by_pointer_and_keys(tmp_path):
    folder = recorded(tmp_path / "run<b>", {HOSTILE: (0.2, 8.0), "b": (0.1, 16.0)}, midway=10, note=HOSTILE)
    path = write_report(folder)
    with opened(path) as (page, seen):
        page.locator("figure.plot").first.wait_for()
        assert page.title() == "run<b>"
        assert not page.locator("img").count()
        assert "</script><img src=x onerror=alert(1)>" in page.get_by_role("region", name="Config of").inner_text()
        page.get_by_role("tab", name="Config").focus()
        page.keyboard.press("ArrowRight")
        assert "2.13.0" in page.get_by_role("tabpanel").inner_text()
        page.keyboard.press("ArrowRight")
        assert page.get_by_role("tabpanel").locator("figure").count() == 1
        page.get_by_role("button", name="FVU", exact=True).focus()
        page.keyboard.press("Enter")
        assert page.locator("tbody tr").first.locator("th").inner_text().startswith("</script>")
        page.get_by_role("link", name="b", exact=True).focus()
        page.keyboard.press("Enter")
        page.get_by_text("Held-out figures, step 40").wait_for()
        assert page.evaluate("location.hash").endswith("coder=1")
        fvu = page.locator("figure.plot", has_text="Fraction of variance unexplained")
        fvu.get_by_role("img").focus()
        page.keyboard.press("End")
        assert "held out 0.1" in " ".join(fvu.locator(".reading span").all_inner_texts())
        page.get_by_role("button", name="Theme").click()
        page.get_by_text("Other logged figures").click()
        page.locator("figure.plot", has_text="grad_norm").wait_for()
        assert not faults(page)
        page.get_by_role("link", name="All coders").click()
        page.locator("figure.plot", has_text="FVU against L0").wait_for()
        page.go_back()
        page.get_by_text("Held-out figures, step 40").wait_for()
        assert not seen.requests
        assert not seen.errors


@pytest.mark.slow
@needs_browser()
def test_two_runs_on_a_phone_in_the_dark(tmp_path):
    a = recorded(tmp_path / "a", {"x": (0.2, 8.0)}, text__source="one")
    b = recorded(tmp_path / "b", {"y": (0.15, 16.0)}, steps=80, finished=False, midway=20, text__source="other")
    path = write_comparison([a, b], tmp_path / "comparison.html")
    with opened(path, WIDTHS["phone"], color_scheme="dark") as (page, seen):
        page.locator("figure.plot").first.wait_for()
        assert page.get_by_text("Held-out figures were not measured on the same: text.source differ.").count() == 1
        assert page.get_by_text("Not finished: b;").count() == 1
        cells = page.locator("tr", has_text="FVU").first.locator("th, td").all_inner_texts()
        assert cells == ["FVU", "0.2", "0.3", "+0.1"]
        settings = page.get_by_role("region", name="Settings that differ").inner_text()
        assert "text.source" in settings
        assert "optim.lr" not in settings
        loss = page.locator("figure.plot", has_text="Loss, training batches")
        assert loss.locator(".legend button").all_inner_texts() == ["a", "b"]
        assert page.evaluate("document.documentElement.scrollWidth") == WIDTHS["phone"]
        assert not faults(page)
        assert not seen.requests
        assert not seen.errors


@pytest.mark.parametrize("whole", [True, False])
def test_a_log_that_is_damaged_says_so_on_the_page(tmp_path, whole):
    folder = recorded(tmp_path / "run", {"a": (0.2, 8.0)})
    if not whole:
        text = (folder / "metrics.jsonl").read_text().replace('"step": 7,', '"step": 7', 1)
        (folder / "metrics.jsonl").write_text(text)
    said = blocks(write_report(folder))["main"]["runs"][0]["said"]
    assert said == ([] if whole else ["metrics.jsonl: 1 damaged lines are left out (line 7)."])
