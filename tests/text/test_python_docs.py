"""The quickstart's corpus and its bundled language model, offline."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae.assets import QUICKSTART_LM
from sae.base.seeding import uniform
from sae.text import python_docs
from sae.text.documents import TextConfig
from sae.text.python_docs import documents, fingerprint, is_held_out, source_roots
from sae.text.tokenizing import is_held_out as is_held_out_of_a_run

WORDS = "the quick brown fox jumps over the lazy dog while nobody who could document it is looking at all"


def write(folder: Path, name: str, source: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    return path


@pytest.fixture(scope="module")
def prefix() -> list[tuple[str, str]]:
    return list(documents(max_chars=400_000))


# ---- reading sources


def test_a_package_is_read_and_never_imported(tmp_path, monkeypatch):
    write(tmp_path, "explosive/__init__.py", f'"""Module. {WORDS}"""\nraise SystemError("imported!")\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(python_docs, "PACKAGES", {"explosive": "explosive"})
    roots = source_roots()
    assert roots[1:] == [tmp_path / "explosive"]
    assert list(documents(sources=roots[1:])) == [("explosive/__init__.py", f"explosive\n\nModule. {WORDS}")]
    assert "explosive" not in sys.modules


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(python_docs, "PACKAGES", {"no_such_package_here": "no-such-package-here"})
    assert len(source_roots()) == 1
    assert fingerprint()["packages"] == {}


def test_a_class_is_one_document_with_its_methods(tmp_path):
    source = f'''
class Outer:
    """An outer class. {WORDS}"""

    def short(self):
        """Too short to keep."""

    async def method(self):
        """A method. {WORDS.upper()}"""

    class Inner:
        """An inner class. {WORDS.title()}"""

def function():
    """A function. {WORDS[::-1]}"""
    def hidden():
        """Not reachable by its name. {WORDS.swapcase()}"""
'''
    counts = Counter()
    found = dict(documents(sources=[write(tmp_path, "module.py", source)], counts=counts))
    assert list(found) == ["module.py:Outer", "module.py:function"]
    titles = [block for block in found["module.py:Outer"].split("\n\n") if " " not in block]
    assert titles == ["Outer", "Outer.method", "Outer.Inner"]
    assert "short" not in found["module.py:Outer"]
    assert "hidden" not in found["module.py:function"]
    chars = sum(map(len, found.values()))
    assert counts == Counter(files=1, docstrings=4, short=2, repeated=0, documents=2, chars=chars)


@pytest.mark.parametrize(
    "source",
    [
        b"def broken(:\n",
        b'"""\xff\xfe not UTF-8"""',
        b"# coding: klingon\n",
        b"x = 1\0",
        b"(" * 10_000,
        b"-" * 200_000 + b"1",
    ],
    ids=["syntax", "encoding", "unknown codec", "NUL", "parentheses", "recursion"],
)
def test_broken_files_are_skipped_and_counted(tmp_path, source):
    write(tmp_path, "pack/broken.py", source)
    write(tmp_path, "pack/good.py", f'"""{WORDS}"""')
    counts = Counter()
    assert [i for i, _ in documents(sources=[tmp_path / "pack"], counts=counts)] == ["pack/good.py"]
    assert (counts["files"], counts["skipped"]) == (1, 1)


def test_declared_encodings_invalid_escapes_and_lone_surrogates(tmp_path):
    write(tmp_path, "pack/latin.py", f'# coding: latin-1\n"""caf\u00e9 {WORDS}"""'.encode("latin-1"))
    write(tmp_path, "pack/escape.py", f'"""\\d {WORDS.upper()}"""')  # a SyntaxWarning, an error under this pytest
    write(tmp_path, "pack/surrogate.py", f'"""<\\ud800> {WORDS.title()}"""')
    found = dict(documents(sources=[tmp_path / "pack"]))
    assert found["pack/latin.py"].startswith("pack.latin\n\ncaf\u00e9 the")
    assert found["pack/escape.py"].startswith("pack.escape\n\n\\d THE")
    assert found["pack/surrogate.py"].startswith("pack.surrogate\n\n<> The")
    "".join(found.values()).encode()


def test_test_folders_are_not_read(tmp_path):
    for name in ("pack/a.py", "pack/tests/b.py", "pack/sub/test/c.py", "pack/test_d.txt"):
        write(tmp_path, name, f'"""{name} {WORDS}"""')
    assert [i for i, _ in documents(sources=[tmp_path / "pack"])] == ["pack/a.py"]


def test_copies_and_near_copies_are_dropped(tmp_path):
    body = "\n".join(f"Line {n} says {word} in its own way." for n, word in enumerate(WORDS.split()))
    near = body.replace("Line 0", "Note 0").replace("Line 1 ", "Note 1 ")
    for name, text in {"a": body, "b": body, "c": near, "d": WORDS}.items():
        write(tmp_path, f"pack/{name}.py", f'"""{text}"""')
    counts = Counter()
    found = [i for i, _ in documents(sources=[tmp_path / "pack"], counts=counts)]
    assert len(found) == 2
    assert "pack/d.py" in found
    assert counts["repeated"] == 2


def test_reference_topics_are_read_as_data(tmp_path, monkeypatch):
    path = write(tmp_path, "pydoc_data/topics.py", f"topics = {{'assert': 'The assert statement. {WORDS}'}}\n")
    expected = [("pydoc/assert", f"assert\n\nThe assert statement. {WORDS}")]
    assert list(documents(sources=[path.parent])) == expected
    path.write_text("raise SystemError('imported!')\n" + path.read_text())
    assert list(documents(sources=[path.parent])) == expected
    path.write_text("count = 1\ntopics = {'assert': boom()}")
    assert list(documents(sources=[path.parent])) == []


# ---- the corpus of this machine


def test_order_is_deterministic_and_max_chars_takes_a_prefix(prefix):
    total = sum(len(text) for _, text in prefix)
    assert total >= 400_000 > total - len(prefix[-1][1])
    again = list(documents(max_chars=100_000))
    assert 20 < len(again) < len(prefix)
    assert again == prefix[: len(again)]


def test_a_prefix_draws_on_many_packages_and_ids_are_unique(prefix):
    ids = [document_id for document_id, _ in prefix]
    assert len(ids) == len(set(ids)) > 150
    packages = {document_id.partition("/")[0] for document_id in ids}
    assert len(packages & set(python_docs.PACKAGES)) >= 5
    assert all(len(text) >= python_docs.MIN_CHARS for _, text in prefix)


def test_held_out_documents_are_a_fixed_share_independent_of_the_order(prefix):
    ids = [f"package/module_{n}.py" for n in range(20_000)]
    assert sum(map(is_held_out, ids)) / len(ids) == pytest.approx(python_docs.HELD_OUT_SHARE, abs=0.01)
    first = [is_held_out(document_id) for document_id in sorted(ids, key=lambda i: uniform("order", i))[:2000]]
    assert sum(first) / len(first) == pytest.approx(python_docs.HELD_OUT_SHARE, abs=0.03)
    assert 0.02 < sum(is_held_out(i) for i, _ in prefix) / len(prefix) < 0.16
    # a run's held-out documents at its default share are new to the model too
    share = TextConfig().held_out_share
    assert all(is_held_out(document_id) for document_id in ids if is_held_out_of_a_run(document_id, share))
    # pinned: the bundled model was trained on this split
    assert [n for n in range(40) if is_held_out(f"package/module_{n}.py")] == [5, 17, 24, 28, 34]


def test_fingerprint_is_json_and_names_versions():
    mark = fingerprint()
    assert json.loads(json.dumps(mark)) == mark == fingerprint()
    assert mark["python"].count(".") >= 2
    assert mark["packages"]["torch"] == torch.__version__


# ---- the bundled model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(QUICKSTART_LM, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(QUICKSTART_LM, local_files_only=True, dtype=torch.float32).eval()


def test_the_model_is_small_and_names_its_special_tokens(model, tokenizer):
    assert 3.5e6 < model.num_parameters() < 4.5e6
    assert (QUICKSTART_LM / "model.safetensors").stat().st_size < 10e6
    for config in (model.config, model.generation_config, tokenizer):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)
    assert len(tokenizer) == model.config.vocab_size == 4096


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x  # doubled  spaces",
        "caf\u00e9 \u2603 \U0001f600",
        "1234.5e-6\t\r\n ,",
        "It 's , isn 't it ?",
        "",
    ],
)
def test_the_tokenizer_puts_bos_in_front_and_round_trips(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]


@torch.no_grad()
def test_the_model_predicts_held_out_text_far_better_than_unigrams(model, tokenizer, prefix):
    train, held_out = ([text for i, text in prefix if is_held_out(i) == side] for side in (False, True))
    seen = torch.tensor([token for ids in tokenizer(train)["input_ids"] for token in ids])
    counts = torch.bincount(seen, minlength=4096) + 1.0
    rows = [ids[:128] for ids in tokenizer(held_out)["input_ids"] if len(ids) >= 128][:32]
    assert len(rows) >= 8
    batch = torch.tensor(rows)
    unigram = -(counts / counts.sum()).log()[batch[:, 1:]].mean()
    assert model(input_ids=batch, labels=batch).loss < unigram - 1.5


def test_the_training_report_lies_beside_the_model():
    report = json.loads((QUICKSTART_LM / "training.json").read_text())
    assert report["held_out_loss_nats"] < report["unigram_entropy_nats"] - 1.5
    assert report["corpus"]["builder"] == python_docs.BUILDER_VERSION
