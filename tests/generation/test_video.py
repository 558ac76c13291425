"""Videos on disk."""

import pytest
from PIL import Image

from vivace.errors import InputError
from vivace.generation import video

av = pytest.importorskip("av")


def test_a_video_carries_its_frames_and_what_made_it(tmp_path):
    path = tmp_path / "out.mp4"
    frames = [Image.new("RGB", (33, 24), (40 * number, 0, 0)) for number in range(5)]
    video.write(frames, path, fps=8, prompt="a fade", seed=3, settings={"frames": 5})
    made = video.facts(path)
    assert (made["prompt"], made["seed"], made["settings"]) == ("a fade", 3, {"frames": 5})
    assert (made["size"], made["frames"]) == ([32, 24], 5)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 8
        reds = [frame.to_ndarray(format="rgb24")[..., 0].mean() for frame in container.decode(video=0)]
    assert reds == pytest.approx([0, 40, 80, 120, 160], abs=6)
    assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"]


def test_a_foreign_file_says_nothing(tmp_path):
    (tmp_path / "odd.mp4").write_text("no video")
    with pytest.raises(InputError, match="does not say how it was made"):
        video.facts(tmp_path / "odd.mp4")
