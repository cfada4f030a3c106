"""The page in a real browser, before the server's own routes and an engine of canned pictures.

DIT_PAGE_URL=http://127.0.0.1:8000 runs what can be run before that server instead; it serves demo-wan and demo-flux.
DIT_PAGE_SCREENSHOTS=FOLDER keeps pictures of the page.
"""

import contextlib
import json
import os
import re
import shutil
import threading
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from canned_server import FAILS, REASON, STAGES, Site, canned_site
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested with the package playwright")
expect = sync_api.expect

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
GIVEN, SHOTS = os.environ.get("DIT_PAGE_URL"), os.environ.get("DIT_PAGE_SCREENSHOTS")
SECONDS = 300 if GIVEN else 30
ANSWERED = re.compile(r"Failed to load resource: the server responded with a status of (400|401|409|429|503) ")
VIOLATIONS = "addEventListener('securitypolicyviolation', told => console.error('CSP: ' + told.violatedDirective))"
FIRST_PAINT = """milliseconds => new Promise((done, fail) => {
    const seen = list => list.getEntriesByName('first-contentful-paint').length && done();
    new PerformanceObserver(seen).observe({type: 'paint', buffered: true});
    setTimeout(() => fail(new Error('nothing was painted')), milliseconds);
})"""
IMAGE, VIDEO = "a green 4 left of a white 9", "a red 7 moving left on a dotted background"
needs_canned = pytest.mark.skipif(bool(GIVEN), reason="the server of DIT_PAGE_URL cannot be told what to answer")


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: expected one of {', '.join(NAMES)} on PATH; install Debian's package chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if GIVEN:
        yield Site(url=GIVEN.rstrip("/"))
        return
    with canned_site(tmp_path_factory.mktemp("jobs")) as running:
        yield running


@pytest.fixture
def visit(browser):
    """visit(url, **context) opens the page; at the end nothing was asked of another host and nothing was wrong."""
    wrong, hosts, urls = [], set(), []
    with contextlib.ExitStack() as opened:

        def open_page(url, held=None, **options):
            context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
            opened.callback(context.close)
            context.add_init_script(VIOLATIONS)
            context.on("request", lambda request: urls.append(request.url))
            if held is not None:
                context.route(re.compile("/health/|/v1/"), lambda route: held.append(route))
            page = context.new_page()
            page.set_default_timeout(1000 * SECONDS)
            expect.set_options(timeout=1000 * SECONDS)
            page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            hosts.add(urlsplit(url).netloc)
            page.goto(url, wait_until="commit")
            return page

        yield open_page
    assert [text for text in wrong if not ANSWERED.match(text)] == []
    assert {urlsplit(url).netloc for url in urls if urlsplit(url).scheme not in ("data", "blob")} <= hosts


@contextlib.contextmanager
def half_way(site):
    """Keeps what is made from going on behind its half, where the engine can be told so."""
    if site.engine is None:
        yield
        return
    site.engine.going.clear()
    try:
        yield
    finally:
        site.engine.going.set()


def served(site, model):
    """What /v1/models says of it, with its shapes as [width, height, frames] and the quality that comes first."""
    with urllib.request.urlopen(f"{site.url}/v1/models") as answer:
        about = next(one for one in json.load(answer)["data"] if one["id"] == model)
    about["shapes"] = [[*map(int, shape.split("x")), 1][:3] for shape in about["shapes"]]
    about["first"] = {"quality": next(iter(about["qualities"]))} | next(iter(about["qualities"].values()))
    return about


def facts(page):
    """Terms and values below a result."""
    return page.eval_on_selector_all("dl div", "all => Object.fromEntries(all.map(one => one.innerText.split('\\n')))")


def begin(page, model, prompt, seed="7"):
    expect(page.locator("#server")).to_have_text("Ready")
    page.get_by_label("Model", exact=True).select_option(model)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Seed", exact=True).fill(seed)
    page.locator("#make").click()


