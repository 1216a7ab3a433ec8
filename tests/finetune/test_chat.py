"""Chats with a model that has learned two conversations by heart: session, terminal, server and web page."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import find_browser, open_page
from sft_helpers import write_chat_tokenizer

from open_lm.data.masking import IGNORE_INDEX
from open_lm.errors import ConfigError
from open_lm.finetune.chat_server import ChatServer, ServerLimits
from open_lm.finetune.chat_session import ChatModel, TerminalChat
from open_lm.finetune.chat_templates import find_template
from open_lm.finetune.chat_tokens import ChatEncoding, ChatTokenizer
from open_lm.finetune.conversations import BadConversation, Message, parse_conversation
from open_lm.generate.sampling import Sampling
from open_lm.model.initialization import init_weights
from open_lm.model.transformer import Params, Transformer
from open_lm.tokenizer import load_tokenizer

SEQ_LEN = 112
GREEDY = Sampling(temperature=0, max_new_tokens=40)
HELLO, WHO = Message("user", "Hi, I am Ada."), Message("user", "Who am I?")
ANSWERS = ["Hello Ada… nice!", "You are Ada."]
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CONVERSATION = [HELLO, Message("assistant", ANSWERS[0]), WHO, Message("assistant", ANSWERS[1])]


def memorize(chat: ChatTokenizer, conversations: list[list[Message]]) -> Transformer:
    """Return a small model that is trained on these conversations until it repeats them."""
    encodings = [item for item in chat.encode(conversations) if isinstance(item, ChatEncoding)]
    inputs = torch.zeros(len(encodings), SEQ_LEN, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORE_INDEX)
    for row, encoding in enumerate(encodings):
        size = len(encoding.ids) - 1
        inputs[row, :size] = torch.from_numpy(encoding.ids[:-1])
        masked = np.where(encoding.is_trained, encoding.ids, IGNORE_INDEX)
        targets[row, :size] = torch.from_numpy(masked[1:])
    model = Transformer(Params(dim=64, n_layers=2, n_heads=4, vocab_size=280, seq_len=SEQ_LEN))
    init_weights(model, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for _ in range(200):
        loss = torch.nn.functional.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten())
        if loss < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    tokenizer = load_tokenizer(str(write_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))))
    chat = ChatTokenizer(tokenizer, find_template("chatml", tokenizer))
    system = [Message("system", "shout"), HELLO, Message("assistant", "HELLO ADA")]
    return ChatModel(memorize(chat, [CONVERSATION, system]), chat, "memory")


# --- session ---------------------------------------------------------------------------------------------------------
def test_turns_stream_and_end_with_the_token_of_the_template(chat_model: ChatModel) -> None:
    turn, pieces = chat_model.reply([HELLO], GREEDY)
    assert (found := list(pieces)) and len(found) > 10 and "".join(found) == turn.text == ANSWERS[0]
    assert turn.finish_reason == "stop" and turn.new_tokens == len(ANSWERS[0].encode()) + 1
    turn, pieces = chat_model.reply(CONVERSATION[:3], GREEDY)
    assert "".join(pieces) == ANSWERS[1]
    turn, pieces = chat_model.reply([Message("system", "shout"), HELLO], GREEDY)
    assert "".join(pieces) == "HELLO ADA"


def test_limits_and_stop_texts(chat_model: ChatModel) -> None:
    turn, pieces = chat_model.reply([HELLO], Sampling(temperature=0, max_new_tokens=5))
    assert ("".join(pieces), turn.finish_reason, turn.new_tokens) == (ANSWERS[0][:5], "length", 5)
    turn, pieces = chat_model.reply([HELLO], GREEDY, stop=["Ada… nix", "nice"])
    assert ("".join(pieces), turn.finish_reason) == ("Hello Ada… ", "stop")
    count = iter(range(100))
    turn, pieces = chat_model.reply([HELLO], GREEDY, is_cancelled=lambda: next(count) == 2)
    assert ("".join(pieces), turn.finish_reason) == (ANSWERS[0][:3], "length")
    with pytest.raises(ConfigError, match=r"the conversation has \d+ tokens, but the model reads at most 111"):
        chat_model.reply([Message("user", "x" * SEQ_LEN)], GREEDY)


def test_ends_of_turns_that_are_text(tmp_path: Path) -> None:
    """The model has to spell the end of its turn if the tokenizer has no token for it."""
    source = (
        "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}[end]"
        "{% endgeneration %}{% else %}{{ message.content }}:{% endif %}{% endfor %}"
    )
    tokenizer = load_tokenizer(str(write_chat_tokenizer(tmp_path, source)))
    chat = ChatTokenizer(tokenizer, find_template(None, tokenizer))
    assert chat.stop_text == "[end]"
    turn, pieces = ChatModel(memorize(chat, [CONVERSATION[:2]]), chat).reply([HELLO], GREEDY)
    assert ("".join(pieces), turn.finish_reason) == (ANSWERS[0], "stop")


# --- terminal --------------------------------------------------------------------------------------------------------
def test_terminal_chat(chat_model: ChatModel, tmp_path: Path) -> None:
    output, file = io.StringIO(), tmp_path / "saved.jsonl"
    lines = iter([
        f"/save {file}", HELLO.content, "", WHO.content, f"/save {file}", "/reset", HELLO.content, "/system shout",
        HELLO.content, f"/save {file}", "x" * SEQ_LEN, "/what", "/quit", "never read",
    ])  # fmt: skip
    TerminalChat(chat_model, GREEDY, output=output).run(lambda: next(lines))
    shown = output.getvalue().splitlines()
    assert shown == [
        "error: there is nothing to save yet", ANSWERS[0], ANSWERS[1], f"saved to {file}", "new conversation",
        ANSWERS[0], "new conversation with this system prompt", "HELLO ADA", f"saved to {file}",
        shown[9], "error: unknown command /what; /help lists the commands",
    ]  # fmt: skip
    assert shown[9].startswith("error: the conversation has ") and next(lines) == "never read"
    saved = [parse_conversation(json.loads(line)) for line in file.read_text().splitlines()]
    assert list(saved[0]) == CONVERSATION and [message.content for message in saved[1]][::2] == ["shout", "HELLO ADA"]


# --- server ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def serve(chat_model: ChatModel) -> Iterator[Callable[..., ChatServer]]:
    servers = []

    def start(**limits: Any) -> ChatServer:
        server = ChatServer(("127.0.0.1", 0), chat_model, GREEDY, ServerLimits(**limits))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def request(
    server: ChatServer, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=120)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
    response = connection.getresponse()
    result = response.status, dict(response.getheaders()), response.read()
    connection.close()
    return result


def complete(server: ChatServer, **settings: Any) -> tuple[int, Any]:
    body = {"messages": [HELLO.to_json()], **settings}
    status, _, content = request(server, "POST", "/v1/chat/completions", body)
    return status, json.loads(content)


def test_completions_have_the_form_of_openai(serve: Callable[..., ChatServer]) -> None:
    server = serve()
    status, found = complete(server, model="any", temperature=0)
    assert status == 200 and found["object"] == "chat.completion" and found["model"] == "memory"
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWERS[0]} and choice["finish_reason"] == "stop"
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + len(ANSWERS[0].encode()) + 1
    assert complete(server, max_tokens=3)[1]["choices"][0]["finish_reason"] == "length"
    assert complete(server, stop="Ada")[1]["choices"][0]["message"]["content"] == "Hello "
    status, _, models = request(server, "GET", "/v1/models")
    assert status == 200 and json.loads(models)["data"][0]["id"] == "memory"


def test_streams_are_server_sent_events(serve: Callable[..., ChatServer]) -> None:
    body = {"messages": [HELLO.to_json()], "stream": True, "stream_options": {"include_usage": True}}
    status, headers, content = request(serve(), "POST", "/v1/chat/completions", body)
    assert status == 200 and headers["Content-Type"] == "text/event-stream"
    events = content.decode().split("\n\n")
    assert events.pop() == "" and events.pop() == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1
    assert chunks.pop()["usage"]["completion_tokens"] == len(ANSWERS[0].encode()) + 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {} and len(deltas) > 10
    assert "".join(delta.get("content", "") for delta in deltas) == ANSWERS[0]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "stop"]


@pytest.mark.parametrize(
    ("settings", "param", "message"),
    [
        ({"messages": []}, "messages", "must be a list of messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages", "found the role 'wizard'"),
        ({"messages": [{"role": "user", "content": "x" * SEQ_LEN}]}, "messages", "the model reads at most"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
        ({"messages": [HELLO.to_json()] * 1001}, "messages", "at most 1000 messages"),
        ({"temperature": "hot"}, "temperature", "expected a number from 0 to 2"),
        ({"temperature": 3}, "temperature", "found temperature 3"),
        ({"temperature": 10**400}, "temperature", "found temperature 10{59}…, expected a number from 0 to 2"),
        ({"seed": -(10**400)}, "seed", "found seed -10"),
        ({"max_tokens": -(10**4000)}, "max_tokens", "an integer of at least 1"),
        ({"top_p": 0}, "top_p", "found top_p 0"),
        ({"max_tokens": 1.5}, "max_tokens", "an integer of at least 1"),
        ({"max_tokens": True}, "max_tokens", "found max_tokens True"),
        ({"n": 2}, "n", "expected 1"),
        ({"stop": ["a"] * 5}, "stop", "up to 4 texts"),
        ({"stream": "yes"}, "stream", "expected true or false"),
    ],
)
def test_bad_requests(serve: Callable[..., ChatServer], settings: dict[str, Any], param: str, message: str) -> None:
    status, found = complete(serve(), **settings)
    assert status == 400 and found["error"]["param"] == param and found["error"]["type"] == "invalid_request_error"
    assert re.search(message, found["error"]["message"])


def test_requests_that_are_refused_before_they_are_read(serve: Callable[..., ChatServer]) -> None:
    server = serve(max_request_bytes=100)
    post: Any = ("POST", "/v1/chat/completions")
    for status, arguments in [
        (404, ("GET", "/etc/passwd")),
        (404, ("POST", "/v1/models", {})),
        (415, (*post, b"{}", {"Content-Type": "text/plain"})),  # as a page of another site could send
        (421, (*post, {}, {"Host": "attacker.example"})),
        (413, (*post, {"messages": "x" * 200})),
        (400, (*post, b"[")),
        (400, (*post, b"[" * 90)),
        (400, (*post, b"[]")),
        (400, (*post, b"{}", {"Content-Length": "\xb2"})),
        (400, (*post, b"{}", {"Content-Length": "-1"})),
        (400, (*post, b"{}", {"Content-Length": "1" * 5000})),
        (501, ("DELETE", "/")),
    ]:
        assert request(server, *arguments)[0] == status, arguments
    with socket.create_connection(server.server_address[:2]) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\r\n"
        )
        assert client.recv(4096).startswith(b"HTTP/1.1 411")
    assert complete(server)[0] == 200


def test_time_and_tokens_are_limited(serve: Callable[..., ChatServer], chat_model: ChatModel) -> None:
    assert complete(serve(max_new_tokens=4), max_tokens=1000)[1]["usage"]["completion_tokens"] == 4
    server = serve(request_timeout_s=1e-6)
    assert complete(server)[1]["choices"][0]["finish_reason"] == "length"  # cut off after the first token
    with server.lock:  # another request is being answered
        status, found = complete(server)
    assert status == 503 and "other requests took" in found["error"]["message"]


def test_client_that_ends_early_frees_the_model(serve: Callable[..., ChatServer]) -> None:
    server = serve()
    body = json.dumps({"messages": [HELLO.to_json()], "stream": True}).encode()
    with socket.create_connection(server.server_address[:2]) as client:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert client.recv(16).startswith(b"HTTP/1.1 200")
    assert complete(server)[1]["choices"][0]["message"]["content"] == ANSWERS[0]


def test_connections_are_limited(serve: Callable[..., ChatServer]) -> None:
    server = serve()
    with contextlib.ExitStack() as stack:
        for _ in range(64):
            client = stack.enter_context(socket.create_connection(server.server_address[:2]))
            client.sendall(b"GET / HTTP/1.1\r\n")  # and nothing more
        with pytest.raises((ConnectionError, http.client.BadStatusLine)):
            request(server, "GET", "/v1/models")


def test_head_of_a_request_has_a_time_limit(serve: Callable[..., ChatServer]) -> None:
    server = serve(head_timeout_s=0.2)
    with socket.create_connection(server.server_address[:2], timeout=0.02) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(6000):
                with contextlib.suppress(TimeoutError):
                    assert client.recv(1) == b""
                    break  # the server has ended the connection
                client.sendall(b"x")
            else:
                pytest.fail("the server still reads the head")
    assert complete(server)[0] == 200


def test_answer_may_take_longer_than_the_head(
    serve: Callable[..., ChatServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_s = 1234.5
    running = []
    reply = ChatModel.reply

    def observed(*arguments: Any, **options: Any) -> Any:
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        running.append([timer for timer in timers if timer.interval == limit_s and not timer.finished.is_set()])
        return reply(*arguments, **options)

    monkeypatch.setattr(ChatModel, "reply", observed)
    assert complete(serve(head_timeout_s=limit_s))[0] == 200
    assert running == [[]]


def test_ipv6_loopback(chat_model: ChatModel) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        server = ChatServer(("::1", 0), chat_model, GREEDY)
    except OSError:
        pytest.skip("no IPv6 loopback address")
    with server:
        assert server.url == f"http://[::1]:{server.server_address[1]}/"
        assert server.is_own_host(f"[::1]:{server.server_address[1]}") and not server.is_own_host("a.example:80")


# --- web page --------------------------------------------------------------------------------------------------------
def test_page_needs_nothing_from_elsewhere(serve: Callable[..., ChatServer]) -> None:
    status, headers, content = request(serve(), "GET", "/")
    page, policy = content.decode(), headers["Content-Security-Policy"]
    assert status == 200 and "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "http://" not in page and "https://" not in page and "innerHTML" not in page
    nonce = policy.partition("script-src 'nonce-")[2].partition("'")[0]
    assert page.count(f'nonce="{nonce}"') == 2 and "{{" not in page


@pytest.mark.processes
@pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")
def test_page_in_a_browser(serve: Callable[..., ChatServer], tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    server = serve()
    with open_page(server.url, tmp_path / "profile") as page:
        page.wait_for("document.getElementById('model').textContent === 'memory'")
        page.evaluate(  # count the changes of the answer while it streams
            "window.changes = 0; new MutationObserver(all => changes += all.length).observe("
            "document.getElementById('messages'), { childList: true, characterData: true, subtree: true })"
        )
        page.type(HELLO.content)  # the message has the focus from the start
        page.press("Enter", 13)
        page.wait_for("document.getElementById('status').textContent.startsWith('Assistant')")
        items = "[...document.querySelectorAll('#messages li')]"
        turns = f"{items}.map(item => [item.className, item.lastChild.textContent])"
        assert page.evaluate(turns) == [["user", HELLO.content], ["assistant", ANSWERS[0]]]
        assert page.evaluate("changes") > 10
        page.type(WHO.content)
        page.press("Enter", 13)
        page.wait_for(f"{items}.length === 4 && !document.getElementById('send').disabled")
        assert page.evaluate(turns)[3] == ["assistant", ANSWERS[1]]
        page.evaluate("document.getElementById('reset').click()")
        assert page.evaluate(f"{items}.length") == 0
        page.type("x" * SEQ_LEN)
        page.press("Enter", 13)
        page.wait_for("document.querySelector('#messages li.error')")
        assert "at most 111" in page.evaluate("document.querySelector('#messages li.error').textContent")
        assert page.evaluate("document.getElementById('input').value") == "x" * SEQ_LEN  # nothing is lost
        page.evaluate("document.querySelector('details').open = true")
        tree = page.call("Accessibility.getFullAXTree")["nodes"]
        names = {(n["role"]["value"], n["name"]["value"]) for n in tree if n.get("role") and n.get("name")}
        assert ("button", "Send") in names and ("button", "Stop") in names and ("heading", "OpenLM chat") in names
        assert ("textbox", "Message (Enter sends, Shift+Enter starts a new line)") in names
        assert ("textbox", "Instructions that begin the conversation") in names
        colors = []
        for scheme in ("light", "dark"):
            page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            colors.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert colors[0] != colors[1]
        assert page.screenshot().startswith(b"\x89PNG")
        outside = [url for url in page.requests if not url.startswith((server.url, "data:", "about:"))]
        assert page.requests and not outside


def test_templates_that_refuse_a_request(chat_model: ChatModel) -> None:
    tokenizer = chat_model.chat.tokenizer
    chat = ChatModel(chat_model.model, ChatTokenizer(tokenizer, find_template("llama2", tokenizer)))
    with pytest.raises(BadConversation, match="must be the first message"):
        chat.reply([HELLO, Message("system", "late")], GREEDY)
