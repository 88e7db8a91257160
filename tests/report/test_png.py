import struct
import sys

import pytest

from counterflow import Costs, dualpipe, simulate
from counterflow.errors import ReportError
from counterflow.report import line_plot, png, schedule_svg, to_png

pytest.importorskip("resvg_py")
needs_font = pytest.mark.skipif(not png.has_font(), reason="needs a font")


def size(data: bytes) -> tuple[int, ...]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


@needs_font
def test_a_png_is_the_picture_at_twice_its_size() -> None:
    schedule = dualpipe(2, 4)
    picture = schedule_svg(schedule, simulate(schedule, Costs()), theme="light")
    width, height = (int(picture.split(f'{side}="')[1].split('"')[0]) for side in ("width", "height"))
    assert size(to_png(picture)) == (2 * width, 2 * height)


@needs_font
def test_a_very_wide_picture_keeps_its_size() -> None:
    schedule = dualpipe(2, 200)
    picture = schedule_svg(schedule, simulate(schedule, Costs()), theme="light")
    assert f'width="{size(to_png(picture))[0]}"' in picture


@needs_font
def test_plots_and_themes_are_rendered() -> None:
    light, dark = (
        to_png(line_plot("title", "x", "y", [1, 2], {"a": [1, 2]}, theme=theme)) for theme in ("light", "dark")
    )
    assert size(light) == size(dark)
    assert light != dark


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ReportError, match=r"not installed; pip install 'counterflow\[png\]', or draw an \.svg"):
        to_png("<svg/>")


def test_without_fonts_one_sentence_says_so_instead_of_a_picture_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "has_font", lambda: False)
    with pytest.raises(ReportError, match=r"this machine has none; install one \(on Debian: apt install"):
        to_png("<svg><text>8</text></svg>")


def test_a_picture_that_might_not_fit_into_memory_is_refused() -> None:
    with pytest.raises(ReportError, match="a PNG of 40000 × 3000 pixels was asked for; it can have 100 million"):
        to_png('<svg xmlns="http://www.w3.org/2000/svg" width="40000" height="3000"/>')
