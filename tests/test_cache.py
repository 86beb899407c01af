"The disk cache: names, damage, two processes at once, and a process that is killed."

import os, signal, subprocess, sys, time, warnings
from pathlib import Path

import numpy as np
import platformdirs
import pytest

from ovss_nb.core.cache import Cache, CacheError
from ovss_nb.core.files import OverwriteError, atomic_path, check_writable, file_digest, refuse_overwrite

# What the subprocesses run. Arrays for seed s are functions of s, so a reader can tell a wrong or torn entry.
CHILD = """
import sys, warnings
import numpy as np
from ovss_nb.core.cache import Cache
warnings.simplefilter("error") # a damaged entry is a warning: here it must not happen
cache, rounds = Cache(sys.argv[1]), int(sys.argv[2])
def arrays(seed): return {"a": np.full(50_000, seed, np.float32), "b": np.arange(seed, seed + 300)}
print("ready", flush=True)
found = 0
for i in range(rounds) if rounds else iter(int, 1):
    for seed in range(4):
        got = cache.get(cache.key("entry", seed))
        if got is not None:
            found += 1
            for name, want in arrays(seed).items():
                assert got[name].dtype == want.dtype and (got[name] == want).all(), (seed, name)
        cache.put(cache.key("entry", seed), arrays(seed))
print(found)
"""


def child(root, rounds):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(root), str(rounds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_round_trip(tmp_path):
    cache = Cache(tmp_path / "deep" / "store")
    arrays = {
        "f": np.random.default_rng(0).normal(size=(3, 4)),
        "half": np.ones(5, np.float16),
        "mask": np.array([[True], [False]]),
        "scalar": np.array(7),
        "empty": np.zeros((0, 3), np.uint8),
        "fortran": np.asfortranarray(np.arange(12).reshape(3, 4)),
        "strided": np.arange(20)[::3],
        "big": np.arange(5, dtype=">i4"),
    }
    key = cache.key("x", 1)
    assert cache.get(key) is None and not cache.root.exists()
    cache.put(key, arrays, {"made by": "test"})
    got = cache.get(key)
    assert set(got) == set(arrays)
    for name, want in arrays.items():
        assert (
            got[name].shape == want.shape
            and (got[name] == want).all()
            and got[name].dtype == want.dtype.newbyteorder("<")
        )
    cache.put(key, {})
    assert cache.get(key) == {}
    assert [file.name for file in cache.root.iterdir()] == [f"{key}.safetensors"]


def test_keys():
    key = Cache.key
    parts = [
        (),
        (None,),
        ((),),
        ([[]],),
        ("",),
        ("a", "b"),
        ("ab",),
        ("a", ("b",)),
        (("a", "b"),),
        (1,),
        ("1",),
        (1.0,),
        (True,),
        (b"1",),
        (-0.0,),
        (0.0,),
        ({},),
        ({"a": "b"},),
        ({"a": ["b"]},),
        ({"a": 1, "b": 2},),
        ({"a": 2, "b": 1},),
        (np.arange(6),),
        (np.arange(6).reshape(2, 3),),
        (np.arange(6).reshape(3, 2),),
        (np.arange(6, dtype=np.int32),),
        (np.arange(6.0),),
        ("\u00e9",),
        ("e\u0301",),
        ("1:a",),
        (10**30,),
    ]
    assert len({key(*p) for p in parts}) == len(parts)
    assert key({"a": 1, "b": (2,)}) == key({"b": [2], "a": 1})
    assert (
        key(np.arange(6).reshape(2, 3))
        == key(np.asfortranarray(np.arange(6).reshape(2, 3)))
        == key(np.arange(6, dtype=">i8").reshape(2, 3))
    )
    assert key(np.float64(0.5), np.int32(3)) == key(0.5, 3)
    # fixed for ever: a change of the encoding would silently orphan everybody's cache
    assert (
        key("cat", 1, 0.5, None, b"x", [True], {"k": np.arange(3, dtype=np.int16)})
        == "dec9fd84d2f9212c29f81a969efa820543a6b373ee6abd3e0c3b11046fe58e0a"
    )
    for bad in ({1, 2}, object(), np.array([None]), np.array(["a"]), Path("x")):
        with pytest.raises(CacheError, match="cache key"):
            key(bad)


def test_place(tmp_path, monkeypatch):
    monkeypatch.setenv("OVSS_NB_CACHE", str(tmp_path / "env"))
    assert Cache(tmp_path / "arg").root == tmp_path / "arg" and Cache().root == tmp_path / "env"
    monkeypatch.setenv("OVSS_NB_CACHE", "")
    assert Cache().root == Path(platformdirs.user_cache_dir("ovss_nb"))
    assert Cache("~/x").root == Path.home() / "x"


def test_bad_input(tmp_path):
    cache = Cache(tmp_path)
    for bad in ("../../etc/passwd", "", "A" * 64, cache.key("x") + "\n"):
        with pytest.raises(CacheError, match="not a cache key"):
            cache.get(bad)
    for arrays in ({"a": [1, 2]}, {1: np.ones(2)}, {"a": np.array([None])}, {"a": np.array(["x"])}):
        with pytest.raises(CacheError, match="numeric NumPy array"):
            cache.put(cache.key("x"), arrays)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match="OVSS_NB_CACHE"):
        Cache(tmp_path / "file" / "store").put(cache.key("x"), {"a": np.ones(2)})


