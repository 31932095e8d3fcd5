"""What the page of many latents takes: bytes, seconds, memory, and the patience of who opens it."""

import os
import time
from dataclasses import replace
from statistics import median

import pytest
from rigs.browser import needs_browser, opened
from rigs.explained_runs import write_explained_run
from rigs.hostile import memory_at_peak

from interp.view.explained import ExplainedRun
from interp.view.reporting import report

KNOWN = 100  # latents that are told over and over, under other ids; no block holds one twice


class Repeated(ExplainedRun):
    """A run of any number of latents, of whose records every hundredth is the same."""

    many = KNOWN

    @property
    def latents(self):
        return list(range(self.many))

    def __len__(self):
        return self.many

    def records(self, latents):
        told = {record.latent: record for record in super().records({latent % KNOWN for latent in latents})}
        return (replace(told[latent % KNOWN], latent=latent, d_sae=self.many) for latent in latents)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_explained_run(tmp_path_factory.mktemp("run") / "explain", KNOWN)


def write(folder, many, target, monkeypatch):
    """Writes the report of so many latents; returns seconds of the processor, and bytes of memory beyond before."""
    monkeypatch.setattr(report, "ExplainedRun", type("Run", (Repeated,), {"many": many}))
    before, begun = memory_at_peak(anew=True), time.process_time()
    assert report.write_report([folder], target) == [target]
    return time.process_time() - begun, memory_at_peak() - before


@pytest.mark.slow
def test_a_thousand_latents_are_written_in_ten_seconds(folder, tmp_path, monkeypatch):
    seconds, memory = write(folder, 1_000, tmp_path / "page.html", monkeypatch)
    size = os.stat(tmp_path / "page.html").st_size
    print(f"1,000 latents: {seconds:.1f} s, {memory / 1e6:.0f} MB more memory, {size / 1e6:.1f} MB")
    assert seconds < 10
    assert memory < 100e6


@needs_browser()
@pytest.mark.slow
def test_ten_thousand_latents_are_usable_in_three_seconds(folder, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    seconds, memory = write(folder, 10_000, path, monkeypatch)
    size = path.stat().st_size
    assert size < 64_000_000
    assert memory < 200e6
    times = []
    with opened(path) as (page, seen):
        for latent in (5_005, 9_990, 17):
            page.goto("about:blank")
            begun = time.monotonic()
            page.goto(path.as_uri(), wait_until="commit")
            page.wait_for_selector(".table tbody tr")
            listed = time.monotonic()
            page.evaluate("latent => { location.hash = 'latent=' + latent }", latent)
            page.wait_for_selector(f"#latent:text-is('Latent {latent}')")
            times.append((listed - begun, time.monotonic() - begun))
        page.get_by_role("link", name="All latents").click()
        page.wait_for_selector(".overview")
        begun = time.monotonic()
        page.get_by_role("searchbox").fill("words")
        page.get_by_role("button", name="Density").click()
        page.wait_for_selector("th[aria-sort=descending]:has-text('Density')")
        sorted_in = time.monotonic() - begun
        assert not seen.errors
    print(f"10,000 latents: {seconds:.0f} s, {memory / 1e6:.0f} MB more memory, {size / 1e6:.1f} MB")
    print(f"list and latent after {times} s, searched and sorted in {sorted_in:.2f} s")
    assert median(whole for _, whole in times) < 3
