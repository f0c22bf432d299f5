"""What the HTTP side knows about the model: a few numbers, read once where the application is built."""

from dataclasses import dataclass

from revision_ray.core import storage
from revision_ray.model import ReVisionConfig
from revision_ray.serve.protocol import Model
from revision_ray.serve.settings import ServeJob


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
