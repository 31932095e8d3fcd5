"""Tables of notebooks: text of strangers is text there, and HTML is what we have made ourselves."""

from html.parser import HTMLParser

from sae.pages.notebook import Html, table, text_lines

HOSTILE = "</td><script>alert(1)</script>\"'&lt;\u202e\x1b[2J\nnext"


class Seen(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.cells = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.cells.append(data)


def test_cells_and_lines_are_text():
    page = Seen(table([HOSTILE], [[HOSTILE, Html("<b>ours</b>")]]))
    assert page.tags == ["table", "thead", "tr", "th", "tbody", "tr", "td", "td", "b"]
    shown = "</td><script>alert(1)</script>\"'&lt;\\u{202e}\\u{1b}[2J\\nnext"
    assert page.cells == [shown, shown, "ours"]
    assert Seen(text_lines([HOSTILE, "b"])).cells == [f"{shown}\nb"]


def test_a_table_without_a_head_has_none():
    assert Seen(table((), [["a", "b"], ["c", "d"]])).tags == ["table", "tbody", "tr", "td", "td", "tr", "td", "td"]
