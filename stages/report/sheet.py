"""The report's first screen as one picture, to share."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from rats.stages.report.showcase import Shot

SIDE = 160
"""Height of a picture, in pixels."""
GAP, LINE, ACROSS = 12, 18, 2
COLOURS = {"good": "#1b7f4d", "bad": "#b3303f", "even": "#626b75"}
INK, SOFT = "#1d2126", "#626b75"


def contact_sheet(headline: str, lead: str, prompts: Sequence[tuple[str, Sequence[Shot]]]) -> bytes:
    """A PNG: the sentence, then two prompts a row with their pictures, names, scores and gains, then `lead`."""
    panels = [_panel(prompt, shots) for prompt, shots in prompts]
    width, height = panels[0].size
    across = min(ACROSS, len(panels))
    inner = across * width + (across - 1) * 2 * GAP
    head, foot = _text(headline, inner, 20, INK), _text(lead, inner, 12, SOFT)
    rows = -(-len(panels) // across)
    tall = head.height + rows * (height + GAP) + foot.height + 4 * GAP
    sheet = Image.new("RGB", (inner + 4 * GAP, tall), "white")
    sheet.paste(head, (2 * GAP, GAP))
    for i, panel in enumerate(panels):
        place = 2 * GAP + i % across * (width + 2 * GAP), 2 * GAP + head.height + i // across * (height + GAP)
        sheet.paste(panel, place)
    sheet.paste(foot, (2 * GAP, tall - foot.height - GAP))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _panel(prompt: str, shots: Sequence[Shot]) -> Image.Image:
    pictures = [_scaled(Image.fromarray(shot.picture)) for shot in shots]
    width = sum(picture.width for picture in pictures) + GAP // 2 * (len(pictures) - 1)
    panel = Image.new("RGB", (width, SIDE + 3 * LINE), "white")
    draw, x = ImageDraw.Draw(panel), 0
    draw.text((0, 0), textwrap.shorten(prompt, width // 7, placeholder=" ..."), INK, _font(14))
    for shot, picture in zip(shots, pictures, strict=True):
        panel.paste(picture, (x, LINE + 3))
        draw.text((x, SIDE + LINE + 5), shot.name, SOFT, _font(12))
        below = (x, SIDE + 2 * LINE + 2)
        draw.text(below, shot.score, INK, _font(12))
        draw.text((below[0] + draw.textlength(shot.score + "  ", _font(12)), below[1]), *_gain(shot))
        x += picture.width + GAP // 2
    return panel


def _gain(shot: Shot) -> tuple[str, str, ImageFont.FreeTypeFont]:
    return shot.gain, COLOURS[shot.tone], _font(12)


def _scaled(picture: Image.Image) -> Image.Image:
    """To the sheet's height; a small picture's pixels stay what they are."""
    size = round(SIDE * picture.width / picture.height), SIDE
    return picture.resize(size, Image.Resampling.NEAREST if picture.height < SIDE else Image.Resampling.LANCZOS)


def _text(text: str, width: int, size: int, colour: str) -> Image.Image:
    """A text in lines of this many pixels."""
    font = _font(size)
    lines = textwrap.wrap(text, max(20, int(width / (0.56 * size))))
    picture = Image.new("RGB", (width, round(1.4 * size) * len(lines)), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(picture).text((0, round(1.4 * size) * i), line, colour, font)
    return picture


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont("DejaVu Sans"), size)
