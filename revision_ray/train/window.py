"""A training run's figures between two lines of its metrics."""

from dataclasses import dataclass, field

from revision_ray import metrics
from revision_ray.train.step import StepResult
from revision_ray.train.zero import Engine


@dataclass
class Window:
    """Sums over the steps since the last line of metrics, of all workers; times of this one."""

    losses: list[float] = field(default_factory=list)
    targets: int = 0
    tokens: int = 0
    slots: int = 0
    samples: int = 0
    ingest_seconds: float = 0.0
    compute_seconds: float = 0.0
    gradient_norm: float = 0.0

    def add(self, result: StepResult, ingest_seconds: float, compute_seconds: float) -> None:
        self.losses.append(result.loss)
        self.targets += result.num_targets
        self.tokens += result.num_tokens
        self.slots += result.num_slots
        self.samples += result.num_samples
        self.ingest_seconds += ingest_seconds
        self.compute_seconds += compute_seconds
        self.gradient_norm = result.gradient_norm

    @property
    def padding_share(self) -> float:
        return 1 - self.tokens / self.slots if self.slots else 0.0

    def figures(self, engine: Engine) -> dict[str, float]:
        seconds = max(self.ingest_seconds + self.compute_seconds, 1e-9)
        return {
            "loss": sum(self.losses) / len(self.losses),
            "learning_rate": max(group["lr"] for group in engine.deepspeed.optimizer.param_groups),
            "gradient_norm": self.gradient_norm,
            "tokens_per_second": self.tokens / seconds,
            "samples_per_second": self.samples / seconds,
            "padding_share": self.padding_share,
            "ingest_share": self.ingest_seconds / seconds,
        }

    def note(self, engine: Engine) -> str:
        figures = self.figures(engine)
        return (
            f"loss {figures['loss']:.3f}, {figures['tokens_per_second']:.0f} tokens/s, "
            f"{figures['samples_per_second']:.1f} samples/s, padding {figures['padding_share']:.0%}, "
            f"ingest {figures['ingest_share']:.0%}, lr {figures['learning_rate']:.1e}, "
            f"|g| {figures['gradient_norm']:.2f}"
        )

    def record(self) -> None:
        """Prometheus has the window's tokens: for one worker to call, since they are sums over all."""
        metrics.record(samples=self.samples, tokens=self.tokens, padding_share=self.padding_share)
