"""Save and load a fitted alignment (a directory of JSON and safetensors); compute its sampling floors.

Sampling floor: let mu and T be the centroid and trace of a fit's N rows, and m the centroid of n other rows.
If all rows come from one distribution, then E||m - mu_true||^2 = T / n and E||mu - mu_true||^2 = T / N, and
the two errors are independent. The root mean square of ||m - mu|| is then sqrt(T (1/n + 1/N)). A distance
well above this floor means that the rows come from another domain than the fit's.

Shapes: D embedding dim, K centroid steps.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from revision_ray.align.maps import Affine
from revision_ray.align.moments import Moments
from revision_ray.align.strategies import StrategyConfig
from revision_ray.core import storage
from revision_ray.core.errors import AlignmentError, ConfigError, DataError, quote, shorten
from revision_ray.data.shards import EncoderIdentity

# With fewer rows, a shift of two fifths of the spread sqrt(T) could be chance.
MIN_ROWS = 50
# The error of a mean of MIN_ROWS or more rows is nearly Gaussian. Its squared length divided by the squared
# floor is therefore a weighted sum of chi-squares with mean 1. The tail is heaviest when one weight is 1 and
# the others are 0 (Szekely and Bakirov, 2003). So independent rows of the same distribution exceed three
# floors in less than 0.3 % of cases, whatever the spectrum.
FLOORS = 3.0


def sampling_floor(trace: float, num_fitted: int, num_sampled: int) -> float:
    """Return the root mean square distance to the fit's centroid that sampling alone explains.

    The distance is that of the centroid of `num_sampled` rows, drawn from the fit's own distribution, to the
    centroid of the fit's `num_fitted` rows, whose sample trace is `trace`.
    """
    return math.sqrt(unbiased_trace(trace, num_fitted) * (1 / num_sampled + 1 / num_fitted))


def gap_floor(text_trace: float, num_texts: int, image_trace: float, num_images: int) -> float:
    """Return the root mean square distance between text and image centroids that sampling alone explains."""
    return math.sqrt(text_trace / max(num_texts - 1, 1) + image_trace / max(num_images - 1, 1))


def unbiased_trace(trace: float, num_rows: int) -> float:
    """Return the unbiased trace N / (N - 1) * T of N rows; a negative T (rounding) counts as 0."""
    return max(trace, 0.0) * num_rows / max(num_rows - 1, 1)


FORMAT_VERSION = 1
DOCUMENT, TENSORS = "alignment.json", "alignment.safetensors"
CONFIG = "config.yaml"
TEXT_MOMENTS, IMAGE_MOMENTS = "moments/text.safetensors", "moments/image.safetensors"


@dataclass(frozen=True, kw_only=True)
class ModalityGap:
    """Distance between the image centroid and the mean text row, Euclidean, with its standard error."""

    before: float
    after: float
    before_standard_error: float
    # Root mean square distance between the two centroids that sampling alone explains. On rows that were not
    # used in the fit, `after` cannot be expected to be smaller.
    after_standard_error: float


@dataclass(frozen=True, kw_only=True)
class FitInputs:
    """Stores and row limits that a fit was made from, with the number of rejected rows."""

    texts: tuple[str, ...]
    images: tuple[str, ...]
    max_rows: int | None = None
    drift_rows: int | None = None
    num_rejected_texts: int = 0
    num_rejected_images: int = 0


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """A strategy fitted to one encoder's texts and images of one domain."""

    strategy: StrategyConfig
    affine: Affine
    text_centroid: np.ndarray  # float64 (D,)
    image_centroid: np.ndarray  # float64 (D,)
    drifted_centroids: np.ndarray  # float64 (K, D): mu' before each centroid step
    text_trace: float
    image_trace: float
    num_texts: int
    num_images: int
    domain: str
    text_encoder: EncoderIdentity
    image_encoder: EncoderIdentity
    modality_gap: ModalityGap
    text_centroid_standard_error: float
    image_centroid_standard_error: float
    drifted_centroid_standard_error: float
    inputs: FitInputs

    @property
    def embedding_dim(self) -> int:
        return len(self.text_centroid)

    def tensors(self) -> dict[str, np.ndarray]:
        named = {
            "text_centroid": self.text_centroid,
            "image_centroid": self.image_centroid,
            "offset": self.affine.offset,
        }
        if len(self.drifted_centroids):
            named["drifted_centroid"] = self.drifted_centroids
        if self.affine.matrix is not None:
            named["matrix"] = self.affine.matrix
        return {name: np.ascontiguousarray(array, np.float64) for name, array in named.items()}

    @property
    def content_hash(self) -> str:
        """Return the SHA-256 of the map's arrays and settings; maps of equal hash give equal bits."""
        return _content_hash(safetensors.numpy.save(self.tensors()), self._map_settings())

    def _map_settings(self) -> dict[str, Any]:
        affine = self.affine
        return {
            "scale": affine.scale,
            "noise": affine.noise,
            "seed": affine.seed,
            "unit_output": affine.unit_output,
        }

    def check_encoder(self, encoder: EncoderIdentity, embedding_dim: int, where: str, override: bool) -> None:
        """Check that this fit may align texts of `encoder` and `embedding_dim`; errors name `where`.

        Raises:
            AlignmentError: the dimension differs; or the encoder differs or is unknown, and `override` is
                False.
        """
        if embedding_dim != self.embedding_dim:
            raise AlignmentError(
                f"{where}: embedding_dim is {embedding_dim}, the fit's is {self.embedding_dim}; "
                "embed with the encoder of the fit, or fit again on this encoder's stores"
            )
        if encoder.fingerprint == self.text_encoder.fingerprint or override:
            return
        raise AlignmentError(
            f"{where}: was made by {_named(encoder)}, the fit by {_named(self.text_encoder)}; embed with the "
            "encoder of the fit, or fit again, or set allow_other_encoder=true if you know that both give "
            "the same rows"
        )

    def document(self) -> dict[str, Any]:
        """Return the content of alignment.json, without the hashes of the moments files."""
        gap = self.modality_gap
        return {
            "format_version": FORMAT_VERSION,
            "strategy": self.strategy.strategy,
            "settings": asdict(self.strategy),
            "embedding_dim": self.embedding_dim,
            "num_texts": self.num_texts,
            "num_images": self.num_images,
            "domain": self.domain,
            "text_encoder": asdict(self.text_encoder),
            "image_encoder": asdict(self.image_encoder),
            **self._map_settings(),
            "text_trace": self.text_trace,
            "image_trace": self.image_trace,
            "modality_gap": {"before": gap.before, "after": gap.after},
            "standard_errors": {
                # Null where a side has too few rows for an estimate: JSON has neither NaN nor infinity.
                name: error if math.isfinite(error) else None
                for name, error in (
                    ("text_centroid", self.text_centroid_standard_error),
                    ("image_centroid", self.image_centroid_standard_error),
                    ("drifted_centroid", self.drifted_centroid_standard_error),
                    ("modality_gap_before", gap.before_standard_error),
                    ("modality_gap_after", gap.after_standard_error),
                )
            },
            "inputs": asdict(self.inputs),
            "content_hash": self.content_hash,
        }


