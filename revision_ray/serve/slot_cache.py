"""Keys and values of a fixed number of sequences, each at a length of its own, for models of transformers.

Shapes: S slots, B rows of a step, T tokens, L cached length, K key/value heads, E head dim.
"""

import torch
from transformers import Cache

_FIRST_LENGTH = 64


class SlotCache(Cache):
    """Sequences live in slots; those that run stand in slots [0, B), so that a step sees views of them.

    A layer's memory (S, K, L, E) is taken at its first step and doubled in length as sequences grow. Each
    forward is announced: `prefill` for whole new prompts, `decode` for one more token of each row.
    """

    def __init__(self, num_slots: int, max_length: int) -> None:
        super().__init__(layers=[])
        self._num_slots, self._max_length = num_slots, max_length
        self._capacity = min(_FIRST_LENGTH, max_length)
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._rows = slice(0)
        self._positions_B: torch.Tensor | None = None
        self._rows_B = torch.empty(0, dtype=torch.long)
        self._seen, self._length = 0, 0

    def prefill(self, first_slot: int, num_rows: int, length: int) -> None:
        """The next forward brings new sequences, padded on the right to `length`, for `first_slot` and on."""
        self._grow(length)
        self._rows, self._positions_B = slice(first_slot, first_slot + num_rows), None
        self._seen, self._length = 0, length

    def decode(self, positions_B: torch.Tensor, length: int) -> None:
        """The next forward brings one token for each of the slots [0, B), at `positions_B`, below `length`.

        Keys and values from `length` on are not shown; what a shorter row must not see is up to the mask.
        """
        self._grow(length)
        self._rows, self._positions_B = slice(0, len(positions_B)), positions_B
        if len(self._rows_B) < len(positions_B) or self._rows_B.device != positions_B.device:
            self._rows_B = torch.arange(self._num_slots, device=positions_B.device)
        self._seen, self._length = length - 1, length

    def move(self, source: int, target: int, length: int) -> None:
        """The sequence of slot `source`, `length` tokens long, stands in slot `target`."""
        for cached in (*self._keys.values(), *self._values.values()):
            cached[target, :, :length] = cached[source, :, :length]

    def zero(self, slot: int) -> None:
        """Nothing is left of what was in `slot`: masked keys must be finite, for 0 times NaN is NaN."""
        for cached in (*self._keys.values(), *self._values.values()):
            cached[slot] = 0

    def clear(self) -> None:
        """No memory is held."""
        self._keys.clear()
        self._values.clear()
        self._capacity = min(_FIRST_LENGTH, self._max_length)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores (B, K, T, E) and gives what the layer attends to."""
        keys = self._stored(self._keys, layer_idx, key_states)
        values = self._stored(self._values, layer_idx, value_states)
        if self._positions_B is None:
            keys[self._rows, :, : self._length] = key_states
            values[self._rows, :, : self._length] = value_states
            return key_states, value_states  # nothing is cached of a new prompt
        rows_B = self._rows_B[: len(self._positions_B)]
        keys[rows_B, :, self._positions_B] = key_states[:, :, 0]
        values[rows_B, :, self._positions_B] = value_states[:, :, 0]
        return keys[self._rows, :, : self._length], values[self._rows, :, : self._length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self._max_length

    def _stored(self, layers: dict[int, torch.Tensor], layer_idx: int, states: torch.Tensor) -> torch.Tensor:
        if layer_idx not in layers:
            num_heads, head_dim = states.shape[1], states.shape[3]
            layers[layer_idx] = states.new_zeros(self._num_slots, num_heads, self._capacity, head_dim)
        return layers[layer_idx]

    def _grow(self, length: int) -> None:
        assert length <= self._max_length, f"{length} tokens, the cache holds {self._max_length}"
        if length <= self._capacity:
            return
        capacity = min(max(2 * self._capacity, length), self._max_length)
        for layers in (self._keys, self._values):
            for layer_idx, cached in layers.items():
                larger = cached.new_zeros(*cached.shape[:2], capacity, cached.shape[3])
                larger[:, :, : self._capacity] = cached
                layers[layer_idx] = larger
        self._capacity = capacity
