"""Label maps of every system before and after a change, compared bit by bit.

    python tests/compare_labels.py OLD_COMMIT [NEW_COMMIT]

Checks out both commits (the second is HEAD unless it is given) into temporary git worktrees, and lets each
label skimage's photographs with all of its systems: by the settings of its own `tests/test_systems.py`, small
networks with random weights included, and by its defaults where weights come with the package. Prints the
maps that differ and how many there are. Ends with 1 if any map differs or is missing on one side.

A change that only moves and renames must end with 0; one that improves a system shows which maps it touches.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
import numpy as np

# What runs in each worktree, with that commit's package and tests: it must suit old layouts and new ones.
LABEL = """
import sys
sys.path[:0] = [".", "tests"]
import numpy as np
import torch
from skimage import data
try:
    from ovss_nb.systems.registry import create, list_systems
    from ovss_nb.encoders.registry import create_encoder
except ImportError:
    from ovss_nb.predict import create, create_encoder, list_systems
import test_systems

photographs = dict(
    chelsea="cat, blanket, wall",
    coffee="cup, saucer, spoon, table",
    rocket="rocket, sky, tower",
    astronaut="woman, flag, rocket, space suit",
)
small = getattr(test_systems, "OPTIONS", None) or test_systems.KNOBS
encoder, maps = create_encoder("lite", "cpu"), {}
for name in (name for name in list_systems() if name in small):
    for kind, options in (("tests", small[name]), ("defaults", dict(templates="single"))):
        torch.manual_seed(0)
        try:
            system = create(name, encoder, cache=None, **options)
        except ValueError as error:
            absent = "no weights", "needs a proxy", "needs regions"
            if kind == "defaults" and any(part in str(error) for part in absent):
                continue
            raise
        for photograph, words in photographs.items():
            for vocabulary in (words.split(", "), "VOC-21"):
                of = "own words" if isinstance(vocabulary, list) else vocabulary
                labels = system.segment(getattr(data, photograph)(), vocabulary).labels
                maps[f"{name}, {kind}, {photograph}, {of}"] = labels.astype(np.int32)
        print(f"  {name}, {kind}", flush=True)
np.savez_compressed(sys.argv[1], **maps)
"""


def label_maps(commit: str, folder: Path) -> dict[str, np.ndarray]:
    "The label maps of one commit, by what they show."
    tree, file = folder / commit.replace("/", "-"), folder / f"{commit.replace('/', '-')}.npz"
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, commit], check=True)
    # The package's data must be that commit's, whatever environment this runs in.
    (tree / "ovss_nb/data").symlink_to("../data")
    try:
        print(commit, flush=True)
        subprocess.run([sys.executable, "-c", LABEL, file], cwd=tree, check=True)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", tree], check=True)
    with np.load(file) as maps:
        return dict(maps)


def differences(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> list[str]:
    "A line for each map that is not the same on both sides."
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            lines.append(f"{name}: only {'after' if name in new else 'before'}")
        elif old[name].shape != new[name].shape:
            lines.append(f"{name}: {old[name].shape} before, {new[name].shape} after")
        elif wrong := int((old[name] != new[name]).sum()):
            lines.append(f"{name}: {wrong} of {old[name].size} pixels differ")
    return lines


def main(old: str, new: str = "HEAD") -> int:
    with tempfile.TemporaryDirectory() as folder:
        before, after = (label_maps(commit, Path(folder)) for commit in (old, new))
    lines = differences(before, after)
    print("\n".join(lines + [f"{len(before)} maps before, {len(after)} after, {len(lines)} differ"]))
    return 1 if lines else 0


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
