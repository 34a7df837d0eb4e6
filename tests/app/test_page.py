"""The page: its API under load, and driven in a browser as a person would.

The browser is Chromium as Debian has it (`apt-get install chromium`); without it these tests are left out.
"""

import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import picture
from fitv2.pipeline import FiTPipeline
from fitv2.sampling.recipe import read_recipe

gradio = pytest.importorskip("gradio")
from fitv2.app.page import CSS, THEME, build_page, size_of  # noqa: E402
from fitv2.app.studio import ALL, AROUND, Bounds, Studio  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
PATIENCE = 60_000  # ms; processes beside this one may be busy


@pytest.fixture(scope="module")
def studio(pixel_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("studio").resolve()
    return Studio(FiTPipeline.from_pretrained(pixel_model), "tiny", folder, Bounds(64, 4, max_tokens=600))


@pytest.fixture(scope="module")
def url(studio):
    page = build_page(studio).queue(max_size=16)
    _, address, _ = page.launch(
        server_name="127.0.0.1", share=False, ssr_mode=False, quiet=True, prevent_thread_lock=True,
        theme=THEME, css=CSS, allowed_paths=[str(studio.folder)],
    )  # fmt: skip
    yield address
    page.close()


def made_by(client, **changes):
    """Files that the page's API gives."""
    values = {"label": "red", "rows": 16, "columns": 24, "count": 1, "seed": 3, "steps": 2} | changes
    gallery, _ = client.predict(
        "", values["label"], "", values["rows"], values["columns"], values["count"], values["seed"], 1.5,
        values["steps"], "automatic", api_name="/make",
    )  # fmt: skip
    return [Path(each["image"]) for each in gallery]


def test_thirty_two_at_once_are_answered_or_refused_in_words(url):
    from gradio_client import Client

    clients = [Client(url, verbose=False, httpx_kwargs={"timeout": 60}) for _ in range(4)]  # 5 s as a rule
    start = threading.Barrier(32)

    def ask(number):
        start.wait()
        try:
            (path,) = made_by(clients[number % 4], seed=number, columns=16 + number)
        except Exception as error:
            return str(error)
        return read_recipe(path), Image.open(path).width

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(32)))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 300, f"{grown:.0f} MB more"  # of pictures of 16x47: measured, 20
    made = [(number, answer) for number, answer in enumerate(answers) if not isinstance(answer, str)]
    assert len(made) >= 10, answers
    for number, (recipe, width) in made:
        assert (recipe.seed, recipe.width, width) == (number, 16 + number, 16 + number)
    assert all("queue" in answer.lower() for answer in answers if isinstance(answer, str)), answers


