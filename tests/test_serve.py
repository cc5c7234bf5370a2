"""`pymcip serve`: its answers, what it refuses, and the page as a person uses it in Chromium."""

from __future__ import annotations

import http.client
import io
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
from PIL import Image

import pymcip
from pymcip.cli import main
from pymcip.configs import ServeConfig
from pymcip.errors import ConfigError, DataError
from pymcip.exporting import write_export
from pymcip.model.appended import Gate, appended_clip, linear_head
from pymcip.search.gallery import Gallery
from tests.conftest import COLOURS, picture, write_shard

uvicorn = pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
from pymcip.search import serve as serving  # noqa: E402

HTML = "<img src=x onerror=document.title='run'>"
IMAGES = 30


class Served:
    """A running server, asked without a browser."""

    def __init__(self, *folders: Path, **options: Any) -> None:
        before, kept = uvicorn.Server, []

        class Recorded(before):  # type: ignore[misc,valid-type]
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                kept.append(self)

        names = dict(zip(("index", "baseline"), folders, strict=False))
        config = ServeConfig(**{"port": 0, "device": "cpu", **names, **options})
        uvicorn.Server = Recorded
        self.thread = threading.Thread(target=serving.serve, args=(config,))
        self.thread.start()
        while not (kept and kept[0].started):
            assert self.thread.is_alive()
            time.sleep(0.01)
        uvicorn.Server = before
        self.server = kept[0]
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    def ask(
        self, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        found = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        connection.close()
        return found

    def search(self, body: bytes | None = None, **query: Any) -> dict[str, Any]:
        status, _, answer = self.ask("/api/search?" + urlencode(query), body)
        assert status == 200, answer
        found: dict[str, Any] = json.loads(answer)
        return found


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path
) -> tuple[Path, Path, Path]:
    """An index by a model with appended dimensions, one by its joint model, and their images."""
    base = tmp_path_factory.mktemp("serve")
    for number in range(IMAGES):
        folder = base / "photos" / ("red", HTML)[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(number, COLOURS[number % 5]).save(folder / f"{number}.png")
    odd = base / "photos" / "red" / f"{HTML}.png"
    picture(99).save(odd)
    odd.with_suffix(".txt").write_text(HTML)
    clip = pymcip.load(str(tiny_model_dir), device="cpu", precision="fp32")
    generator = torch.Generator().manual_seed(0)
    head = linear_head(torch.randn(6, clip.embed_dim, generator=generator), torch.zeros(6))
    tuned = appended_clip(clip, None, head, 1.5, Gate(torch.eye(clip.embed_dim)[:2], 0.5, 0.1))
    hub = write_export(tuned, base / "model").hub
    options: dict[str, Any] = {"images": base / "photos", "precision": "fp32", "device": "cpu"}
    pymcip.build_index(model=str(hub), out=base / "tuned", **options)
    pymcip.build_index(model=str(tiny_model_dir), out=base / "plain", **options)
    return base / "tuned", base / "plain", base / "photos"


@pytest.fixture(scope="module")
def served(folders: tuple[Path, Path, Path]) -> Iterator[Served]:
    server = Served(*folders[:2])
    yield server
    server.stop()


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def rows(hits: list[Any]) -> list[int]:
    return [hit["row"] if isinstance(hit, dict) else hit.row for hit in hits]


def test_answers_are_those_of_the_indexes(served: Served, folders: tuple[Path, Path, Path]) -> None:
    tuned, plain = (pymcip.Index(folder, device="cpu") for folder in folders[:2])
    about = json.loads(served.ask("/api/about")[2])
    assert (about["images"], about["appended"]) == (IMAGES + 1, True)
    image = picture(3, COLOURS[3])
    for query, body, arguments in (
        ({"text": "red"}, None, {"text": "red"}),
        ({"row": 4, "strength": 0}, None, {"image": 4, "strength": 0}),
        (
            {"row": 4, "text": "red", "weight": 0.2},
            None,
            {"text": "red", "image": 4, "weight": 0.2},
        ),
        ({"text": " "}, encoded(image), {"image": image}),
    ):
        found = served.search(body, **query, offset=5, limit=7)
        expected, before = (index.search(**arguments, k=40) for index in (tuned, plain))
        assert found["hits"][0].items() >= {**vars(expected[5]), "captions": []}.items()
        assert rows(found["hits"]) == rows(expected)[5:12]
        assert rows(found["baseline"]) == rows(before)[5:12]
        for hits, others in ((found["hits"], before), (found["baseline"], expected)):
            assert [hit["rank"] for hit in hits] == list(range(5, 12))
            assert [hit["other"] for hit in hits] == [
                rows(others).index(hit["row"]) for hit in hits
            ]
    pages = [served.search(offset=offset, limit=16) for offset in (0, 16)]
    assert sorted(rows(pages[0]["hits"] + pages[1]["hits"])) == list(range(IMAGES + 1))
    assert {hit["score"] for hit in pages[0]["hits"]} == {None}
    document = json.loads(served.ask("/openapi.json")[2])
    for path in document["paths"]:
        assert served.ask(path.replace("{row}", "0"))[0] == 200
    hit = document["components"]["schemas"]["Hit"]["properties"]
    assert set(hit) == set(pages[0]["hits"][0])
    assert (
        'pymcip_requests_total{endpoint="search",status="200"} 7'
        in served.ask("/metrics")[2].decode()
    )


def test_thumbnails_are_made_once(served: Served, folders: tuple[Path, Path, Path]) -> None:
    hit = served.search(text="red", limit=1)["hits"][0]
    status, headers, content = served.ask(hit["thumbnail"])
    assert (status, headers["content-type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(content)).size == (40, 40)
    kept = [path for path in folders[0].glob("thumbnails/*/*") if path.read_bytes() == content]
    assert len(kept) == 1
    path = Path(hit["path"])
    before = path.read_bytes()
    path.write_bytes(encoded(picture(1000)))  # another picture, which is not of the index
    try:
        assert served.ask(hit["thumbnail"])[2] == content
        kept[0].unlink()
        status, _, answer = served.ask(hit["thumbnail"])
        assert status == 404
        assert "has changed since it was indexed" in json.loads(answer)["error"]
    finally:
        path.write_bytes(before)
    assert served.ask(hit["thumbnail"])[2] == content


def test_images_of_shards_have_thumbnails(tmp_path: Path, tiny_model_dir: Path) -> None:
    upright = Image.new("RGB", (400, 200))
    exif = Image.Exif()
    exif[0x112] = 6  # turned by a quarter
    buffer = io.BytesIO()
    upright.save(buffer, "JPEG", exif=exif)
    write_shard(tmp_path / "s.tar", [("a.png", encoded(picture(1))), ("b.jpg", buffer.getvalue())])
    out = pymcip.build_index(
        model=str(tiny_model_dir), images=tmp_path / "s.tar", out=tmp_path / "index", device="cpu"
    ).out
    gallery = Gallery(pymcip.Index(out, device="cpu"))
    sizes = [Image.open(io.BytesIO(gallery.thumbnail(row))).size for row in (0, 1)]
    assert sizes == [(40, 40), (160, 320)]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/thumbnails/31", 404),
        ("/thumbnails/-1", 404),
        ("/thumbnails/" + "9" * 900, 404),
        ("/thumbnails/" + "9" * 9000, 400),
        ("/thumbnails/x", 400),
        ("/thumbnails/../index.json", 404),
        ("/thumbnails/..%2f..%2findex.json", 404),
        ("/thumbnails//etc/passwd", 404),
        ("//etc/passwd", 404),
        ("/%2e%2e/%2e%2e/etc/passwd", 404),
        ("/page/index.html", 404),
        ("/serve.py", 404),
        ("/api/search?row=31", 400),
        ("/api/search?row=1.5", 400),
        ("/api/search?path=/etc/passwd", 400),
        ("/api/search?image=/etc/passwd", 400),
        ("/api/search?text=" + "a" * 1001, 400),
        ("/api/search?text=a&limit=101", 400),
        ("/api/search?text=a&offset=-1", 400),
        ("/api/search?text=a&row=0&weight=nan", 400),
    ],
)
def test_refused_requests(served: Served, path: str, status: int) -> None:
    found, headers, content = served.ask(path)
    assert found == status
    assert json.loads(content)["error"]
    assert "default-src 'none'" in headers["content-security-policy"]


def test_refused_pictures(served: Served) -> None:
    def sent(body: bytes) -> tuple[int, str]:
        status, _, answer = served.ask("/api/search", body)
        return status, json.loads(answer)["error"]

    bomb = encoded(Image.new("1", (9_500, 9_500)))
    for body, message in (
        (b"no picture", "the picture can't be decoded"),
        (encoded(picture(1))[:-40], "the picture can't be decoded"),
        (bomb, "decompression bomb"),
        (encoded(Image.new("L", (100_000, 1))), "are refused"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "can't be decoded"),
    ):
        status, error = sent(body)
        assert (status, message in error) == (400, True), error
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    connection.putrequest("POST", "/api/search")
    connection.putheader("content-length", str(1 << 40))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    pieces = (bytes(1 << 20) for _ in range(21))  # of no announced length
    connection.request("POST", "/api/search", pieces, encode_chunked=True,
                       headers={"transfer-encoding": "chunked"})  # fmt: skip
    assert connection.getresponse().status == 413
    connection.close()


def test_names_that_lead_here_from_elsewhere(served: Served) -> None:
    assert served.ask("/", Host="rebound.example:80")[0] == 421
    assert served.ask("/", Host="127.0.0.1.rebound.example")[0] == 421
    assert served.ask("/", Host="[::1")[0] == 400
    for name in ("localhost", f"127.0.0.1:{served.port}", "[::1]:80"):
        assert served.ask("/", Host=name)[0] == 200


def test_the_token(folders: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    server = Served(folders[1], host="0.0.0.0")
    try:
        printed = re.search(
            rf"31 images: http://0.0.0.0:{server.port}/\?token=(\S+)", capsys.readouterr().out
        )
        assert printed is not None
        token = printed[1]
        assert len(token) >= 32
        for path in ("/", "/api/about", "/thumbnails/0", "/metrics", "/page.js", "/nowhere"):
            assert server.ask(path)[0] == 401
        assert server.ask("/?token=wrong")[0] == 401
        assert server.ask("/api/about", Authorization="Bearer ")[0] == 401
        assert server.ask("/health")[0] == 200
        assert server.ask("/api/about", Authorization=f"Bearer {token}")[0] == 200
        status, headers, _ = server.ask(f"/?token={token}")
        assert (status, headers["location"]) == (303, "/")
        assert "HttpOnly" in headers["set-cookie"]
        cookie = headers["set-cookie"].split(";")[0]
        assert server.ask("/", Cookie=cookie, Host="a.name.of.this.machine")[0] == 200
    finally:
        server.stop()


def test_options_that_are_refused(
    folders: tuple[Path, Path, Path], tiny_model_dir: Path, tmp_path: Path,
    served: Served, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(ConfigError, match="token= must be 8 to 200"):
        ServeConfig(index="i", token="")
    (tmp_path / "a").mkdir()
    picture(1).save(tmp_path / "a" / "1.png")
    other = pymcip.build_index(
        model=str(tiny_model_dir), images=tmp_path / "a", out=tmp_path / "other", device="cpu"
    ).out
    with pytest.raises(DataError, match="holds other images than"):
        serving.serve(ServeConfig(index=folders[1], baseline=other, device="cpu"))
    assert main(["serve", str(other), "--port", str(served.port), "--device", "cpu"]) == 2
    assert "can't be listened on" in capsys.readouterr().err


def test_without_the_extra(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(folders[0])]) == 2
    assert "pip install 'pymcip[serve]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no Chromium (Debian: apt install chromium)")
    with driver.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, served: Served, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, opened; nothing may fail in it, and nothing may be asked of another host."""
    context = browser.new_context(**getattr(request, "param", {}))
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened = context.new_page()
    troubles: list[str] = []
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)
    opened.on(
        "request",
        lambda asked: (
            troubles.append(asked.url)
            if not asked.url.startswith((served.address, "blob:", "data:"))
            else None
        ),
    )
    opened.troubles = troubles
    opened.goto(served.address)
    opened.wait_for_selector("#status:has-text('Some of the images')")
    yield opened
    assert troubles == []
    assert opened.title() == "Search"  # what the names of files and classes say was not run
    context.close()


def shown(page: Any, column: int = 1) -> list[str]:
    """The paths of the pictures shown, when they are there: 0 before, 1 now."""
    page.wait_for_selector("#status:has-text('Nearest first')")
    paths: list[str] = page.eval_on_selector_all(
        f"section:nth-of-type({column + 1}) .hit", "hits => hits.map(hit => hit.dataset.path)"
    )
    return paths


def paths(hits: list[dict[str, Any]]) -> list[str]:
    return [hit["path"] for hit in hits]


def test_a_person_searches(page: Any, served: Served) -> None:
    page.fill("#text", "red")
    page.click("#go")
    found = served.search(text="red")
    assert shown(page) == paths(found["hits"])  # side by side
    assert shown(page, 0) == paths(found["baseline"])
    marks = page.locator("section:nth-of-type(2) li").all_inner_texts()
    for hit, text in zip(found["hits"], marks, strict=True):
        steps = hit["other"] - hit["rank"]
        assert ("▲" in text, "▼" in text) == (steps > 0, steps < 0)
        assert hit["label"] in text
        assert f"{hit['score']:.3f}" in text
    assert page.locator("h2").all_inner_texts()[0].startswith("Before: ")
    assert not page.is_visible("#mix")
    page.locator(".hit img").first.evaluate("image => image.decode()")  # or it fails

    page.locator("section:nth-of-type(2) .hit").nth(2).click()  # text and picture
    row = found["hits"][2]["row"]
    page.wait_for_selector("#chip:visible")
    assert shown(page) == paths(served.search(text="red", row=row)["hits"])
    slide(page, "#weight", "1")
    assert shown(page) == paths(served.search(text="red", row=row, weight=1)["hits"])
    slide(page, "#strength", "0")
    assert shown(page) == paths(served.search(text="red", row=row, weight=1, strength=0)["hits"])
    assert page.inner_text("#amount") == "0"
    page.click("#more")
    page.wait_for_selector("#where:has-text('25 to 31 of 31')")
    page.locator("section:nth-of-type(2) .copy").first.click()
    page.wait_for_selector("#status:has-text('Copied')")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == served.search(
        text="red", row=row, weight=1, strength=0, offset=24
    )["hits"][0]["path"]  # fmt: skip
    page.go_back()
    page.wait_for_selector("#where:has-text('1 to 24 of 31')")


def slide(page: Any, name: str, value: str) -> None:
    with page.expect_response(re.compile("/api/search")):
        page.eval_on_selector(
            name,
            "(slider, value) => { slider.value = value;"
            " for (const kind of ['input', 'change']) slider.dispatchEvent(new Event(kind)) }",
            value,
        )


def test_pictures_are_chosen_dropped_and_pasted(page: Any, served: Served) -> None:
    content = encoded(picture(5, COLOURS[0]))
    expected = paths(served.search(content)["hits"])
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": content})
    page.wait_for_selector("#chip:visible")
    assert shown(page) == expected
    with page.expect_response(re.compile("/api/search")):
        page.click("#remove")
    page.wait_for_selector("#status:has-text('Some of the images')")
    for event, field in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.evaluate(
            """([kind, field, bytes]) => {
                const files = new DataTransfer();
                files.items.add(new File([new Uint8Array(bytes)], 'a.png', {type: 'image/png'}));
                const event = new Event(kind, {bubbles: true});
                event[field] = files;
                document.body.dispatchEvent(event);
            }""",
            [event, field, list(content)],
        )
        assert shown(page) == expected
        page.click("#remove")
        page.wait_for_selector("#status:has-text('Some of the images')")
    broken = {"name": "b.png", "mimeType": "image/png", "buffer": content[:200]}
    page.set_input_files("#file", broken)
    page.wait_for_selector('#status.wrong:has-text("the picture can\'t be decoded")')
    assert page.locator(".hit").count() == 0
    assert "400" in page.troubles.pop()  # what the browser says of it
    page.click("#remove")
    page.wait_for_selector("#status:has-text('Some of the images')")


def test_by_keyboard_alone(page: Any, served: Served) -> None:
    press = page.keyboard.press
    page.keyboard.type("red")
    press("Enter")
    found = served.search(text="red")
    before = shown(page, 0)
    assert before == paths(found["baseline"])
    for key in ("ArrowDown", "ArrowRight", "ArrowDown", "ArrowUp", "ArrowLeft", "c"):
        press(key)
    page.wait_for_selector("#status:has-text('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == before[0]
    press("ArrowUp")
    assert page.evaluate("document.activeElement.id") == "text"
    press("ArrowDown")
    press("ArrowRight")
    press("Enter")
    page.wait_for_selector("#chip:visible")
    assert shown(page, 0) == paths(
        served.search(text="red", row=found["baseline"][1]["row"])["baseline"]
    )
    press("/")
    assert page.evaluate("document.activeElement.id") == "text"
    seen = set()
    for _ in range(8):
        press("Tab")
        seen.add(page.evaluate("document.activeElement.id"))
    assert {"remove", "choose", "go", "weight", "strength"} <= seen


@pytest.mark.parametrize(
    "page", [{"viewport": {"width": 320, "height": 640}, "color_scheme": "dark"}], indirect=True
)
def test_a_narrow_screen(page: Any) -> None:
    page.fill("#text", "red")
    page.click("#go")
    assert len(shown(page)) == 24
    page.locator(".hit").nth(1).click()
    page.wait_for_selector("#mix:visible")
    shown(page)
    wide, across = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= across
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 22, 24)"
    widths = page.eval_on_selector_all(".hit", "hits => hits.map(hit => hit.clientWidth)")
    assert min(widths) > 120
