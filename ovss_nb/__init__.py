"Open-vocabulary semantic segmentation: give it an image and words, get a label map."
__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

# Loaded on first use: `import ovss_nb` stays free of torch.
_home = {
    "segment": "inference.predict",
    "create": "systems.registry",
    "list_systems": "systems.registry",
    "create_encoder": "encoders.registry",
    "list_encoders": "encoders.registry",
    "Vocabulary": "core.vocabulary",
    "load_vocabulary": "core.vocabulary",
    "list_vocabularies": "core.vocabulary",
    "Segmentation": "core.segmentation",
    "load_image": "core.images",
}
__all__ = sorted(_home)

if TYPE_CHECKING:  # the same names for editors and type checkers
    from .core.images import load_image as load_image
    from .core.segmentation import Segmentation as Segmentation
    from .core.vocabulary import Vocabulary as Vocabulary
    from .core.vocabulary import list_vocabularies as list_vocabularies
    from .core.vocabulary import load_vocabulary as load_vocabulary
    from .encoders.registry import create_encoder as create_encoder
    from .encoders.registry import list_encoders as list_encoders
    from .inference.predict import segment as segment
    from .systems.registry import create as create
    from .systems.registry import list_systems as list_systems
else:

    def __getattr__(name):
        if name in _home:
            return getattr(import_module(f"{__name__}.{_home[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