def test_the_command_serves_this_machine_alone_until_it_is_ended(pixel_model, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.listen()
        command = [sys.executable, "-m", "fitv2", "app", str(pixel_model), "--port", str(port)]
        refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert refused.returncode == 2
    assert f"fitv2: port {port} of 127.0.0.1 cannot be used: choose another --port" in refused.stderr
    running = subprocess.Popen([*command, "--out", str(tmp_path / "kept")], stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout.readline().startswith(f"http://127.0.0.1:{port}")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as page:
            assert b"FiTv2" in page.read()
        from gradio_client import Client

        client = Client(f"http://127.0.0.1:{port}", verbose=False)
        assert len(made_by(client, count=2)) == 2
        assert len(list((tmp_path / "kept").rglob("*.png"))) == 2
        with pytest.raises(OSError), socket.create_connection((own_address(), port), timeout=5):
            pass
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(30)


def own_address():
    """An address of this machine that others may reach; one that nobody has, if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect(("192.0.2.1", 9))  # sends nothing
            return asked.getsockname()[0]
        except OSError:
            return "192.0.2.1"


def test_a_mistake_is_answered_in_words(url):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(url, verbose=False)
    with pytest.raises(AppError, match="greater than maximum value 64"):
        made_by(client, rows=1000)
    with pytest.raises(AppError, match="1024 tokens together"):
        made_by(client, rows=64, columns=64, count=4)
    with pytest.raises(AppError, match="not in the list of choices"):
        made_by(client, label="green")
    assert len(made_by(client)) == 1


def test_a_picture_is_edited_and_read_by_the_api(url, tmp_path):
    from gradio_client import Client, handle_file

    picture(16, 12).save(tmp_path / "mine.png")
    client = Client(url, verbose=False)
    editor = {"background": handle_file(tmp_path / "mine.png"), "layers": [], "composite": None}
    gallery, _ = client.predict(
        editor, ALL, "", "red", "", 16, 16, 0.5, 2, 7, 1.5, 2, "automatic", api_name="/edit"
    )
    assert [Image.open(each["image"]).size for each in gallery] == [(16, 12)] * 2
    said = client.predict(handle_file(gallery[0]["image"]), api_name="/read")
    assert (said["seed"], said["edited"]["strength"]) == (7, 0.5)


def test_shapes_have_about_as_many_tokens_as_were_trained_on(studio):
    assert size_of(studio, (1, 1)) == (16, 16)
    rows, columns = size_of(studio, (1, 2))
    assert rows < columns
    assert rows // 4 * columns // 4 <= 16


# In a browser ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as play:
        running = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


def opened(browser, url, **options):
    """A tab at the page, which asks nothing of the network but its own server."""
    tab = browser.new_page(**options)
    tab.set_default_timeout(PATIENCE)
    strangers = []
    tab.on("request", lambda asked: strangers.append(asked.url) if not asked.url.startswith(
        (url, "data:", "blob:")) else None)  # fmt: skip
    tab.goto(url)
    tab.get_by_role("button", name="Make", exact=True).wait_for()
    return tab, strangers


def number(tab, name, value):
    field = tab.get_by_role("spinbutton", name=name).first
    field.fill(str(value))
    field.press("Tab")


def wait_for_pictures(tab, count):
    tab.wait_for_function(
        "count => [...document.querySelectorAll('#said')].some(one => one.textContent.includes('seed'))"
        " && document.querySelectorAll('#gallery button img').length >= count", arg=count,
    )  # fmt: skip


@needs_browser
def test_choose_make_see_download_read(browser, url, tmp_path):
    tab, strangers = opened(browser, url)
    number(tab, "Height", 24)
    number(tab, "Width", 40)
    number(tab, "Count", 2)
    tab.get_by_role("button", name="Make", exact=True).click()
    wait_for_pictures(tab, 2)
    tab.locator("#gallery button img").first.click()
    with tab.expect_download() as download:
        tab.locator("#gallery").get_by_role("button", name="Download").first.click()
    download.value.save_as(tmp_path / "made.png")
    recipe = read_recipe(tmp_path / "made.png")
    assert (recipe.height, recipe.width) == (24, 40)
    assert Image.open(tmp_path / "made.png").size == (40, 24)
    tab.get_by_role("tab", name="Read a picture").click()
    tab.locator("#read input[type=file]").set_input_files(tmp_path / "made.png")
    tab.get_by_text(recipe.weights).wait_for()
    assert strangers == []


@needs_browser
def test_a_size_is_dragged_and_the_box_follows_the_sliders(browser, url):
    tab, _ = opened(browser, url)
    field = tab.locator("#drag .field")
    field.scroll_into_view_if_needed()
    corner = field.bounding_box()
    tab.mouse.move(corner["x"] + 5, corner["y"] + 5)
    tab.mouse.down()
    tab.mouse.move(corner["x"] + corner["width"] * 0.99, corner["y"] + corner["height"] * 0.5, steps=4)
    tab.mouse.up()
    tab.get_by_text("32x64").wait_for()
    number(tab, "Count", 1)
    tab.get_by_role("button", name="Make", exact=True).click()
    wait_for_pictures(tab, 1)
    assert "1 of 32x64" in tab.locator("#said").first.inner_text()
    number(tab, "Height", 48)
    tab.get_by_text("48x64").wait_for()


@needs_browser
def test_other_shapes_are_made_with_it(browser, url):
    tab, _ = opened(browser, url)
    number(tab, "Count", 1)
    tab.get_by_role("button", name="Other shapes, other noises").click()
    tab.get_by_label("1:2").check()
    tab.get_by_label("One noise at all of them").check()
    tab.get_by_role("button", name="Make", exact=True).click()
    wait_for_pictures(tab, 2)
    assert "1 of 16x16, 8x20" in tab.locator("#said").first.inner_text()


@needs_browser
def test_too_much_at_once_gives_a_message(browser, url):
    tab, _ = opened(browser, url)
    for name, value in (("Count", 4), ("Height", 64), ("Width", 64)):
        number(tab, name, value)
    tab.get_by_role("button", name="Make", exact=True).click()
    tab.get_by_text("1024 tokens together").wait_for()


@needs_browser
def test_a_picture_is_painted_around(browser, url, tmp_path):
    picture(16, 12).save(tmp_path / "mine.png")
    tab, _ = opened(browser, url)
    tab.get_by_role("tab", name="Edit").click()
    tab.locator("#editor canvas").first.wait_for()  # before that the editor loses a file
    tab.locator("#editor input[type=file]").first.set_input_files(tmp_path / "mine.png")
    tab.locator("#editor").get_by_text("Upload an image").wait_for(state="hidden")  # the picture is there
    tab.get_by_text(AROUND).click()
    number(tab, "Canvas height", 16)
    number(tab, "Canvas width", 48)
    tab.get_by_role("button", name="Edit", exact=True).click()
    tab.wait_for_function("() => document.querySelectorAll('#gallery button img').length >= 1")
    tab.wait_for_function(
        "() => [...document.querySelectorAll('#said')].some(one => one.textContent.includes('seed'))"
    )
    source = tab.locator("#gallery button img").first.get_attribute("src")
    body = tab.request.get(source).body()
    (tmp_path / "made.png").write_bytes(body)
    made = np.asarray(Image.open(tmp_path / "made.png").convert("RGB"))
    assert made.shape == (16, 48, 3)
    assert np.array_equal(made[2:14, 16:32], np.asarray(picture(16, 12)))


@needs_browser
def test_what_is_painted_with_the_brush_is_made_anew(browser, url, tmp_path):
    picture(64, 48).save(tmp_path / "mine.png")
    tab, _ = opened(browser, url)
    tab.get_by_role("tab", name="Edit").click()
    tab.locator("#editor canvas").first.wait_for()
    tab.locator("#editor input[type=file]").first.set_input_files(tmp_path / "mine.png")
    tab.locator("#editor").get_by_text("Upload an image").wait_for(state="hidden")
    number(tab, "Count", 1)
    brush = tab.locator("#editor").get_by_role("button", name="Brush").first
    brush.wait_for()  # the picture is there
    tab.get_by_role("button", name="Edit", exact=True).click()
    tab.get_by_text("nothing is painted").first.wait_for()
    brush.click()
    canvas = tab.locator("#editor canvas").first.bounding_box()
    middle = canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2
    tab.mouse.move(*middle)
    tab.mouse.down()
    tab.mouse.move(middle[0] + 20, middle[1] + 10, steps=5)
    tab.mouse.up()
    tab.get_by_role("button", name="Edit", exact=True).click()
    tab.wait_for_function(
        "() => [...document.querySelectorAll('#said')].some(one => one.textContent.includes('seed'))"
    )
    source = tab.locator("#gallery button img").first.get_attribute("src")
    (tmp_path / "made.png").write_bytes(tab.request.get(source).body())
    made, given = (np.asarray(Image.open(path).convert("RGB")) for path in
                   (tmp_path / "made.png", tmp_path / "mine.png"))  # fmt: skip
    changed = (made != given).any(2)
    assert 0 < changed.mean() < 0.9
    assert not changed[0, 0]


@needs_browser
def test_two_tabs_at_once_both_finish_and_a_telephone_shows_it(browser, url):
    tabs = [opened(browser, url)[0], opened(browser, url, viewport={"width": 390, "height": 844})[0]]
    for tab in tabs:
        tab.get_by_role("button", name="Make", exact=True).click()
    for tab in tabs:
        wait_for_pictures(tab, 4)
    assert tabs[1].evaluate("() => document.documentElement.scrollWidth") <= 390  # nothing lies outside
