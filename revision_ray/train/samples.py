"""Training samples (token ids, labels, image embeddings) and padded batches of them. No Ray.

Stage 1 (paper sec. 5): image slot, caption, end token; loss on caption and end token. Stage 2: the chat
template of the tokenizer; loss on the assistant's turns and their end token. Samples are dealt to ranks so
that little is padding.

Shapes: B samples, T tokens, I images, D embedding dim, V visual tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from revision_ray.core.errors import ConfigError
from revision_ray.data.chat import (
    ChatRefusal,
    ChatTemplate,
    ControlTokenMarks,
    RenderedChat,
    Span,
    TurnSpan,
    UnwritableToken,
    as_date,
)
from revision_ray.data.conversations import BAD_CONVERSATION, IMAGE_MARK, Conversation
from revision_ray.model.ending import control_token_ids, turn_ends

Cause = Literal["no_target", "missing_embedding", "too_long", "bad_conversation"]
NO_LABEL = -100


class Unusable(Exception):  # noqa: N818  # a verdict on the data, not a failure
    """This example cannot be trained on; it is counted under `cause`."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(cause, detail)
        self.cause: Cause = cause
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class TrainingSample:
    """One example as the model reads it; `num_cut` tokens at its end were cut off by the length limit."""

    id: str
    input_ids: np.ndarray  # int32 (T,)
    labels: np.ndarray  # int32 (T,), NO_LABEL where not a target
    image_embeds: np.ndarray  # float32 (I, D)
    num_cut: int = 0
    ended: bool = True  # whether a token that ends answers is behind the last target, before any cut


