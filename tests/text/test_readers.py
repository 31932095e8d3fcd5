"""Every kind of file gives the same cells, nested or not, compressed or not; what cannot be read is named."""

import bz2
import csv
import gzip
import io
import json
from functools import partial

import pytest

from sae.base.errors import ConfigError
from sae.text.documents import TextConfig, documents, local_files

TEXTS = ["first, with a comma", 'second "quoted"', "third\nof two lines", "fourth \u2028 \x85 of one", "\u4e94"]


def zstd(data: bytes) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


gz = partial(gzip.compress, mtime=0)  # bytes name tests, and are to be the same on every worker
PACK = {"": bytes, ".gz": gz, ".zst": zstd, ".bz2": bz2.compress}


def written(kind: str, rows: list[dict]) -> bytes:
    if kind in (".csv", ".tsv"):
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().encode()
    if kind == ".json":
        return json.dumps(rows, ensure_ascii=False).encode()
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read(path, column="text", **options):
    return [found for _, found in documents(TextConfig(str(path), column=column, **options))]


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
def test_kinds_of_files_and_their_compression(tmp_path, kind, pack):
    path = tmp_path / f"a{kind}{pack}"
    path.write_bytes(PACK[pack](written(kind, [{"n": n, "text": text} for n, text in enumerate(TEXTS)])))
    assert read(path) == TEXTS
    assert [name for name, _ in documents(TextConfig(str(path)))] == [f"{path.name}:{n}" for n in range(5)]


@pytest.mark.parametrize("pack", PACK)
def test_compressed_text_is_text(tmp_path, pack):
    path = tmp_path / f"a.txt{pack}"
    text = "a paragraph of text\n" * 200 + "\n" + "another\n" * 300
    path.write_bytes(PACK[pack](text[:1000].encode()) + PACK[pack](text[1000:].encode()))  # in two members
    assert "".join(read(path)) == text
    assert len(read(path)) == 2


@pytest.mark.parametrize(
    "value",
    [
        [{"text": text} for text in TEXTS],
        {"data": [{"text": text} for text in TEXTS]},
        {"version": 1, "data": [{"text": text} for text in TEXTS]},
    ],
)
def test_json_is_a_list_of_records_or_has_one_as_data(tmp_path, value):
    (tmp_path / "a.json").write_text(json.dumps(value, indent=1))
    assert read(tmp_path / "a.json") == TEXTS


