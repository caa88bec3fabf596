"""The playground in a browser, as someone uses it."""

import pytest
from helpers.browser import IN_A_BROWSER, opened

pytestmark = IN_A_BROWSER


@pytest.fixture(scope="module")
def browser():
    with opened() as browser:
        yield browser


@pytest.fixture
def page(browser, process):
    """The page of a server that asks for a key, and what it complains of."""
    size = {"width": 400, "height": 800}
    # Playwright's own questions are not let through by the page's policy.
    page = browser.new_page(viewport=size, color_scheme="dark", bypass_csp=True)
    page.set_default_timeout(60_000)
    complaints, asked = [], []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(process.url)
    page.fill("#key", process.key)
    page.keyboard.press("Tab")
    page.wait_for_function("model !== null")
    # That the first look without a key was turned down is what Chromium calls an error.
    assert all("401" in complaint for complaint in complaints)
    complaints.clear()
    yield page
    assert complaints == []
    assert all(url.startswith((process.url, "data:")) for url in asked)
    page.close()


def move(page, value):
    page.eval_on_selector(
        "#threshold", f"e => {{ e.value = {value}; e.dispatchEvent(new Event('input')) }}"
    )


def layers(page):
    return page.eval_on_selector_all("#text-0 .token sub", "all => all.map(e => e.textContent)")


def colours(page):
    return page.eval_on_selector_all(
        "#text-0 .token", "all => [...new Set(all.map(e => e.style.background))]"
    )


def wait_for(page, number):
    page.wait_for_function(f"document.querySelectorAll('#text-0 .token').length === {number}")
    page.wait_for_function("document.getElementById('go').disabled === false")


def go(page, prompt, number, mode):
    """Ask for so many tokens after a prompt."""
    page.fill("#prompt", prompt)
    page.uncheck("#chat")
    page.fill("#tokens", str(number))
    page.select_option("#mode", mode)
    page.click("#go")
    wait_for(page, number)


def test_a_moved_threshold_changes_colours(page):
    page.fill("#prompt", "def add(a, b):\n    ")
    page.uncheck("#chat")
    page.fill("#tokens", "12")
    page.select_option("#mode", "threshold")
    move(page, 1)
    page.keyboard.press("Control+Enter")
    wait_for(page, 12)
    assert set(layers(page)) == {"16"}
    before = colours(page)
    move(page, 0)
    page.wait_for_function(
        "[...document.querySelectorAll('#text-0 sub')].at(-1)?.innerText === '4'"
    )
    wait_for(page, 12)
    assert {"4"} < set(layers(page))
    assert len(colours(page)) > len(before)
    assert page.inner_text("#count-0") == page.inner_text("#count-1") == "12"
    assert float(page.inner_text("#speed-0")) > 0
    assert page.inner_text("#depth-1") == "16.0 of 16"
    assert "layer 4" in page.inner_text("#legend")
    assert page.evaluate("document.documentElement.scrollWidth") == 400


def test_a_token_tells_what_every_exit_says(page):
    go(page, "import os\n", 6, "full")
    page.locator("#text-0 .token").nth(2).hover()
    page.wait_for_selector("#lens table")
    rows = page.eval_on_selector_all("#lens tr", "all => all.map(e => e.cells[0].textContent)")
    assert rows == ["layer", "4", "8", "12", "16, full depth"]
    # What full depth is said to say is what it said, token by token, by keyboard.
    page.focus("#text-0")
    for place, key in enumerate(["Home", *["ArrowRight"] * 5]):
        page.keyboard.press(key)
        first = page.inner_text("#lens tr:last-child td:nth-child(3) code")
        token = page.evaluate(f"visible(shown.tokens[{place}].text)")
        assert first.strip() == token.strip()


def test_an_empty_prompt_is_one_token(page):
    """The one that begins a text, to the lens, too."""
    go(page, "", 2, "full")
    page.locator("#text-0 .token").nth(0).hover()
    page.wait_for_selector("#lens table")


def test_a_sample_is_beside_the_same_one_at_full_depth(page):
    page.fill("#temperature", "1")
    page.fill("#tokens", "12")
    page.select_option("#mode", "speculative")
    page.click("#go")
    page.wait_for_function("document.getElementById('same').textContent !== '–'")
    assert page.inner_text("#same") == "the same"


def test_characters_of_several_tokens_are_whole(page):
    page.fill("#tokens", "1")
    page.select_option("#mode", "full")
    page.click("#go")
    wait_for(page, 1)
    page.evaluate(r"""() => ["bytes:\\xf0\\x9f", "bytes:\\x98", "bytes:\\x80", "bytes:"].forEach(
        text => add({ text, exit_layer: 4, confidence: 0.5, rejected: [] }, 0))""")
    shown = page.eval_on_selector_all("#text-0 .token", "all => all.map(e => e.firstChild.data)")
    assert shown[1:] == ["◦", "◦", "😀", "bytes:"]
    assert page.evaluate("visible(' a\\n')") == "·a⏎"


@pytest.mark.parametrize(
    ("exits", "modes"), [([0], ["auto", "speculative", "full"]), ([], ["auto", "full"])]
)
def test_modes_are_those_that_exits_serve(page, exits, modes):
    page.evaluate(
        """async exits => {
        const found = { ...model, exit_layers: exits };
        ask = async () => ({ json: async () => ({ data: [found] }) });
        await start();
    }""",
        exits,
    )
    assert page.eval_on_selector_all("#mode option", "all => all.map(e => e.value)") == modes


def test_stop_and_curl(page, process):
    page.fill("#prompt", "a = ")
    page.uncheck("#chat")
    page.fill("#tokens", "900")
    page.select_option("#mode", "full")
    page.click("#go")
    page.wait_for_function("document.querySelectorAll('#text-0 .token').length > 3")
    page.keyboard.press("Escape")
    page.wait_for_function("document.getElementById('stop').disabled")
    assert 3 < len(layers(page)) < 900
    command = page.evaluate("curl()")
    assert command.startswith(f"curl '{process.url}/v1/completions'")
    assert '"mode":"full"' in command
