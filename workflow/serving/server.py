"""The process around the endpoints: its socket, its log and its end."""

import asyncio
import contextlib
import ipaddress
import logging
import socket
import sys
from collections import Counter
from pathlib import Path

import uvicorn

from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.serving.app import Service, build_app
from complexity_deep.workflow.serving.protocol import options_left_out
from complexity_deep.workflow.serving.refusal import Refusal

SECONDS_TO_TELL = 2  # for clients to take the last event, at the end
SECONDS_TO_STOP = 2  # for the step that is being computed
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]"}

log = logging.getLogger("complexity_deep.serve")


def start_log() -> None:
    """Our lines and the errors of the libraries, on stderr, each with its time."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.ERROR, force=True)
    log.setLevel(logging.INFO)


def read_key(path: str | None) -> bytes | None:
    """The API key in the first line of a file."""
    if path is None:
        return None
    try:
        key = Path(path).read_bytes().splitlines()[0].strip()
    except (OSError, IndexError) as error:
        raise InputError(f"--api-key-file '{path}' has no key in its first line that can be read.") from error
    if not key:
        raise InputError(f"--api-key-file '{path}' has an empty first line: write the key there.")
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any that is free."""
    try:
        if port > 65535:  # which would silently become another
            raise OverflowError("ports end at 65535")
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except (OSError, OverflowError) as error:
        # Python adds the address to the reason, in parentheses.
        reason = (getattr(error, "strerror", None) or str(error)).split(" (")[0]
        raise InputError(f"--host {host} --port {port} cannot be listened on ({reason}): give others.") from error


class Server(uvicorn.Server):
    """uvicorn's server that tells running requests of the end, and ends when the model has."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service
        self.death: str | None = None  # of the model

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        told = self.service.engine.close("The server is shutting down: send the request again later.")
        log.info("Shutting down. Unfinished requests, which are told: %d.", told)
        # What uvicorn logs from here on are connections that it cuts off.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)
        if not await asyncio.to_thread(self.service.engine.stop, SECONDS_TO_STOP):
            log.info("The step that is being computed is not waited for.")
        log.info("Ended.")

    def end_with_the_model(self) -> None:
        self.death = self.service.engine.death()
        if self.death:
            log.error("The model has stopped working, and the server ends: %s", self.death)
            self.should_exit = True

    async def report(self) -> None:
        """One line a second at most: the load, where there is any or something has changed."""
        engine, counts = self.service.engine, Counter()
        told = engine.tokens_generated
        while not self.should_exit:
            await asyncio.sleep(1)
            self.end_with_the_model()
            generated, told = engine.tokens_generated - told, engine.tokens_generated
            if engine.answers or generated or counts != self.service.counts:
                counts = self.service.counts.copy()
                log.info("%s", load_line(engine.running, engine.waiting, generated, counts))


def load_line(running: int, waiting: int, tokens_per_second: int, counts: Counter) -> str:
    """The load of the last second, and how requests have ended since the start."""
    statuses = ", ".join(f"{status}: {counts[status]:,}" for status in sorted(counts) if status.isdecimal())
    ends = [f"{counts[end]:,} {end}" for end in ("answered", "cancelled", "failed", "refused") if counts[end]]
    so_far = (", ".join(ends) or "none answered") + (f" ({statuses})" if statuses else "")
    return f"{running} running, {waiting} waiting, {tokens_per_second:,} tokens/s; so far {so_far}"


def serve(service: Service, listener: socket.socket, key: bytes | None, has_page: bool, name: str) -> None:
    """Answer requests until a signal ends the process. `name` is what --host calls the listener's address.

    Raises `InputError` where the model stops working.
    """
    host, port = listener.getsockname()[:2]
    is_loopback = ipaddress.ip_address(host).is_loopback
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @contextlib.asynccontextmanager
    async def lifespan(app):
        try:
            await service.engine.start()
        except Refusal:
            server.end_with_the_model()
        else:
            log.info("Serving '%s' at %s%s", service.name, url, ", with a page at /" if has_page else "/v1")
        reporting = asyncio.create_task(server.report())
        yield
        reporting.cancel()

    if not is_loopback and key is None:
        log.warning("Everybody who reaches %s can use the model: give --api-key-file to ask for a key.", url)
    rope = getattr(service.engine.observer.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # "dynamic" scales nothing within the context
        log.warning("With longrope, positions are scaled for the longest request that runs: answers depend on others.")
    if left_out := options_left_out(service.defaults):
        names = ", ".join(left_out)
        log.warning("The model's generation_config.json has options that are not followed: %s.", names)
    app = build_app(service, key, LOOPBACK_NAMES | {host, name.lower()} if is_loopback else None, has_page, lifespan)
    config = uvicorn.Config(
        app, lifespan="on", log_config=None, access_log=False, timeout_graceful_shutdown=SECONDS_TO_TELL
    )
    server = Server(config, service)
    server.run(sockets=[listener])
    if server.death:
        raise InputError("The model has stopped working; the log above says why.")
