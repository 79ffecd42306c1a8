"""Which layers of a step are sent together: few large writes, and small ones at the end. Engine thread only."""

from __future__ import annotations

from .specs import Push

_TAPER = 4
"""The last writes of a step have at least this part of the usual size."""


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
        blocks = [sum(len(r.ids) for p in pushes for r in p.computed if r.group == g) for g in range(len(layers))]
        self._stride = [max(1, -(-post_bytes // max(1, n * size))) for n, size in zip(blocks, layer_bytes, strict=True)]

    def is_due(self, group: int) -> bool:
        """The layers that are done and not told are worth a write.

        Towards the last layer writes become smaller, down to a quarter of the usual size: nothing is computed any more
        that could hide the last one.
        """
        stride, pending = self._stride[group], self.done[group] - self.told[group]
        left = self.layers[group] - self.done[group]
        return left == 0 or pending >= min(stride, max(left, -(-stride // _TAPER)))

    def tell(self, group: int) -> tuple[int, int]:
        """The layers [lo, hi) that are done and were not told before: they are now."""
        lo, self.told[group] = self.told[group], self.done[group]
        return lo, self.done[group]

    @property
    def all_told(self) -> bool:
        return tuple(self.told) == self.layers
