"""Configs of strangers come to an end, and their values are what they should be."""

import pytest

from sae.base.errors import DataError
from sae.untrusted.configs import as_int, one_of, read_config

LAUGHS = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))])
MERGES = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 10))]
)
BAD_CONFIGS = {
    "text": ("json", "hello", "is not valid JSON"),
    "list": ("json", "[1]", "holds a list, expected an object"),
    "bytes": ("json", b"\xff\xfe{", "is not valid JSON"),
    "empty": ("json", "", "is not valid JSON"),
    "deep": ("json", '{"a":' * 200 + "1" + "}" * 200, "lie too deep in each other"),
    "deeper": ("json", '{"a":' * 100_000, "is not valid JSON"),
    "long number": ("json", '{"d_sae": ' + "9" * 5000 + "}", "is not valid JSON"),
    "huge": ("json", '{"a": "' + "x" * 2**24 + '"}', "and a config at most 16,777,216"),
    "yaml": ("yaml", "a: [1, 2", "is damaged or no config: .* is not valid YAML"),
    "yaml list": ("yaml", "[1]", "holds a list"),
    "yaml bytes": ("yaml", b"\xff\xfe{", "is damaged or no config"),
    "yaml deep": ("yaml", "[" * 100_000, "lie too deep in each other"),
    "yaml indented": ("yaml", "\n".join(" " * i + "a:" for i in range(300)), "lie too deep in each other"),
    "yaml huge": ("yaml", "a: " + "x" * 2**20, "and a config at most 131,072"),
    "yaml long number": ("yaml", "d_sae: " + "9" * 5000, "is damaged or no config"),
    "laughs": ("yaml", LAUGHS, "are there too often"),
    "merges": ("yaml", MERGES, "are there too often"),
    "itself": ("yaml", "a: &a [*a]", "lie too deep in each other"),
    "object": ("yaml", "!!python/object/apply:os.system ['true']", "is not valid YAML"),
    "tabs": ("yaml", "a:\n\t- b", "is damaged or no config: while scanning"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configs_that_are_damaged_or_would_never_end_are_named(root, case):
    kind, text, message = BAD_CONFIGS[case]
    path = root / "a" / f"cfg.{kind}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as error:
        read_config(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_few_aliases_are_read(root):
    (root / "a" / "cfg.yaml").write_text("a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}}\n")
    assert read_config(root / "a" / "cfg.yaml") == {"a": [1, 2], "b": [1, 2], "c": {"d": 1}}


def test_whole_numbers_are_numbers():
    for value in (0, 1, 32.0, 2**40):
        assert as_int(value, "k", "cfg.json") == int(value)


BAD = [None, True, "32", "abc", 1.5, -1, 10**15, 1e400, float("nan"), [3], {"a": 1}, "x" * 10**6, 10**3000]


def test_what_is_no_whole_number_is_named_in_one_short_line():
    for value in BAD:
        with pytest.raises(DataError, match=r"^cfg\.json: d_sae is .*, expected a whole number") as error:
            as_int(value, "d_sae", "cfg.json")
        assert len(str(error.value)) < 300
        with pytest.raises(DataError, match=r"^cfg\.json: activation is .*; known are relu, topk") as error:
            one_of(value, ("relu", "topk"), "activation", "cfg.json")
        assert len(str(error.value)) < 300


def test_words_are_known_or_the_nearest_is_named():
    assert one_of("topk", ("relu", "topk"), "activation", "cfg.json") == "topk"
    with pytest.raises(DataError, match=r"activation is 'topkk'; known are relu, topk\. Did you mean 'topk'\?$"):
        one_of("topkk", ("relu", "topk"), "activation", "cfg.json")
    with pytest.raises(DataError, match=r"activation is 'a\\nb'"):
        one_of("a\nb", ("relu",), "activation", "cfg.json")
