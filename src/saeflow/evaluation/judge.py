"""A judge for detection: a language model that any server with the OpenAI-compatible chat protocol runs.

For each latent it is asked twice. From examples on which the latent fires it writes an explanation; from the explanation alone it
says of held-out windows whether the latent fires on their marked token (Paulo et al. 2024, arXiv 2410.13928). Replies are kept
in a file, so that a job that was cut off asks for nothing again.
"""

import json
import logging
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from saeflow.errors import UserError
from saeflow.evaluation.detection import Window
from saeflow.files import json_digest, parse_json

logger = logging.getLogger(__name__)

KEY = "SAEFLOW_JUDGE_KEY"
"""The environment variable with the server's key; no parameter, record or log holds one."""
WHERE = "evaluation.interpretability.detection.judge"
_LOCAL = ("localhost", "127.0.0.1", "::1")
_EXPLAIN = (
    "You study a latent of a sparse autoencoder of a language model. It fires on single tokens, which stand between << and >> in the "
    "examples. Say in one short sentence on which tokens, and in which contexts, it fires. Reply with that sentence alone."
)
_DETECT = (
    "You are given an explanation of a latent, which fires on single tokens, and numbered windows of text. Say of each window whether the "
    "latent fires on the token between << and >>. Reply with a JSON list alone, one number a window in order: 1 where it "
    "fires, 0 where it does not."
)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the key and the texts go to the server that was named, and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass
class Judge:
    """A scorer of windows, see `saeflow.evaluation.detection.Scorer`.

    Attributes:
        settings: url, model, attempts, timeout_s and price of evaluation.interpretability.detection.judge.
        replies: the file of replies, one JSON object a line; those that it holds are not asked for again.
        explanations: of the latents, in the order in which they were scored.
    """

    settings: Mapping[str, Any]
    replies: Path
    explanations: list[str] = field(default_factory=list)
    used: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.key = os.environ.get(KEY, "")
        address = urllib.parse.urlsplit(self.settings["url"])
        if self.key and address.scheme != "https" and address.hostname not in _LOCAL:
            raise UserError(
                f"{WHERE}.url: expected https, since {KEY} is set, found {self.settings['url']}. Use https, or a server of this "
                "machine, or unset the key."
            )
        self.kept = self._read()

    def __call__(self, examples: Sequence[Window], windows: Sequence[Window]) -> list[float]:
        """Return 1 for each window on which the model says that the latent fires, -1 for the others.

        Raises:
            UserError: the server cannot be asked, or gives no list of as many answers in all attempts.
        """
        firing = "\n".join(_shown(one) for one in examples if one.fires)
        explanation = self._ask(_EXPLAIN, firing, 0).strip()
        self.explanations.append(explanation)
        numbered = "\n".join(f"{number}. {_shown(one)}" for number, one in enumerate(windows, 1))
        asked = f"Explanation: {explanation}\n\n{numbered}"
        reply = ""
        for attempt in range(self.settings["attempts"]):
            reply = self._ask(_DETECT, asked, attempt)
            if (answers := _answers(reply, len(windows))) is not None:
                return [1.0 if answer else -1.0 for answer in answers]
            logger.warning("the judge's reply is no list of %d answers: %.80r", len(windows), reply)
        raise UserError(
            f"{WHERE}.model: expected a JSON list of {len(windows)} zeros and ones in one of {self.settings['attempts']} replies, found "
            f"{reply[:80]!r}. Take a model that follows instructions, or raise attempts."
        )

    def facts(self) -> dict[str, Any]:
        """Return what was asked, for the record: address, models, requests, tokens and cost."""
        usages = [one["usage"] for one in self.used]
        counted = [usage for usage in usages if usage is not None]
        tokens = {
            name: sum(usage[name] for usage in counted)
            for name in ("prompt_tokens", "completion_tokens")
        }
        price = self.settings["price"]
        cost = None
        if price is not None and len(counted) == len(usages):
            cost = sum(
                tokens[f"{side}_tokens"] * price[side] / 1e6 for side in ("prompt", "completion")
            )
        return {
            "url": self.settings["url"], "model": self.settings["model"],
            "served": sorted({one["model"] for one in self.used}), "requests": len(self.used),
            "requests_without_usage": len(usages) - len(counted), **tokens, "cost": cost,
        }  # fmt: skip

    def _ask(self, system: str, user: str, attempt: int) -> str:
        body = {
            "model": self.settings["model"], "temperature": 0, "seed": attempt,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        }  # fmt: skip
        digest = json_digest([self.settings["url"], body])
        if digest not in self.kept:
            reply = self._post(body)
            self.kept[digest] = {"asked": digest, "request": body, **reply}
            with self.replies.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.kept[digest]) + "\n")
        found = self.kept[digest]
        self.used.append(found)
        content: str = found["content"]
        return content

    def _post(self, body: Mapping[str, Any]) -> dict[str, Any]:
        url = f"{self.settings['url'].rstrip('/')}/chat/completions"
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        opener = urllib.request.build_opener(_NoRedirect)
        try:
            with opener.open(request, timeout=self.settings["timeout_s"]) as answer:
                text = answer.read().decode("utf-8")
        except urllib.error.HTTPError as error:
            said = error.read(400).decode("latin-1")
            said = " ".join(said.replace(self.key, "***").split() if self.key else said.split())
            raise UserError(
                f"{WHERE}: {url}: the server answers {error.code} {error.reason} ({said[:200]}). Check url and model, and {KEY} where the "
                "server asks for a key."
            ) from None
        except (OSError, HTTPException, UnicodeDecodeError) as error:
            raise UserError(
                f"{WHERE}: {url}: the server cannot be asked ({error}). Start it, or fix url."
            ) from None
        return _reply(url, parse_json(url, text))

    def _read(self) -> dict[str, dict[str, Any]]:
        """Return the replies that a cut-off job left; of its last line perhaps a part, which is asked for again."""
        if not self.replies.exists():
            return {}
        whole, _, _ = self.replies.read_text(encoding="utf-8").rpartition("\n")
        lines = whole.split("\n") if whole else []
        self.replies.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        found = [parse_json(str(self.replies), line) for line in lines]
        return {one["asked"]: one for one in found}