def test_damaged_entries_are_missing_and_replaced(tmp_path):
    cache, arrays = Cache(tmp_path), {"a": np.arange(100.0), "b": np.ones((2, 3), np.uint8)}
    key = cache.key("x")
    cache.put(key, arrays)
    whole, rng = cache.path(key).read_bytes(), np.random.default_rng(0)
    damaged = [b"", whole[:5], whole[:-1], whole[:200], whole + b"x", b"\xff" * len(whole)]
    for at in rng.choice(len(whole), 60, replace=False):
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :])
    for data in damaged:
        cache.path(key).write_bytes(data)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = cache.get(key)
        # a flipped bit in the padding of the header does no harm; any other must be noticed
        if got is None:
            assert str(cache.path(key)) in str(caught[0].message)
        else:
            assert (
                not caught
                and got.keys() == arrays.keys()
                and all((got[n] == arrays[n]).all() and got[n].dtype == arrays[n].dtype for n in arrays)
            )
        if len(data) != len(whole):
            assert got is None
        cache.put(key, arrays)
        assert (cache.get(key)["a"] == arrays["a"]).all()


def test_two_processes(tmp_path):
    both = [child(tmp_path, 40) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    for process, (out, err) in zip(both, outputs):
        assert process.returncode == 0, err
        assert int(out.split()[1]) >= 39 * 4  # from the second round on everything was there
    assert len(list(tmp_path.iterdir())) == 4  # no temporary file stayed


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a POSIX signal")
def test_kill_leaves_no_corrupt_entry(tmp_path):
    cache, seen = Cache(tmp_path), 0
    for turn in range(6):
        writer = child(tmp_path, 0)  # writes until it is killed
        assert writer.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.03 * turn)
        assert writer.poll() is None, writer.stderr.read()
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for seed in range(4):
                got = cache.get(cache.key("entry", seed))
                if got is not None:
                    seen += 1
                    assert (
                        (got["a"] == seed).all()
                        and got["a"].shape == (50_000,)
                        and (got["b"] == np.arange(seed, seed + 300)).all()
                    )
    assert seen > 0


def test_atomic_path(tmp_path):
    target = tmp_path / "labels.png"
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".png" and temporary != target
        temporary.write_bytes(b"one")
        assert not target.exists()
    assert target.read_bytes() == b"one"
    with pytest.raises(ZeroDivisionError):
        with atomic_path(target) as temporary:
            temporary.write_bytes(b"two")
            1 / 0
    assert target.read_bytes() == b"one" and list(tmp_path.iterdir()) == [target]
    with pytest.raises(FileNotFoundError):
        with atomic_path(target):
            pass  # nothing was written
    assert target.read_bytes() == b"one"
    with pytest.raises(FileNotFoundError, match="create it first"):
        with atomic_path(tmp_path / "no" / "labels.png"):
            pass
    # a long name stays within the limit
    with atomic_path(str(tmp_path / ("n" * 240 + ".json"))) as temporary:
        temporary.write_text("{}")
    assert (tmp_path / ("n" * 240 + ".json")).exists()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(IsADirectoryError) as found:
        with atomic_path(tmp_path / "folder.png") as temporary:
            temporary.write_bytes(b"one")
    # the name that was meant
    assert found.value.filename == str(tmp_path / "folder.png") and str(temporary) not in str(found.value)


