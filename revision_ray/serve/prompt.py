"""Messages to token ids through the model's chat template, with the images that they show, in order.

What a client writes is text: strings in it that name control tokens (`<image>`, the end of a turn) are
encoded as the characters that they are (data/chat.py), so no message can hold an image that was not sent, or
speak in another's turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from revision_ray.core import storage
from revision_ray.data.chat import ChatRefusal, ChatTemplate, UnwritableToken
from revision_ray.model import ReVisionConfig
from revision_ray.model.processing import IMAGE_TOKEN
from revision_ray.serve.protocol import ApiError, ImageEmbeddingPart, ImageUrlPart, Message, Model, TextPart
from revision_ray.serve.settings import ServeJob

# Characters of a reason of others (a template, the tokenizer) that a message repeats.
_MAX_REASON = 200


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    created: int
    """When the folder was written, in seconds of Unix time."""
    context_length: int
    """Tokens of prompt and answer together."""
    embedding_dim: int
    num_visual_tokens: int
    """For each image."""
    image_token_id: int
    vocab_size: int
    fingerprint: str | None
    """Of the image encoder; None where the model knows none, and takes any."""
    image_input: bool
    """Whether it holds an image tower."""

    def listed(self, model_id: str) -> Model:
        """The model as /v1/models has it."""
        return Model(
            id=model_id,
            object="model",
            created=self.created,
            owned_by="revision_ray",
            context_length=self.context_length,
            embedding_dim=self.embedding_dim,
            num_visual_tokens=self.num_visual_tokens,
            encoder_fingerprint=self.fingerprint,
            image_input=self.image_input,
        )


def facts_of(job: ServeJob) -> ModelFacts:
    """The facts of the model in the job's folder.

    Raises:
        DataError, OSError: no model there.
    """
    config = ReVisionConfig.from_pretrained(storage.local_copy(job.model))
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    tower = config.image_tower or {}
    return ModelFacts(
        created=storage.info(storage.join(job.model, "config.json")).mtime_ns // 10**9,
        context_length=min(job.engine.max_length, positions or job.engine.max_length),
        embedding_dim=config.embedding_dim,
        num_visual_tokens=config.num_visual_tokens,
        image_token_id=config.image_token_id,
        vocab_size=config.get_text_config().vocab_size,
        fingerprint=(config.alignment or {}).get("image_fingerprint") or tower.get("fingerprint"),
        image_input=config.image_tower is not None,
    )


@dataclass(frozen=True, kw_only=True)
class ImagePartPlace:
    """An image part, and where in the request it stands."""

    param: str
    part: ImageUrlPart | ImageEmbeddingPart


@dataclass(frozen=True, kw_only=True)
class TemplateInput:
    """What the chat template takes, and the images that its `image` parts stand for."""

    messages: list[dict[str, Any]]
    images: list[ImagePartPlace]
    num_characters: int


def conversation_of(messages: Sequence[Message]) -> TemplateInput:
    """
    Raises:
        ApiError: an image outside a user's message.
    """
    images: list[ImagePartPlace] = []
    rendered, num_characters = [], 0
    for index, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            rendered.append({"role": role, "content": message.content})
            num_characters += len(message.content)
            continue
        parts: list[dict[str, str]] = []
        for position, part in enumerate(message.content):
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
                num_characters += len(part.text)
            elif role != "user":
                raise ApiError(
                    400,
                    f"messages[{index}]: images stand in messages of the user alone; move this one there",
                    param=f"messages[{index}].content",
                )
            else:
                parts.append({"type": "image"})
                images.append(ImagePartPlace(param=f"messages[{index}].content[{position}]", part=part))
        rendered.append({"role": role, "content": parts})
    return TemplateInput(messages=rendered, images=images, num_characters=num_characters)


class Prompter:
    """Token ids of conversations. Not for several threads at once: tokenizers are not."""

    def __init__(self, tokenizer: Any, image_token_id: int, num_visual_tokens: int) -> None:
        """The tokenizer is the model folder's: its chat template knows what an image part is.

        Raises:
            ConfigError: it has no chat template.
        """
        self._chat, self._image_token_id = ChatTemplate(tokenizer), image_token_id
        self.num_visual_tokens = num_visual_tokens

    def input_ids(self, conversation: TemplateInput) -> tuple[int, ...]:
        """The prompt, with the placeholders of each image.

        Equal to what the processor makes of the rendered template without special tokens of its own, for
        text without control tokens.

        Raises:
            ApiError: the template does not take this conversation, or a control token cannot be written as
                text.
        """
        try:
            rendered = self._chat.render(conversation.messages, prompt=True)
            ids = self._chat.encode(rendered).input_ids.tolist()
        except UnwritableToken as error:
            raise ApiError(
                400,
                f"the messages cannot be written as tokens: {str(error)[:_MAX_REASON]}",
                param="messages",
            ) from error
        except ChatRefusal as error:
            raise ApiError(
                400,
                f"the model's chat template does not take these messages: {str(error)[:_MAX_REASON]}",
                param="messages",
            ) from error
        num_shown, num_images = ids.count(self._image_token_id), len(conversation.images)
        if num_shown != num_images:
            raise self._not_shown(conversation, num_shown)
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * (self.num_visual_tokens if token == self._image_token_id else 1)
        return tuple(expanded)

    def _not_shown(self, conversation: TemplateInput, num_shown: int) -> ApiError:
        num_images = len(conversation.images)
        texts = [
            part.get("text", "") for message in conversation.messages for part in _parts(message["content"])
        ]
        if any(IMAGE_TOKEN in text for text in texts):
            return ApiError(
                400,
                f"a text of the messages holds {IMAGE_TOKEN}, which the model's chat template takes for an "
                "image; write it otherwise, and send images as parts of their own",
                param="messages",
                code="image_token_in_text",
            )
        return ApiError(
            400,
            f"the model's chat template shows {num_shown} of the {num_images} images of these messages; send "
            "images where it shows them",
            param="messages",
        )


def _parts(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
