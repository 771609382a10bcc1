"""The page in a real browser: headless Chromium drags the line, zooms, changes pictures, at desktop and phone width."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import write_images
from PIL import Image
from tiny_classes import tiny
from videos import number_of, write_video

from eval import reconstruction
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.report import build_report

pytestmark = pytest.mark.browser

OPEN = "document.querySelectorAll('details').forEach((one) => { one.open = true })"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two VAEs and a log."""
    root = tmp_path_factory.mktemp("browser")
    images = write_images(root / "images", 5, size=(64, 64))
    vaes = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)
        config.build().save_pretrained(root / f"a-rather-long-name-of-an-autoencoder-{seed}")
        vaes.append(str(root / f"a-rather-long-name-of-an-autoencoder-{seed}"))
    run = root / "run"
    with pytest.MonkeyPatch.context() as patch:
        flags = ["--output", str(run / "report"), "--resolution", "64", "--metrics", "psnr,ssim", "--num_workers", "0"]
        patch.setattr(sys, "argv", ["eval", *vaes, str(images), *flags])
        reconstruction.main()
    channels = "".join(f', "kl_nats_per_channel/{channel}": {1000 + channel}' for channel in range(128))
    lines = (f'{{"images": {images}, "loss/l1": {5 / images}{channels}}}\n' for images in (5, 10))
    (run / "metrics.jsonl").write_text("".join(lines))
    (run / "config.yaml").write_text("output_dir: run\nadversary: {weight: 0.5, start_images: 5}\n")
    return build_report(run)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a class of clips and one of images on clips of five frames, whose frames tell their number."""
    root = tmp_path_factory.mktemp("films")
    (root / "videos").mkdir()
    for number in range(2):
        write_video(root / "videos" / f"{number}.mkv", 5, (32, 32))
    for name in ("AutoencoderKLWan", "AutoencoderKL"):
        tiny(name).save_pretrained(root / name)
    with pytest.MonkeyPatch.context() as patch:
        flags = ["--output", str(root / "out"), "--resolution", "32", "--metrics", "psnr", "--num_workers", "0"]
        vaes = [str(root / "AutoencoderKLWan"), str(root / "AutoencoderKL")]
        patch.setattr(sys, "argv", ["eval", *vaes, str(root / "videos"), "--frames", "5", *flags])
        reconstruction.main()
    return build_report(root / "out")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if BROWSER is None or DRIVER is None:
        missing = "no Chromium" if BROWSER is None else "no chromedriver"
        print(f"{missing} found: the page was not driven in a browser")
        pytest.skip(f"{missing} found (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage", f"user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def opened(browser: Any, page: Path, width: int, height: int = 900) -> Any:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get(page.as_uri())
    return browser


def line_position(browser: Any) -> float:
    """Where the line is, in per cent of the picture."""
    return float(
        browser.execute_script(
            "const c = document.querySelector('.canvas').getBoundingClientRect(),"
            " d = document.querySelector('.divider').getBoundingClientRect();"
            "return 100 * (d.left + d.width / 2 - c.left) / c.width"
        )
    )


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def test_dragging_the_line_cuts_the_picture_there(browser: Any, page: Path) -> None:
    from selenium.webdriver import ActionChains

    opened(browser, page, 1280)
    assert line_position(browser) == pytest.approx(50, abs=0.5)
    canvas = find(browser, ".canvas")
    quarter = round(canvas.size["width"] / 4)
    ActionChains(browser).move_to_element(find(browser, ".divider")).click_and_hold().move_by_offset(
        quarter, 5
    ).release().perform()
    assert line_position(browser) == pytest.approx(75, abs=1)
    cut = browser.execute_script("return getComputedStyle(document.querySelector('.after')).clipPath")
    assert float(cut.split()[-1].removesuffix("%)")) == pytest.approx(75, abs=1)
    # the pointer was let go: moving on moves nothing
    ActionChains(browser).move_by_offset(-quarter, 0).perform()
    assert line_position(browser) == pytest.approx(75, abs=1)


def test_the_keyboard_moves_the_line(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(browser, page, 1280)
    find(browser, "#split").send_keys(Keys.HOME)
    assert line_position(browser) == pytest.approx(0, abs=0.5)
    find(browser, "#split").send_keys(Keys.ARROW_RIGHT * 10)
    assert line_position(browser) == pytest.approx(1, abs=0.5)


def test_zoom_keeps_whole_pixels(browser: Any, page: Path) -> None:
    opened(browser, page, 1280)
    assert find(browser, ".canvas").size["width"] == 64 * 8  # the largest that fits
    find(browser, "#zoom-in").click()
    assert find(browser, "#zoom").text == "12×"
    assert find(browser, ".canvas").size["width"] == 64 * 12
    rendering = "return getComputedStyle(document.querySelector('.before')).imageRendering"
    assert browser.execute_script(rendering) == "pixelated"
    for _ in range(7):
        find(browser, "#zoom-out").click()
    assert find(browser, "#zoom").text == "1×"
    assert browser.execute_script(rendering) == "auto"


def test_pictures_and_vaes_can_be_chosen(browser: Any, page: Path) -> None:
    from selenium.webdriver.support.select import Select

    opened(browser, page, 1280)
    thumbnails = browser.find_elements("css selector", ".thumbnails button")
    assert len(thumbnails) == 5
    thumbnails[3].click()
    assert thumbnails[3].get_attribute("aria-pressed") == "true"
    key = find(browser, ".which").text
    numbers = find(browser, "#compare-numbers").text
    Select(find(browser, "#right")).select_by_index(2)
    assert find(browser, ".which").text == key
    assert find(browser, "#compare-numbers").text != numbers
    shown = browser.execute_script(
        "const images = document.querySelectorAll('.card')[3].querySelectorAll('img');"
        "return document.querySelector('.after').src === images[3].src"
    )
    assert shown
    assert find(browser, ".tag.right").text.endswith("-1")


def test_charts_tell_their_values(browser: Any, page: Path) -> None:
    from selenium.webdriver import ActionChains

    opened(browser, page, 1280)
    chart = find(browser, ".chart svg")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    ActionChains(browser).move_to_element_with_offset(chart, chart.size["width"] // 2 - 12, 0).perform()
    assert find(browser, ".readout").text.split() == ["10", "l1", "0.5"]


@pytest.mark.parametrize(("of", "width"), [("page", 390), ("page", 768), ("page", 1280), ("films", 390)])
def test_nothing_is_wider_than_the_screen(browser: Any, request: pytest.FixtureRequest, of: str, width: int) -> None:
    opened(browser, request.getfixturevalue(of), width)
    browser.execute_script(OPEN)
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert find(browser, ".canvas").size["width"] <= width
    # what has no room scrolls: no element reaches beyond the screen but inside of one that does
    beyond = browser.execute_script(
        "return [...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1"
        " && !e.closest('.scroll, pre, .viewport, .hidden, svg')).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert beyond == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_table_that_has_no_room_shows_it_and_scrolls_by_key(browser: Any, page: Path, scheme: str) -> None:
    from selenium.webdriver.common.keys import Keys

    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    opened(browser, page, 390)
    browser.execute_script(OPEN)
    scrolling = [
        one
        for one in browser.find_elements("css selector", ".scroll, pre")
        if browser.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth + 18", one)  # of padding
    ]
    assert len(scrolling) >= 3, "at 390 px there are tables, pictures side by side and commands without room"
    for one in scrolling:
        assert one.get_attribute("tabindex") == "0"
        browser.execute_script("arguments[0].scrollIntoView({block: 'start'})", one)
        if "row" not in one.get_attribute("class").split():  # where a picture is seen to be cut
            before, behind = edges(one)
            assert behind > 20, f"no shade at the right edge: {one.get_attribute('outerHTML')[:90]}"
            assert before < 8, "a shade at the left, where nothing is"
        one.send_keys(Keys.ARROW_RIGHT * 3)
        browser.execute_script("return new Promise((done) => setTimeout(done, 250))")
        assert browser.execute_script("return arguments[0].scrollLeft", one) > 0
    table = next(one for one in scrolling if one.find_elements("css selector", "table.metrics"))
    head = table.find_element("css selector", "tbody th")
    moved = "return arguments[0].getBoundingClientRect().left - arguments[1].getBoundingClientRect().left"
    assert abs(browser.execute_script(moved, head, table)) < 1, "the first column stays in sight"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def edges(element: Any) -> tuple[float, float]:
    """By how many levels the left and the right edge of an element differ from its inside, in a row above its words."""
    with Image.open(io.BytesIO(element.screenshot_as_png)) as image:
        row = np.asarray(image.convert("L")).astype(float)[8 if element.tag_name == "pre" else 1]
    return abs(row[0] - row[20]), abs(row[-1] - row[-20])


@pytest.mark.parametrize("width", [390, 1280])
def test_no_letters_are_too_small_to_read(browser: Any, page: Path, width: int) -> None:
    opened(browser, page, width)
    browser.execute_script(OPEN)
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('main *')].filter((e) => [...e.childNodes].some((n) => n.nodeType == 3 &&"
        " n.data.trim()) && e.getBoundingClientRect().width && e.tagName != 'TITLE').map((e) => {"
        " const svg = e.closest('svg');"
        " const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;"
        " return [parseFloat(getComputedStyle(e).fontSize) * scale, e.outerHTML.slice(0, 60)] })"
    )
    assert len(sizes) > 100
    assert [small for small in sizes if small[0] < 11] == []


def test_titles_and_ticks_of_a_chart_do_not_overlap(browser: Any, page: Path) -> None:
    opened(browser, page, 390)
    overlaps = browser.execute_script(
        "return [...document.querySelectorAll('svg')].flatMap((svg) => {"
        " const texts = [...svg.querySelectorAll('text')];"
        " return texts.flatMap((a, i) => texts.slice(i + 1).filter((b) => { const p = a.getBoundingClientRect(),"
        " q = b.getBoundingClientRect(); return p.width && q.width && Math.min(p.right, q.right) - Math.max(p.left,"
        " q.left) > 1 && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 3 })"
        ".map((b) => `${a.textContent} / ${b.textContent}`)) })"
    )
    assert overlaps == []


def frame_shown(element: Any) -> int:
    """The number of the frame that an element shows, by the grey in its right lower corner."""
    with Image.open(io.BytesIO(element.screenshot_as_png)) as image:
        pixels = np.asarray(image.convert("RGB"))
    return number_of(torch.from_numpy(pixels[::8, ::8].copy()).permute(2, 0, 1))


def test_films_of_a_page_show_one_frame(browser: Any, films: Path) -> None:
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    opened(browser, films, 1280)
    number = "return Number(document.querySelector('#frame').value)"
    seen = {browser.execute_script(number)}
    # it plays by itself, and comes round; looked at more often than it moves, so that no frame hides behind another
    WebDriverWait(browser, 20, poll_frequency=0.03).until(
        lambda _: seen.add(browser.execute_script(number)) or seen == {1, 2, 3, 4, 5}
    )
    find(browser, "#play").click()
    find(browser, "#frame").send_keys(Keys.HOME + Keys.ARROW_RIGHT * 3)
    assert find(browser, "#frame-number").text == "4 of 5"
    for original in browser.find_elements("css selector", ".card img[id$='-original']"):
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", original)
        assert frame_shown(original) == 3
        assert original.size["width"] == pytest.approx(original.size["height"], abs=0.1)
    places = browser.execute_script(
        "return [...document.querySelectorAll('img.film')].map((e) => [e.dataset.frames, e.style.objectPosition])"
    )
    # latents of the class of clips have two frames
    assert {(frames, place.split()[1]) for frames, place in places} == {("5", "75%"), ("2", "100%")}
    assert len(places) > 20
    browser.execute_script("window.scrollTo(0, 0)")
    # the picture under the line too, and another one that is chosen while the clips stand still
    for button in browser.find_elements("css selector", ".thumbnails button"):
        button.click()
        assert find(browser, ".canvas .before").get_attribute("style").endswith("75%;")
    assert find(browser, ".canvas").size["width"] == find(browser, ".canvas").size["height"]
    assert browser.execute_script(number) == 4


def test_nothing_moves_where_the_system_asks_for_rest(browser: Any, films: Path) -> None:
    features = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    opened(browser, films, 1280)
    frames = "return new Promise((done) => setTimeout(() => done(document.querySelector('#frame').value), 600))"
    assert browser.execute_script(frames) == "1"
    assert find(browser, "#play").get_attribute("aria-label") == "play"
    find(browser, "#play").click()
    assert browser.execute_script("return document.querySelector('.player.stopped')") is None
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_scheme_follows_the_system(browser: Any, page: Path) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        opened(browser, page, 1280)
        colours[scheme] = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    brightness = {name: sum(map(int, value[4:-1].split(","))) for name, value in colours.items()}
    assert brightness["light"] > 700
    assert brightness["dark"] < 100


@pytest.mark.parametrize("of", ["page", "films"])
def test_nothing_was_fetched_and_nothing_complained(browser: Any, request: pytest.FixtureRequest, of: str) -> None:
    opened(browser, request.getfixturevalue(of), 1280)
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert browser.get_log("browser") == []
