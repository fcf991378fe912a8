"""Start a server, ask it about images, and stop it: python examples/ask_server.py MODEL IMAGE...

The images are sent at the same time; those that arrive together run as one batch. Asking needs nothing but Python.
"""

import contextlib
import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote


@contextlib.contextmanager
def serving(model: str) -> Iterator[int]:
    """Run `dvit-serve` during the block; yield its port, any that is free."""
    command = [sys.executable, "-m", "dvit_infer.cli.serve", model, "--port", "0", "--no-access-log"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            lines = []
            for line in server.stderr or ():  # what happens, one JSON object a line
                if '"message": "ready"' in line:
                    break
                lines.append(line)
            else:
                sys.exit("".join(lines))  # it has ended, and the last line says why
            yield json.loads(line)["port"]
        finally:
            server.terminate()  # SIGTERM: it answers what it took, and ends


def ask(port: int, image: str) -> dict[str, Any]:
    """Return the answer for an image file: {"image": ..., "top5": [{"class": ..., "probability": ...}, ...]}."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(client):
        client.request("POST", f"/predict?image={quote(image)}", Path(image).read_bytes())
        answer: dict[str, Any] = json.load(client.getresponse())
        return answer


def main(model: str, *images: str) -> None:
    with serving(model) as port, ThreadPoolExecutor(len(images)) as clients:
        for answer in clients.map(lambda image: ask(port, image), images):
            print(f"{answer['image']}: {answer.get('error') or answer['top5'][0]}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
