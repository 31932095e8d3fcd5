"""`device_map`: where the latents of a coder come to lie, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from rigs.any_coder import batch, made

import sae
from sae.base.errors import ConfigError, DataError
from sae.coder.coder import SparseCoder
from sae.coder.parts import CoderInParts
from sae.loading import placing as module
from sae.loading.placing import placing

CPU = torch.device("cpu")
ALLOWED = r"allowed: a device, auto, disk, a list of devices, or \{device: share\} with shares that sum to 1"


@pytest.fixture
def cards(monkeypatch):
    """Two GPUs with 20 and 80 bytes free."""
    free = {0: 20, 1: 80}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (free[card], 100))
    monkeypatch.setattr(module, "resolve_device", lambda name, field: torch.device(name))


@pytest.mark.parametrize(
    ("device_map", "shares"),
    [
        ("cuda:1", [("cuda:1", 1)]),
        (1, [("cuda:1", 1)]),
        ({"": 1}, [("cuda:1", 1)]),
        ({"W_enc": 0, "W_dec": "cuda:0"}, None),
        (torch.device("cpu"), [("cpu", 1)]),
        ("disk", [("disk", 1)]),
        (["cuda:0", 1], [("cuda:0", 0.5), ("cuda:1", 0.5)]),
        ({"cuda:0": 0.5, 1: 0.25, "disk": 0.25}, [("cuda:0", 0.5), ("cuda:1", 0.25), ("disk", 0.25)]),
    ],
)
def test_what_a_map_may_be(cards, device_map, shares):
    if shares is None:
        with pytest.raises(ConfigError, match=f"is of modules, but it is latents that are dealt out; {ALLOWED}"):
            placing(device_map, None)
        return
    found = placing(device_map, None)
    assert [(str(device or "disk"), share) for device, share in found.shares] == shares
    assert str(found.device) == next((device for device, _ in shares if device != "disk"), "cpu")


@pytest.mark.parametrize(
    ("size", "shares"),
    [
        (70, [("cuda:1", 1.0)]),
        (90, [("cuda:0", 0.2), ("cuda:1", 0.8)]),
        (180, [("cuda:0", 0.1), ("cuda:1", 0.4), ("disk", 0.5)]),
    ],
)
def test_auto_takes_one_card_if_it_can_then_all_then_the_disk(cards, size, shares):
    found = [(str(device or "disk"), share) for device, share in placing("auto", None, size).shares]
    assert [device for device, _ in found] == [device for device, _ in shares]
    assert [share for _, share in found] == pytest.approx([share for _, share in shares])


def test_auto_without_a_card_is_memory_while_there_is_room(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    assert placing("auto", None, 90).whole is not None
    assert placing("auto", None, 91).shares == ((None, 1.0),)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("gpu", r"^device_map: 'gpu' is not available here \(.*\); try cpu$"),
        (["cpu", "cuda:99"], "^device_map: 'cuda:99' is not available here"),
        ({"cpu": 0.5, "disk": 0.4}, r"^device_map: cpu 0.5, disk 0.4 sum to 0.9; shares must be above 0 and sum to 1$"),
        ({"cpu": 1.5, "disk": -0.5}, r"^device_map: cpu 1.5, disk -0.5 sum to 1; shares must be above 0"),
        ([], "^device_map: nothing sum to 0; shares must be above 0 and sum to 1$"),
        (["cpu", "disk", "cpu"], "^device_map: cpu is named twice; give it one share$"),
        (["disk", "disk"], "^device_map: disk is named twice; give it one share$"),
        ({}, f"^device_map: {{}} is of modules, but it is latents that are dealt out; {ALLOWED}$"),
        (2.5, f"^device_map: 2.5 is no device; {ALLOWED}$"),
        (True, f"^device_map: True is no device; {ALLOWED}$"),
    ],
)
def test_what_is_no_map_is_one_line(device_map, message):
    with pytest.raises(ConfigError, match=message):
        placing(device_map, None)


def test_a_coder_is_loaded_as_it_is_to_lie(tmp_path):
    coder = made("topk", select_by_decoder_norm=True).to_dtype(torch.bfloat16)
    sae.save(coder, tmp_path / "a")
    whole, x = sae.load(tmp_path / "a"), batch(coder)[0]
    for device_map in ("disk", {"cpu": 0.3, "disk": 0.7}, ["disk", "cpu"]):
        parts = sae.load(tmp_path / "a", device_map=device_map)
        assert isinstance(parts, CoderInParts)
        assert (parts.dtype, parts.W_enc.dtype, parts(x).out.dtype) == (torch.float32, torch.bfloat16, torch.float32)
        assert torch.equal(parts.encode(x).ids, whole.encode(x).ids)
        torch.testing.assert_close(parts(x).out, whole(x).out)
    low = sae.load(tmp_path / "a", device_map="disk", dtype="auto")
    assert low(x).out.dtype == torch.bfloat16
    for device_map in ("cpu", {"": "cpu"}, "auto", ["cpu"]):
        assert type(SparseCoder.from_pretrained(tmp_path / "a", device_map=device_map)) is SparseCoder
    parts.save_pretrained(tmp_path / "b")
    torch.testing.assert_close(sae.load(tmp_path / "b").state_dict(), whole.state_dict())
    with pytest.raises(ConfigError, match=r"^lazy: device_map says where weights lie; leave one of them out$"):
        sae.load(tmp_path / "a", device_map="disk", lazy=True)
    with pytest.raises(ConfigError, match=r"^device: cpu and device_map: meta are two answers to one question"):
        sae.load(tmp_path / "a", device="cpu", device_map="meta")


def test_what_is_put_on_a_device_is_looked_at_for_what_is_not_finite(tmp_path):
    sae.save(made("relu"), tmp_path)
    low = {"dtype": "float16"}
    big = sae.load(tmp_path)
    big.W_dec[20, 0] = 1e30
    sae.save(big, tmp_path)
    assert sae.load(tmp_path, device_map="disk", **low).W_dec[20, 0] == 1e30, "read where it is looked at"
    with pytest.raises(DataError, match="W_dec holds NaN or Inf"):
        sae.load(tmp_path, device_map={"disk": 0.5, "cpu": 0.5}, **low)
