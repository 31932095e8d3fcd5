"""Items -> tasks, where every window is judged by itself."""

from collections.abc import Sequence

import torch

from interp.records import Item, Task
from sae.base.seeding import generator


def window_task(item: Item) -> Task:
    """Returns the task of telling whether the latent fires in one window."""
    return Task((item,), float(item.active), item.tier, item.decile, item.window.section)


def window_tasks(items: Sequence[Item], *key: str | int) -> list[Task]:
    """Returns one task an item in an order drawn by `key`; none without both active and silent ones."""
    if len({item.active for item in items}) < 2:
        return []
    order = torch.randperm(len(items), generator=generator(0, "tasks", *key)).tolist()
    return [window_task(items[place]) for place in order]
