"""On a card, batches come whole over pinned buffers, and the host waits for no step."""

import pytest
import torch

from sae.stream.carrying import BUFFERS, Carrier

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def test_batches_come_whole_while_the_device_is_busy():
    device = torch.device("cuda")
    carrier, work = Carrier(device), torch.randn(4096, 4096, device=device)
    sent = [torch.randn(4096 - n, 256) for n in range(3 * BUFFERS)]
    found = []
    for x in sent:
        for _ in range(20):
            work = (work @ work).clamp(-1, 1)
        found.append(carrier("site", x))
    assert all(torch.equal(there.cpu(), x) for there, x in zip(found, sent, strict=True))
    assert all(memory.is_pinned() for memory, _ in carrier.buffers["site", torch.float32])


def test_the_host_does_not_wait_for_what_the_device_is_doing():
    device = torch.device("cuda")
    carrier, work, x = Carrier(device), torch.randn(8192, 8192, device=device), torch.randn(4096, 256)
    for _ in range(2 * BUFFERS):  # makes the buffers
        carrier("site", x)
    torch.cuda.synchronize()
    for _ in range(50):
        work = (work @ work).clamp(-1, 1)
    done = torch.cuda.Event()
    done.record()
    carrier("site", x)
    assert not done.query()