def test_json_lines_that_are_called_json_and_a_single_record_are_read(tmp_path):
    (tmp_path / "a.json").write_bytes(written(".jsonl", [{"text": text} for text in TEXTS]))
    assert read(tmp_path / "a.json") == TEXTS
    (tmp_path / "a.json").write_text('{"text": "alone"}')
    assert read(tmp_path / "a.json") == ["alone"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_table_of_text_may_be_parted_and_its_lines_ended_in_any_way(tmp_path, name, delimiter, end):
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([["n, m; o", "text", "x"], *([n, text, "a|b"] for n, text in enumerate(TEXTS))])
    (tmp_path / name).write_bytes(PACK[".gz" if name.endswith("gz") else ""](out.getvalue().encode("utf-8-sig")))
    assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n"])
def test_json_lines_may_end_in_any_way(tmp_path, name, end):
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    (tmp_path / name).write_bytes(end.join(rows).encode())
    assert read(tmp_path / name) == TEXTS


def test_a_path_of_keys_reaches_what_lies_deeper(tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"a": {"b": text, "list": [{"x": "no"}, {"x": text}]}, "c": None} for text in TEXTS]
    (tmp_path / "a.jsonl").write_bytes(written(".jsonl", rows))
    (tmp_path / "a.json").write_bytes(written(".json", rows))
    table = pa.table({"a": [row["a"] for row in rows], "a.dot": TEXTS})
    pq.write_table(table, tmp_path / "a.parquet")
    datasets.disable_progress_bars()
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.json", "a.parquet", "saved"):
        assert read(tmp_path / name, "a.b") == TEXTS
        assert read(tmp_path / name, "a.list.1.x") == TEXTS
        with pytest.raises(ConfigError, match=r"has no column 'a\.bb'\. Did you mean 'a\.b'\? It has: a\.b, a\.list"):
            read(tmp_path / name, "a.bb")
        with pytest.raises(ConfigError, match=r"holds no text \(5 empty"):
            read(tmp_path / name, "a.list.2.x")  # no list is so long
        with pytest.raises(ConfigError, match=r"no column 'a\.b\.c': a\.b is no object"):
            read(tmp_path / name, "a.b.c")
        with pytest.raises(ConfigError, match=r"has no column 'x\.b'"):
            read(tmp_path / name, "x.b")
    assert read(tmp_path / "a.parquet", "a.dot") == TEXTS  # a name may hold a dot
    with pytest.raises(ConfigError, match=r"holds no text \(5 empty"):
        read(tmp_path / "a.jsonl", "c.d")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gz(b'{"text": "x"}\n' * 2000)[:-20], r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.gz", b"no gzip at all", r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.zst", zstd(b'{"text": "x"}\n' * 2000)[:-9], r"a\.jsonl\.zst (cannot be read|line)"),
        ("a.jsonl.zst", b"no zstandard", r"a\.jsonl\.zst cannot be read"),
        ("a.txt.gz", b"\x1f\x8b no more", r"a\.txt\.gz cannot be read"),
        ("a.jsonl.gz", gz(b'{"text": "x"}\n{"text": '), r"a\.jsonl\.gz line 2 is not JSON"),
        ("a.json", b'[{"text": "x"},', r"a\.json is not JSON \(.*line 1 column 16"),
        ("a.json", b'[{"text": "x"}, "y"]', r"a\.json record 1 is a str, not an object"),
        ("a.json", b'{"text": "x"}\n{"text": ', r"a\.json line 2 is not JSON"),
        ("a.json", b'"x"', r"a\.json record 0 is a str, not an object"),
        ("a.csv", b'text,n\nx,1\n"y,2\n', r"a\.csv line 3: unexpected end of data"),
        ("a.csv", b"text,n\nx,1\ny,2,3\n", r"a\.csv line 3 has 3 fields, not 2"),
        ("a.csv", b"texts,n\nx,1\n", r"a\.csv has no column 'text'\. Did you mean 'texts'\? It has: texts, n"),
        ("a.csv", b"", r"a\.csv has no column 'text'"),
        ("a.csv", b"text\n", r"holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', r"a\.jsonl has no column 'text'. Did you mean 'txt'"),
        ("a.jsonl", b'{"text": ["a", "b"]}', r"'text' holds a list of str in a\.jsonl:0, not text, token ids or a"),
        ("a.jsonl", b'{"text": [1, null]}', r"'text' holds a list of int in a\.jsonl:0, not"),
        ("a.jsonl", b'{"text": true}', r"'text' holds a bool in a\.jsonl:0, not"),
        ("a.parquet.gz", b"x", r"a\.parquet\.gz is not one of"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_folder_is_read_without_the_files_that_describe_it(tmp_path):
    (tmp_path / "dataset_infos.json").write_text('{"description": "no text"}')
    (tmp_path / "files.csv").write_text("name\na.jsonl\n")
    assert [path.name for path in local_files(tmp_path)] != []
    for name in ("a.jsonl", "b.jsonl.gz", "a.jsonl.gz"):
        pack = PACK[".gz" if name.endswith("gz") else ""]
        (tmp_path / name).write_bytes(pack(written(".jsonl", [{"text": name}])))
    assert sorted(path.name for path in local_files(tmp_path)) == ["a.jsonl", "b.jsonl.gz"]  # the same once
    assert sorted(read(tmp_path)) == ["a.jsonl", "b.jsonl.gz"]


def test_a_field_of_a_table_of_text_may_be_long(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "x" * 300_000 + "\n")
    assert read(tmp_path / "a.csv") == ["x" * 300_000]


def test_binary_columns_are_text_in_the_encoding_that_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["caf\xe9".encode("latin-1")], "other": ["caf\xe9"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", encoding="latin-1") == ["caf\xe9"]
    assert read(tmp_path / "a.parquet", "other", encoding="latin-1") == ["caf\xe9"]  # strings are UTF-8 there
