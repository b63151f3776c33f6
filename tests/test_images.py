"""Pictures of every kind become uint8 RGB; everything else is refused by name."""

import io
import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from embervlm.data import images
from embervlm.data.images import ImageError, PictureCache, load_image, padded_area

pytestmark = pytest.mark.filterwarnings("error")
RED = (255, 0, 0)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.fixture
def photo():
    """40 x 20: left half red, right half blue, with a green top left corner."""
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, :20] = RED
    pixels[:, 20:] = (0, 0, 255)
    pixels[:8, :8] = (0, 255, 0)
    return Image.fromarray(pixels)


def test_png_is_read_exactly(photo, tmp_path):
    photo.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), encoded(photo), photo, np.asarray(photo)):
        picture = load_image(source)
        assert picture.dtype == np.uint8 and picture.flags.writeable
        np.testing.assert_array_equal(picture, np.asarray(photo))


def test_size_gives_a_square(photo):
    picture = load_image(photo, size=10)
    assert picture.shape == (10, 10, 3)
    np.testing.assert_array_equal(picture[8, 1], RED)
    np.testing.assert_array_equal(picture[8, 8], (0, 0, 255))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [None, 10])
def test_exif_orientation_is_applied(photo, orientation, size):
    inverse = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = photo
    if (turn := inverse.get(orientation, images._TRANSPOSE.get(orientation))) is not None:
        stored = photo.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = load_image(encoded(stored, exif=exif), size=size)
    np.testing.assert_array_equal(picture, load_image(photo, size=size))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (3, 2), 7), (7, 7, 7)),
        (Image.new("1", (3, 2), 1), (255, 255, 255)),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 255)), RED),
        (Image.new("LA", (3, 2), (9, 0)), (255, 255, 255)),
        (Image.new("LA", (3, 2), (9, 255)), (9, 9, 9)),
        (Image.new("RGB", (3, 2), RED).convert("P"), RED),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 0)).quantize(), (255, 255, 255)),
        (Image.fromarray(np.full((2, 3), 65535, dtype=np.uint16)), (255, 255, 255)),
        (Image.fromarray(np.full((2, 3), 257 * 100, dtype=np.uint16)), (100, 100, 100)),
    ],
    ids=[
        "grey",
        "bilevel",
        "clear",
        "opaque",
        "grey-clear",
        "grey-opaque",
        "palette",
        "palette-clear",
        "white16",
        "grey16",
    ],
)
def test_every_mode_becomes_rgb(image, expected):
    for source in (image, encoded(image)):
        for size in (None, 5):
            picture = load_image(source, size=size)
            np.testing.assert_array_equal(picture, np.broadcast_to(np.uint8(expected), picture.shape))


def test_cmyk_jpeg_becomes_rgb():
    picture = load_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(picture.astype(int) - RED).max() < 8


def test_png_with_one_transparent_colour_is_laid_on_white():
    picture = load_image(encoded(Image.new("RGB", (2, 2), RED), transparency=RED))
    np.testing.assert_array_equal(picture, np.full((2, 2, 3), 255))


def test_palette_with_transparency_bytes_raises_no_warning():
    image = Image.new("P", (2, 2), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    np.testing.assert_array_equal(load_image(encoded(image, transparency=b"\x00\xff"))[0, 0], (255, 255, 255))


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, (0, 0, 255))]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(load_image(animation)[0, 0], RED)


def test_one_pixel_is_a_picture():
    picture = load_image(Image.new("RGB", (1, 1), RED), size=8)
    np.testing.assert_array_equal(picture, np.broadcast_to(np.uint8(RED), (8, 8, 3)))


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3), (4, 6, 4)])
def test_float_array_in_zero_to_one_equals_its_uint8_picture(shape):
    array = np.full(shape, 0.2, dtype=np.float32)
    if shape[-1] == 4:
        array[..., 3] = 1
    np.testing.assert_array_equal(load_image(array), np.full((4, 6, 3), 51))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"shape \[3, 8, 8\] is not .*; move the channels last"),
        (np.zeros((0, 8, 3), np.uint8), "it is empty"),
        (np.zeros((4, 4), np.int64), "values of type int64; convert"),
        (np.full((4, 4), 200.0), "float values from 200.0 to 200.0; scale"),
        (np.full((4, 4), np.nan), "float values from nan to nan; scale"),
    ],
)
def test_array_that_is_no_picture_is_refused(array, message):
    with pytest.raises(ImageError, match=message):
        load_image(array)


