"""The playground in Chromium: what is made is watched, played, repeated, refused and cancelled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from browsing import READY, browsing, check_accessibility, visiting
from generators import SMALL, create
from limits import HANG
from media_files import clip, picture, png
from playwright.sync_api import Browser, BrowserContext, Page, Response, expect
from servers import Server

pytestmark = [pytest.mark.serve, pytest.mark.browser]
HEAVIEST = 120_000  # bytes of the page with its files, uncompressed


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    with visiting(browser) as made:
        yield made


def opened(context: BrowserContext, server: Server) -> Page:
    page = context.new_page()
    page.goto(f"{server.url}/")
    page.wait_for_selector(READY)
    return page


def choose(page: Page, mode: str) -> None:
    page.locator(f"label:has(#mode-{mode})").click()


def fill(page: Page, prompt: str, **fields: object) -> None:
    """A small request: fields by their ids."""
    page.fill("#prompt", prompt)
    if page.locator("#size").is_visible():
        page.select_option("#size", "custom")
        page.fill("#custom-size", str(fields.pop("size", "64x64")))
    for name, value in {"steps": 2, "seed": 1, **fields}.items():
        page.fill(f"#{name}", str(value))


def made(page: Page) -> dict[str, object]:
    """The job that the button makes."""
    with page.expect_response(
        lambda answer: answer.url.endswith("/v1/videos") and answer.request.method == "POST"
    ) as answer:
        page.click("#submit")
    job: dict[str, object] = answer.value.json()
    return job


def test_a_video_is_made_played_and_kept(
    context: BrowserContext, generator_server: Server, tmp_path: Path
) -> None:
    page = context.new_page()
    answers: list[Response] = []
    page.on("response", lambda answer: answers.append(answer))  # noqa: PLW0108 - it marks its handlers
    page.goto(f"{generator_server.url}/")
    page.wait_for_selector(READY)
    page.wait_for_load_state("networkidle")
    assert {urlsplit(answer.url).netloc for answer in answers} == {
        urlsplit(generator_server.url).netloc
    }
    files = [answer for answer in answers if "/v1/" not in answer.url]
    assert sum(len(answer.body()) for answer in files) < HEAVIEST
    # Health is looked at every now and then, as long as the page is open.
    assert len([answer for answer in answers if not answer.url.endswith("/health")]) <= 25
    assert "script-src 'self';" in answers[0].headers["content-security-policy"]
    expect(page.locator("#tab-ask")).to_be_hidden()  # nobody would answer
    check_accessibility(page)

    prompt = "<b onclick=alert(1)>a boat</b> & more"
    fill(page, prompt, frames=5)
    assert page.input_value("#seconds") == "0.21"
    # The first preview of a server is made whatever it takes: the next test is to see it.
    page.locator("#preview").evaluate("box => { box.checked = false; }")
    page.locator("#prompt").press("Control+Enter")
    video = page.locator("#stage video")
    expect(video).to_be_visible()
    video.evaluate("video => video.play()")
    page.wait_for_function("() => document.querySelector('#stage video').currentTime > 0")
    assert video.evaluate("video => video.videoWidth") == 64
    expect(page.locator("#stage h2")).to_have_text(prompt)
    expect(page.locator("#stage .facts")).to_contain_text("seed 1")
    card = page.locator("#gallery li")
    expect(card.locator(".caption")).to_have_text(prompt)
    expect(card.locator("img")).to_be_visible()
    check_accessibility(page)
    with page.expect_download() as download:
        page.locator("#stage").get_by_role("button", name="Download").click()
    assert Path(download.value.path()).read_bytes()[4:8] == b"ftyp"

    with visiting(
        context.browser, color_scheme="dark", viewport={"width": 390, "height": 844}
    ) as other:  # type: ignore[arg-type]
        phone = opened(other, generator_server)
        expect(phone.locator("#gallery li")).to_have_count(
            0
        )  # what others made is not shown at first
        phone.click("#scope-all")
        expect(phone.get_by_text(prompt).first).to_be_visible()
        assert phone.evaluate("document.documentElement.scrollWidth") == 390
        check_accessibility(phone)


def test_a_job_is_watched_in_two_tabs_through_a_reload_and_cancelled(
    context: BrowserContext, generator_server: Server
) -> None:
    page, other = opened(context, generator_server), opened(context, generator_server)
    fill(page, "a long one", size="256x256", frames=121, steps=200)
    job = made(page)
    status = page.locator("#stage .status")
    expect(status).to_contain_text("of 200")
    expect(page.locator("#stage img.preview")).to_be_visible()
    source = str(page.locator("#stage img.preview").get_attribute("src"))
    assert source.startswith("data:image/jpeg;base64,/9j/")
    expect(other.locator("#gallery li")).to_have_count(1)
    page.reload()
    page.wait_for_selector(READY)
    expect(page.locator("#stage h2")).to_have_text("a long one")
    expect(status).to_contain_text("of 200")

    waiting = create(generator_server, **SMALL | {"size": "512x512", "num_inference_steps": 200})
    page.click("#cancel")
    expect(page.locator("#gallery li")).to_have_count(0)
    expect(other.locator("#gallery li")).to_have_count(0)
    assert httpx.get(f"{generator_server.url}/v1/videos/{job['id']}").status_code == 404
    httpx.delete(f"{generator_server.url}/v1/videos/{waiting['id']}", timeout=HANG)


def test_errors_are_the_words_of_the_api(context: BrowserContext, generator_server: Server) -> None:
    page = opened(context, generator_server)
    fill(page, "a boat", size="100x100")
    page.click("#submit")
    said = httpx.post(
        f"{generator_server.url}/v1/videos", json={"prompt": "a boat", "size": "100x100"}
    ).json()["error"]["message"]
    expect(page.locator("#request-error")).to_have_text(said[0].upper() + said[1:])
    expect(page.locator("#custom-size")).to_be_focused()
    expect(page.locator("#custom-size")).to_have_attribute("aria-invalid", "true")
    choose(page, "image2video")
    page.click("#submit")
    expect(page.locator("#request-error")).to_have_text("Choose a picture first")


def test_a_picture_starts_a_video_which_is_varied_and_continued(
    context: BrowserContext, generator_server: Server
) -> None:
    page = opened(context, generator_server)
    choose(page, "image2video")
    fill(page, "drive on", frames=5)
    file = {"name": "<i>street</i>.png", "mimeType": "image/png", "buffer": png(picture(64, 64))}
    page.set_input_files("#input-file", file)  # type: ignore[arg-type]
    expect(page.locator("#input-hint")).to_have_text("<i>street</i>.png")
    page.select_option("#preset", "high")
    made(page)
    buttons = page.locator("#stage .actions-of")
    buttons.get_by_role("button", name="Vary seed").click()
    expect(page.locator("#gallery li[data-status=completed]")).to_have_count(2)
    expect(page.locator("#stage .facts")).to_contain_text("image2video")
    expect(page.locator("#stage .facts")).to_contain_text("preset high")
    seeds = page.locator("#gallery li .small").all_inner_texts()
    assert len({text.partition("seed ")[2] for text in seeds}) == 2
    buttons.get_by_role("button", name="Continue").click()
    expect(page.locator("#continues-text")).to_have_text("drive on")
    made(page)
    expect(page.locator("#stage .facts")).to_contain_text("9 frames")
    buttons.get_by_role("button", name="Again").click()
    assert page.input_value("#prompt") == "drive on"
    buttons.get_by_role("button", name="Delete").click()
    expect(page.locator("#gallery li")).to_have_count(2)


def test_an_image_and_a_clip_that_is_followed(
    context: BrowserContext, generator_server: Server, tmp_path: Path
) -> None:
    page = opened(context, generator_server)
    choose(page, "text2image")
    fill(page, "a red boat")
    page.click("#submit")
    expect(page.locator("#stage .frame img")).to_have_attribute("alt", "a red boat")
    choose(page, "transfer")
    fill(page, "in oil")
    page.set_input_files("#input-file", clip(tmp_path / "street.mp4", frames=5))
    job = made(page)
    effective = job["cosmos3"]["effective"]  # type: ignore[index]
    assert (job["cosmos3"]["mode"], bool(effective["edge"])) == ("transfer", True)  # type: ignore[index]
    httpx.delete(f"{generator_server.url}/v1/videos/{job['id']}", timeout=HANG)
    expect(page.locator("#gallery li")).to_have_count(1)
    page.reload()
    expect(page.locator("#gallery img")).to_be_visible()


def test_actions_are_plotted(context: BrowserContext, generator_server: Server) -> None:
    page = opened(context, generator_server)
    choose(page, "policy")
    page.fill("#prompt", "drive on")
    page.select_option("#domain", "umi")
    page.select_option("#tier", "256")
    for name, value in (("chunk", "4"), ("steps", "1")):
        page.fill(f"#{name}", value)
    file = {"name": "view.png", "mimeType": "image/png", "buffer": png(picture(64, 48))}
    page.set_input_files("#input-file", file)  # type: ignore[arg-type]
    made(page)
    expect(page.locator("#stage .plot polyline")).to_have_count(10)
    expect(page.locator("#stage figcaption")).to_contain_text("4 actions of 10 numbers")
    points = str(page.locator("#stage polyline").first.get_attribute("points"))
    assert len(points.split()) == 4


def test_marks_of_an_answer_are_drawn(context: BrowserContext, generator_server: Server) -> None:
    page = opened(context, generator_server)
    answer = 'Here: ```json [{"bbox_2d": [100, 200, 300, 400], "label": "<b>"}, {"point_2d": [500, 500]}]``` [sic]'
    page.evaluate(
        """async (answer) => {
            const { draw, marksIn } = await import("./playground/marks.js");
            draw(document.getElementById("ask-view"), marksIn(answer));
        }""",
        answer,
    )
    styles = page.locator("#ask-view .mark").evaluate_all(
        "all => all.map(({style, textContent}) => [style.left, style.top, style.width, style.height, textContent])"
    )
    assert styles == [["10%", "20%", "20%", "20%", "<b>"], ["50%", "50%", "", "", ""]]


def test_the_api_page_executes_its_example(
    context: BrowserContext, generator_server: Server
) -> None:
    page = context.new_page()
    hosts: set[str] = set()
    page.on(
        "request",
        lambda request: hosts.add(urlsplit(request.url).scheme + urlsplit(request.url).netloc),
    )
    page.goto(f"{generator_server.url}/docs")
    block = page.locator("#operations-Cosmos3_videos-create_v1_videos_post")
    block.locator(".opblock-summary-control").click()
    example = json.loads(block.locator("textarea.body-param__text").input_value())
    assert list(example) == ["prompt", "size", "seconds", "seed"]
    with page.expect_response(lambda answer: answer.request.method == "POST") as answer:
        block.get_by_role("button", name="Execute").click()
    job = answer.value.json()
    assert httpx.delete(f"{generator_server.url}/v1/videos/{job['id']}", timeout=HANG).is_success
    status = block.locator(".live-responses-table tbody .response-col_status").first
    expect(status).to_contain_text("200")
    assert {host for host in hosts if host.startswith("http")} == {
        "http" + urlsplit(generator_server.url).netloc
    }
    summaries = page.locator(".opblock-summary-description").all_inner_texts()
    assert "Create a video" in summaries
    assert not [text for text in summaries if "ot offered" in text]


def test_json_for_other_clients(generator_server: Server) -> None:
    answer = httpx.get(generator_server.url)
    assert answer.json()["surfaces"] == ["generator"]
    assert answer.json()["links"]["docs"] == "docs"
    assert answer.headers["vary"] == "Accept"
    script = httpx.get(f"{generator_server.url}/playground/app.js")
    tag = {"If-None-Match": script.headers["etag"]}
    assert httpx.get(f"{generator_server.url}/playground/app.js", headers=tag).status_code == 304
    for name in ("../app.py", "..%2fapp.py", "nothing.js"):
        assert httpx.get(f"{generator_server.url}/playground/{name}").status_code == 404


def test_no_previews_unless_they_are_asked_for(generator_server: Server) -> None:
    job = create(generator_server, **SMALL)
    url = f"{generator_server.url}/v1/videos/{job['id']}/events"
    with httpx.stream("GET", url, timeout=HANG) as stream:
        names = {line for line in stream.iter_lines() if line.startswith("event:")}
    assert names - {"event: progress"} == {"event: completed"}  # which may be all that is left
