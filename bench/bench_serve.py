"""`pymcip serve` under load: many clients that search an index and fetch thumbnails, on this machine.

    python bench/bench_serve.py photos.index --clients 64 --seconds 30

Each client asks for a text (every fourth time for a row of the index, as a click does) and for two
thumbnails of what is found, one request after the other. Printed is a line of JSON: requests,
those that failed, milliseconds of searches and thumbnails, and the server's memory, in thirds of the
time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

WORDS = "red green small old wooden open round two photo bowl dog street apple house water"


def client(port: int, seed: int, until: float, times: dict[str, list[float]]) -> None:
    """Search until the time is over; a failed request counts in `times["failed"]`."""
    chosen = random.Random(seed)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def timed(kind: str, path: str) -> bytes:
        started = time.perf_counter()
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise OSError(content)
        except (OSError, http.client.HTTPException) as error:
            print(f"{path}: {error!r}", file=sys.stderr)
            connection.close()
            times["failed"].append(0.0)
            return b""
        times[kind].append(time.perf_counter() - started)
        return content

    row = None
    while time.perf_counter() < until:
        text = quote(" ".join(chosen.choices(WORDS.split(), k=3)))
        query = f"text={text}" if row is None or chosen.random() < 0.75 else f"row={row}"
        found = timed("search", f"/api/search?{query}")
        hits = json.loads(found)["hits"] if found else []
        for hit in chosen.sample(hits, min(2, len(hits))):
            row = hit["row"]
            timed("thumbnail", hit["thumbnail"])


def memory(process: int) -> int:
    """MiB of a process that are in memory."""
    text = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    return int(found[1]) >> 10 if found else 0


def measure(index: str, clients: int, seconds: float) -> dict[str, Any]:
    """Start a server, and load it."""
    command = [sys.executable, "-m", "pymcip", "serve", index, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        address = re.search(r"(\d+) images: http://127\.0\.0\.1:(\d+)/", line)
        if address is None:
            raise SystemExit(f"the server did not start: {line}")
        times: dict[str, list[float]] = {"search": [], "thumbnail": [], "failed": []}
        until = time.perf_counter() + seconds
        threads = [
            threading.Thread(target=client, args=(int(address[2]), seed, until, times))
            for seed in range(clients)
        ]
        for thread in threads:
            thread.start()
        memories = []
        for _ in range(3):
            time.sleep(seconds / 3)
            memories.append(memory(server.pid))
        for thread in threads:
            thread.join()
    finally:
        server.terminate()
        server.wait()
    result: dict[str, Any] = {"images": int(address[1]), "clients": clients, "seconds": seconds}
    result["failed"] = len(times.pop("failed"))
    for kind, values in times.items():
        result[kind] = {"requests": len(values)}
        if values:
            p50, p95 = np.percentile(np.array(values) * 1e3, [50, 95]).round(1).tolist()
            result[kind] |= {"p50_ms": p50, "p95_ms": p95}
    return result | {"memory_mib": memories}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("index", help="folder that pymcip index has written")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=30)
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