def bad_file(tmp_path, kind):
    path = tmp_path / f"{kind}.png"
    whole = encoded(Image.effect_noise((64, 64), 50))
    content = {"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"not a picture", "header": whole[:20]}
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(content[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "No such file or directory; correct the path"),
        ("empty", "the file is empty; copy it again"),
        ("truncated", "not readable as a picture .*; copy it again"),
        ("header", "; (copy it again|convert it)"),
        ("text", "not a picture in a format that Pillow reads; convert"),
        ("folder", "is a folder; give the path of one picture"),
    ],
)
def test_unusable_file_is_refused_by_name(tmp_path, kind, message):
    path = bad_file(tmp_path, kind)
    with pytest.raises(ImageError, match=message) as caught:
        load_image(path, size=32)
    assert str(path) in str(caught.value)


def test_truncated_jpeg_is_refused(photo):
    whole = encoded(photo.resize((400, 400)), "JPEG")
    with pytest.raises(ImageError, match=r"street\.jpg: not readable as a picture"):
        load_image(whole[: len(whole) // 2], size=32, name="street.jpg")


def test_url_is_refused_with_what_to_do():
    with pytest.raises(ImageError, match=r"http://example\.org/a\.jpg: URLs are not downloaded; download"):
        load_image("http://example.org/a.jpg")


@pytest.mark.parametrize("source", [None, 3, b"", ["a.png"], "a\0b.png"])
def test_other_sources_are_refused(source):
    with pytest.raises(ImageError):
        load_image(source)


def test_pillow_image_without_pixels_is_refused():
    with pytest.raises(ImageError, match="0 x 4 pixels"):
        load_image(Image.new("RGB", (0, 4)))


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_wrong_size_is_refused(photo, size):
    with pytest.raises(ValueError, match="size="):
        load_image(photo, size=size)


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(encoded(Image.new("1", (20_000, 10_001))))  # above Pillow's own error limit as well
    start = time.process_time()
    with pytest.raises(ImageError, match=r"bomb\.png: 20000 x 10001 pixels, more than 200,000,000; scale it down"):
        load_image(path, size=32)
    assert time.process_time() - start < 0.5
    assert Image.MAX_IMAGE_PIXELS is not None


def test_hundred_megapixel_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path, monkeypatch):
    path = tmp_path / "big.jpg"
    Image.new("L", (10_000, 10_000), 90).save(path)
    decoded = []
    reduced = images._reduced
    monkeypatch.setattr(images, "_reduced", lambda image, size: decoded.append(image.size) or reduced(image, size))
    picture = load_image(path, size=224)
    assert abs(picture.astype(int) - 90).max() <= 1 and decoded == [(1250, 1250)]


def test_large_png_is_reduced_to_the_same_picture_as_a_plain_resize():
    ramp = np.linspace(0, 255, 900 * 700 * 3).reshape(700, 900, 3).astype(np.uint8)
    expected = np.asarray(Image.fromarray(ramp).resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert abs(load_image(ramp, size=32) - expected).max() <= 2


# ---- padding


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_padded_picture_keeps_its_aspect_ratio_in_the_middle_of_the_colour(photo, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    photo.save(path, exif=exif)
    picture = load_image(path, size=16, fill=(1, 2, 3))
    left, top, right, bottom = (round(16 * side) for side in padded_area(str(path), 16))
    assert (left, top, right, bottom) == ((0, 4, 16, 12) if orientation == 1 else (4, 0, 12, 16))
    filled = (picture == (1, 2, 3)).all(-1)
    assert filled.sum() == 128 and not filled[top:bottom, left:right].any()
    upright = load_image(photo if orientation == 1 else photo.rotate(-90, expand=True))
    expected = np.asarray(Image.fromarray(upright).resize((right - left, bottom - top), Image.Resampling.BILINEAR))
    assert abs(picture[top:bottom, left:right].astype(int) - expected).max() <= 1


def test_padded_and_squashed_pictures_are_cached_apart(paths, tmp_path):
    for fill in (None, (0, 0, 0), (9, 9, 9)):
        cache = PictureCache(paths, 16, tmp_path / "cache", fill)
        np.testing.assert_array_equal(cache[paths[1]], load_image(paths[1], size=16, fill=fill))
    assert cache.area(paths[1]) == (0, 2 / 16, 1, 14 / 16)
    assert len(os.listdir(tmp_path / "cache")) == 3


# ---- the cache


@pytest.fixture
def paths(tmp_path):
    found = []
    for i in range(5):
        found.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (9, 7), (i * 10, 0, 0)).save(found[-1])
    return found


@pytest.mark.parametrize("on_disk", [False, True])
def test_cache_gives_the_loaded_picture(paths, tmp_path, on_disk):
    cache = PictureCache([*paths, paths[0]], 16, tmp_path / "cache" if on_disk else None)
    assert len(cache) == 5 and cache.index(paths[3]) == 3 and cache.array.shape == (5, 16, 16, 3)
    for path in paths:
        np.testing.assert_array_equal(cache[path], load_image(path, size=16))
        assert np.shares_memory(cache[path], cache.array)


def test_second_cache_reads_the_file_of_the_first(paths, tmp_path, monkeypatch):
    PictureCache(paths, 16, tmp_path / "cache")
    monkeypatch.setattr(images, "load_image", lambda *args, **kwargs: pytest.fail("decoded again"))
    assert PictureCache(paths, 16, tmp_path / "cache")[paths[2]][0, 0, 0] == 20


def test_changed_picture_or_size_gives_a_new_cache(paths, tmp_path):
    PictureCache(paths, 16, tmp_path / "cache")
    Image.new("RGB", (9, 7), (200, 0, 0)).save(paths[2])
    os.utime(paths[2], ns=(1, 1))
    assert PictureCache(paths, 16, tmp_path / "cache")[paths[2]][0, 0, 0] == 200
    assert PictureCache(paths, 8, tmp_path / "cache").shape == (5, 8, 8, 3)
    assert len(os.listdir(tmp_path / "cache")) == 3


def test_cache_file_that_was_cut_off_is_built_again(paths, tmp_path):
    PictureCache(paths, 16, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:500])
    assert PictureCache(paths, 16, tmp_path / "cache")[paths[4]][0, 0, 0] == 40


def test_all_unreadable_pictures_are_named_and_nothing_is_left(paths, tmp_path):
    bad = [str(bad_file(tmp_path, kind)) for kind in ("truncated", "missing")]
    with pytest.raises(ImageError) as caught:
        PictureCache([bad[0], *paths, bad[1]], 16, tmp_path / "cache")
    assert [problem.split(":")[0] for problem in caught.value.problems] == bad
    assert not os.listdir(tmp_path / "cache")


def test_several_builders_at_once_agree(paths, tmp_path):
    arrays = []
    builders = [
        threading.Thread(target=lambda: arrays.append(PictureCache(paths, 16, tmp_path / "cache").array))
        for _ in range(4)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(arrays) == 4 and all(np.array_equal(array, arrays[0]) for array in arrays)
    assert len(os.listdir(tmp_path / "cache")) == 1


def test_cache_of_no_pictures_is_empty(tmp_path):
    assert len(PictureCache([], 16, tmp_path / "cache")) == 0


def test_unknown_path_is_named(paths):
    with pytest.raises(KeyError, match=r"gone.png: not among the 5 cached pictures"):
        PictureCache(paths, 4)["gone.png"]


@pytest.mark.parametrize(
    ("sides", "told"), [([(200, 150)] * 3, ""), ([(90, 90), (300, 640), (600, 800)], "have 300 x 640 pixels or more")]
)
def test_a_run_says_what_is_lost_of_pictures_much_larger_than_the_model_reads(sides, told, tmp_path):
    paths = []
    for number, size in enumerate(sides):
        Image.new("RGB", size).save(path := tmp_path / f"{number}.png")
        paths.append(str(path))
    found = images.told_shrinking(paths, 96)
    assert (told in found) if told else found == ""
    if told:
        assert "the model reads 96 x 96: what is smaller than about 13 pixels there" in found
    assert images.told_shrinking([], 96) == ""
