"""The page that `evaluate` writes, in a browser: light and dark, on a desk and on a phone."""

import io

import pytest
from helpers.browser import IN_A_BROWSER, opened
from rich.console import Console

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.commands.evaluate import evaluate
from ee_tuning.config import EvaluateConfig
from ee_tuning.evaluate.report import write_report

pytestmark = IN_A_BROWSER
# What is wider than the window, and what is cut off by what it is in.
WIDE = """() => [...document.querySelectorAll("body *")].filter(one => {
    const box = one.getBoundingClientRect();
    return box.width && (box.right > document.documentElement.clientWidth + 1 || box.left < -1);
}).map(one => one.outerHTML.slice(0, 80))"""
# The least contrast (WCAG 2) of words with what is behind them, and the words.
CONTRAST = """() => {
    const values = colour => {
        const found = colour.match(/[0-9.]+/g).map(Number);
        return found.length < 4 ? [...found, 1] : found;
    };
    const over = (top, below) => below.map((value, i) => top[3] * top[i] + (1 - top[3]) * value);
    const light = colour => colour.slice(0, 3).map(value => value / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = one => {
        const own = values(getComputedStyle(one).backgroundColor);
        if (own[3] === 1) return own.slice(0, 3);
        return over(own, one.parentElement ? behind(one.parentElement) : [255, 255, 255]);
    };
    const kinds = "p, h1, h2, h3, th, td, figcaption, span, pre, text";
    const words = [...document.querySelectorAll(kinds)];
    return words.filter(one => one.textContent.trim()).map(one => {
        const style = getComputedStyle(one), below = behind(one);
        const ink = over(values(one.tagName === "text" ? style.fill : style.color), below);
        const [a, b] = [light(ink), light(below)].sort((x, y) => y - x);
        return [(a + 0.05) / (b + 0.05), one.textContent.trim().slice(0, 40)];
    }).sort((x, y) => x[0] - y[0])[0];
}"""


@pytest.fixture(scope="module")
def pages(base, data, tokenizer, tmp_path_factory):
    """Addresses of pages of several exits and of one, the first with cells as wide as can be."""
    folder, found = tmp_path_factory.mktemp("report"), {}
    for name, layers in (("many", [1, 2, 3]), ("one", [2])):
        exits = folder / name
        EarlyExitModel.from_base(base, ExitConfig(layers, init="random")).save_pretrained(exits)
        config = EvaluateConfig(
            exits=str(exits), data=[data], thresholds="1,0.9,0.02,0.01,0", seq_length=64,
            max_tokens=256, prompts=2, prompt_length=8, max_new_tokens=8, rounds=1, out=str(exits),
        )  # fmt: skip
        result = evaluate(config, Console(file=io.StringIO()))
        if name == "many":
            result["settings"]["data"] = ["/a/folder/with/a/long/name" * 3]
            for row in result["threshold_rows"]:
                row |= {"text_agreement": 1.0, "text_interval": [0.999, 1.0], "speedup": 10.25}
                row["speedup_interval"] = [10.11, 10.99]
                row["speed"] = {"median": 10123.4, "min": 10001.2, "max": 10234.5}
        write_report(exits / "report.html", result, tokenizer)
        found[name] = f"file://{exits}/report.html"
    return found


@pytest.fixture(scope="module")
def browser():
    with opened() as browser:
        yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 760, 962, 1200])
def test_it_can_be_read_in_light_and_dark_at_every_width(browser, pages, scheme, width):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(60_000)
    for address in pages.values():
        page.goto(address)
        assert page.evaluate(WIDE) == []
        contrast, words = page.evaluate(CONTRAST)
        assert contrast >= 4.5, words
        ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    page.close()


def test_one_exit_is_more_than_a_dot(browser, pages):
    """Its loss stands beside full depth's, with a line between them."""
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto(pages["one"])
    plot = page.locator(".plots svg").first
    assert "full depth" in plot.text_content()
    line = plot.locator("path[style*='stroke-opacity: 0.5']")
    assert line.bounding_box()["width"] > 50
    page.close()


def test_tokens_show_the_layer_that_they_left_at(browser, pages):
    """Where it is asked for: a colour alone does not tell everybody."""
    page = browser.new_page(viewport={"width": 320, "height": 800})
    page.set_default_timeout(60_000)
    page.goto(pages["many"])
    shown = "() => getComputedStyle(document.querySelector('.token'), '::after').content"
    assert page.evaluate(shown) == "none"
    page.check("text=numbers beside tokens")
    layer = page.locator(".token").first.get_attribute("title").split(",")[0]
    assert page.evaluate(shown) == f'"{layer.removeprefix("layer ")}"'
    assert page.evaluate(WIDE) == []
    page.close()
