"""Image files of every kind: each becomes the right RGB image, or an error that names row and file."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.data.images import MAX_SIDE, load_image, load_image_processor
from llava.data.pixels import ASPECT_RATIOS, preprocess_image
from llava.errors import BadImageError
from tests.golden import golden_dir

GRADIENT = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def saved(folder: Path, image: Image.Image, name: str, **options: object) -> np.ndarray:
    """Pixels of the image after writing and loading it; no warning may be given on the way."""
    image.save(folder / name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_image(folder, name, "row 0")
    assert loaded.mode == "RGB"
    return np.asarray(loaded)


def test_modes_of_eight_bits(tmp_path: Path) -> None:
    rgb = Image.fromarray(COLOURS)
    grey = np.repeat(GRADIENT[..., None], 3, axis=-1)
    assert np.array_equal(saved(tmp_path, rgb, "rgb.png"), COLOURS)
    assert np.array_equal(saved(tmp_path, Image.fromarray(GRADIENT), "grey.png"), grey)
    grey_alpha = Image.merge("LA", (Image.fromarray(GRADIENT), Image.fromarray(GRADIENT[::-1].copy())))
    assert np.array_equal(saved(tmp_path, grey_alpha, "grey_alpha.png"), grey)
    with_alpha = rgb.copy()
    with_alpha.putalpha(Image.fromarray(GRADIENT))
    assert np.array_equal(saved(tmp_path, with_alpha, "rgba.png"), COLOURS), "transparency is dropped, not blended"
    cmyk = saved(tmp_path, rgb.convert("CMYK"), "cmyk.tif")
    assert np.abs(cmyk.astype(int) - COLOURS).max() <= 1
    bits = saved(tmp_path, Image.fromarray(GRADIENT > 127), "bits.png")
    assert np.array_equal(bits[..., 0], np.where(GRADIENT > 127, 255, 0))


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(0, 256, 4)) + bytes(192)])
def test_palettes(transparency: object, tmp_path: Path) -> None:
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8), mode="L").convert("P")
    colours = np.random.default_rng(1).integers(0, 256, (256, 3), dtype=np.uint8)
    palette.putpalette(colours.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    assert np.array_equal(saved(tmp_path, palette, "palette.png", **options), colours[:64].reshape(8, 8, 3))


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_sixteen_bits_are_scaled_and_not_cut_off(name: str, tmp_path: Path) -> None:
    """Pillow alone makes everything from 256 on white."""
    deep = GRADIENT.astype(np.uint16) * 257
    pixels = saved(tmp_path, Image.fromarray(deep), name)
    assert np.array_equal(pixels, np.repeat(GRADIENT[..., None], 3, axis=-1))
    with Image.open(tmp_path / name) as image:
        assert (np.asarray(image.convert("RGB")) == 255).mean() > 0.9


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_of_unknown_range_are_refused(dtype: type, tmp_path: Path) -> None:
    Image.fromarray(GRADIENT.astype(dtype)).save(tmp_path / "numbers.tif")
    with pytest.raises(BadImageError, match=r"row 5: image .*numbers\.tif .*range is unknown"):
        load_image(tmp_path, "numbers.tif", "row 5")


@pytest.mark.parametrize("name", ["moving.gif", "moving.png", "moving.webp"])
def test_the_first_frame_of_an_animation(name: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    pixels = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(pixels, np.asarray(frames[0]))


def test_orientation_of_cameras_is_ignored_as_in_the_original(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    image = Image.fromarray(np.zeros((4, 8, 3), dtype=np.uint8))
    assert saved(tmp_path, image, "turned.png", exif=exif).shape == (4, 8, 3)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has hardly any pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def eps() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "UnidentifiedImageError"),
        (png_header(0, 8), " be read: "),
        (png_header(8, 0), " be read: "),
        (png_header(8, 8), "OSError"),
        (png_header(50_000, 50_000), "DecompressionBombError"),
        (png_header(10_000, 16_100), "DecompressionBombError: 161000000 pixels"),
        (png_header(MAX_SIDE + 1, 200), f"sides may be 1 to {MAX_SIDE}"),
        (png_header(10, 2_001), "at most 200 times"),
        (eps(), "external program"),
    ],
    ids=["empty", "no width", "no height", "no pixels", "bomb", "small bomb", "long", "thin", "eps"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # Pillow warns; we refuse
def test_refused_from_the_header(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file.png").write_bytes(content)
    with pytest.raises(BadImageError, match=rf"data\.json, row 3: image .*file\.png cannot.*{message}"):
        load_image(tmp_path, "file.png", "data.json, row 3")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_files(kind: str, tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "whole", kind)
    content = (tmp_path / "whole").read_bytes()
    assert load_image(tmp_path, "whole").size == (64, 64)
    (tmp_path / "half").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadImageError, match=r"row 3: image .*half cannot be read"):
        load_image(tmp_path, "half", "row 3")


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """An image folder with links into it, out of it, and to a file outside; `x.png` outside is red, inside blue."""
    outside, folder = tmp_path / "outside", tmp_path / "images"
    (outside / "deeper").mkdir(parents=True)
    (folder / "sub").mkdir(parents=True)
    for place, colour in ((outside, "red"), (outside / "deeper", "red"), (folder / "sub", "blue"), (folder, "blue")):
        Image.new("RGB", (8, 8), colour).save(place / "x.png")
    (folder / "link").symlink_to(outside)
    (folder / "sub" / "link").symlink_to(outside / "deeper")
    (folder / "inside").symlink_to(folder / "sub")
    (folder / "file.png").symlink_to(outside / "x.png")
    (folder / "hop").symlink_to(folder / "sub" / "link")
    (folder / "gone.png").symlink_to(outside / "absent.png")
    return folder


OUT_OF_IT = ("link/x.png", "sub/link/x.png", "inside/link/x.png", "file.png", "hop/x.png", "link/deeper/x.png")
INTO_IT = ("x.png", "sub/x.png", "inside/x.png", "sub/../x.png")
ESCAPES = ("../outside/x.png", "sub/../../outside/x.png", "link/../../outside/x.png", "./../images/../outside/x.png")


def test_links_may_lead_out_of_the_folder_of_a_data_set(linked: Path) -> None:
    for name in OUT_OF_IT:
        assert load_image(linked, name, "row 0").getpixel((0, 0)) == (255, 0, 0)
    for name in INTO_IT:
        assert load_image(linked, name, "row 0").getpixel((0, 0)) == (0, 0, 255)
    (linked.parent / "linked").symlink_to(linked)
    assert load_image(linked.parent / "linked", "link/x.png").size == (8, 8), "the image folder itself may be a link"
    with pytest.raises(BadImageError, match=r"row 0: image 'gone\.png' is missing"):
        load_image(linked, "gone.png", "row 0")


def test_a_server_follows_no_link_out_of_its_folder(linked: Path) -> None:
    for name in OUT_OF_IT:
        with pytest.raises(BadImageError, match=r"row 0: image .* lies outside .*a link leads to"):
            load_image(linked, name, "row 0", follow_links=False)
    for name in INTO_IT:
        assert load_image(linked, name, follow_links=False).getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("follow_links", [True, False])
def test_a_name_does_not_leave_the_folder(follow_links: bool, linked: Path) -> None:
    """`..` behind a link is a step back in the name, never in what the link leads to."""
    for name in ESCAPES:
        with pytest.raises(BadImageError, match="lies outside the image folder"):
            load_image(linked, name, follow_links=follow_links)
    (linked.parent / "secret.png").write_bytes((linked / "x.png").read_bytes())
    with pytest.raises(BadImageError, match="is missing"):  # beside `outside`, where the link leads
        load_image(linked, "link/../secret.png", follow_links=follow_links)
    assert load_image(linked, "link/../x.png", follow_links=follow_links).getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("aspect_ratio", ASPECT_RATIOS)
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (2, 200), (200, 3), (3, 5)])
def test_tiny_and_thin_images_keep_their_colours(aspect_ratio: str, size: tuple[int, int]) -> None:
    """A side of 1 or 3 pixels could be taken for the colour channels."""
    processor = load_image_processor(golden_dir("llava") / "tiny-clip")
    pixels = preprocess_image(Image.new("RGB", size, (255, 0, 0)), processor, aspect_ratio, [(28, 56), (56, 28)])
    tile = pixels if aspect_ratio != "anyres" else pixels[0]
    assert tile.shape == (3, 28, 28)
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    red, green, blue = tile[:, 14, 14].numpy() * std + mean
    if aspect_ratio == "pad":  # a thin image is mixed with the padding
        assert red > max(green, blue) + 0.1
    else:
        assert (red, green, blue) == pytest.approx((1, 0, 0), abs=1e-5)
