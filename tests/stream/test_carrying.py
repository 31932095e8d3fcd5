"""Batches on their way to a device: over buffers that are not filled before they are read, through a fake of CUDA."""

import pytest
import torch

from sae.stream.carrying import Carrier


class FakeCuda:
    """Says what a device would be asked for; copies are made at once."""

    def __init__(self):
        self.said = []

    def Stream(self, device):  # as torch.cuda has it
        return "beside"

    def Event(self):
        return FakeEvent(self)

    def current_stream(self, device):
        return self

    def stream(self, stream):
        from contextlib import nullcontext

        self.said.append(f"on {stream}")
        return nullcontext()

    def wait_event(self, event):
        self.said.append(f"the step waits for {event.number}")


class FakeEvent:
    count = 0

    def __init__(self, cuda):
        FakeEvent.count += 1
        self.cuda, self.number = cuda, FakeEvent.count

    def record(self, stream):
        self.cuda.said.append(f"{stream} records {self.number}")

    def synchronize(self):
        self.cuda.said.append(f"the host waits for {self.number}")


@pytest.fixture
def cuda(monkeypatch):
    FakeEvent.count = 0
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: None)
    return FakeCuda()


def test_two_buffers_take_turns_and_are_waited_for(cuda, monkeypatch):
    carrier = Carrier(torch.device("cpu"), cuda)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **kwargs: x.clone())
    sent = [torch.randn(n, 3) for n in (4, 2, 4, 5)]
    found = [carrier("site", x) for x in sent]
    assert all(map(torch.equal, found, sent))
    turns = [int(line.split()[-1]) for line in cuda.said if line.startswith("the host waits")]
    assert turns == [1, 2, 1, 2]
    assert cuda.said[1:4] == ["on beside", "beside records 1", "the step waits for 1"]
    assert [memory.numel() for memory, _ in carrier.buffers["site", torch.float32]] == [12, 15]


def test_each_name_and_precision_has_buffers_of_its_own(cuda):
    carrier = Carrier(torch.device("cpu"), cuda)
    for name, dtype in (("a", torch.float32), ("b", torch.float32), ("a", torch.bfloat16)):
        carrier(name, torch.ones(2, 2, dtype=dtype))
    assert len(carrier.buffers) == 3


def test_without_a_card_tensors_stay_as_they_are():
    x = torch.randn(3, 2)
    assert Carrier(torch.device("cpu"))("site", x) is x
