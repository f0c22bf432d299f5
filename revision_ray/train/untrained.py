"""The model that stage 1 starts from, as a folder: the baseline without stage 1 (paper, Table 6)."""

import torch

from revision_ray import storage
from revision_ray.train import export, ingest, models
from revision_ray.train.run import PretrainJob, alignment_identity
from revision_ray.train.zero import dtype_of


def write_untrained(job: PretrainJob, output: str) -> str:
    """The language model with an untrained projector stands at `output`, as stage 1 of `job` would begin."""
    if storage.exists(storage.join(output, "config.json")):
        return output
    source = ingest.text_source(job.data, job.alignment, allow_other_encoder=job.allow_other_encoder)
    torch.manual_seed(job.seed)
    model, processor = models.new_model(
        job.model,
        job.architecture,
        embedding_dim=source.embedding_dim,
        alignment=alignment_identity(job.alignment),
        image_tower=job.image_tower,
        dtype=dtype_of(job),
        attention=job.attention,
    )
    export.write(model, processor, output)
    return output