def finished(page, prompt):
    expect(page.locator("#label blockquote")).to_have_text(prompt)


def shoot(page, name):
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


def refusal(site, body):
    """What the API itself says to this request."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{site.url}/v1/images/generations", json.dumps(body).encode(), headers)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    return json.load(refused.value)["error"]["message"]


def test_the_first_paint_waits_for_nothing(visit, site):
    held = []
    page = visit(site.url, held=held)
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.keyboard.type("a blue 3")
    expect(page.locator("#prompt")).to_have_value("a blue 3")
    page.evaluate(FIRST_PAINT, 1000 * SECONDS)
    assert held
    assert page.locator("#make").get_attribute("aria-disabled") == "true"


@needs_canned
def test_it_tells_when_the_server_is_not_ready(visit, tmp_path):
    compiled = threading.Event()
    with canned_site(tmp_path, warm=compiled.wait) as site:
        page = visit(site.url)
        expect(page.locator("#server")).to_have_text("Not ready")
        expect(page.locator("#notice")).to_contain_text("programs are being compiled")
        expect(page.get_by_label("Model", exact=True)).to_have_value("demo-wan")
        page.get_by_label("Prompt", exact=True).fill(VIDEO)
        page.keyboard.press("Control+Enter")
        compiled.set()
        expect(page.locator("#server")).to_have_text("Ready")
        expect(page.locator("#notice")).to_be_hidden()
        expect(page.locator("#make")).to_have_attribute("aria-disabled", "false")
        assert page.locator("#prompt").input_value() == VIDEO and not site.engine.tickets


def test_an_image(visit, site):
    page = visit(site.url)
    with half_way(site):
        begin(page, "demo-flux", IMAGE)
        expect(page.locator('#frame img[alt="Preview"]')).to_be_visible()
        expect(page.locator("#status")).to_have_text(re.compile(r"^\d+ %$"))
        shoot(page, "preview")
    finished(page, IMAGE)
    picture = page.locator("#frame img")
    expect(picture).to_have_attribute("alt", IMAGE)
    assert picture.evaluate("shown => shown.decode().then(() => [shown.naturalWidth, shown.naturalHeight])") == [
        128,
        128,
    ]
    first = served(site, "demo-flux")["first"]
    assert facts(page) == {
        "Plan": first["plan"], "Steps": str(first["steps"]), "Quality": first["quality"], "Seed": "7",
        "Size": "128 × 128", "Model": "demo-flux",
    }  # fmt: skip
    told = page.locator("#label").inner_text()
    assert re.search(r"Time\s+\d+\.\d s", told) and all(re.search(stage + r" \d+\.\d\d s", told) for stage in STAGES)
    with page.expect_download() as downloaded:
        page.get_by_role("link", name="Download PNG").click()
    assert downloaded.value.suggested_filename == "demo-flux-7.png"
    with Image.open(downloaded.value.path()) as saved:
        assert saved.size == (128, 128) and json.loads(saved.text["Comment"])["prompt"] == IMAGE


def test_a_video_and_what_was_made_before(visit, site):
    page = visit(site.url)
    begin(page, "demo-flux", IMAGE)
    finished(page, IMAGE)
    page.get_by_label("Model", exact=True).select_option("demo-wan")
    about = served(site, "demo-wan")
    width, height, frames = about["shapes"][-1]
    page.get_by_text(f"{width} × {height}", exact=True).click()
    seconds = f"{frames / about['fps']:.1f} s"
    lengths = [
        f"{shape[2]} frames{shape[2] / about['fps']:.1f} s" for shape in about["shapes"] if shape[:2] == [width, height]
    ]
    expect(page.locator("#lengths label")).to_have_text(lengths)
    page.get_by_text(f"{frames} frames", exact=False).click()
    with half_way(site):
        begin(page, "demo-wan", VIDEO, seed="11")
        expect(page.locator('#frame img[alt="Preview"]')).to_be_visible()
        expect(page.locator("#progress")).to_have_attribute("value", re.compile(r"^\d+$"))
    finished(page, VIDEO)
    video = page.locator("#frame video")
    expect(video).not_to_have_js_property("currentTime", 0)
    assert video.evaluate("shown => [shown.videoWidth, shown.videoHeight]") == [width, height]
    shoot(page, "video")
    wanted = {"Length": f"{frames} frames, {seconds}", "Seed": "11", "Plan": about["first"]["plan"]}
    assert facts(page).items() >= wanted.items()
    with page.expect_download() as downloaded:
        page.get_by_role("link", name="Download MP4").click()
    assert b"ftyp" in Path(downloaded.value.path()).read_bytes()[:16]
    strip = page.locator("#strip button")
    expect(strip).to_have_count(2)
    strip.nth(1).click()
    finished(page, IMAGE)
    expect(strip.nth(1)).to_have_attribute("aria-current", "true")
    page.get_by_role("button", name="Use these settings").click()
    expect(page.get_by_label("Model", exact=True)).to_have_value("demo-flux")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("7")
    expect(page.locator("#prompt")).to_have_value(IMAGE)


def test_cancel(visit, site):
    page = visit(site.url)
    for model, prompt in (("demo-flux", IMAGE), ("demo-wan", VIDEO)):
        with half_way(site):
            begin(page, model, prompt)
            expect(page.locator("#status")).to_have_text(re.compile(r"^\d+ %$"))
            if model == "demo-flux":
                page.keyboard.press("Escape")
            else:
                page.get_by_role("button", name="Cancel").click()
            expect(page.locator("#told")).to_have_text("Cancelled")
            if site.engine:
                assert site.engine.tickets[-1].result.exception(SECONDS) is not None
        expect(page.locator("#failure")).to_be_empty()
    jobs = json.load(urllib.request.urlopen(f"{site.url}/v1/videos?limit=1"))["data"]
    assert jobs[0]["status"] == "failed" and jobs[0]["error"]["code"] == "cancelled"
    begin(page, "demo-flux", IMAGE)
    finished(page, IMAGE)


def test_the_words_of_the_server_are_shown_where_they_belong(visit, site):
    page = visit(site.url)
    begin(page, "demo-flux", IMAGE, seed="5000000000")
    asked = {"prompt": IMAGE, "seed": 5_000_000_000, "stream": True}
    expect(page.locator('.pair:has(#seed) [role="alert"]')).to_have_text(refusal(site, asked))
    expect(page.get_by_label("Seed", exact=True)).to_be_focused()
    expect(page.get_by_label("Seed", exact=True)).to_have_accessible_description(refusal(site, asked))
    shoot(page, "refused")
    begin(page, "demo-flux", "   ")
    expect(page.locator('.actions [role="alert"]')).to_have_text(refusal(site, {"prompt": "   "}))
    expect(page.locator('[role="alert"]:not(:empty)')).to_have_count(1)
    begin(page, "demo-flux", IMAGE)
    finished(page, IMAGE)
    expect(page.locator('[role="alert"]:not(:empty)')).to_have_count(0)


@needs_canned
def test_a_job_that_fails_says_why_and_one_whose_stream_breaks_goes_on(visit, site):
    page = visit(site.url)
    begin(page, "demo-wan", FAILS)
    expect(page.locator("#failure")).to_have_text(REASON)
    told = {"type": "error", "error": {"message": "it slipped", "type": "server_error"}}
    page.route(
        re.compile("/images/"),
        lambda route: route.fulfill(
            content_type="text/event-stream", body=f"event: error\ndata: {json.dumps(told)}\n\n"
        ),
        times=1,
    )
    begin(page, "demo-flux", IMAGE)
    expect(page.locator("#failure")).to_have_text("it slipped")
    broken = []

    def break_once(route):
        broken.append(route)
        if len(broken) == 1:
            route.fulfill(status=200, content_type="text/event-stream", body=": still here\n\n")
        else:
            route.continue_()

    page.route(re.compile("/events"), break_once)
    begin(page, "demo-wan", VIDEO)
    finished(page, VIDEO)
    assert len(broken) == 2


@needs_canned
def test_it_asks_for_a_key_only_where_one_is_wanted(visit, tmp_path, site):
    page = visit(site.url)
    expect(page.locator("#server")).to_have_text("Ready")
    expect(page.locator("#key-form")).to_be_hidden()
    key = "an-api-key-of-a-test"
    (tmp_path / "keys").write_text(key)
    with canned_site(tmp_path / "jobs", keys=tmp_path / "keys") as locked:
        page = visit(locked.url)
        sent = []
        page.on("request", lambda request: sent.append(request.url))
        expect(page.get_by_label("API key")).to_be_focused()
        expect(page.locator("#key-error")).to_contain_text("no known API key was sent")
        for tried in ("not-the-right-one", key):
            page.keyboard.type(tried)
            page.keyboard.press("Enter")
            expect(page.locator("#key-form")).to_be_visible(visible=tried != key)
        begin(page, "demo-wan", VIDEO)
        finished(page, VIDEO)
        begin(page, "demo-flux", IMAGE)
        finished(page, IMAGE)
        assert page.evaluate("[Object.values(sessionStorage), localStorage.length]") == [[key], 0]
        assert not [url for url in sent if key in url]


RING = """() => {
  const at = document.activeElement, shown = at.type === "radio" ? at.closest("label") : at;
  const style = getComputedStyle(shown), named = at.labels?.[0]?.innerText || at.ariaLabel || at.innerText;
  return [at.id || at.name || at.tagName.toLowerCase(), style.outlineStyle, Boolean(named)];
}"""


def test_the_keyboard_is_enough(visit, site):
    page = visit(site.url)
    expect(page.locator("#server")).to_have_text("Ready")
    expect(page.locator("#prompt")).to_be_focused()
    keys = {
        "prompt": IMAGE, "model": "demo-f", "seed": "3", "size": "ArrowRight", "quality": "ArrowDown",
        "summary": "Enter", "negative": "stripes",
    }  # fmt: skip
    for place, typed in keys.items():
        name, outline, named = page.evaluate(RING)
        assert name == place and named and outline != "none"
        if typed[0].isupper():
            page.keyboard.press(typed)
        else:
            page.keyboard.type(typed)
        page.keyboard.press("Tab")
    assert page.evaluate(RING) == ["make", "solid", True]
    page.keyboard.press("Shift+Tab")
    with half_way(site):
        page.keyboard.press("Control+Enter")
        expect(page.locator("#cancel")).to_be_visible()
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        assert page.evaluate(RING) == ["cancel", "solid", True]
    finished(page, IMAGE)
    expect(page.get_by_role("link", name="Download PNG")).to_be_focused()
    about = served(site, "demo-flux")
    size, quality = " × ".join(map(str, about["shapes"][1][:2])), list(about["qualities"])[1]
    assert facts(page).items() >= {"Size": size, "Quality": quality, "Seed": "3"}.items()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_400_pixels_are_wide_enough(visit, site, scheme):
    page = visit(
        site.url, viewport={"width": 400, "height": 800}, color_scheme=scheme, reduced_motion="reduce", has_touch=True
    )

    def check():
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 400

    expect(page.locator("#server")).to_have_text("Ready")
    check()
    for model, prompt in (("demo-flux", IMAGE + " " + "9" * 60), ("demo-wan", VIDEO)):
        with half_way(site):
            begin(page, model, prompt)
            expect(page.locator('#frame img[alt="Preview"]')).to_be_in_viewport()
            check()
        finished(page, prompt)
        check()
    assert page.locator("#frame video").evaluate("shown => shown.paused")
    shoot(page, f"narrow-{scheme}")
    for box in page.locator("button:visible, select:visible, a:visible, summary:visible, .choices label:visible").all():
        place = box.bounding_box()
        assert place["x"] >= 0 and place["x"] + place["width"] <= 400 and place["height"] >= 24
