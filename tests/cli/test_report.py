"""``requant report``: text, JSON and a page that a browser draws."""

import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import write_model
from tests.support.commands import Result
from tests.support.number_formats import BF16

Requant = Callable[..., Result]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
EVIL = "model.<script>window.hit=1</script>&\"'.x"


@pytest.fixture
def output(model: Path, tmp_path: Path, requant: Requant) -> Path:
    assert requant("convert", model, tmp_path / "out", "--layout", "keep", "--quiet").code == 0
    return tmp_path / "out"


def test_text(output: Path, requant: Requant) -> None:
    result = requant("report", output)
    assert (result.code, result.err) == (0, "")
    assert re.search(r"^quantized  BF16  affine 4-bit g64 +re-encoded +3 ", result.out, re.M)
    assert re.search(r"^q_proj +2 ", result.out, re.M)
    assert f"check: requant verify SOURCE {output}\n" in result.out


def test_json(output: Path, requant: Requant) -> None:
    found = json.loads(requant("report", output, "--json").out)
    assert found["schema"] == 1
    assert found["bits_per_weight"] == pytest.approx(8 * found["bytes_out"] / found["parameters"])
    assert {layer["kind"] for layer in found["layers"]} >= {"q_proj", "down_proj", "lm_head"}


def test_no_record_is_an_error(model: Path, requant: Requant) -> None:
    result = requant("report", model, "--html", model / "page.html")
    assert result.code == 1
    assert "requant.json: is missing: requant did not write this folder" in result.err
    assert not (model / "page.html").exists()


def test_a_page_that_cannot_be_written(output: Path, requant: Requant) -> None:
    result = requant("report", output, "--html", output / "no" / "page.html")
    assert result.code == 1
    assert "No such file or directory" in result.err


@pytest.fixture
def page(output: Path, requant: Requant) -> Path:
    html = output.parent / "page.html"
    assert requant("report", output, "--html", html).code == 0
    return html


def test_the_page_stands_alone(page: Path) -> None:
    text = page.read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?:", text)


def test_one_bar_for_what_becomes_the_same(tmp_path: Path, requant: Requant) -> None:
    """From whatever dtype, the table distinguishes those; and a size stays with its unit."""
    weights = {"a.weight": np.ones((64, 64), BF16), "b.weight": np.ones((64, 64), np.float32)}
    model = write_model(tmp_path / "m", weights)
    assert requant("convert", model, tmp_path / "o", "--layout", "keep", "--quiet").code == 0
    assert requant("report", tmp_path / "o", "--html", tmp_path / "page.html").code == 0
    text = (tmp_path / "page.html").read_text()
    assert text.count(">quantized: affine 4-bit g64<") == 1
    assert text.count("<td>affine 4-bit g64</td>") >= 2
    assert re.search(r"<strong>[\d.]+&nbsp;kB →&nbsp;[\d.]+&nbsp;kB</strong>", text)


def test_names_are_only_text(tmp_path: Path, requant: Requant) -> None:
    model = write_model(tmp_path / "m", {f"{EVIL}.weight": np.ones((64, 64), BF16)})
    assert requant("convert", model, tmp_path / "o", "--layout", "keep", "--quiet").code == 0
    assert requant("report", tmp_path / "o", "--html", tmp_path / "p.html").code == 0
    assert "<script>window" not in (tmp_path / "p.html").read_text()


# -- in a browser --------------------------------------------------------------------------
def browse(page: Path, *options: str) -> str:
    """What headless Chromium prints."""
    assert CHROMIUM is not None
    profile = f"--user-data-dir={page.parent / 'profile'}"
    common = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", profile)
    command = [CHROMIUM, *common, *options, page.as_uri()]
    # A sanitizer preloaded for Python is not for the browser.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def screenshot(page: Path, dark: bool) -> np.ndarray:
    """The page as ``(height, width, 3)``, uint8."""
    png = page.with_suffix(".png")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    browse(page, scheme, "--window-size=1150,1900", f"--screenshot={png}")
    return read_png(png.read_bytes())


