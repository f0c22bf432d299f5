"""Continuous batching over input embeddings: prompts join and leave the running batch at every step.

Transformers' own continuous batching takes token ids only, and images enter as embeddings. The cache holds
keys and values of a fixed number of sequences, each with its own length.

Shapes: S slots, B rows of a step, T tokens, L cached length, K key/value heads, E head dim, H width, V
vocabulary.
"""

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from revision_ray.core.errors import ConfigError
from revision_ray.serve.engine import QueuedEngine, QueuedRequest
from revision_ray.serve.settings import EngineConfig

_FIRST_LENGTH = 64


class SlotCache(Cache):
    """Cache of keys and values of S sequences; running ones are in slots [0, B), so a step needs only views.

    A layer's memory (S, K, L, E) is allocated at its first step and doubled in length as sequences grow. Call
    `prefill` before a forward over whole new prompts, `decode` before one with one more token for each row.
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
        """Prepare a forward over `num_rows` new sequences, right-padded to `length`, from `first_slot` on."""
        self._grow(length)
        self._rows, self._positions_B = slice(first_slot, first_slot + num_rows), None
        self._seen, self._length = 0, length

    def decode(self, positions_B: torch.Tensor, length: int) -> None:
        """Prepare a forward with one token for each of the slots [0, B), at `positions_B`, below `length`.

        It gets keys and values up to `length`; the mask must hide those beyond the end of shorter rows.
        """
        self._grow(length)
        self._rows, self._positions_B = slice(0, len(positions_B)), positions_B
        if len(self._rows_B) < len(positions_B) or self._rows_B.device != positions_B.device:
            self._rows_B = torch.arange(self._num_slots, device=positions_B.device)
        self._seen, self._length = length - 1, length

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the sequence of slot `source`, `length` tokens long, to slot `target`."""
        for cached in (*self._keys.values(), *self._values.values()):
            cached[target, :, :length] = cached[source, :, :length]

    def zero(self, slot: int) -> None:
        """Set the content of `slot` to 0: masked keys must be finite, because 0 times NaN is NaN."""
        for cached in (*self._keys.values(), *self._values.values()):
            cached[slot] = 0

    def clear(self) -> None:
        """Release all memory."""
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
        """Store keys and values (B, K, T, E); return those that the layer attends to."""
        keys = self._stored(self._keys, layer_idx, key_states)
        values = self._stored(self._values, layer_idx, value_states)
        if self._positions_B is None:
            keys[self._rows, :, : self._length] = key_states
            values[self._rows, :, : self._length] = value_states
            return key_states, value_states  # a new prompt has nothing cached before it
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


# What a causal language model must take so that each row can be at a position of its own.
_TAKES = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values")
_MASKED_ATTENTION = ("sdpa", "eager")
# Rows of the trial: far enough apart that ignored positions show.
_TRIAL_LENGTHS = (24, 3)
# Relative, of logits: far above rounding, far below what a wrong mask or position does.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_ROUNDING = 0.25
# Of a checkpoint's generation settings: what generate would do besides drawing.
_NOT_APPLIED = ("no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens", "sequence_bias",
                "begin_suppress_tokens", "forced_eos_token_id")  # fmt: skip
_LOG = logging.getLogger(__name__)


