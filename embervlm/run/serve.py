"""`embervlm serve`: a checkpoint behind a port."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from embervlm.errors import UserError
from embervlm.model.config import STAGE3
from embervlm.options import add_flag, chosen
from embervlm.run.ask import checkpoint_option, model_to_ask
from embervlm.serve.settings import STOP_S, ServeSettings

KEY_VARIABLE = "EMBERVLM_API_KEY"
MAX_CONNECTIONS = 4096


def serve_options(parser: argparse.ArgumentParser) -> None:
    checkpoint_option(parser)
    for name in ServeSettings.__dataclass_fields__:
        if name == "picture_hosts":
            add_flag(parser, ServeSettings, name, action="extend", nargs="+", type=str, default=[])
        else:
            add_flag(parser, ServeSettings, name)
    parser.add_argument(
        "--api_key_file", type=Path, help=f"file with the key that clients have to send; or set {KEY_VARIABLE}"
    )
    parser.add_argument(
        "--num_threads", type=int, help="processor threads of the model; default: half of the processors"
    )


def serve(checkpoint: str | None, *, api_key_file: Path | None, num_threads: int | None, **options: Any) -> None:
    """Answer OpenAI's chat completions until Ctrl-C or SIGTERM."""
    options["picture_hosts"] = tuple(options["picture_hosts"])
    settings = ServeSettings(**chosen(options, ServeSettings))
    key = key_of(api_key_file)
    try:
        import uvicorn

        from embervlm.serve.app import build_app
        from embervlm.serve.http import limited_protocol
    except ModuleNotFoundError as error:
        raise UserError(f"serve: {error.name} is not installed; pip install 'embervlm[serve]'") from error
    listening = listen(settings)
    import torch

    sys.setswitchinterval(0.0005)  # the model's thread asks for the interpreter hundreds of times a token
    torch.set_num_threads(num_threads or max(1, len(os.sched_getaffinity(0)) // 2))
    model = model_to_ask(checkpoint)
    if model.config.stage == STAGE3:
        raise UserError("serve: this is a Stage 3 checkpoint, which does not reason; give one of Stage 4")
    app = build_app(model, settings, key)
    protocol = limited_protocol(room_for_connections(), settings.timeout_s + STOP_S)
    config = uvicorn.Config(
        app, http=protocol, ws="none", log_level="warning", timeout_graceful_shutdown=STOP_S, server_header=False
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it has stopped
        signal.signal(number, lambda *_: None)
    host, port = listening.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port} answers, Ctrl-C stops it", flush=True)
    if not settings.is_loopback and key is None:
        print(f"other machines can ask it, without a key; --api_key_file or {KEY_VARIABLE} sets one", file=sys.stderr)
    uvicorn.Server(config).run(sockets=[listening])
    print("stopped")


def key_of(file: Path | None) -> str | None:
    """The key that clients have to send, if any."""
    key = os.environ.get(KEY_VARIABLE)
    where = KEY_VARIABLE
    if file is not None:
        where = str(file)
        try:
            key = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: not readable ({error}); give a file with the key") from error
    if key is None:
        return None
    if not (key := key.strip()) or not key.isascii() or not key.isprintable():
        raise UserError(f"{where}: has no key of printable ASCII characters; make one: openssl rand -hex 32")
    return key


def listen(settings: ServeSettings) -> socket.socket:
    """The socket, before the model is loaded: a port that is taken is told at once."""
    try:
        family, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        out = socket.socket(family)
        out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        out.bind(address)
        return out
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{settings.host}:{settings.port}: {reason}; give another --host or --port") from error


def room_for_connections() -> int:
    """How many connections may be open, after asking for as many files as there may be."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + 256 if most == resource.RLIM_INFINITY else min(MAX_CONNECTIONS + 256, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0]), most))
    return min(MAX_CONNECTIONS, wanted - 128)
