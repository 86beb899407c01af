"Open-vocabulary semantic segmentation: give it an image and words, get a label map."
__version__ = "0.1.0"

from importlib import import_module

# Loaded on first use: `import ovss_nb` stays free of torch.
_home = {"segment": "inference.predict", "create": "systems.registry", "create_encoder": "encoders.registry",
         "list_systems": "systems.registry", "list_encoders": "encoders.registry", "Vocabulary": "core.vocabulary",
         "load_vocabulary": "core.vocabulary", "list_vocabularies": "core.vocabulary",
         "Segmentation": "core.segmentation", "load_image": "core.images"}
__all__ = sorted(_home)

def __getattr__(name):
    if name in _home: return getattr(import_module(f"{__name__}.{_home[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

def __dir__(): return sorted([*globals(), *__all__])
