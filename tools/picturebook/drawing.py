"""Draw a record: scene, figure and medium together."""

from PIL import Image

from dreamloom.picturebook.pen import UNITS_HIGH, Pen
from dreamloom.picturebook.world import Drawing
from tools.picturebook.figures import draw_figure
from tools.picturebook.media import SUPERSAMPLING, Layers, apply_medium
from tools.picturebook.scenes import draw_scene

_HEAD_Y_UNITS = 139
# A wider canvas places the figure off-centre as far as ``shift_x`` says, up to this share of it.
_OFF_CENTRE = 4.0


def draw(drawing: Drawing, size_px: int = 128) -> Image.Image:
    """Draw a square RGB picture; the same record and size always give the same bytes.

    Raises:
        ValueError: If ``size_px`` is below 16.
    """
    return draw_at(drawing, size_px, size_px)


def draw_at(drawing: Drawing, width_px: int, height_px: int) -> Image.Image:
    """Draw an RGB picture of any proportion.

    The figure's size follows the height. A wider canvas shows more of the scene and, as in a
    phone photo, places the figure off-centre on the side of ``shift_x``. A narrow one crops.

    Raises:
        ValueError: If a side is below 16 pixels.
    """
    if min(width_px, height_px) < 16:
        raise ValueError(f"a picture's sides are 16 px or more, got {width_px}x{height_px}")
    fine_width_px, fine_height_px = width_px * SUPERSAMPLING, height_px * SUPERSAMPLING
    scene = draw_scene(
        drawing.scene, drawing.backdrop, drawing.stroke_seed, fine_width_px, fine_height_px
    )
    figure = Image.new("RGBA", scene.size)
    unit_px = fine_height_px / UNITS_HIGH
    spare_px = max(0, fine_width_px - fine_height_px)
    x_px = fine_width_px / 2 + drawing.shift_x * (fine_height_px + _OFF_CENTRE * spare_px)
    y_px = _HEAD_Y_UNITS * unit_px + drawing.shift_y * fine_height_px
    draw_figure(Pen(figure, x_px, y_px, unit_px * drawing.zoom), drawing)
    return apply_medium(Layers(scene, figure), drawing.medium, drawing.stroke_seed)