class Formatter:
    """Examples as samples, for one tokenizer: at most `max_length` tokens, visual tokens among them.

    `on_too_long`: reject leaves longer examples out; truncate keeps what fits, and says so in `num_cut`.
    `today`: the date that a chat template may print, as YYYY-MM-DD; the day of the call where it is empty.

    Raises:
        ConfigError: the tokenizer has no `<image>` token, no end token, or gives no offsets.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_visual_tokens: int,
        max_length: int = 2048,
        on_too_long: Literal["reject", "truncate"] = "reject",
        today: str = "",
    ) -> None:
        self.tokenizer, self.num_visual_tokens = tokenizer, num_visual_tokens
        self.max_length, self.on_too_long = max_length, on_too_long
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise ConfigError(f"tokenizer {name}: is a slow one without offsets; use one with tokenizer.json")
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"tokenizer {name}: has no end token (eos_token); set one")
        self.image_token_id = image_token_id(tokenizer)
        eos: Any = tokenizer.eos_token_id
        self._ends: set[int] = {eos, *turn_ends(tokenizer)}
        special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= self._ends | set(tokenizer.all_special_ids)
        self._special_ids = special & control_token_ids(tokenizer)
        self._bos = _bos_ids(tokenizer)
        self._texts = ControlTokenMarks(tokenizer)
        self._today = as_date(today)
        self._chat: ChatTemplate | None = None

    def caption(self, id: str, text: str, embedding: np.ndarray) -> TrainingSample:
        """The image slot with this embedding, then the caption and the end token, which are the targets.

        Raises:
            Unusable: no caption, no finite embedding, too long, or `<image>` inside the caption.
        """
        if not text or text.isspace():
            raise Unusable("no_target", "the caption is empty")
        if IMAGE_MARK in text:
            raise Unusable(BAD_CONVERSATION, f"the caption holds {IMAGE_MARK}")
        try:
            target = [*self._texts.encode(text), self.tokenizer.eos_token_id]
        except UnwritableToken as error:
            raise Unusable(BAD_CONVERSATION, str(error)) from error
        prompt = [*self._bos, self.image_token_id]
        input_ids = np.array([*prompt, *target], np.int32)
        labels = input_ids.copy()
        labels[: len(prompt)] = NO_LABEL
        return self._sample(id, input_ids, labels, np.reshape(embedding, (1, -1)))

    def conversation(self, conversation: Conversation, image_embeds: np.ndarray) -> TrainingSample:
        """The conversation as the chat template writes it; targets are the assistant's turns and their ends,
        but for turns that are not to be trained on (`TurnMessage.is_target`).

        Raises:
            Unusable: fewer embeddings than images, one that is not finite, too long, or the template refuses
                these turns.
            ConfigError: no chat template, or one that does not show where the assistant's turns are.
        """
        if len(image_embeds) < len(conversation.images):
            raise Unusable(
                "missing_embedding", f"{len(image_embeds)} embeddings, {len(conversation.images)} images"
            )
        messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
        chat = self._the_chat()
        try:
            rendered, turns = chat.turns(messages, slots=True)
            encoded = chat.encode(rendered)
        except ChatRefusal as error:
            raise Unusable(BAD_CONVERSATION, str(error)) from error
        text, input_ids, offsets = rendered.text, encoded.input_ids, encoded.offsets
        assert offsets is not None  # of fast tokenizers alone
        labels = np.full_like(input_ids, NO_LABEL)
        assistant_turns = [m for m in conversation.messages if m.role == "assistant"]
        for message, turn in zip(assistant_turns, turns, strict=True):
            if not message.is_target:
                continue
            *pieces, last = _spans(rendered, turn)
            chosen = [_inside(text, piece, offsets) for piece in pieces]
            for tokens in [*chosen, self._target(text, last, input_ids, offsets)]:
                labels[tokens] = input_ids[tokens]
        labels[input_ids == self.image_token_id] = NO_LABEL
        sample = self._sample(conversation.id, input_ids, labels, image_embeds)
        return replace(sample, ended=int(labels[labels != NO_LABEL][-1]) in self._ends)

    def _the_chat(self) -> ChatTemplate:
        if self._chat is None:
            self._chat = ChatTemplate(self.tokenizer, self._today)
        return self._chat

    def _target(self, text: str, span: tuple[int, int], input_ids: np.ndarray, offsets: np.ndarray) -> slice:
        """The tokens of `span`, up to the end token of its turn where there is one."""
        inside = _inside(text, span, offsets)
        first, end = inside.start, inside.stop
        if first == end:
            return inside
        last = end - 1
        while last > first and text[offsets[last, 0] : offsets[last, 1]].isspace():
            last -= 1  # the line break that ChatML writes behind the end token
        if int(input_ids[last]) in self._special_ids:
            return slice(first, last + 1)
        if end < len(input_ids) and int(input_ids[end]) in self._special_ids:
            return slice(first, end + 1)  # the end token stands behind the template's marks
        return slice(first, end)

    def _sample(
        self, id: str, input_ids: np.ndarray, labels: np.ndarray, image_embeds: np.ndarray
    ) -> TrainingSample:
        """The sample with V visual tokens an image, cut to the length limit, known to have a target."""
        num_images = int((input_ids == self.image_token_id).sum())
        if num_images != len(image_embeds):
            raise Unusable(
                BAD_CONVERSATION, f"{num_images} {IMAGE_MARK} in the text, {len(image_embeds)} embeddings"
            )
        if not np.isfinite(image_embeds).all():
            raise Unusable("missing_embedding", "the embedding is not finite")
        copies = np.where(input_ids == self.image_token_id, self.num_visual_tokens, 1)
        input_ids, labels = np.repeat(input_ids, copies), np.repeat(labels, copies)
        length, num_cut = len(input_ids), max(len(input_ids) - self.max_length, 0)
        if num_cut:
            said = f"{length} tokens, max_length is {self.max_length}"
            if self.on_too_long == "reject":
                raise Unusable("too_long", said)
            if (input_ids[self.max_length :] == self.image_token_id).any():
                raise Unusable("too_long", f"{said}, which cuts an image off")
            input_ids, labels = input_ids[: self.max_length], labels[: self.max_length]
        # The first token is predicted from nothing.
        if not (labels[1:] != NO_LABEL).any():
            cause: Cause = "too_long" if num_cut else "no_target"
            raise Unusable(cause, f"none of the {len(labels)} tokens is a target")
        return TrainingSample(
            id=id,
            input_ids=input_ids.astype(np.int32),
            labels=labels.astype(np.int32),
            image_embeds=np.ascontiguousarray(image_embeds, np.float32),
            num_cut=num_cut,
        )


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of `<image>`.

    Raises:
        ConfigError: the tokenizer does not know it as a token.
    """
    found = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
    if not isinstance(found, int) or found == tokenizer.unk_token_id:
        raise ConfigError(f"the tokenizer has no token {IMAGE_MARK}; take the one of the model's processor")
    return found


