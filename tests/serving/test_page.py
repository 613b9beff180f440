"""The page of `serve.py --page` in a headless Chromium, driven over its DevTools protocol."""

import base64
import json
import os
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from complexity_deep.workflow.serving.app import page_response
from served import Served, save_tiny

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MARKUP = "<img src=x onerror=alert(1)>"
CONTEXT = 2**15


class Browser:
    """One tab. Commands go over a pipe, so that no port and no WebSocket is needed."""

    def __init__(self, profile: Path):
        read_commands, self.write = os.pipe()
        self.read, write_replies = os.pipe()

        def as_third_and_fourth() -> None:  # the file descriptors that Chromium uses
            os.dup2(os.dup(read_commands), 3)
            os.dup2(os.dup(write_replies), 4)

        # Without its sandbox, because tests may run as root; it loads only the page under test.
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        self.process = subprocess.Popen(
            [CHROMIUM, *options, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"],
            preexec_fn=as_third_and_fourth,
            env={**os.environ, "TMPDIR": str(profile)},  # what a killed Chromium leaves there is removed with the rest
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_replies)
        self.received, self.count, self.session, self.events = b"", 0, None, []
        while not (pages := [one for one in self("Target.getTargets")["targetInfos"] if one["type"] == "page"]):
            time.sleep(0.02)
        self.session = self("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._next()
            if reply.get("id") == self.count:
                assert "error" not in reply, reply
                return reply["result"]
            self.events.append(reply)

    def _next(self) -> dict:
        while b"\0" not in self.received:
            assert select.select([self.read], [], [], 120)[0], "Chromium does not answer"
            self.received += os.read(self.read, 2**16)
        reply, self.received = self.received.split(b"\0", 1)
        return json.loads(reply)

    def value(self, expression: str):
        result = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 120):
        deadline = time.monotonic() + seconds
        while not (value := self.value(expression)):
            assert time.monotonic() < deadline, f"{expression} stays {value}: {self.value('document.body.innerText')}"
            time.sleep(0.02)
        return value

    def type(self, text: str) -> None:
        """Into the field for the prompt, and Enter."""
        self.value("document.getElementById('prompt').focus()")
        self("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
            self("Input.dispatchKeyEvent", type=kind, **key, **({"text": "\r"} if kind == "keyDown" else {}))

    def click(self, id: str) -> None:
        self.value(f"document.getElementById('{id}').scrollIntoView()")
        place = self.value(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
            f"(document.getElementById('{id}').getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A model many of whose words are HTML, and whose tables differ between layers. It can write for a minute."""
    place = tmp_path_factory.mktemp("page")
    folder = save_tiny(place / "words", routing="random", routing_per_layer=True, max_position_embeddings=CONTEXT)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        word if index < 200 else MARKUP.replace("1", str(index)): index for word, index in vocabulary.items()
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    server = Served(folder, place / "log", "--page")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("There is no Chromium to open the page in: install Debian's package chromium.")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def test_type_stream_stop_and_reload(server, browser):
    browser("Page.navigate", url=f"{server.url}/")
    browser.wait("document.title === 'words' && document.getElementById('layer').options.length === 3")

    # Type and stream: the text grows while the answer is written, and the number of tokens a second is told. The page
    # keeps what it showed, since the answer may be whole before it is asked a second time.
    browser.value("document.getElementById('tokens').value = 120")
    shown = "[document.querySelector('.assistant').textContent.length, document.getElementById('send').disabled]"
    browser.value(
        f"window.shown = []; new MutationObserver(() => running && shown.push({shown}))"
        ".observe(document.querySelector('main'), {childList: true, subtree: true})"
    )
    browser.type("w40 w41 w42")
    note = browser.wait("!running && document.querySelector('.note').textContent")
    assert note.startswith("120 tokens, ") and note.endswith(" tokens/s, cut at the number of tokens")
    lengths, is_disabled = zip(*browser.value("shown"))
    assert list(lengths) == sorted(lengths) and len(set(lengths)) > 3 and all(is_disabled)

    # What the model wrote is text: its markup is shown, and made nothing.
    assert "onerror=alert" in browser.value("document.querySelector('.assistant').textContent")
    assert browser.value("document.querySelectorAll('main img').length") == 0

    # Every token has the colour of its expert, which another layer changes.
    tokens = "[...document.querySelectorAll('.assistant .expert')]"
    assert browser.value(f"{tokens}.length") == 120
    assert browser.value(f"{tokens}.every((token) => token.style.backgroundColor && token.title)")
    colours = browser.value(f"{tokens}.map((token) => token.style.backgroundColor)")
    assert 1 < len(set(colours)) <= 4
    browser.value("document.getElementById('layer').value = 2")
    browser.value("document.getElementById('layer').dispatchEvent(new Event('change'))")
    assert browser.value(f"{tokens}.map((token) => token.style.backgroundColor)") != colours

    # Stop: the server ends the request, and what was written stays and can be gone on from.
    browser.value("document.getElementById('tokens').value = 30000")
    browser.value("document.getElementById('temperature').value = 0")
    browser.type("w50")
    last = "[...document.querySelectorAll('.assistant')].at(-1).textContent.length"
    browser.wait(f"document.querySelectorAll('.assistant').length === 2 && {last} > 20")
    browser.click("stop")
    note = browser.wait("!running && [...document.querySelectorAll('.note')].at(-1).textContent")
    stopped = re.fullmatch(r"(\d+) tokens?(, \d+\.\d tokens/s)?, stopped", note)  # no speed where all came at once
    assert stopped, note
    # As many tokens as it tells have the text that is shown. Words are not counted: a special token has no text.
    asked = f"model: 'words', messages: messages.slice(0, 3), temperature: 0, max_tokens: {stopped[1]}"
    whole = f"ask('/v1/chat/completions', {{{asked}}}).then((answer) => answer.json())"
    written = browser.value("[...document.querySelectorAll('.assistant')].at(-1).textContent")
    assert browser.value(f"{whole}.then((answer) => answer.choices[0].message.content)") == written
    browser.wait("fetch('/health').then((one) => one.json()).then((one) => one.running === 0)")
    assert browser.value("messages.map((message) => message.role).join()") == "user,assistant,user,assistant"

    # A wrong value is told as the server says it, and the prompt is there to be sent again.
    browser.value("document.getElementById('tokens').value = 40000")
    browser.type("w60")
    refusal = browser.wait("!running && document.querySelector('.note.error')?.textContent")
    assert f"The model's context is {CONTEXT} tokens" in refusal and "lower Tokens or press Clear" in refusal
    assert browser.value("document.getElementById('prompt').value") == "w60"

    # Reload: a new conversation that works.
    browser("Page.reload")
    browser.wait("document.title === 'words' && !document.querySelector('.turn')")
    browser.value("document.getElementById('tokens').value = 5")
    browser.type("w40")
    browser.wait("document.querySelectorAll('.assistant .expert').length === 5")

    # Nothing came from elsewhere, and the page asked for nothing that its policy forbids.
    urls = [
        event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert urls and all(url.startswith(f"{server.url}/") for url in urls)
    errors = [event for event in browser.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    entries = [event["params"].get("entry", {"level": "error", "text": str(event)}) for event in errors]
    # Chromium also tells where the test was in the field before its focus came by itself.
    said = [entry["text"] for entry in entries if entry["level"] in ("warning", "error")]
    assert said and all("status of 400" in text for text in said), said


def test_the_page_may_run_only_its_own_script_and_style():
    policy = page_response().headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert not re.search(r"https?:|src=|url\(|@import", page_response().body.decode())
