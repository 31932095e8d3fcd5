"""A page is one file in which data is inert."""

import base64
import gzip
import hashlib
import json
import re

from sae.pages.page import CORE, packed, page, write_page

HOSTILE = "</script><script>alert(1)</script><!-- \" ' \u202e \u0000 \ud800"


def unpacked(text):
    return json.loads(gzip.decompress(base64.b64decode(text)))


def test_what_is_packed_ends_no_tag_and_comes_back():
    text = packed({"text": HOSTILE})
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", text)
    assert unpacked(text) == {"text": HOSTILE.replace("\ud800", "?")}


def test_the_policy_names_the_script_and_style_that_are_there(tmp_path):
    path = tmp_path / "page.html"
    write_page(path, HOSTILE.replace("\ud800", ""), CORE[:1], [("main", {"a": 1})])
    text = path.read_text(encoding="utf-8")
    assert "alert(1)</script>" not in text
    scripts, styles = re.findall(r"<script>(.*?)</script>", text, re.S), re.findall(r"<style>(.*?)</style>", text, re.S)
    assert len(scripts) == len(styles) == 1
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    for kind, body in (("script-src", scripts[0]), ("style-src", styles[0])):
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{kind} &#39;sha256-{digest}&#39;" in policy
    assert policy.startswith("default-src &#39;none&#39;")
    assert "unsafe" not in policy


def test_blocks_are_made_one_after_the_other():
    made = []

    def blocks():
        for number in range(3):
            made.append(number)
            yield str(number), number

    stream = page("t", (), blocks())
    assert not made
    assert len(re.findall("data-block=", "".join(stream))) == 3
    assert made == [0, 1, 2]
