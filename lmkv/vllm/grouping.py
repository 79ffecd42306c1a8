"""Decides which layers of a step are sent together: in few large writes, smaller ones first and last. Engine thread."""

from __future__ import annotations

from .specs import Push

_PART = 4
"""The first write of a step has this part of the usual size, and those before the last have at least as much."""


class StepLayers:
    """The layers of one step that has something to push, KV cache group by KV cache group.

    `layer_bytes[g]` is what a block of one layer of group g has, `layers[g]` how many layers that group has.
    """

    def __init__(
        self, pushes: tuple[Push, ...], layer_bytes: tuple[int, ...], layers: tuple[int, ...], post_bytes: int
    ) -> None:
        self.pushes = pushes
        self.layers = layers
        self.done = [0] * len(layers)
        self.told = [0] * len(layers)
        self._ends_prompt = any(push.last for push in pushes)
        blocks = [sum(len(r.ids) for p in pushes for r in p.computed if r.group == g) for g in range(len(layers))]
        self._stride = [max(1, -(-post_bytes // max(1, n * size))) for n, size in zip(blocks, layer_bytes, strict=True)]

    def is_due(self, group: int) -> bool:
        """The layers that are done and not told are worth a write.

        The first write is small so that a slow link has something to do soon. Towards the end of a prompt they become
        smaller again: nothing is computed any more that could hide the last one.
        """
        stride, pending = self._stride[group], self.done[group] - self.told[group]
        part, left = -(-stride // _PART), self.layers[group] - self.done[group]
        if left == 0:
            return True
        if self.told[group] == 0:
            return pending >= part
        return pending >= (min(stride, max(left, part)) if self._ends_prompt else stride)

    def tell(self, group: int) -> tuple[int, int]:
        """The layers [lo, hi) that are done and were not told before: they are now."""
        lo, self.told[group] = self.told[group], self.done[group]
        return lo, self.done[group]

    @property
    def all_told(self) -> bool:
        return tuple(self.told) == self.layers
