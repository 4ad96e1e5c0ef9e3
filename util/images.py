"""Images: between uint8 and [-1, 1], decoded, resized, saved, and many in one picture."""
import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageCms, ImageDraw, ImageFont, ImageOps

from util.cli import UserError, reason
from util.files import atomic_write, refuse_special

CELL = 64                                       # pixels: smaller images of a grid are enlarged
TEXT = 20                                       # pixels: the size of labels


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1]. Floats, an autoencoder's latents say, keep their values."""
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    return images.float()


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Floats in [-1, 1] -> uint8: 127.5 x + 128, clipped and truncated, as EDM does."""
    return (127.5 * x + 128).clamp(0, 255).byte()


def open_upright(file) -> tuple[Image.Image, dict]:
    """Decodes an image file: a filename, or a file with its bytes.

    Returns a PIL image of mode L (gray) or RGB, in sRGB: rotated as its EXIF says, with white
    behind transparent parts, and the upper 8 bits of 16. And facts about the file: "opacity", the
    largest of its alpha channel, and "notes", a sentence for each thing that is left alone, with {}
    for how many images it is true of. Raises ValueError where the range of the values is unknown,
    and what Pillow raises for a file that is damaged or too large.
    """
    image = Image.open(file)
    facts = {"notes": [], "opacity": 255}
    if getattr(image, "is_animated", False):
        facts["notes"].append("only the first page is read of {} with several")
    extra = getattr(image, "tag_v2", {338: (1,)}).get(338, ())  # bands of a TIFF; 1 is alpha
    if 0 in extra or image.mode == "RGBA" and not extra:
        facts["notes"].append("only color is read of {} with more bands")
    is_gray = image.mode in ("1", "L", "LA", "I", "I;16", "I;16B") or "LA;16B" in str(image.tile)
    profile = image.info.get("icc_profile")
    has_16_bits_in_mode_i = image.format in ("PNG", "PPM")      # other formats have 32
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode == "I" and not has_16_bits_in_mode_i:
        raise ValueError("32-bit and float images have no standard range: convert it to "
                         "8 bits")
    if image.mode.startswith("I"):                              # 16-bit gray
        values = np.asarray(image)                              # Pillow would clip them to 255
        image = Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8))
    mode = "L" if is_gray else "RGB"
    if profile:
        try:
            image = in_srgb(image, "CMYK" if image.mode == "CMYK" else mode, profile)
        except Exception:                                       # a damaged one, or of other colors
            facts["notes"].append("the color profile cannot be used of {}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        facts["opacity"] = image.getchannel("A").getextrema()[1]
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode), facts


def in_srgb(image: Image.Image, mode: str, icc: bytes) -> Image.Image:
    """An image, whose colors an ICC profile describes, in sRGB: RGBA, or as it is where that would
    change nothing by more than 2 of 255. mode: L for a gray image, else RGB or CMYK. What lcms
    raises for a profile that is damaged or of another kind of image."""
    to_srgb = ImageCms.buildTransform(io.BytesIO(icc), ImageCms.createProfile("sRGB"), mode, "RGB")
    ramp = Image.linear_gradient("L").resize((32, 32))
    colors = Image.merge("RGB", [ramp, ramp.rotate(90), ramp.rotate(180)]).convert(mode)
    converted = ImageCms.applyTransform(colors, to_srgb)
    if np.max(ImageChops.difference(converted, colors.convert("RGB")).getextrema()) <= 2:
        return image
    converted = ImageCms.applyTransform(image.convert(mode), to_srgb)
    converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


def crop_and_resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Center-crop a PIL image to these proportions, then resize with Lanczos, as EDM does."""
    scale = min(image.width / width, image.height / height)
    crop_width = max(1, round(width * scale))
    crop_height = max(1, round(height * scale))
    left = (image.width - crop_width) // 2
    top = (image.height - crop_height) // 2
    cropped = image.crop((left, top, left + crop_width, top + crop_height))
    return cropped.resize((width, height), Image.LANCZOS)


def read_image(filename, channels: int, height: int, width: int,
               resize: bool = True) -> torch.Tensor:
    """One image file, cropped and resized: uint8 [1, channels, height, width], where channels
    is 1 or 3. Raises UserError, and without resize also for another size."""
    refuse_special(filename)
    modes = {1: "L", 3: "RGB"}
    try:
        image, _ = open_upright(filename)
        if not resize and image.size != (width, height):
            raise UserError(f"{filename} has {image.width} x {image.height} pixels, and must have "
                            f"{width} x {height}")
        image = crop_and_resize(image.convert(modes[channels]), width, height)
    except UserError:
        raise
    except Exception as error:                                  # decoders raise anything
        raise UserError(f"{filename} is not an image that can be read as one of {channels} "
                        f"channels: {reason(error)}") from None
    pixels = np.atleast_3d(np.array(image))                                     # [H, W, C]
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()         # [1, C, H, W]


