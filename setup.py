"Builds the package described in `settings.ini`."

from configparser import ConfigParser
from pathlib import Path
import re
from setuptools import find_packages, setup

root = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(root / "settings.ini", encoding="utf-8")
meta = config["DEFAULT"]
lines = lambda key: [o.strip() for o in meta.get(key, "").splitlines() if o.strip()]
version = re.search(r'__version__ = "(.+)"', (root / meta["lib_name"] / "__init__.py").read_text())[1]

extras = {key.removesuffix("_requirements"): lines(key) for key in meta if key.endswith("_requirements")}
extras["all"] = sorted({o for name in extras if name not in ("dev", "ray") for o in extras[name]})

setup(
    name=meta["lib_name"],
    version=version,
    description=meta["description"],
    license=meta["license"],
    author=meta["author"],
    author_email=meta["author_email"],
    keywords=meta["keywords"].split(),
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=" + meta["min_python"],
    # `data/` stands beside the library in a checkout and inside it, as `ovss_nb.data`, once installed.
    packages=find_packages(include=["ovss_nb*"])
    + [
        "ovss_nb.data",
        "ovss_nb.data.vocabularies",
        "ovss_nb.data.prompts",
        "ovss_nb.data.labels",
        "ovss_nb.data.weights",
    ],
    package_dir={"ovss_nb": "ovss_nb", "ovss_nb.data": "data"},
    package_data={
        "ovss_nb.data": ["*"],
        "ovss_nb.data.vocabularies": ["*"],
        "ovss_nb.data.prompts": ["*"],
        "ovss_nb.data.labels": ["*"],
        "ovss_nb.data.weights": ["*"],
    },
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["ovss_nb = ovss_nb._modidx:d"]},
)
