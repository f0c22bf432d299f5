"""Moments of the contrastive loss's gradients with respect to embeddings, over batches and workers. No Ray.

Shapes: B rows of this worker's batch, D embedding dim, K batches, M 2, the modalities: images, then texts.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from revision_ray.geometry.dynamics import Gradients


@dataclass
class GradientSums:
    """Sums of gradients of the loss with respect to unit embeddings, this worker's part of each batch.

    A row's gradient is B times that of the mean over the worker's B rows (with several workers the gathered
    loss has already summed it over all of them): the gradient of the sum over the global batch, whatever the
    number of workers. It is the gradient in the surrounding space, before it goes back through the
    normalisation, which would take away its part along the embedding itself.
    """

    sums: list[list[torch.Tensor]] = field(default_factory=lambda: [[], []])  # M lists of (D,), one a batch
    seconds: list[torch.Tensor | None] = field(default_factory=lambda: [None, None])  # M of (D, D)
    num_rows: int = 0

    def watch(self, image_BD: torch.Tensor, text_BD: torch.Tensor) -> None:
        """The gradients of these tensors are added when they are known; both belong to the graph."""
        for side, rows_BD in enumerate((image_BD, text_BD)):
            rows_BD.register_hook(lambda gradient_BD, side=side: self._add(side, gradient_BD))
        self.num_rows += len(image_BD)

    def _add(self, side: int, gradient_BD: torch.Tensor) -> None:
        rows_BD = gradient_BD.detach().double() * len(gradient_BD)
        former_DD = self.seconds[side]
        second_DD = rows_BD.T @ rows_BD
        self.seconds[side] = second_DD if former_DD is None else former_DD + second_DD
        self.sums[side].append(rows_BD.sum(0))

    def over_workers(self) -> Gradients | None:
        """Over all workers; None where no batch was watched. All workers must call it."""
        image_DD, text_DD = self.seconds
        if image_DD is None or text_DD is None:
            return None
        num_batches = len(self.sums[0])
        second_MDD = torch.stack([image_DD, text_DD])
        sums_MKD = torch.stack([torch.stack(side) for side in self.sums])
        count = torch.tensor(float(self.num_rows), dtype=torch.float64, device=image_DD.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            for total in (second_MDD, sums_MKD, count):
                dist.all_reduce(total)
        rows = float(count)
        mean_MKD = (sums_MKD / (rows / num_batches)).cpu().numpy()
        second = (second_MDD / rows).cpu().numpy()
        means_DD = np.einsum("mkd,mke->de", mean_MKD, mean_MKD) / num_batches
        return Gradients(
            image_DD=second[0],
            text_DD=second[1],
            covariance_DD=second.sum(0) - means_DD,
            num_batches=num_batches,
        )