def read_png(data: bytes) -> np.ndarray:
    """Pixels of a PNG of 8 bits a channel, RGB or RGBA, not interlaced."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, packed, width, height, channels = 8, b"", 0, 0, 0
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", body)
            assert (depth, interlaced) == (8, 0)
            channels = {2: 3, 6: 4}[colour]
        packed += body if kind == b"IDAT" else b""
        place += 12 + length
    lines = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, -1)
    rows, above = [], np.zeros(width * channels, np.uint8)
    for line in lines:
        above = unfiltered(int(line[0]), line[1:], above, channels)
        rows.append(above)
    return np.stack(rows).reshape(height, width, channels)[..., :3]


def unfiltered(kind: int, line: np.ndarray, above: np.ndarray, step: int) -> np.ndarray:
    """One line of a PNG from what is stored and the line above."""
    if kind == 0:
        return line
    if kind == 2:
        return line + above
    if kind == 1:
        pixels = line.reshape(-1, step)
        return np.cumsum(pixels, axis=0, dtype=np.uint64).astype(np.uint8).ravel()
    out, up = [0] * step, [0] * step + above.tolist()
    for x, value in enumerate(line.tolist()):
        a, b, c = out[x], up[x + step], up[x]
        if kind == 3:
            guess = (a + b) // 2
        else:
            near = (abs(b - c), abs(a - c), abs(a + b - 2 * c))
            guess = (a, b, c)[near.index(min(near))]
        out.append((value + guess) & 255)
    return np.array(out[step:], np.uint8)


def pixels_of(picture: np.ndarray, colour: str) -> int:
    wanted = np.array([int(colour[n : n + 2], 16) for n in (1, 3, 5)], np.uint8)
    return int((picture == wanted).all(-1).sum())


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_charts_are_drawn(page: Path, dark: bool) -> None:
    background, blue, orange, grey = (
        ("#0e1217", "#6aa0ff", "#f0883e", "#57616c")
        if dark
        else ("#ffffff", "#2f6fde", "#c4541a", "#a9b4c0")
    )
    picture = screenshot(page, dark)
    assert pixels_of(picture, background) > picture[..., 0].size / 2
    assert pixels_of(picture, blue) > 20_000  # bars of bits and bytes
    assert pixels_of(picture, orange) > 2_000  # errors
    assert pixels_of(picture, grey) > 5_000  # bytes before


PROBE = """<script>
const heads = [...document.querySelectorAll("table.sortable:last-of-type")].slice(-2)[0];
const out = {};
const column = (n) => [...heads.tBodies[0].rows].map((row) => row.cells[n].dataset.value);
const press = (n) => heads.tHead.rows[0].cells[n].querySelector("button").click();
heads.tHead.rows[0].cells[8].querySelector("button").focus();
out.focused = document.activeElement.textContent;
press(8); out.worst = column(8); out.sort = heads.tHead.rows[0].cells[8].getAttribute("aria-sort");
press(8); out.best = column(8);
press(0); out.words = [...heads.tBodies[0].rows].map((row) => row.cells[0].textContent);
out.hit = window.hit;
document.title = "RESULT" + JSON.stringify(out);
</script>"""


@needs_chromium
def test_headings_sort_and_take_the_keyboard(page: Path) -> None:
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    title = re.search(r"<title>RESULT(.*?)</title>", browse(probed, "--dump-dom"))
    assert title is not None
    found = json.loads(title[1].replace("&quot;", '"').replace("&amp;", "&"))
    worst = [float(value) for value in found["worst"]]
    assert worst == sorted(worst, reverse=True) and found["sort"] == "descending"
    assert [float(value) for value in found["best"]] == sorted(worst)
    assert found["focused"] == "error (rms)"
    assert found["words"][0] == "lm_head" and "hit" not in found


@needs_chromium
def test_it_prints(page: Path) -> None:
    pdf = page.with_suffix(".pdf")
    browse(page, f"--print-to-pdf={pdf}")
    assert pdf.read_bytes().startswith(b"%PDF") and pdf.stat().st_size > 10_000
