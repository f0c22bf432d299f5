"""ReVision on Ray: close the modality gap, train multimodal LLMs from unpaired text (arXiv 2602.07026)."""

import importlib
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"

# Ray reads it when it is imported, which nothing of ours does before this. Ray Train's watchers write these
# lines, the first one every second, where no dashboard answers them; both are harmless.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX", "State API may be temporarily unavailable|'PreemptionWatcher'"
)

# Every Ray worker imports this package, and most never touch a model: importing torch and transformers here
# would cost each of them seconds. Yet `AutoModel.from_pretrained` must know our model after `import
# revision_ray`. So the model registers itself at once where transformers is loaded, else as soon as it is.
_MODEL = "revision_ray.model"


class _RegisterAfterTransformers:
    """A finder that finds nothing new: it lets `import transformers` end with the import of our model."""

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "transformers":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, None, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            importlib.import_module(_MODEL)

        # On the instance, so that everything else that asks this loader (resources, sources) is answered as
        # ever. It is a new one each time; finders are also asked by those who only want to know.
        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "transformers" in sys.modules:
    importlib.import_module(_MODEL)
else:
    sys.meta_path.insert(0, _RegisterAfterTransformers())
