"""What one machine says of itself. No Ray: a task on each node calls `facts`, and a test does so, too."""

import fnmatch
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import revision_ray
from revision_ray.core import storage
from revision_ray.core.errors import DataError

# The project's dependencies, by the names of their distributions: a test compares them with pyproject.toml.
PACKAGES = (
    "ray", "torch", "torchvision", "transformers", "open_clip_torch", "deepspeed", "omegaconf", "pyarrow",
    "numpy", "scipy", "safetensors", "pillow", "protobuf", "sentencepiece", "threadpoolctl", "lazy_loader",
    "tqdm", "peft", "tensorboardX", "matplotlib", "jinja2", "tokenizers", "aiohttp", "fastapi", "pydantic",
)  # fmt: skip
DRIVERS_FILE = "driver"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
_HUB_TIMEOUT_S = 15
_GPU_TIMEOUT_S = 120

_COMPUTE = """
import json, torch
count = torch.cuda.device_count()
for index in range(count):
    ones = torch.ones(64, 64, device=f"cuda:{index}")
    assert float((ones @ ones).sum()) == 64.0 ** 3, f"device {index} computes wrongly"
print(json.dumps({"count": count, "cuda": torch.version.cuda, "built": torch.backends.cuda.is_built()}))
"""


@dataclass(frozen=True, kw_only=True)
class ProbeRequest:
    """What a machine is asked."""

    storage: str | None
    """Directory of this check, in which DRIVERS_FILE holds `token`."""
    token: str
    models: tuple[str, ...]
    scratch: str | None
    """Where Ray keeps spilled objects; by default the temporary directory."""
    num_gpus: float
    """Devices that the node offers."""


def facts(asked: ProbeRequest, node_id: str) -> dict[str, Any]:
    """Everything that the checks of one machine rest on; errors are text, which is empty where it works."""
    return {
        "python": platform.python_version(),
        "versions": versions(),
        "code": code_hash(),
        "disk": disk(asked.scratch),
        "storage": try_storage(asked, node_id) if asked.storage else None,
        "gpus": gpus(asked.num_gpus),
        "models": {model: model_error(model) for model in asked.models},
    }


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def code_hash() -> str:
    """Of this package's own source, which travels with the job or is installed on each node."""
    root = Path(next(iter(revision_ray.__path__)))
    files = sorted(root.rglob("*.py"))
    parts = [part for file in files for part in (str(file.relative_to(root)).encode(), file.read_bytes())]
    return storage.sha256(*parts)[:12]


def disk(scratch: str | None) -> dict[str, Any]:
    place = scratch if scratch and os.path.isdir(scratch) else os.environ.get("TMPDIR", "/tmp")
    usage = shutil.disk_usage(place)
    return {"place": place, "free": usage.free, "total": usage.total}


def try_storage(asked: ProbeRequest, node_id: str) -> dict[str, str]:
    """What reading the driver's file and writing one of this node's own came to."""
    assert asked.storage is not None
    found = {"read": "", "write": ""}
    try:
        content = storage.read_bytes(storage.join(asked.storage, DRIVERS_FILE)).decode()
        if content != asked.token:
            found["read"] = "the file that the driver wrote has another content here"
    except (DataError, UnicodeDecodeError) as error:
        found["read"] = str(error)
    try:
        storage.write_bytes(storage.join(asked.storage, node_id), asked.token.encode())
    except DataError as error:
        found["write"] = str(error)
    return found


def gpus(num_gpus: float) -> dict[str, Any]:
    """What the driver lists, and, where Ray offers devices, whether torch can compute on each of them."""
    listed, error = _driver()
    found: dict[str, Any] = {"driver": listed, "driver_error": error, "torch": None, "torch_error": ""}
    if num_gpus:
        # In a process of its own: without the devices that Ray hides from this task, and with no memory held
        # on one afterwards.
        hidden = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        found["torch"], found["torch_error"] = _json_of([sys.executable, "-c", _COMPUTE], environment)
    return found


def _driver() -> tuple[list[dict[str, str]], str]:
    fields = ("name", "driver_version", "memory.total")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_GPU_TIMEOUT_S, check=True)
    except FileNotFoundError:
        return [], "no nvidia-smi on this machine"
    except (subprocess.SubprocessError, OSError) as error:
        return [], _last_line(getattr(error, "stdout", "") or str(error))
    rows = [line.split(", ") for line in result.stdout.splitlines() if line.strip()]
    return [dict(zip(fields, row, strict=False)) for row in rows], ""


def _json_of(command: Sequence[str], environment: dict[str, str]) -> tuple[Any, str]:
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_GPU_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {_GPU_TIMEOUT_S} s"
    if result.returncode:
        return None, _last_line(result.stderr)
    return json.loads(result.stdout.splitlines()[-1]), ""


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"


def model_error(model: str) -> str:
    """Why `model` (a folder, a URI, or a hub id) cannot be had here; empty where it can."""
    if "://" in model:
        return _uri_error(model)
    if os.path.isabs(model):
        return _folder_error(Path(model))
    return _hub_error(model)


def _uri_error(uri: str) -> str:
    try:
        return _lacks([storage.name_of(path) for path, _ in storage.list_files(uri)])
    except DataError as error:
        return str(error)


def _folder_error(folder: Path) -> str:
    if not folder.is_dir():
        return "no such directory on this node"
    return _lacks([path.name for path in folder.iterdir()])


def _lacks(names: Sequence[str]) -> str:
    """What a model of ours or of others is not without; empty where `names` have it all."""
    if not fnmatch.filter(names, "*config.json"):
        return "no config.json there"
    return "" if any(fnmatch.filter(names, pattern) for pattern in _WEIGHTS) else "no weights there"


def _hub_error(model: str) -> str:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if _cached(model):
        return ""
    hub = huggingface_hub.HfApi()
    try:
        hub.model_info(model, timeout=_HUB_TIMEOUT_S)
        # Anybody may know of a gated model; its files are another matter.
        hub.auth_check(model)
    except GatedRepoError:
        return "the hub gives it only to accounts that accepted its terms"
    except (RepositoryNotFoundError, HFValidationError):
        return "neither a directory nor a public repository of the hub"
    except Exception as error:  # whatever a proxy, a name server or the hub's client comes up with
        return f"not in this node's cache, and the hub cannot be reached ({_last_line(str(error))})"
    return ""


def _cached(model: str) -> bool:
    """Whether the files of a model of the hub lie on this node already."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return not _folder_error(Path(huggingface_hub.snapshot_download(model, local_files_only=True)))
    except (LocalEntryNotFoundError, HFValidationError):
        return False


def now() -> float:
    return time.time()


class ResourceHolder:
    """An actor with what it was given of a node, which does not go while it has that."""

    def here(self) -> None:
        """Answers once there is such a node."""
