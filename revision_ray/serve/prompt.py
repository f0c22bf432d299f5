"""Convert chat messages to token ids with the model's chat template, and list their images in order.

Control tokens in a client's text (`<image>`, the end of a turn) are encoded as plain characters
(data/chat.py). So a message can neither insert an image that was not sent, nor start another turn.
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

# Longest reason of a template or tokenizer, in characters, that an error message repeats.
_MAX_REASON = 200


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    created: int
    """When the folder was written, in seconds of Unix time."""
    context_length: int
    """Tokens of prompt and answer together."""
    embedding_dim: int
    num_visual_tokens: int
    """Visual tokens of each image."""
    image_token_id: int
    vocab_size: int
    fingerprint: str | None
    """Fingerprint of the image encoder; None where it is unknown, and any encoder is accepted."""
    image_input: bool
    """Whether the model has an image tower."""

    def listed(self, model_id: str) -> Model:
        """Return the model's entry in /v1/models."""
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
    """Read the facts of the job's model.

    Raises:
        DataError, OSError: there is no model in the job's folder.
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
    """An image part of a request, and its parameter path for error messages (`param`)."""

    param: str
    part: ImageUrlPart | ImageEmbeddingPart


@dataclass(frozen=True, kw_only=True)
class TemplateInput:
    """Messages for the chat template, and the images of their `image` parts, in order."""

    messages: list[dict[str, Any]]
    images: list[ImagePartPlace]
    num_characters: int


def conversation_of(messages: Sequence[Message]) -> TemplateInput:
    """Convert the messages of a request to input of the chat template.

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
    """Converter of conversations to token ids. Not thread-safe, because tokenizers are not."""

    def __init__(self, tokenizer: Any, image_token_id: int, num_visual_tokens: int) -> None:
        """Take the tokenizer of the model's folder, whose chat template handles image parts.

        Raises:
            ConfigError: the tokenizer has no chat template.
        """
        self._chat, self._image_token_id = ChatTemplate(tokenizer), image_token_id
        self.num_visual_tokens = num_visual_tokens

    def input_ids(self, conversation: TemplateInput) -> tuple[int, ...]:
        """Return the token ids of the prompt, with placeholders for the visual tokens of each image.

        For text without control tokens they equal those of the processor for the rendered template, without
        added special tokens.

        Raises:
            ApiError: the template refuses this conversation or does not show all its images, or a control
                token cannot be written as text.
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
