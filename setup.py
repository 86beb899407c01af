"Builds the package described in `settings.ini`."

from configparser import ConfigParser
from pathlib import Path
import re
from setuptools import find_packages, setup

root = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(root / "settings.ini", encoding="utf-8")
meta = config["DEFAULT"]


def lines(key):
    return [line.strip() for line in meta.get(key, "").splitlines() if line.strip()]


version = re.search(r'__version__ = "(.+)"', (root / meta["lib_name"] / "__init__.py").read_text())[1]

extras = {key.removesuffix("_requirements"): lines(key) for key in meta if key.endswith("_requirements")}
extras["all"] = sorted({line for name in extras if name not in ("dev", "ray") for line in extras[name]})
folders = sorted(
    path.name for path in (root / "data").iterdir() if path.is_dir() and path.name[0] not in "_."
)
data = ["ovss_nb.data", *(f"ovss_nb.data.{name}" for name in folders)]

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
    packages=find_packages(include=["ovss_nb*"]) + data,
    package_dir={"ovss_nb": "ovss_nb", "ovss_nb.data": "data"},
    package_data={"ovss_nb": ["py.typed"]} | {name: ["*"] for name in data},
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["ovss_nb = ovss_nb._modidx:d"]},
)
