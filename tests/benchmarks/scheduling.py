"""What the client adds to a server's own time: 3,000 questions, 64 at once, each answered in half a second.

    python scheduling.py [--requests 3000] [--at-once 64] [--seconds 0.5]

The server runs in a process of its own and keeps no more than a clock, so that what is measured is the client: probe,
keys, cache, limiter, openai package, ledger. Ideal is requests / at-once x seconds. Prints wall time, its ratio to the
ideal (to be at most 1.2), the client's CPU time a request, latencies, and how long the same wave takes from the cache.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from interp.client.client import Client
from interp.client.config import EndpointConfig
from interp.client.requests import Chat, Reply, Request

MOST_RATIO = 1.2


async def serve(seconds: float) -> None:
    """Answers every chat completion with "yes", so many seconds after it came in; prints its port."""
    top = [{"token": "yes", "logprob": -0.1, "bytes": None}, {"token": "no", "logprob": -2.4, "bytes": None}]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "yes"},
        "finish_reason": "stop",
        "logprobs": {"content": [{**top[0], "top_logprobs": top}]},
    }
    usage = {"prompt_tokens": 200, "completion_tokens": 1, "total_tokens": 201}
    body = json.dumps({"id": "c", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                asked = (await reader.readuntil(b"\r\n\r\n")).lower()
                start = asked.index(b"content-length:") + 15
                await reader.readexactly(int(asked[start : asked.index(b"\r\n", start)]))
                await asyncio.sleep(seconds)
                writer.write(head + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=2**20, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def questions(count: int) -> list[Request]:
    """Questions of the size of a window with its explanation."""
    shared = "You are told what a latent of a language model stands for, and judge if it is active in a text. " * 6
    return [
        Chat(
            "judge", (("system", shared), ("user", f"text {n} " + "words of a window " * 10)), 1, choices=("yes", "no")
        )
        for n in range(count)
    ]


async def measure(url: str, cache: Path, args: argparse.Namespace) -> float:
    """Asks the wave twice, prints what it took, and returns the ratio to the ideal."""
    took: list[float] = []
    wave = questions(args.requests)
    config = EndpointConfig(model="bench", base_urls=(url,), max_concurrency=args.at_once)
    async with Client({"judge": config}, cache) as client:
        await client.abilities("judge")
        endpoint = next(iter(client._holders.values()))
        once = endpoint._once  # type: ignore[union-attr]

        async def timed(*arguments: object) -> object:
            start = time.perf_counter()
            result = await once(*arguments)  # type: ignore[arg-type]
            took.append(time.perf_counter() - start)
            return result

        endpoint._once = timed  # type: ignore[union-attr,method-assign]
        wall, cpu = time.perf_counter(), time.process_time()
        replies = await client.ask_all(wave)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        assert len(took) == len(replies)
        assert all(map(_is_answer, replies))
        again = time.perf_counter()
        assert all(reply.cached for reply in await client.ask_all(wave))
        again = time.perf_counter() - again
    ideal = args.requests / args.at_once * args.seconds
    took.sort()
    print(f"{args.requests} requests, {args.at_once} at once, {args.seconds} s each; load {os.getloadavg()[0]:.1f}")
    print(f"wall {wall:.2f} s, {wall / ideal:.3f} x the ideal {ideal:.2f} s (at most {MOST_RATIO})")
    print(f"client CPU {1000 * cpu / args.requests:.2f} ms a request")
    print(f"latency p50 {took[len(took) // 2]:.3f} s, p99 {took[int(len(took) * 0.99)]:.3f} s")
    print(f"all from the cache: {again:.2f} s, {1e6 * again / args.requests:.0f} us a request")
    return wall / ideal


def _is_answer(reply: Reply) -> bool:
    return reply.ok and not reply.cached and reply.probabilities["yes"] > 0.9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.seconds))
        return 0
    argv = [sys.executable, __file__, "--serve", "--seconds", str(args.seconds)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server, tempfile.TemporaryDirectory() as folder:
        try:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
            ratio = asyncio.run(measure(url, Path(folder) / "cache", args))
        finally:
            server.terminate()
    return 0 if ratio <= MOST_RATIO else 1


if __name__ == "__main__":
    raise SystemExit(main())