class ContinuousEngine(QueuedEngine):
    """Engine whose steps decode one token of every running prompt; new prompts join between steps.

    An answer does not depend on the other prompts in the batch, except for rounding.
    """

    def __init__(self, model: Any, tokenizer: Any, config: EngineConfig) -> None:
        """
        Raises:
            ConfigError: rows of one batch cannot be at different positions with this model.
        """
        super().__init__(model, tokenizer, config)
        _check(model.language_model, self.context_length)
        self._language_model = model.language_model
        self._embed = model.get_input_embeddings()
        self._cache = SlotCache(config.num_slots, self.context_length)
        generation = model.generation_config
        # A part of what the model is (the placeholder is never an answer). Drawing is up to the request.
        self._suppressed = torch.tensor(
            generation.suppress_tokens or [], dtype=torch.long, device=self._device
        )
        if ignored := [name for name in _NOT_APPLIED if getattr(generation, name, None)]:
            _LOG.warning("generation settings that engine.kind=continuous does not apply: %s", ignored)
        self._try()

    async def _turn(self) -> None:
        num_free = self.config.num_slots - self._num_running()
        taken = self._take(num_free, self.config.max_prefill_tokens)
        if taken:
            await self._in_thread(self._prefill, taken)
        if self._running:
            await self._in_thread(self._decode)

    def _forget(self) -> None:
        self._cache.clear()

    @torch.inference_mode()
    def _prefill(self, taken: list[QueuedRequest]) -> None:
        """Run the prompts `taken`, and choose their first tokens."""
        try:
            self._release()
        finally:  # they count as running from here on, and fail with the rest
            first_slot = len(self._running)
            self._running += taken
        lengths = [len(request.prompt.input_ids) for request in taken]
        ids_BT = torch.full((len(taken), max(lengths)), self._pad)
        for ids_T, request in zip(ids_BT, taken, strict=True):
            request.length = len(request.prompt.input_ids)
            ids_T[: request.length] = torch.tensor(request.prompt.input_ids)
        images_ID = self._images(taken)
        features = None if images_ID is None else self.model.get_image_features(image_embeds=images_ID)
        embeds_BTH = self.model._embedded(ids_BT.to(self._device), features, cached=False)
        self._advance(first_slot, taken, self._first_logits(first_slot, embeds_BTH, lengths))

    @torch.inference_mode()
    def _decode(self) -> None:
        """Generate one more token for every running request."""
        self._release()
        if not self._running:
            return
        tokens_B1 = torch.tensor([[request.token] for request in self._running], device=self._device)
        lengths = [request.length for request in self._running]
        logits_BV = self._following_logits(self._embed(tokens_B1), lengths)
        for request in self._running:
            request.length += 1
        self._advance(0, self._running, logits_BV)

    def _first_logits(
        self, first_slot: int, embeds_BTH: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """Return the logits (B, V) after each of the new sequences, in the slots from `first_slot` on.

        Padding is on the right, where causal attention never looks, so there is no mask but the model's own.
        """
        num_rows, padded = embeds_BTH.shape[:2]
        self._cache.prefill(first_slot, num_rows, padded)
        positions_T = torch.arange(padded, device=self._device)
        last_BT = positions_T == torch.tensor(lengths, device=self._device)[:, None] - 1
        logits = self._language_model(
            inputs_embeds=embeds_BTH,
            position_ids=positions_T.expand(num_rows, -1),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=last_BT,
            return_dict=True,
        ).logits
        return logits if logits.ndim == 2 else logits[last_BT]  # of a model that keeps them all

    def _following_logits(self, embeds_B1H: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Return the logits (B, V) after one more token of the sequences in slots [0, B), `lengths` long."""
        positions_B = torch.tensor(lengths, device=self._device)
        total = max(lengths) + 1
        self._cache.decode(positions_B, total)
        hidden_BL = torch.arange(total, device=self._device) > positions_B[:, None]
        # Additive, which every attention takes; the lowest number and not -inf, as the library has it.
        mask_BL = torch.zeros(hidden_BL.shape, dtype=embeds_B1H.dtype, device=self._device)
        mask_BL.masked_fill_(hidden_BL, torch.finfo(mask_BL.dtype).min)
        return self._language_model(
            inputs_embeds=embeds_B1H,
            attention_mask=mask_BL[:, None, None],
            position_ids=positions_B[:, None],
            past_key_values=self._cache,
            use_cache=True,
            return_dict=True,
        ).logits[:, -1]

    def _advance(self, first_slot: int, requests: Sequence[QueuedRequest], logits_BV: torch.Tensor) -> None:
        logits_BV = logits_BV.float()
        scores_BV = logits_BV
        if len(self._suppressed):
            scores_BV = scores_BV.index_fill(1, self._suppressed, -torch.inf)
        for row, token in enumerate(self._choose(requests, scores_BV, logits_BV)):
            if token < 0:
                self._cache.zero(first_slot + row)

    def _release(self) -> None:
        """Remove requests that ended, and move the running ones to the first slots."""
        for slot in reversed(range(len(self._running))):
            if self._running[slot].ended:
                last = self._running.pop()
                if slot < len(self._running):
                    self._cache.move(len(self._running), slot, last.length)
                    self._running[slot] = last

    @torch.inference_mode()
    def _try(self) -> None:
        """Raise ConfigError if steps do not give the logits of one forward over the same tokens.

        Signatures and layer types cannot tell whether a model builds on the mask and the positions it is
        given (some rebuild them, ALiBi from the mask for instance); two short rows of random tokens can.
        """
        lengths = [min(length, self.context_length - 1) for length in _TRIAL_LENGTHS][: self.config.num_slots]
        ids_BT = torch.arange(len(lengths) * (max(lengths) + 1)).view(len(lengths), -1) * 7 % self._vocab_size
        embeds_BTH = self._embed(ids_BT.to(self._device))
        rows = range(len(lengths))
        expected_BV = torch.stack(
            [
                self._language_model(inputs_embeds=embeds_BTH[row, None, : lengths[row] + 1]).logits[0, -1]
                for row in rows
            ]
        )
        try:
            self._first_logits(0, embeds_BTH[:, :-1], lengths)
            following = torch.stack([embeds_BTH[row, None, lengths[row]] for row in rows])
            difference = (self._following_logits(following, lengths) - expected_BV).norm(dim=-1)
            error = float((difference / expected_BV.norm(dim=-1)).max())
        except (TypeError, ValueError, IndexError, RuntimeError) as failure:
            raise _unsupported(
                self._language_model, f"it cannot take rows at different positions ({failure})"
            ) from failure
        self._cache.clear()
        if not error < _ROUNDING.get(embeds_BTH.dtype, _HALF_ROUNDING):
            raise _unsupported(
                self._language_model,
                f"rows at different positions come out otherwise than alone (relative error {error:.1e})",
            )


def _check(language_model: Any, context_length: int) -> None:
    """Raises ConfigError where signature, layer types or attention say that the slots cannot serve."""
    missing = set(_TAKES) - set(inspect.signature(language_model.forward).parameters)
    if missing:
        raise _unsupported(language_model, f"it does not take {', '.join(sorted(missing))}")
    for layer in DynamicCache(config=language_model.config).layers:
        # A window that is never left hides nothing.
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.sliding_window >= context_length:
            continue
        if type(layer) is not DynamicLayer:
            raise _unsupported(language_model, f"it has a layer whose cache is a {type(layer).__name__}")
    attention = language_model.config._attn_implementation
    if attention not in _MASKED_ATTENTION:
        raise ConfigError(
            f"engine.attention={attention}: it takes no mask for each row; set engine.attention=sdpa, or "
            "engine.kind=generate"
        )


def _unsupported(language_model: Any, reason: str) -> ConfigError:
    return ConfigError(
        f"engine.kind=continuous: {type(language_model).__name__} cannot be batched this way: {reason}; set "
        "engine.kind=generate"
    )
