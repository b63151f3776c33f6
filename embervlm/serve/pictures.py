"""Pictures of a request -> arrays, without trusting them."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import ipaddress
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import httpx2
import numpy as np
from PIL import Image

from embervlm.data.images import Area, Colour, ImageError, area_in_square, load_image, picture_sides
from embervlm.errors import UserError
from embervlm.serve.settings import ServeSettings

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
FETCH_S = 10.0


class PictureError(UserError):
    """A picture that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A picture as the model takes it."""

    pixels: np.ndarray
    area: Area | None
    """Where in `pixels` the picture as sent is, if it was padded; of several their layout counts as one."""


class Pictures:
    """`await load(addresses)` gives the picture of a request.

    Args:
        size, fill: As for `load_image`, so that what is kept in memory is small.
        pool: Decodes; as many pictures of full size are in memory at once as it has threads.
    """

    def __init__(self, settings: ServeSettings, size: int, fill: Colour | None, pool: Executor) -> None:
        self.settings, self.size, self.fill, self.pool = settings, size, fill, pool

    async def load(self, addresses: Sequence[str]) -> Loaded | None:
        """None without a picture; several are laid out as in training.

        Raises:
            PictureError: of an address that is not followed, and of a picture that is too large or damaged.
        """
        if not addresses:
            return None
        files = [await self._file(address, f"picture {number}") for number, address in enumerate(addresses, 1)]
        return await asyncio.get_running_loop().run_in_executor(self.pool, self._decode, files)

    async def _file(self, address: str, name: str) -> bytes:
        scheme = address[:8].partition(":")[0].lower()
        if scheme == "data":
            return _from_data_url(address, name)
        if scheme in ("http", "https"):
            try:
                return await asyncio.wait_for(fetch(address, name, self.settings), FETCH_S)
            except (httpx2.HTTPError, OSError, asyncio.TimeoutError) as error:
                raise PictureError(f"{name}: not fetched ({type(error).__name__}: {error})") from error
        raise PictureError(f"{name}: give a data URL, data:image/png;base64,...")

    def _decode(self, files: Sequence[bytes]) -> Loaded:
        pixels = 0
        for number, file in enumerate(files, 1):
            pixels += _pixels(file, f"picture {number}")
            if pixels > self.settings.max_pixels:
                raise PictureError(f"picture {number}: too many pixels; give at most {self.settings.max_pixels:,}")
        source: Any = files[0] if len(files) == 1 else list(files)
        try:
            loaded = load_image(source, size=self.size, fill=self.fill, name="picture")
            area = None
            if self.fill is not None and len(files) == 1:
                area = area_in_square(*picture_sides(io.BytesIO(files[0])), self.size)
            return Loaded(pixels=loaded, area=area)
        except (ImageError, MemoryError) as error:
            reason = str(error).partition(";")[0]
            raise PictureError(f"{reason}; send a whole file, as {' or '.join(FORMATS)}") from error


def _from_data_url(address: str, name: str) -> bytes:
    head, comma, data = address.partition(",")
    if not comma:
        raise PictureError(f"{name}: no comma in its data URL; write data:image/png;base64,...")
    try:
        if head.lower().endswith(";base64"):
            return base64.b64decode(data.encode("ascii"), validate=True)
        return unquote_to_bytes(data)
    except (binascii.Error, ValueError) as error:
        raise PictureError(f"{name}: its data URL is not base64 ({error})") from error


def _pixels(file: bytes, name: str) -> int:
    """Number of pixels by the head of the file; nothing is decoded."""
    try:
        with Image.open(io.BytesIO(file), formats=FORMATS) as image:
            return image.width * image.height
    except Image.DecompressionBombError:  # Pillow's own limit, far above ours
        return sys.maxsize
    except Exception as error:  # a plugin that stumbles over garbage raises what it likes
        raise PictureError(f"{name}: not a picture; send {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from error


async def fetch(address: str, name: str, settings: ServeSettings) -> bytes:
    """The file at an http(s) address whose host `settings.picture_hosts` names; redirects are not followed.

    The host is looked up once and the connection goes to that address, so that a name cannot change its mind.
    """
    try:
        url = urlsplit(address)
        port = url.port or (443 if url.scheme == "https" else 80)
    except ValueError as error:
        raise PictureError(f"{name}: not an address ({error})") from error
    host = url.hostname or ""
    if not {host, f"{host}:{port}"} & set(settings.picture_hosts):
        raise PictureError(
            f"{name}: pictures are not fetched from {host or 'an empty host'}; send a data URL, or start the server "
            "with --picture_hosts and this host"
        )
    if url.username is not None or url.password is not None:
        raise PictureError(f"{name}: its address has a password in it; send a data URL")
    ip = await _address_of(host, port, name, settings)
    shown = f"[{ip}]" if ":" in ip else ip
    target = f"{url.scheme}://{shown}:{port}{url.path or '/'}{'?' + url.query if url.query else ''}"
    options = {"headers": {"Host": url.netloc, "Accept-Encoding": "identity"}, "extensions": {"sni_hostname": host}}
    async with (
        httpx2.AsyncClient(timeout=FETCH_S, follow_redirects=False, trust_env=False) as client,
        client.stream("GET", target, **options) as found,  # type: ignore[arg-type]
    ):
        if found.status_code != 200:
            raise PictureError(f"{name}: {host} answered with status {found.status_code}; redirects are not followed")
        out = bytearray()
        async for part in found.aiter_raw():
            out += part
            if len(out) > settings.max_body_bytes:
                raise PictureError(f"{name}: more than {settings.max_body_bytes:,} bytes")
        return bytes(out)


async def _address_of(host: str, port: int, name: str, settings: ServeSettings) -> str:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    named = {allowed.strip("[]") for allowed in settings.picture_hosts}
    named |= {allowed.rpartition(":")[0].strip("[]") for allowed in settings.picture_hosts}
    for ip in addresses:
        plain = ipaddress.ip_address(ip.partition("%")[0])
        if isinstance(plain, ipaddress.IPv6Address) and plain.ipv4_mapped:
            plain = plain.ipv4_mapped
        if not plain.is_global and str(plain) not in named:
            raise PictureError(f"{name}: {host} is in a private network ({ip}); name that address in --picture_hosts")
    if not addresses:
        raise PictureError(f"{name}: {host} has no address")
    return addresses[0]