def _bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin token, where the tokenizer itself puts one before a text."""
    ids: Any = tokenizer("a")["input_ids"]
    bos: Any = tokenizer.bos_token_id
    return [bos] if ids[:1] == [bos] else []


def _spans(rendered: RenderedChat, turn: TurnSpan) -> list[Span]:
    """The characters of the turn that are targets: those that the template marks, where it marks the content.

    A turn whose content it does not mark is a target as a whole. What the generation prompt holds is none.
    """
    marked = [span for span in rendered.marked if span[0] < turn.end and span[1] > turn.start]
    if any(start < turn.content_end <= end for start, end in marked):
        return [(max(start, turn.start), end) for start, end in marked]
    return [(turn.start, turn.end)]


def _inside(text: str, span: Span, offsets: np.ndarray) -> slice:
    """The tokens that lie in `span`."""
    touched = np.flatnonzero((offsets[:, 1] > span[0]) & (offsets[:, 0] < span[1])).tolist()
    inside = [place for place in touched if _lies_in(text, offsets[place].tolist(), span)]
    return slice(inside[0], inside[-1] + 1) if inside else slice(0, 0)


def _lies_in(text: str, offset: Sequence[int], span: tuple[int, int]) -> bool:
    """Whether a token stands for characters of `span`; white space at its edges may reach beyond."""
    start, end = offset
    if end <= start or end <= span[0] or start >= span[1]:
        return False
    piece = text[start:end]
    if not piece.isspace():
        start += len(piece) - len(piece.lstrip())
        end -= len(piece) - len(piece.rstrip())
    return span[0] <= start and end <= span[1]


def visible(sample: TrainingSample, tokenizer: PreTrainedTokenizerBase) -> str:
    """The sample as the model reads it: targets in [[ ]], V visual tokens in a row as `<image>xV`."""
    image_id = image_token_id(tokenizer)
    kinds = np.where(sample.input_ids == image_id, 2, (sample.labels != NO_LABEL).astype(np.int64))
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    shown = []
    for start, end in pairwise(edges):
        if kinds[start] == 2:
            shown.append(f"{IMAGE_MARK}x{end - start}")
            continue
        text = str(tokenizer.decode(sample.input_ids[start:end].tolist(), skip_special_tokens=False))
        shown.append(f"[[{text}]]" if kinds[start] else text)
    return "".join(shown)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro batch on the CPU, padded on the right. `num_targets` counts labels that the model predicts."""

    input_ids: torch.Tensor  # int64 (B, T)
    attention_mask: torch.Tensor  # int64 (B, T)
    labels: torch.Tensor  # int64 (B, T)
    image_embeds: torch.Tensor  # float32 (I, D), in the order of the samples
    num_targets: int
    num_tokens: int  # without padding
    ids: tuple[str, ...] = ()


def collate(samples: Sequence[TrainingSample], pad_id: int) -> Batch:
    """The samples, at least one, as one batch."""
    lengths = [len(sample.input_ids) for sample in samples]
    shape = (len(samples), max(lengths))
    input_ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, NO_LABEL, np.int64)
    attention_mask = np.zeros(shape, np.int64)
    for row, sample in enumerate(samples):
        input_ids[row, : lengths[row]] = sample.input_ids
        labels[row, : lengths[row]] = sample.labels
        attention_mask[row, : lengths[row]] = 1
    return Batch(
        ids=tuple(sample.id for sample in samples),
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        labels=torch.from_numpy(labels),
        image_embeds=torch.from_numpy(np.concatenate([sample.image_embeds for sample in samples])),
        num_targets=int((labels[:, 1:] != NO_LABEL).sum()),
        num_tokens=sum(lengths),
    )


def padding_share(batches: Batch | Sequence[Batch]) -> float:
    """Share of the places of these batches that hold padding, 0 to 1."""
    listed = [batches] if isinstance(batches, Batch) else list(batches)
    places = sum(batch.input_ids.numel() for batch in listed)
    return 1.0 - sum(batch.num_tokens for batch in listed) / places if places else 0.0


def deal(
    lengths: Sequence[int] | np.ndarray, num_ranks: int, micro_batch_size: int
) -> list[list[np.ndarray]]:
    """[rank][micro batch] -> positions: near lengths together, as many micro batches for every rank.

    The longest come first, so that a batch that does not fit shows at once, and the ranks' n-th micro batches
    have near lengths, so that no rank waits long for another. Micro batches hold `micro_batch_size` positions
    at most and are as equal in number as can be; some are empty where there are fewer positions than micro
    batches.
    """
    order = longest_first(lengths)
    per_rank = -(-len(order) // (micro_batch_size * num_ranks))
    micro_batches = np.array_split(order, per_rank * num_ranks) if per_rank else []
    return [micro_batches[rank::num_ranks] for rank in range(num_ranks)]


def longest_first(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Positions by falling length, those of equal length in their order."""
    return np.argsort(-np.asarray(lengths, np.int64), kind="stable")


def split_again(samples: Sequence[TrainingSample], num_micro_batches: int) -> list[list[TrainingSample]]:
    """A rank's samples by their true lengths, in as many micro batches as it was dealt."""
    order = longest_first([len(sample.input_ids) for sample in samples])
    return [[samples[place] for place in part] for part in np.array_split(order, num_micro_batches)]