def _shown(window: Window) -> str:
    """Return a window in one line, its marked token between << and >>."""
    parts = [
        f"<<{text}>>" if place == window.mark else text for place, text in enumerate(window.texts)
    ]
    return "".join(parts).replace("\n", "⏎")


def _answers(reply: str, count: int) -> list[int] | None:
    """Return the list of zeros and ones that a reply holds; None where it holds none of this length."""
    start, end = reply.find("["), reply.rfind("]")
    try:
        found = json.loads(reply[start : end + 1]) if 0 <= start < end else None
    except json.JSONDecodeError:
        return None
    if not isinstance(found, list) or len(found) != count:
        return None
    return found if all(type(one) is int and one in (0, 1) for one in found) else None


def _reply(url: str, answer: Any) -> dict[str, Any]:
    """Return the text, the model and the usage of a reply of the chat protocol.

    Raises:
        UserError: it is none.
    """
    match answer:
        case {"choices": [{"message": {"content": str(content)}}, *_]}:
            pass
        case _:
            raise UserError(
                f"{WHERE}: {url}: expected a reply with choices[0].message.content, found {json.dumps(answer)[:120]}. Give the address of an "
                "OpenAI-compatible server, such as http://127.0.0.1:8000/v1."
            )
    usage = None
    match answer.get("usage"):
        case {"prompt_tokens": int(prompt), "completion_tokens": int(completion)}:
            usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    model = answer.get("model")
    return {"content": content, "model": model if isinstance(model, str) else "", "usage": usage}
