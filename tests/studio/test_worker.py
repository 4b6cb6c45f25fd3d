"""Queue and batches: requests are computed together, and independently of each other."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx2

from ctf import Pipeline
from ctf.studio.tasks import Limits
from ctf.studio.worker import Worker
from tests.serving import (
    LENGTH,
    LIMITS,
    expect_error,
    hold_steps,
    post,
    serving,
    stream,
    wait_until,
)


def send(client: httpx2.Client, body: dict[str, object], accept: str) -> socket.socket:
    """Send a request to /v1/generate, and do not wait for the response."""
    content = json.dumps(body).encode()
    connection = socket.create_connection((client.base_url.host, client.base_url.port))
    connection.sendall(
        b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Accept: %s\r\nContent-Length: %d\r\n\r\n%s" % (accept.encode(), len(content), content)
    )
    return connection


def test_waiting_requests_with_equal_settings_are_one_batch(
    client: httpx2.Client, pipe: Pipeline, worker: Worker
) -> None:
    with ThreadPoolExecutor(4) as pool, hold_steps(pipe) as (gate, steps):
        first = pool.submit(post, client, "/v1/generate", classes=[0], seed=100)
        wait_until(lambda: steps)
        others = [
            pool.submit(post, client, "/v1/generate", classes=[i % 3], count=i, seed=200 + 10 * i)
            for i in (1, 2, 3)
        ]
        wait_until(lambda: worker.state()["waiting"] == 3)
        gate.set()
        responses = [first.result(), *(other.result() for other in others)]
    # With guidance, a step has two rows per image.
    assert steps == [2] * LENGTH + [12] * LENGTH
    for response in responses:
        for image in response["pictures"]:
            alone = pipe.sample([image["class_number"]], image["seed"])
            assert image["codes"] == alone.codes[0].tolist()


def test_requests_with_other_settings_are_other_batches(
    client: httpx2.Client, pipe: Pipeline, worker: Worker
) -> None:
    with ThreadPoolExecutor(4) as pool, hold_steps(pipe) as (gate, steps):
        first = pool.submit(post, client, "/v1/generate", classes=[0])
        wait_until(lambda: steps)
        others = [
            pool.submit(post, client, "/v1/generate", classes=[1], settings={"guidance": guidance})
            for guidance in (1.0, 3.0, 1.0)
        ]
        wait_until(lambda: worker.state()["waiting"] == 3)
        gate.set()
        for response in (first, *others):
            response.result()
    # Three batches: one image, one image, and two images without guidance.
    assert steps == [2] * 3 * LENGTH


def test_a_request_is_cancelled_within_a_step_when_its_client_disconnects(
    client: httpx2.Client, pipe: Pipeline, worker: Worker
) -> None:
    for accept in ("application/json", "text/event-stream"):
        with hold_steps(pipe) as (gate, steps):
            connection = send(client, {"classes": [0]}, accept)
            wait_until(lambda: steps)
            connection.close()
            wait_until(lambda: all(job.cancelled for job in worker.running))
            gate.set()
            wait_until(lambda: worker.state()["running"] == 0)
            assert len(steps) == 1  # the one that was computed already


def test_a_cancelled_request_leaves_its_batch_and_the_others_stay(
    client: httpx2.Client, pipe: Pipeline, worker: Worker
) -> None:
    expected = pipe.sample([1, 1], 40)
    with ThreadPoolExecutor(2) as pool, hold_steps(pipe, again_after=LENGTH) as (gate, steps):
        first = pool.submit(post, client, "/v1/generate", classes=[0])
        wait_until(lambda: steps)
        leaves = send(client, {"classes": [0], "count": 5}, "text/event-stream")
        stays = pool.submit(post, client, "/v1/generate", classes=[1], count=2, seed=40)
        wait_until(lambda: worker.state()["waiting"] == 2)
        gate.set()
        first.result()
        wait_until(lambda: len(steps) > LENGTH)
        leaves.close()
        wait_until(lambda: any(job.cancelled for job in worker.running))
        gate.set()
        codes = [image["codes"] for image in stays.result()["pictures"]]
    assert codes == expected.codes.tolist()
    assert steps[LENGTH:] == [14] + [4] * (LENGTH - 1)


def test_a_full_queue_refuses_requests(
    client: httpx2.Client, pipe: Pipeline, worker: Worker
) -> None:
    with ThreadPoolExecutor(8) as pool, hold_steps(pipe) as (gate, steps):
        first = pool.submit(post, client, "/v1/generate", classes=[0])
        wait_until(lambda: steps)
        waiting = [
            pool.submit(post, client, "/v1/generate", classes=[0], seed=i)
            for i in range(LIMITS.waiting)
        ]
        wait_until(lambda: worker.state()["waiting"] == LIMITS.waiting)
        response = client.post("/v1/generate", json={"classes": [0]})
        expect_error(response, 429, "too many requests")
        assert int(response.headers["Retry-After"]) >= 1
        gate.set()
        for one in (first, *waiting):
            one.result()
    assert client.post("/v1/generate", json={"classes": [0]}).status_code == 200


def test_a_request_is_cancelled_after_the_time_limit(worker: Worker, pipe: Pipeline) -> None:
    with (
        serving([worker], Limits(seconds=0.3)) as url,
        httpx2.Client(base_url=url, timeout=60) as client,
        hold_steps(pipe) as (gate, steps),
    ):
        expect_error(client.post("/v1/generate", json={"classes": [0]}), 429, "0.3 seconds")
        assert stream(client, classes=[0])[-1][0] == "error"
        gate.set()
        wait_until(lambda: worker.state() == {"waiting": 0, "running": 0})
        assert len(steps) == 1
