"""The judge of latents against a server on this machine that speaks the chat protocol."""

import csv
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from saeflow.config import check_params
from saeflow.errors import UserError
from saeflow.evaluation.detection import Window
from saeflow.evaluation.interpret import interpret
from saeflow.evaluation.judge import KEY, Judge

from ..workflow.test_text import PARAMS
from .test_interpret import SETTINGS
from .test_interpret import text as text  # a fixture

SECRET = "s3cret-value"


class Server:
    """A chat server whose model knows one word: a latent fires on it, or on nothing that it was shown."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.spoil = 0  # so many lists of answers come as prose
        self.status = 200
        self.usage = True
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.seen.append(body)
                server.keys.append(self.headers["Authorization"])
                code, text = server.answer(self.path, body)
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", f"{server.url}/elsewhere")
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        if self.status != 200 or path != "/v1/chat/completions":
            return self.status, f"no, not with {self.keys[-1]}"
        system, user = (message["content"] for message in body["messages"])
        if "JSON list" in system:
            explanation, _, windows = user.partition("\n\n")
            word = explanation.removeprefix("Explanation: fires on ")
            said = json.dumps([int(f"<<{word}>>" in line) for line in windows.split("\n")])
            if self.spoil:
                self.spoil -= 1
                said = "I think the first one."
            else:
                said = f"Here it is: {said}"
        else:
            said = "fires on " + user.partition("<<")[2].partition(">>")[0]
        reply: dict[str, Any] = {
            "model": "served-name",
            "choices": [{"message": {"content": said}}],
        }
        if self.usage:
            reply["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        return 200, json.dumps(reply)


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    thread = threading.Thread(target=one.http.serve_forever)
    thread.start()
    yield one
    one.http.shutdown()
    thread.join()
    one.http.server_close()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)


def settings(url: str, **changes: Any) -> dict[str, Any]:
    known = {"url": url, "model": "asked-name", "attempts": 2, "timeout_s": 10, "price": None}
    return known | changes


def window(word: str, fires: bool | None) -> Window:
    return Window((1, 2, 3), 1, fires, ("a ", word, " b\n"))


EXAMPLES = [window("other", False), window("cat", True), window("cat", True)]
ASKED = [window("dog", None), window("cat", None), window("bird", None)]


def test_the_model_is_shown_examples_and_asked_for_answers(server: Server, tmp_path: Path) -> None:
    judge = Judge(settings(server.url), tmp_path / "replies.jsonl")
    assert judge(EXAMPLES, ASKED) == [-1.0, 1.0, -1.0]
    assert judge.explanations == ["fires on cat"]
    explain, detect = server.seen
    assert explain["messages"][1]["content"] == "a <<cat>> b⏎\na <<cat>> b⏎"
    assert detect["messages"][1]["content"].split("\n") == [
        "Explanation: fires on cat", "", "1. a <<dog>> b⏎", "2. a <<cat>> b⏎", "3. a <<bird>> b⏎",
    ]  # fmt: skip
    assert {body["model"] for body in server.seen} == {"asked-name"}
    assert {body["temperature"] for body in server.seen} == {0}
    assert server.keys == [None, None]


def test_the_record_counts_requests_tokens_and_cost(server: Server, tmp_path: Path) -> None:
    price = {"prompt": 2.0, "completion": 30.0}
    judge = Judge(settings(server.url, price=price), tmp_path / "replies.jsonl")
    judge(EXAMPLES, ASKED)
    judge(EXAMPLES[::-1], ASKED[:2])
    found = judge.facts()
    assert (
        len(server.seen) == 3
    )  # the explanation is asked for once: its examples are the same ones
    assert found == {
        "url": server.url, "model": "asked-name", "served": ["served-name"], "requests": 4,
        "requests_without_usage": 0, "prompt_tokens": 400, "completion_tokens": 40,
        "cost": pytest.approx((400 * 2 + 40 * 30) / 1e6),
    }  # fmt: skip
    server.usage = False
    judge(EXAMPLES, ASKED[:1])
    assert (judge.facts()["requests_without_usage"], judge.facts()["cost"]) == (1, None)


def test_a_job_that_was_cut_off_asks_for_nothing_again(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    first = Judge(settings(server.url), path)(EXAMPLES, ASKED)
    with path.open("a") as file:
        file.write('{"asked": "a line that was cut')
    judge = Judge(settings(server.url), path)
    assert judge(EXAMPLES, ASKED) == first
    assert len(server.seen) == 2
    assert judge.facts()["requests"] == 2
    contents = [json.loads(line)["content"] for line in path.read_text().splitlines()]
    assert contents[0] == "fires on cat"


def test_a_reply_that_cannot_be_read_is_asked_for_again_then_refused(
    server: Server, tmp_path: Path
) -> None:
    server.spoil = 1
    judge = Judge(settings(server.url), tmp_path / "replies.jsonl")
    assert judge(EXAMPLES, ASKED) == [-1.0, 1.0, -1.0]
    assert [body["seed"] for body in server.seen] == [0, 0, 1]
    server.spoil = 2
    with pytest.raises(
        UserError,
        match=r"expected a JSON list of 2 zeros and ones in one of 2 replies, found 'I think",
    ):
        judge(EXAMPLES, ASKED[:2])  # fmt: skip


@pytest.mark.parametrize(
    "reply", ["[1, 0]", "[1, 0, 2]", "[true, 0, 1]", "1, 0, 1", "[1, 0, 1", "[]"]
)
def test_what_is_no_list_of_answers(reply: str) -> None:
    from saeflow.evaluation.judge import _answers

    assert _answers(reply, 3) is None
    assert _answers("Sure: [1, 0, 1].", 3) == [1, 0, 1]


def test_the_key_is_of_the_environment_and_written_nowhere(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, SECRET)
    judge = Judge(settings(server.url), tmp_path / "replies.jsonl")
    judge(EXAMPLES, ASKED)
    assert set(server.keys) == {f"Bearer {SECRET}"}
    assert SECRET not in (tmp_path / "replies.jsonl").read_text() + json.dumps(judge.facts())
    server.status = 401  # its answer repeats the key
    with pytest.raises(UserError, match="answers 401") as caught:
        judge(EXAMPLES, ASKED[:1])
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    server.status = 302
    with pytest.raises(UserError, match="answers 302"):  # the key goes to no other address
        judge(EXAMPLES, ASKED[:1])
    with pytest.raises(UserError, match=f"expected https, since {KEY} is set"):
        Judge(settings("http://example.org/v1"), tmp_path / "replies.jsonl")


def test_a_server_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    judge = Judge(settings("http://127.0.0.1:9/v1"), tmp_path / "replies.jsonl")
    with pytest.raises(
        UserError, match=r"127\.0\.0\.1:9/v1/chat/completions: the server cannot be asked"
    ):
        judge(EXAMPLES, ASKED)  # fmt: skip


def test_latents_of_a_model_are_judged(text: Any, server: Server, tmp_path: Path) -> None:
    """Accuracy is counted again from the requests: the model says yes to the word of the first example."""
    detection = SETTINGS["detection"] | {"scorer": "judge", "judge": settings(server.url)}
    found = interpret(*text, SETTINGS | {"detection": detection}, tmp_path)
    with (tmp_path / "detection.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines
    assert found["judge"]["requests"] == 2 * len(lines)
    explanations = json.loads((tmp_path / "explanations.json").read_text())
    assert set(explanations) == {line["latent"] for line in lines}
    assert all(one.startswith("fires on ") for one in explanations.values())
    for line, body in zip(lines, server.seen[1::2], strict=True):
        explanation, _, windows = body["messages"][1]["content"].partition("\n\n")
        assert explanation == f"Explanation: {explanations[line['latent']]}"
        assert len(windows.split("\n")) == 2 * detection["windows"]
    assert any(float(line["balanced_accuracy"]) != 0.5 for line in lines)


@pytest.mark.parametrize(
    "change", [{"scorer": "judge"}, {"judge": {"url": "http://a/v1", "model": "m"}}]
)
def test_a_judge_without_a_server_and_a_server_without_a_judge_are_refused(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for name in ("0.txt", "1.txt"):
        (tmp_path / name).touch()
    params = json.loads(json.dumps(PARAMS))
    params["evaluation"]["interpretability"]["detection"] = change
    with pytest.raises(UserError, match="Give both or neither"):
        check_params(params, [])
    both = {"scorer": "judge", "judge": {"url": "http://a/v1", "model": "m"}}
    params["evaluation"]["interpretability"]["detection"] = both
    assert (
        check_params(params, [])["evaluation"]["interpretability"]["detection"]["judge"]["attempts"]
        == 3
    )