def _named(encoder: EncoderIdentity) -> str:
    if not encoder.fingerprint:
        return "an unknown encoder"
    return f"encoder {encoder.name} ({encoder.fingerprint[:12]})"


def _content_hash(tensors: bytes, settings: dict[str, Any]) -> str:
    return storage.sha256(tensors, repr(sorted(settings.items())).encode())


def save_alignment(alignment: Alignment, text: Moments, image: Moments, uri: str) -> None:
    """Write the alignment and its moments to directory `uri`.

    alignment.json is written last: a directory without it is an unfinished fit.

    Raises:
        DataError: a write failed.
    """
    hashes = {}
    for name, moments in ((TEXT_MOMENTS, text), (IMAGE_MOMENTS, image)):
        content = moments.to_bytes()
        hashes[name] = storage.sha256(content)
        storage.write_bytes(storage.join(uri, name), content)
    storage.write_bytes(storage.join(uri, TENSORS), safetensors.numpy.save(alignment.tensors()))
    storage.write_json(storage.join(uri, DOCUMENT), alignment.document() | {"moments": hashes})


def load_alignment(uri: str) -> Alignment:
    """Read the alignment in directory `uri`.

    Raises:
        AlignmentError: there is none, or it is unfinished, damaged, or of an unsupported format version.
    """
    try:
        document = _read_document(uri)
        content = storage.read_bytes(storage.join(uri, TENSORS))
    except DataError as error:
        raise AlignmentError(f"{uri}: no fit there ({shorten(error)}); make one with jobs/fit.py") from error
    try:
        tensors = safetensors.numpy.load(content)
    except safetensors.SafetensorError as error:
        raise _damaged(uri, error) from error
    return parse_alignment(document, tensors, uri)


