"Open-vocabulary semantic segmentation: give it an image and words, get a label map."
__version__ = "0.1.0"

from importlib import import_module

# Loaded on first use: `import ovss_nb` stays free of torch.
_home = {"segment": "predict", "create": "predict", "create_encoder": "predict", "list_systems": "predict",
         "list_encoders": "predict", "Vocabulary": "vocabulary", "load_vocabulary": "vocabulary",
         "list_vocabularies": "vocabulary", "Segmentation": "segmentation", "load_image": "images"}
__all__ = sorted(_home)

def __getattr__(name):
    if name in _home: return getattr(import_module(f"{__name__}.{_home[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

def __dir__(): return sorted([*globals(), *__all__])