def save_image(pixels: torch.Tensor, filename):
    """Saves uint8 [1 or 3, H, W] as a PNG. Raises UserError for another extension."""
    if not str(filename).lower().endswith(".png"):
        raise UserError(f"{filename} cannot be written: use the extension .png")
    array = pixels.cpu().permute(1, 2, 0).numpy()                               # [H, W, C]
    if len(pixels) == 1:
        array = array[:, :, 0]                                                  # [H, W]
    with atomic_write(filename, flush=False) as f:
        Image.fromarray(array).save(f, "png")


def save_grid(images: torch.Tensor, filename, columns: int = None):
    """Saves uint8 [N, C, H, W] as one picture, each image in a dark border. Small images are
    enlarged, not smoothed. columns: by default as many as rows."""
    if columns is None:
        columns = math.ceil(math.sqrt(len(images)))
    images = enlarge(gray_or_color(images.cpu()), max(1, CELL // images.shape[-1]))
    empty = -len(images) % columns                              # places left in the last row
    tiles = F.pad(images, (1, 1, 1, 1, 0, 0, 0, empty))
    save_image(side_by_side(tiles, columns), filename)


def labeled_grid(rows: list, columns: list, filename):
    """Saves a table of images as one picture, with a label at each row and over each column.

    rows: pairs of a label and a list of images [C, H, W] in [-1, 1], one for each column.
    columns: their labels. Small images are enlarged, not smoothed, until each column holds its
    label.
    """
    row_labels = [label for label, _ in rows]
    images = torch.stack([image for _, row in rows for image in row])
    images = gray_or_color(to_uint8(images).cpu())              # [rows * columns, C, H, W]
    images = images.expand(-1, 3, -1, -1)
    font = label_font()
    gap = 4
    column_width = max(CELL, *(font.getlength(label) + gap for label in columns))
    images = enlarge(images, math.ceil(column_width / images.shape[-1]))
    cells = F.pad(images, (0, gap, 0, gap), value=255)
    table = side_by_side(cells, len(columns))                                   # [3, H, W]

    left = math.ceil(max(font.getlength(label) for label in row_labels)) + 2 * gap
    top = TEXT + 2 * gap
    _, table_height, table_width = table.shape
    canvas = Image.new("RGB", (left + table_width, top + table_height), "white")
    canvas.paste(Image.fromarray(table.permute(1, 2, 0).numpy()), (left, top))
    draw = ImageDraw.Draw(canvas)
    for i, label in enumerate(columns):
        x = left + i * table_width // len(columns)
        draw.text((x, gap), label, fill="black", font=font)
    for i, label in enumerate(row_labels):
        row_top = top + i * table_height // len(rows)
        row_height = table_height // len(rows)
        draw.text((gap, row_top + (row_height - TEXT) // 2), label, fill="black", font=font)
    save_image(torch.from_numpy(np.array(canvas)).permute(2, 0, 1), filename)


def gray_or_color(images: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] -> [N, 1 or 3, H, W]: of data with other channels, the first."""
    channels = 3 if images.shape[1] >= 3 else 1
    return images[:, :channels]


def enlarge(images: torch.Tensor, k: int) -> torch.Tensor:
    """[N, C, H, W] -> [N, C, k H, k W]: each pixel becomes k x k equal ones."""
    return images.repeat_interleave(k, -1).repeat_interleave(k, -2)


def side_by_side(tiles: torch.Tensor, columns: int) -> torch.Tensor:
    """[rows * columns, C, H, W] -> one image [C, rows * H, columns * W]."""
    _, c, h, w = tiles.shape
    table = tiles.reshape(-1, columns, c, h, w)                 # [rows, columns, C, H, W]
    table = table.permute(2, 0, 3, 1, 4)                        # [C, rows, H, columns, W]
    return table.reshape(c, -1, columns * w)


def label_font():
    """Pillow's own font at the size of labels; its small one where Pillow has no FreeType."""
    try:
        return ImageFont.load_default(size=TEXT)
    except (ImportError, OSError):
        return ImageFont.load_default()