def parse_alignment(document: dict[str, Any], tensors: dict[str, np.ndarray], where: str) -> Alignment:
    """Return the alignment of a `document()` and its `tensors()`; error messages name `where`.

    Raises:
        AlignmentError: a value is missing or of the wrong type, or the content hash does not match.
    """
    try:
        alignment = _of_document(document, tensors)
        unchanged = alignment.content_hash == document["content_hash"]
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise _damaged(where, error) from error
    if not unchanged:
        raise AlignmentError(
            f"{where}: {TENSORS} does not match {DOCUMENT}; make the fit again with jobs/fit.py"
        )
    return alignment


def _damaged(where: str, error: Exception) -> AlignmentError:
    return AlignmentError(f"{where}: the fit is damaged ({quote(error)}); make it again with jobs/fit.py")


def _read_document(uri: str) -> dict[str, Any]:
    document = storage.read_json(storage.join(uri, DOCUMENT))
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise AlignmentError(f"{uri}: format_version is {version}, this version reads {FORMAT_VERSION}")
    return document


def _of_document(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> Alignment:
    gap, errors, inputs = document["modality_gap"], document["standard_errors"], document["inputs"]
    errors = {name: math.nan if error is None else error for name, error in errors.items()}
    image_centroid = tensors["image_centroid"]
    drifted = tensors.get("drifted_centroid", np.empty((0, len(image_centroid))))
    affine = Affine(
        scale=document["scale"],
        offset=tensors["offset"],
        matrix=tensors.get("matrix"),
        noise=document["noise"],
        seed=document["seed"],
        unit_output=document["unit_output"],
        recentre=image_centroid - drifted if len(drifted) else None,
    )
    return Alignment(
        strategy=StrategyConfig(**document["settings"]),
        affine=affine,
        text_centroid=tensors["text_centroid"],
        image_centroid=image_centroid,
        drifted_centroids=drifted,
        text_trace=document["text_trace"],
        image_trace=document["image_trace"],
        num_texts=document["num_texts"],
        num_images=document["num_images"],
        domain=document["domain"],
        text_encoder=EncoderIdentity(**document["text_encoder"]),
        image_encoder=EncoderIdentity(**document["image_encoder"]),
        modality_gap=ModalityGap(
            before=gap["before"],
            after=gap["after"],
            before_standard_error=errors["modality_gap_before"],
            after_standard_error=errors["modality_gap_after"],
        ),
        text_centroid_standard_error=errors["text_centroid"],
        image_centroid_standard_error=errors["image_centroid"],
        drifted_centroid_standard_error=errors["drifted_centroid"],
        inputs=FitInputs(**{**inputs, "texts": tuple(inputs["texts"]), "images": tuple(inputs["images"])}),
    )


def load_moments(uri: str) -> tuple[Moments, Moments]:
    """Read the text and image moments that were saved with the alignment in directory `uri`.

    Raises:
        AlignmentError: a moments file is damaged, or the format version is unsupported.
        DataError: a file is missing.
    """
    hashes = _read_document(uri).get("moments", {})
    return _moments(uri, TEXT_MOMENTS, hashes), _moments(uri, IMAGE_MOMENTS, hashes)


def _moments(uri: str, name: str, hashes: dict[str, str]) -> Moments:
    content = storage.read_bytes(storage.join(uri, name))
    if storage.sha256(content) != hashes.get(name):
        raise AlignmentError(f"{uri}: {name} does not match {DOCUMENT}; make the fit again with jobs/fit.py")
    return Moments.from_bytes(content)
