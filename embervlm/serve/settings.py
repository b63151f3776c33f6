"""What a server allows."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from embervlm.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Limits and addresses of a server."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for other machines too, which wants a key."""
    port: int = 8000
    """Port to listen at; 0 takes a free one and prints it."""
    model_name: str = "embervlm"
    """What clients give as `model`."""
    max_rows: int = 32
    """Most chains that are written at once."""
    max_waiting: int = 128
    """Most chains that wait for their turn; whoever comes then gets status 429."""
    timeout_s: float = 60.0
    """Most seconds for a request, waiting included; then it gets status 504."""
    max_body_bytes: int = 10_000_000
    """Most bytes of a request, its pictures included; above, status 413."""
    max_pixels: int = 40_000_000
    """Most pixels of a picture."""
    max_question_characters: int = 8_000
    """Most characters of a conversation."""
    max_new_tokens: int = 1024
    """Most tokens of a chain, whatever a request asks for."""
    picture_hosts: tuple[str, ...] = ()
    """Hosts from which pictures may be fetched where a request gives a URL, such as `camera.example.com` or
    `10.0.0.5:8080`; a host in a private network needs its address in this list too. Default: no URL is fetched."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_waiting", "timeout_s", "max_body_bytes", "max_pixels", "max_question_characters"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}: {getattr(self, name)} is not above 0")
        if self.max_new_tokens < 1 or not 0 <= self.port < 65536:
            raise ConfigError("max_new_tokens must be at least 1, and port in [0, 65535]")
        if wrong := [host for host in self.picture_hosts if "/" in host or not host.strip()]:
            raise ConfigError(f"picture_hosts: {wrong[0]!r} is not a host; write it without https:// and path")

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


MAX_CHOICES = 16
"""Most `n` and `num_chains`."""
MAX_BODIES_BYTES = 256_000_000
"""Most bytes of all requests that are being read or answered."""
HEAD_TIMEOUT_S = 10.0
"""Most seconds for a connection to send the head of its request."""
STOP_S = 20
"""Most seconds that a stop waits for running requests."""
