"""The reward that a model on a server gives, against a server in a thread."""

from __future__ import annotations

import base64
import io
import json
import logging
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import make_prompts, make_sample, make_state
from PIL import Image

from virft_fast.algorithms import grpo
from virft_fast.models.processing import load_processor
from virft_fast.tasks import judge as module
from virft_fast.tasks import load_reward_funcs, score
from virft_fast.tasks.adapters import swift_orm, verl_score
from virft_fast.tasks.judge import Judge, grade_in
from virft_fast.tasks.scoring import RewardError, RewardLog, check_arguments

SECRET = "sk-very-secret"


class Server:
    """Answers with `reply(body)`: a text, or a status; keeps what it was asked."""

    def __init__(self):
        self.asked, self.keys, self.together, self.most = [], [], 0, 0
        self.reply, self.pause, self.lock = (lambda body: "7"), 0.0, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.together += 1
                    server.most = max(server.most, server.together)
                    server.asked.append((self.path, body))
                    server.keys.append(self.headers.get("Authorization"))
                time.sleep(server.pause)
                reply = server.reply(body)
                with server.lock:
                    server.together -= 1
                status = reply if isinstance(reply, int) else 200
                answer = {"choices": [{"message": {"content": reply}}]}
                if status != 200:
                    answer = {"error": f"you sent {self.headers.get('Authorization')}"}
                data = reply if isinstance(reply, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                try:
                    self.wfile.write(data)
                except OSError:
                    pass  # the client gave up

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("httpx")
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    started = Server()
    yield started
    started.http.shutdown()
    started.http.server_close()


def answers(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def rewards(function, *texts, **columns):
    """Through `score`, as a run calls it. Also the log."""
    count, log = len(texts), RewardLog()
    prompts = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q?"}]}]]
    columns = {"solution": ["S"] * count, **columns}
    found, _ = score(
        [("judge", function)], [1.0], prompts * count, answers(*texts), columns, log.arguments()
    )
    return [None if value != value else round(value, 6) for value in found[:, 0].tolist()], log


def test_grades_become_rewards_and_metrics(server):
    grades = {"good": "10", "bad": "It is wrong.\n0", "odd": "no idea", "high": "11"}
    server.reply = lambda body: grades[body["messages"][0]["content"][-1]["text"].split("|")[1]]
    judge = Judge(server.url, "m", question="{question} {solution} |{answer}|")
    got, log = rewards(judge, "good", "bad", "odd", "high")
    assert got == [1.0, 0.0, None, None]
    path, body = server.asked[0]
    assert path == "/v1/chat/completions" and body["model"] == "m" and body["temperature"] == 0
    assert body["messages"][0]["content"][-1]["text"].startswith("Q? S |")
    assert set(server.keys) == {f"Bearer {SECRET}"}
    assert log.metrics == {"judge/cached": [0.0] * 4, "judge/failed": [0.0, 0.0, 1.0, 1.0]}


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("8", 8), ("Grade: 7.5.", 7.5), ("8/10", 8), ("8 out of 10", 8), ("I see 3 cats.\n6", 6),
        ("6\nThat is all.", 6), ("between 6 and 8", None), ("90%", None), ("", None), ("-1", -1),
        ("grade 4!", 4), ("v2", None),
    ],
)  # fmt: skip
def test_the_grade_in_a_reply(reply, grade):
    assert grade_in(reply) == grade


def test_images_are_sent_only_to_functions_that_name_them(server):
    image = Image.new("RGB", (5, 3), (1, 2, 3))
    got, _ = rewards(Judge(server.url, "m"), "a", images=[(image, image)])
    assert got == [0.7]
    first, second, _ = server.asked[0][1]["messages"][0]["content"]
    assert first == second
    data = base64.b64decode(first["image_url"]["url"].partition("base64,")[2])
    assert list(Image.open(io.BytesIO(data)).getdata()) == [(1, 2, 3)] * 15
    seen = []

    def plain(completions, **columns):
        seen.append(sorted(columns))
        return [0.0] * len(completions)

    rewards(plain, "a", images=[(image,)])
    assert seen == [["log_extra", "log_metric", "prompts", "solution", "trainer_state"]]
    without, _ = rewards(Judge(server.url, "m", images=False), "a", images=[(image,)])
    assert without == [0.7] and len(server.asked[-1][1]["messages"][0]["content"]) == 1

    def needs(images, completions, **columns):
        return [float(images[0][0] is image)]

    check_arguments([("needs", needs), ("plain", plain)], ["solution"])
    assert rewards(needs, "a", images=[(image,)])[0] == [1.0]  # the image itself, not a copy


def test_an_image_is_encoded_once(server, monkeypatch):
    encoded, encode = [], module._data_url
    monkeypatch.setattr(module, "_data_url", lambda image: encoded.append(1) or encode(image))
    image = Image.new("RGB", (5, 3))
    rewards(Judge(server.url, "m"), "a", "b", "c", images=[(image,)] * 3)
    assert len(encoded) == 1 and len(server.asked) == 3