@pytest.mark.parametrize(
    "way", ["same", "relative", "dots", "symlink", "hard link", "linked folder", "loop of links"]
)
def test_an_input_is_never_written_over(tmp_path, monkeypatch, way):
    "By whatever path or link it is reached; a folder counts like a file."
    (tmp_path / "in").mkdir()
    source = tmp_path / "in/ortho.tif"
    source.write_bytes(b"imagery")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "soft.tif").symlink_to(source)
    os.link(source, tmp_path / "hard.tif")
    (tmp_path / "linked").symlink_to("in", target_is_directory=True)
    (tmp_path / "second").symlink_to("soft.tif")
    out = dict(
        zip(
            ["same", "relative", "dots", "symlink", "hard link", "linked folder", "loop of links"],
            [
                source,
                "in/ortho.tif",
                "./in/../in/ortho.tif",
                "soft.tif",
                "hard.tif",
                "linked/ortho.tif",
                "second",
            ],
        )
    )[way]
    with pytest.raises(OverwriteError, match="another place for the output"):
        refuse_overwrite(out, "VOC-21", None, 3, "none.tif", source)
    refuse_overwrite(tmp_path / "in/labels.tif", source)
    with pytest.raises(OverwriteError):
        refuse_overwrite("linked", tmp_path / "in")
    assert source.read_bytes() == b"imagery"


def test_a_link_is_replaced_not_what_it_points_to(tmp_path):
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "link").symlink_to("kept")
    with atomic_path(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (
        (tmp_path / "link").read_text() == "new"
        and not (tmp_path / "link").is_symlink()
        and (tmp_path / "kept").read_text() == "kept"
    )


def test_a_digest_is_of_the_bytes_alone(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(256)) * 5000)
    before, times = file_digest(tmp_path / "a"), (tmp_path / "a").stat()
    (tmp_path / "a").rename(tmp_path / "b")
    assert file_digest(tmp_path / "b") == before
    (tmp_path / "b").write_bytes(bytes(range(255, -1, -1)) * 5000)
    os.utime(tmp_path / "b", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_digest(tmp_path / "b") != before and (tmp_path / "b").stat().st_size == times.st_size


@pytest.mark.parametrize("place", ["file/store", "/proc/ovss/store", "disk"])
def test_without_a_place_for_the_cache_work_goes_on_and_says_so_once(place, tmp_path):
    "Text is encoded with a cache whose folder cannot be made, or whose disk is full."
    from doubles import Colors
    from ovss_nb.text.text_bank import encode_text

    (tmp_path / "file").write_text("in the way")
    disk = tmp_path / "disk"
    disk.mkdir()
    if place == "disk":
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4k", "none", disk], capture_output=True
        ).returncode:
            pytest.skip("a small disk cannot be mounted here")
        (disk / "big").write_bytes(bytes(4096))
    try:
        cache, encoder = Cache(tmp_path / place), Colors()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            banks = [encode_text(encoder, ["red", "green", "blue"], cache=cache) for _ in range(2)]
        assert (banks[0].embeddings == encode_text(encoder, ["red", "green", "blue"]).embeddings).all()
        assert (
            len(caught) == 1
            and str(tmp_path / place) in str(caught[0].message)
            and "without" in str(caught[0].message)
        )
        with pytest.raises(CacheError, match="OVSS_NB_CACHE"):
            cache.put(cache.key("x"), {"a": np.ones(2)})
    finally:
        if place == "disk":
            subprocess.run(["umount", disk])


@pytest.mark.parametrize("place", ["file/x", "/proc/ovss/x", ".", "n" * 300, os.devnull])
def test_check_writable_leaves_nothing(place, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError) as e:
        check_writable(tmp_path / place)
    assert e.value.filename == str(tmp_path / place) and e.value.strerror
    check_writable(tmp_path / "new" / "x")
    check_writable(tmp_path / "file")
    assert (
        sorted(file.name for file in tmp_path.iterdir()) == ["file"]
        and (tmp_path / "file").read_text() == "in the way"
    )
