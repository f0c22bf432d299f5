"""Typed settings of training, for both stages, and packages that only some settings need."""

import importlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import Literal

from revision_ray.core.config import MISSING
from revision_ray.core.errors import ConfigError


def optional(package: str, setting: str) -> ModuleType:
    """The package that `setting` asks for.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{setting} is set, but the package {package} cannot be imported ({error}); install it in the "
            "environment of the workers, or leave the setting out"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """One run of AdamW over global batches."""

    global_batch_size: int = 256
    """Samples of an optimizer step, over all workers and accumulation steps."""
    micro_batch_size: int = 8
    """Samples of a forward pass on one worker; accumulation makes up the global batch."""
    num_epochs: float = 1.0
    """How often every sample is seen."""
    max_steps: int | None = None
    """Stop after this many steps, if the epochs have more; the schedule ends there too."""
    learning_rate: float = 1e-5
    """Peak, of everything that trains but the projector."""
    projector_learning_rate: float | None = None
    """Peak of the projector; that of the rest if not given."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes on after the warm-up: to zero along half a cosine, a line, or not at all."""
    warmup_fraction: float = 0.03
    """Share of the steps in which the learning rate rises from zero to its peak."""
    weight_decay: float = 0.0
    """Of matrices; biases and normalisations have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay of the gradient's and the squared gradient's averages."""
    max_gradient_norm: float = 1.0
    """Longer gradients are cut to this."""

    def __post_init__(self) -> None:
        if self.global_batch_size < 1 or self.micro_batch_size < 1:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size}, micro_batch_size={self.micro_batch_size}: "
                "expected positive numbers"
            )
        if self.num_epochs <= 0 or (self.max_steps is not None and self.max_steps < 1):
            raise ConfigError(
                f"num_epochs={self.num_epochs:g}, max_steps={self.max_steps}: expected positive numbers"
            )
        if not 0 <= self.warmup_fraction < 1:
            raise ConfigError(f"warmup_fraction={self.warmup_fraction}: expected a share from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters in place of full tuning of the language model (stage 2), merged at the end."""

    rank: int = 16
    """Rank of the update of each matrix."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """On the adapter's input."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the layers that get one; all-linear is every linear layer but the head."""


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """What DeepSpeed shards over the workers, and where it lies."""

    stage: Literal[0, 1, 2, 3] = 2
    """0: nothing; 1: optimizer state; 2: gradients too; 3: weights too."""
    offload: Literal["none", "cpu"] = "none"
    """cpu: optimizer state (and the weights of stage 3) in main memory; needs stage 1 or above."""

    def __post_init__(self) -> None:
        if self.stage == 0 and self.offload != "none":
            raise ConfigError("zero.offload=cpu needs zero.stage of 1 or above")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Ray Train's workers and what happens when one dies."""

    gpus_per_worker: Literal[0, 1] | None = None
    """GPUs of a worker; by default 1 where the cluster has as many as workers, else 0. On a cluster that
    starts GPU nodes on demand, say 1."""
    cpus_per_worker: float = 1.0
    """CPUs reserved for a worker. Leave some of the cluster for the ingest, which starves without any."""
    max_failures: int = 3
    """Restarts from the latest checkpoint before the job gives up."""


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When the state of training is kept, and how much of it."""

    every_steps: int = 500
    """Steps between checkpoints; one more is written at the end. Ray commits one in about two seconds, so
    keep them ten seconds or more apart."""
    keep: int = 2
    """The latest checkpoints that are kept. With held-out data the best one is kept too, in OUTPUT/best."""


@dataclass(frozen=True, kw_only=True)
class Logging:
    """Where the numbers go besides the progress display and metrics.jsonl."""

    every_steps: int = 10
    """Steps that one line of metrics.jsonl sums up."""
    tensorboard: bool = True
    """Event files in OUTPUT/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project; the package must be installed, the key comes from WANDB_API_KEY."""
    mlflow_experiment: str | None = None
    """MLflow experiment; the package must be installed, the server comes from MLFLOW_TRACKING_URI."""
    heldout_every_steps: int = 200
    """Steps between two measurements of the held-out loss; it is measured at every checkpoint besides."""
    sample_steps: list[int] = field(default_factory=lambda: [50, 200])
    """Steps after which a text is sampled from the first held-out sample, to be read by a person."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What both stages have in common."""

    alignment: str = ""
    """Directory of the fit that aligns the texts; stage 2 takes it from the model."""
    model: str = MISSING
    """Stage 1: folder or hub id of a causal language model. Stage 2: the folder that stage 1 wrote."""
    output: str = MISSING
    """URI of the run: checkpoints, metrics, and the trained model in OUTPUT/model."""
    num_workers: int = 1
    """Ray Train workers; on GPUs one GPU each."""
    seed: int = 0
    """Of the order of samples, the projector's first weights, and dropout."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of weights and activations; AdamW's state is float32. auto is bfloat16 on GPUs, float32 on CPUs."""
    max_length: int = 2048
    """Tokens of a sample, visual tokens among them."""
    on_too_long: Literal["reject", "truncate"] = "truncate"
    """Cut longer samples off, or leave them out; both are counted."""
    max_rejected_fraction: float = 0.01
    """Fail when a larger share of the samples could not be used."""
    image_root: str = ""
    """Folder that image paths of records are relative to; that of the records' file if not given."""
    match_images: Literal["exact", "file_name"] = "exact"
    """How images of records are found in the image stores. exact: by URI, id, or the path that an id was made
    of. file_name: else by file name alone, whatever the folder; two paths of one file name are an error."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    attention: str | None = None
    """Attention implementation of the language model (sdpa, flash_attention_2, eager); transformers' choice
    if not given."""
    optimisation: Optimisation = field(default_factory=Optimisation)
    """Steps, batches, learning rates."""
    zero: ZeroSettings = field(default_factory=ZeroSettings)
    """DeepSpeed."""
    workers: Workers = field(default_factory=Workers)
    """Ray Train."""
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    """Resuming."""
    logging: Logging = field(default_factory=Logging)
    """What one sees."""
    batches_per_window: int = 64
    """Global batches that are shuffled among each other; one task of the ingest reads that many."""
    group_by_length: bool = True
    """Inside a window, samples of near lengths share a batch, which saves padding."""
    allow_other_encoder: bool = False
    """Train although texts, fit or images come from different encoders."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ConfigError(f"num_workers={self.num_workers}: expected at least 1")
        per_step = self.num_workers * self.optimisation.micro_batch_size
        if self.optimisation.global_batch_size % per_step:
            raise ConfigError(
                f"optimisation.global_batch_size={self.optimisation.global_batch_size} is no multiple of "
                f"num_workers x micro_batch_size = {per_step}"
            )