def test_equal_questions_are_asked_once_and_kept(server, tmp_path):
    cache = tmp_path / "cache"
    judge = Judge(server.url, "m", cache=cache)
    assert rewards(judge, "a", "a", "b")[0] == [0.7] * 3 and len(server.asked) == 2
    server.reply = lambda body: "1"
    got, log = rewards(judge, "a", "b", "c")
    assert got == [0.7, 0.7, 0.1] and len(server.asked) == 3
    assert log.metrics["judge/cached"] == [1.0, 1.0, 0.0]
    assert rewards(Judge(server.url, "m", cache=cache, version="2"), "a")[0] == [0.1]
    for file in cache.iterdir():
        file.write_text("{broken")
    assert rewards(judge, "a")[0] == [0.1]
    assert all(SECRET not in file.read_text() for file in cache.iterdir())


def test_at_most_so_many_requests_at_a_time(server):
    server.pause = 0.05
    assert rewards(Judge(server.url, "m", concurrency=3), *map(str, range(12)))[0] == [0.7] * 12
    assert server.most == 3


@pytest.mark.parametrize("failure", [500, 503, 429, b"not json", b'{"choices": []}'])
def test_the_servers_faults_are_tried_again(server, failure):
    server.reply = lambda body: failure if len(server.asked) < 3 else "5"
    assert rewards(Judge(server.url, "m", retries=2), "a")[0] == [0.5]
    assert len(server.asked) == 3


def test_no_reply_is_no_reward_and_warned_of(server, caplog):
    server.reply = lambda body: 500
    with caplog.at_level(logging.WARNING):
        got, log = rewards(Judge(server.url, "m", retries=1), "a")
    assert got == [None] and log.metrics["judge/failed"] == [1.0] and len(server.asked) == 2
    assert "status 500" in caplog.text and SECRET not in caplog.text
    server.reply, server.asked = (lambda body: 400), []  # this question will never do
    assert rewards(Judge(server.url, "m"), "a")[0] == [None] and len(server.asked) == 1


def test_a_slow_server_is_given_up(server):
    server.pause = 1.0
    start = time.monotonic()
    assert rewards(Judge(server.url, "m", retries=0, timeout=0.1), "a")[0] == [None]
    assert time.monotonic() - start < 1.0


def test_no_server_at_all(caplog):
    pytest.importorskip("httpx")
    assert rewards(Judge("http://127.0.0.1:9/v1", "m", retries=0), "a")[0] == [None]
    assert "ConnectError" in caplog.text


@pytest.mark.parametrize(("status", "what"), [(401, "the key"), (404, "base_url and model")])
def test_a_refusal_ends_the_run_without_the_key(server, status, what):
    server.reply = lambda body: status
    with pytest.raises(RewardError, match=f"answered {status} .*check {what}") as error:
        rewards(Judge(server.url, "m"), "a")
    assert SECRET not in str(error.value) and SECRET not in repr(vars(Judge(server.url, "m")))


def test_mistakes_are_named(server):
    with pytest.raises(RewardError, match="fields of answer, question, solution, got .*'label'"):
        rewards(Judge(server.url, "m", question="{label}"), "a")
    with pytest.raises(ValueError, match="expected low < high"):
        Judge(server.url, "m", low=1, high=0)
    with pytest.raises(ValueError, match=r"a reward model isn't loaded here; .*tasks\.judge"):
        load_reward_funcs(["org/reward-model"])


def test_without_httpx(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ValueError, match=r"pip install httpx, or '.\[judge\]'"):
        Judge("http://x/v1", "m")


def test_a_run_whose_only_reward_is_a_judge_logs_its_metrics(server):
    processor = load_processor("tiny")
    state = make_state(processor, reward=Judge(server.url, "m"))
    stats, _ = grpo.train_step(state, make_prompts(processor, make_sample(0)))
    assert stats["judge/failed"] == 0.0


@pytest.mark.parametrize("around", ["\n", "\r\n", " "])
def test_a_key_with_space_around_it_works(server, monkeypatch, around):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET + around)
    assert rewards(Judge(server.url, "m"), "a")[0] == [0.7]
    assert set(server.keys) == {f"Bearer {SECRET}"}


@pytest.mark.parametrize("key", ["sk-\r\nsecret", "sk-ä"])
def test_a_key_that_no_header_takes_is_not_shown(server, monkeypatch, caplog, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(RewardError, match="printable ASCII characters in OPENAI_API_KEY") as error:
        rewards(Judge(server.url, "m"), "a")
    assert key not in str(error.value) + caplog.text and not server.asked


def test_images_of_any_mode(server):
    assert rewards(Judge(server.url, "m"), "a", images=[(Image.new("CMYK", (2, 2)),)])[0] == [0.7]


def test_in_other_trainers(server, tmp_path):
    """It is asynchronous; verl and ms-swift call a reward as a plain function."""
    path = tmp_path / "grades.py"
    path.write_text(
        f"from virft_fast.tasks.judge import Judge\nquality = Judge({server.url!r}, 'm')\n"
    )
    assert verl_score(f"{path}:quality")("data", "a", "S") == 0.7
    assert swift_orm(f"{path}:quality")()(completions=["a", "b"], solution=["S"] * 2) == [0.7] * 2


def test_named_in_a_file(server, tmp_path):
    path = tmp_path / "grades.py"
    path.write_text(
        "from virft_fast.tasks.judge import Judge\n"
        f"quality = Judge({server.url!r}, 'm', low=0, high=7)\n"
    )
    ((name, function),) = load_reward_funcs([f"{path}:quality"])
    check_arguments([(name, function)], ["solution"])
    assert name == "quality" and rewards(function, "a")[0] == [1.0]
