"""The server as a client sees it that knows HTTP and nothing of OpenAI: raw bodies, events, sockets."""

import copy
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import jax
import pytest

from mapo_jax import serve
from mapo_jax.errors import UserError
from mapo_jax.serving.limits import WRONG_KEYS_PER_MINUTE, Limits, client_of
from mapo_jax.serving.protocol import ChatRequest
from mapo_jax.serving.served import ServedModel

HELLO = [{"role": "user", "content": "Hello, it is me."}]


def body(**options):
    return {"model": "tiny", "messages": HELLO, "seed": 5, "max_completion_tokens": 12} | options


def post(server, content=None, path="/v1/chat/completions", **options):
    return httpx2.post(server.url + path, json=body() if content is None else content, timeout=60, **options)


def events(answer):
    """The data of server-sent events, read by the letter of their format."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.split("\n\n")
    assert blocks.pop() == ""
    lines = [line for block in blocks for line in block.split("\n") if not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def test_a_stream_by_the_letter(server):
    *chunks, done = events(post(server, body(stream=True, stream_options={"include_usage": True})))
    assert done == "[DONE]"
    chunks = list(map(json.loads, chunks))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 12
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == post(server).json()["choices"][0]["message"]["content"]


MALFORMED = {
    "no JSON": (b"{", 400),
    "a list": (b"[]", 400),
    "not a number": (b'{"model": "tiny", "messages": [], "temperature": NaN}', 400),
    "no model": (json.dumps({"messages": HELLO}).encode(), 400),
    "nested": (b"[" * 100_000, 400),
    "nested in time": (b'{"model": ' + b"[" * 3_000 + b"]" * 3_000 + b"}", 400),
    "many messages": (b'{"messages": [' + b"{}," * 300_000 + b"{}]}", 400),
    "an open string": (b'{"model": "' + b'\\"' * 400_000, 400),
    "a long stop text": (json.dumps({"model": "tiny", "messages": HELLO, "stop": "x" * 1001}).encode(), 400),
    "huge number": (b'{"seed": 1' + b"0" * 5000 + b"}", 400),
    "no UTF-8": (b'{"model": "\xff"}', 400),
    "too large": (b" " * (2**20 + 1), 413),
    "empty": (b"", 400),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_bodies(server, name):
    content, status = MALFORMED[name]
    url = f"{server.url}/v1/chat/completions"
    answer = httpx2.post(url, content=content, headers={"content-type": "application/json"}, timeout=60)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert post(server).status_code == 200


def test_a_body_of_many_values_is_refused_before_it_is_checked(server, monkeypatch):
    """Checking them would take seconds in which no stream goes on; commas in texts are none."""
    many = body(messages=[{"role": "user", "content": ["x"] * 10_000}])
    monkeypatch.setattr(ChatRequest, "model_validate", None)
    assert "JSON values" in post(server, many).json()["error"]["message"]
    monkeypatch.undo()
    commas = [{"role": "user", "content": '\\",[{' * 20_000}]
    assert post(server, body(messages=commas)).json()["error"]["code"] == "context_length_exceeded"


def test_a_long_message_is_tokenised_beside_the_streams(server, monkeypatch):
    release, ids = threading.Event(), server.model._ids

    def slow(request, conversation):
        if len(request.messages[0].content) > 1000:
            assert release.wait(60)
        return ids(request, conversation)

    monkeypatch.setattr(server.model, "_ids", slow)
    with ThreadPoolExecutor() as pool:
        long = pool.submit(post, server, body(messages=[{"role": "user", "content": "x " * 2**18}]))
        while not server.service._reading:
            time.sleep(0.005)
        assert post(server).status_code == 200
        release.set()
        answer = long.result()
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    assert not server.model.users and not server.service._reading


@pytest.mark.parametrize("before", [[], [{"role": "system", "content": "Be kind."}]])
@pytest.mark.parametrize(
    ("part", "status"),
    [
        ({"type": None, "text": "x"}, 200),
        ({"text": "x"}, 200),
        ({"type": "image_url", "text": "x"}, 400),
        ({"type": "text", "text": None}, 400),
        ("x", 200),
    ],
)
def test_content_parts_follow_one_rule(server, before, part, status):
    answer = post(server, body(messages=[*before, {"role": "user", "content": [part]}]))
    assert answer.status_code == status
    if status == 200:
        same = post(server, body(messages=[*before, {"role": "user", "content": "x"}])).json()
        assert answer.json()["usage"]["prompt_tokens"] == same["usage"]["prompt_tokens"]


def test_lone_surrogates_and_nulls(server):
    content = json.dumps(body(stop=None, n=None)).replace("it is me", "\\ud83d").encode()
    url = f"{server.url}/v1/chat/completions"
    answer = httpx2.post(url, content=content, headers={"content-type": "application/json"}, timeout=60)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v2", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/admin/load", 404)],
)
def test_unknown_urls(server, method, path, status):
    answer = httpx2.request(method, server.url + path, json={})
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_another_content_type_is_refused(server):
    """A page of another origin can only send such a request without being asked whether it may."""
    url = f"{server.url}/v1/chat/completions"
    answer = httpx2.post(url, content=json.dumps(body()), headers={"content-type": "text/plain"})
    assert answer.status_code == 415


def test_another_host_name_is_refused(serving):
    server = serving(hosts=("127.0.0.1", "localhost", "[::1]"))
    for name in ("127.0.0.1", "LOCALHOST:8000", "[::1]:8000"):
        assert httpx2.get(f"{server.url}/health", headers={"host": name}).status_code == 200
    for name in ("evil.example", "localhost.evil.example:80", "[dead::beef]:80"):
        answer = httpx2.get(f"{server.url}/health", headers={"host": name})
        assert answer.status_code == 400 and name.split(":80")[0] in answer.json()["error"]["message"]


def test_a_key(serving):
    server = serving(key="secret-1")
    for path in ("/v1/models", "/metrics"):
        assert httpx2.get(server.url + path).status_code == 401
    wrong = post(server, headers={"authorization": "Bearer secret-2"})
    assert wrong.status_code == 401 and wrong.json()["error"]["code"] == "invalid_api_key"
    assert "secret" not in wrong.text
    assert post(server, headers={"authorization": "Bearer secret-1"}).status_code == 200
    assert httpx2.get(f"{server.url}/health").status_code == 200


def test_guessing_a_key_is_limited(serving):
    """Not even the right key is told from a wrong one then; those of other addresses are."""
    server = serving(key="secret-1", admin_key="secret-2", load=lambda *_: None)

    def guess(path, key):
        headers = {"authorization": f"Bearer {key}"}
        return httpx2.request("GET" if path == "/v1/models" else "POST", server.url + path, headers=headers)

    paths = ("/v1/models", "/v1/chat/completions", "/v1/feedback", "/admin/load", "/v1/models")
    answers = [guess(path, "wrong") for path in 2 * paths]
    assert [answer.status_code for answer in answers] == [401] * WRONG_KEYS_PER_MINUTE
    for path, key in (("/v1/models", "secret-1"), ("/admin/load", "secret-2"), ("/v1/models", "wrong")):
        answer = guess(path, key)
        assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 6
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    server.service._check_key("192.0.2.1", "Bearer secret-1", "secret-1")


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3::4", "20010db800010002/64"),
        ("2001:db8:1:2:ffff::", "20010db800010002/64"),
        ("fe80::1%eth0", "fe80000000000000/64"),
        ("testclient", "testclient"),
    ],
)
def test_an_address_is_one_client(host, client):
    assert client_of(host) == client


def test_wrong_keys_count_as_requests(serving):
    server = serving(key="secret-1", limits=Limits(requests_per_minute=3))
    wrong = {"authorization": "Bearer wrong"}
    assert [post(server, headers=wrong).status_code for _ in range(4)] == [401, 401, 401, 429]


def test_a_rate_is_limited(serving):
    server = serving(limits=Limits(requests_per_minute=3))
    answers = [post(server) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"


def test_a_full_queue_and_a_long_conversation_are_refused(serving, monkeypatch):
    server = serving(limits=Limits(waiting=1, messages=3), reply_tokens=None)
    release, advance = threading.Event(), server.model.engine.advance
    monkeypatch.setattr(server.model.engine, "advance", lambda *steps: release.wait(60) and advance(*steps))
    answer = post(server, body(n=6))  # 4 streams and 1 that waits
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "n"
    connection = raw_request(server, body(n=5, max_completion_tokens=None, temperature=0))
    while server.model.running + server.model.waiting < 5:
        time.sleep(0.005)
    answer = post(server)
    assert answer.status_code == 429 and "retry-after" in answer.headers
    connection.close()
    answer = post(server, body(messages=4 * HELLO))
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"
    release.set()


def test_an_answer_that_would_not_fit_into_memory_is_refused(server, monkeypatch):
    monkeypatch.setattr("mapo_jax.serving.app.MOST_LOGPROBS", 2 * 12 * 4)
    assert post(server, body(n=2, logprobs=True, top_logprobs=3)).status_code == 200
    answer = post(server, body(n=2, logprobs=True, top_logprobs=4))
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "logprobs"


def test_a_top_k_beyond_the_devices_integers_is_all_tokens(server):
    answer = post(server, body(top_k=2**40, temperature=0.0))
    assert answer.status_code == 200
    assert answer.json()["choices"] == post(server, body(temperature=0.0)).json()["choices"]


def test_a_body_that_does_not_come_is_given_up(serving):
    server = serving(limits=Limits(body_seconds=0.2))
    host, port = re.match(r"http://(.*):(\d+)", server.url).groups()
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n"
        connection.sendall(f"{head}content-type: application/json\r\n\r\n{{".encode())
        assert b" 408 " in connection.recv(1000)
    assert post(server).status_code == 200


def test_a_client_that_goes_away_while_it_sends(server, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "handlers", [caplog.handler])
    host, port = re.match(r"http://(.*):(\d+)", server.url).groups()
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n"
        connection.sendall(f"{head}content-type: application/json\r\n\r\n{{".encode())
        time.sleep(0.1)
    end = time.monotonic() + 20
    while 'outcome="disconnected"} 1.0' not in httpx2.get(f"{server.url}/metrics").text:
        assert time.monotonic() < end and not caplog.records
        time.sleep(0.01)
    assert not caplog.records


def raw_request(server, content):
    host, port = re.match(r"http://(.*):(\d+)", server.url).groups()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect((host, int(port)))
    data = json.dumps(content).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n"
    connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(serving, settled, stream):
    server = serving(reply_tokens=None)
    long = body(stream=stream, max_completion_tokens=None, n=6, logit_bias={})
    connection = raw_request(server, long)
    while not server.model.running:
        time.sleep(0.005)
    if stream:
        connection.recv(100)
    connection.close()
    settled(server.model)
    assert not server.model.engine.busy
    metrics = httpx2.get(f"{server.url}/metrics").text
    assert 'mapo_requests_total{model="tiny",outcome="disconnected"} 1.0' in metrics
    assert post(server).status_code == 200


def test_a_client_that_reads_nothing_is_disconnected(serving, settled):
    server = serving(reply_tokens=None, limits=Limits(stall_seconds=0.5))
    wordy = body(stream=True, logprobs=True, top_logprobs=20, max_completion_tokens=None)  # half a megabyte
    connection = raw_request(server, wordy)
    while not server.model.running:
        time.sleep(0.005)
    settled(server.model, 60)
    assert 'outcome="disconnected"} 1.0' in httpx2.get(f"{server.url}/metrics").text
    connection.close()


def test_metrics_and_health(server):
    first, second = post(server), post(server, body(stream=True))
    assert first.status_code == second.status_code == 200
    text = httpx2.get(f"{server.url}/metrics").text
    prompt = first.json()["usage"]["prompt_tokens"]
    for line in (
        'mapo_requests_total{model="tiny",outcome="ok"} 2.0',
        f'mapo_tokens_total{{kind="prompt"}} {2.0 * prompt}',
        'mapo_tokens_total{kind="completion"} 24.0',
        "mapo_time_to_first_token_seconds_count 2.0",
        "mapo_slots_in_use 0.0",
        "mapo_queue 0.0",
    ):
        assert line in text
    assert float(re.search(r"mapo_time_between_tokens_seconds_count (\S+)", text)[1]) >= 2
    health = httpx2.get(f"{server.url}/health").json()
    assert health == {"status": "ok", "models": ["tiny"], "conversations": "off"}


def test_a_broken_engine_is_an_error_and_no_silence(server, monkeypatch):
    """In an answer, and in a stream that has begun; the next request is answered."""

    def broken():
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(server.model.engine, "advance", broken)
        answer = post(server)
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        *_, error, done = events(post(server, body(stream=True)))
        assert json.loads(error)["error"]["type"] == "server_error" and done == "[DONE]"
        assert "device" not in answer.text + error
    assert post(server).status_code == 200


class TestLoading:
    @pytest.fixture
    def loading(self, serving, tiny):
        """A server that can load `other`: the same shape with other weights."""
        engine, chat = tiny

        def load(name, path, step):
            if path != "other":
                raise UserError(f"there is no model folder or run {path}")
            other = twin(jax.tree.map(lambda leaf: -leaf, engine._params))
            return ServedModel(name, other, chat, source="other", reply_tokens=16)

        def twin(params):
            other = copy.copy(engine)  # shares the compiled programs
            other.reset()
            other._params = params
            return other

        return serving(twin(engine._params), load=load, admin_key="admin", reply_tokens=None)

    def load(self, server, path="other", model="tiny", key="admin"):
        headers = {"authorization": f"Bearer {key}"}
        return post(server, {"model": model, "path": path}, "/admin/load", headers=headers)

    def test_a_stream_ends_on_the_old_weights_and_the_next_begins_on_the_new(self, loading, settled):
        greedy = body(temperature=0, max_completion_tokens=60)
        before, old = post(loading, greedy).json(), loading.model
        url = f"{loading.url}/v1/chat/completions"
        with httpx2.stream("POST", url, json=greedy | {"stream": True}, timeout=60) as answer:
            lines = answer.iter_lines()
            text = ""
            while not text:
                text += told(next(lines))
            loaded = self.load(loading)
            assert loaded.status_code == 200 and loaded.json()["source"] == "other"
            after = post(loading, greedy).json()
            text += "".join(map(told, lines))
        assert text == before["choices"][0]["message"]["content"]
        assert after["choices"][0]["message"]["content"] != text
        settled(old)
        end = time.monotonic() + 20
        while old.engine.version is not None:  # its memory is freed
            assert time.monotonic() < end
            time.sleep(0.01)

    def test_a_second_name(self, loading):
        assert self.load(loading, model="adapter").status_code == 200
        names = [model["id"] for model in httpx2.get(f"{loading.url}/v1/models").json()["data"]]
        assert names == ["tiny", "adapter"]
        texts = [post(loading, body(model=name)).json()["choices"][0]["message"]["content"] for name in names]
        assert texts[0] != texts[1]

    def test_what_cannot_be_loaded_changes_nothing(self, loading):
        assert self.load(loading, key="wrong").status_code == 401
        answer = self.load(loading, path="nowhere")
        assert answer.status_code == 400 and "nowhere" in answer.json()["error"]["message"]
        assert post(loading).status_code == 200


def told(line):
    """What a line of a stream adds to the text."""
    if not line.startswith("data: {"):
        return ""
    return json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--port", "99999", "number, from 0 to 65535"),
        ("--port", "-1", "number, from 0 to 65535"),
        ("--streams", "0", "number, at least 1"),
        ("--requests-per-minute", "-5", "number, at least 0"),
        ("--block", "many", "must be a whole number"),
    ],
)
def test_numbers_out_of_range_are_refused(option, value, words, capsys):
    with pytest.raises(SystemExit) as ended:
        serve.main(["--model", "nowhere", option, value])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and option in said and words in said


@pytest.mark.parametrize(
    ("options", "named"),
    [([], "--key-variable"), (["--key-variable", "MAPO_NO_SUCH_KEY"], "MAPO_NO_SUCH_KEY")],
)
def test_the_command_refuses_an_open_door(tmp_path, capsys, options, named):
    assert serve.main(["--model", str(tmp_path), "--host", "0.0.0.0", *options]) == 2
    assert named in capsys.readouterr().err


def test_sigterm_ends_streams_and_loses_nothing(model_folder, tmp_path):
    """The command itself: a stream that is under way ends whole and is kept; no new request is taken."""
    command = [sys.executable, "-m", "mapo_jax.serve", "--model", str(model_folder), "--port", "0"]
    command += ["--streams", "2", "--max-tokens", "512", "--conversations", str(tmp_path / "kept")]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        printed = ""
        while "kept in" not in printed:
            line = process.stdout.readline()
            assert line, printed
            printed += line
        url = re.search(r"http://127\.0\.0\.1:\d+", printed)[0]
        name = httpx2.get(f"{url}/v1/models").json()["data"][0]["id"]
        long = body(model=name, stream=True, max_completion_tokens=400, temperature=0)
        with httpx2.stream("POST", f"{url}/v1/chat/completions", json=long, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        finish = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest[:-1]]
        assert finish[-1] in ("stop", "length")
        assert process.wait(30) == 0
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{url}/health")
    finally:
        process.kill()
    (file,) = (tmp_path / "kept").iterdir()
    (row,) = map(json.loads, file.read_text().splitlines())
    assert row["finish"] == finish[-1] and row["tokens"] >= 1
