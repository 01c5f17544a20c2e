"""Downloads of URLs that a request names: which hosts are allowed, asked again at every redirect.

One rule for the generator's references and for the media of chat, so that neither surface reaches a
machine that the other refuses.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

import aiohttp
from yarl import URL

from vllm_cosmos3.errors import Cosmos3Error

# "1" is --allow-private-media for chat: vLLM hands its connector no option of ours.
PRIVATE_MEDIA = "VLLM_COSMOS3_ALLOW_PRIVATE_MEDIA"
REDIRECTS = 4
CHUNK = 2**16  # bytes
# Mapped, compatible and translated (NAT64) addresses.
ENDING_IN_IPV4 = [ipaddress.IPv6Network(n) for n in ("::ffff:0:0/96", "::/96", "64:ff9b::/96")]


class FetchError(Cosmos3Error):
    """A URL whose content is not to be had. ``str`` says why, as the end of "... cannot be fetched"."""

    code = "fetch_failed"


class UrlNotAllowed(FetchError):
    """A URL, or where it redirects to, is not one that this server may fetch."""

    code = "url_not_allowed"


class DownloadTooLarge(FetchError):
    """The content of a URL has more bytes than are accepted."""

    code = "payload_too_large"


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRule:
    """Which URLs may be fetched: those of ``domains`` (any if empty), at public addresses.

    ``private`` allows private and loopback addresses as well. So many ``redirects`` are followed.
    """

    domains: tuple[str, ...] = ()
    private: bool = False
    redirects: int = REDIRECTS

    def check(self, url: str) -> None:
        """Refuse what the resolver does not see: other schemes, other domains, literal addresses.

        The URL is taken apart as the client does it, for which digits of any script are digits.

        Raises:
            UrlNotAllowed: it may not be fetched.
            FetchError: it is not a URL.
        """
        try:
            parts = URL(url)
            host = parts.host
        except ValueError as error:
            raise FetchError(f"it is not a URL ({error})") from None
        if parts.scheme not in ("http", "https") or not host:
            raise UrlNotAllowed(f"{parts.scheme}:// is not followed")
        if self.domains and host not in self.domains:
            raise UrlNotAllowed(f"{host} is not one of {', '.join(self.domains)}")
        try:
            public = is_public(host)
        except ValueError:
            if host.replace(".", "").isdigit():
                # aiohttp up to 3.13 takes it for an address and asks no resolver, and the system reads
                # 2130706433 and 127.1 as 127.0.0.1.
                raise UrlNotAllowed(f"{host} is not an address of four numbers") from None
            return  # a name, which the resolver asks about
        if not public and not self.private:
            raise UrlNotAllowed(f"{host} is not a public address")


def private_media_allowed() -> bool:
    """Whether the operator allows private and loopback addresses, as the environment says."""
    return os.environ.get(PRIVATE_MEDIA, "0") not in ("", "0", "false")


async def fetch(
    url: str,
    rule: FetchRule,
    write: Callable[[bytes], object],
    *,
    seconds: float,
    max_bytes: int | None = None,
) -> None:
    """Hand the content of ``url`` to ``write``, chunk by chunk, within ``seconds`` in all.

    Raises:
        UrlNotAllowed: it, or what it redirects to, may not be fetched.
        DownloadTooLarge: it has more than ``max_bytes``.
        FetchError: it cannot be reached, or does not answer with 200.
    """
    timeout = aiohttp.ClientTimeout(total=seconds)
    connector = aiohttp.TCPConnector(resolver=_Resolver(rule), force_close=True)
    try:
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            for _ in range(rule.redirects + 1):
                rule.check(url)
                async with session.get(url, allow_redirects=False) as response:
                    if response.status in (301, 302, 303, 307, 308):
                        url = urljoin(url, response.headers.get("Location", ""))
                        continue
                    if response.status != 200:
                        raise FetchError(f"it answered {response.status}")
                    await _read(response, write, max_bytes)
                    return
        raise FetchError(f"it redirects more than {rule.redirects} times")
    except TimeoutError:
        raise FetchError(f"it took more than {seconds:g} seconds") from None
    except (aiohttp.ClientError, _PrivateAddress, ValueError) as error:
        refusal = error if isinstance(error, _PrivateAddress) else error.__cause__
        if isinstance(refusal, _PrivateAddress):
            raise UrlNotAllowed(str(refusal)) from None
        raise FetchError(type(error).__name__) from None


async def fetch_bytes(
    url: str, rule: FetchRule, *, seconds: float, max_bytes: int | None = None
) -> bytes:
    """The content of ``url``. Errors as of `fetch`."""
    chunks: list[bytes] = []
    await fetch(url, rule, chunks.append, seconds=seconds, max_bytes=max_bytes)
    return b"".join(chunks)


async def _read(
    response: aiohttp.ClientResponse, write: Callable[[bytes], object], max_bytes: int | None
) -> None:
    received = 0
    async for chunk in response.content.iter_chunked(CHUNK):
        received += len(chunk)
        if max_bytes is not None and received > max_bytes:
            raise DownloadTooLarge(f"it has more than {max_bytes} bytes, the limit of this server")
        write(chunk)


class _PrivateAddress(OSError):
    """A host is not on the internet. Says which."""


class _Resolver(aiohttp.ThreadedResolver):
    """Resolves names to public addresses only, at the moment of connecting."""

    def __init__(self, rule: FetchRule) -> None:
        super().__init__()
        self._private = rule.private

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[Any]:
        found: list[Any] = await super().resolve(host, port, family)
        for entry in found:
            if not self._private and not is_public(entry["host"]):
                raise _PrivateAddress(f"{host} is not a public address")
        return found


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, also when written inside an IPv6 address."""
    ip = ipaddress.ip_address(address.split("%")[0])
    addresses = [ip, *(_inside(ip) if ip.version == 6 else ())]
    return all(each.is_global and not each.is_multicast for each in addresses)


def _inside(ip: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that packets to ``ip`` may reach instead."""
    of_tunnels = [ip.sixtofour, *(ip.teredo or ())]
    found = [each for each in of_tunnels if each is not None]
    if any(ip in network for network in ENDING_IN_IPV4):
        found.append(ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF))
    return found
