"""Images by https address: from allowed hosts alone, and never from an address inside one's own network.

A name is resolved once, its addresses are checked, and the connection goes to one of those, so that a name
that changes its mind between check and connection (DNS rebinding) gains nothing. Redirects are followed by
hand: each target passes the same checks.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from revision_ray.serve.api_error import ApiError
from revision_ray.serve.images import checked, too_large
from revision_ray.serve.settings import RemoteImages

# host, port -> addresses, as text.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Translation to and from addresses that only the operator of the network knows.
_LOCAL_NAT64 = ipaddress.ip_network("64:ff9b:1::/48")
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 64 * 1024


def is_public(address: str) -> bool:
    """Whether the address is on the open internet, also behind IPv6 forms that carry an IPv4 address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None or ip.is_site_local or ip in _LOCAL_NAT64:
            return False
        inside = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inside = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if ip.teredo is not None:  # (server, client): the client is who answers
            inside = ip.teredo[1]
        if inside is not None:
            return is_public(str(inside))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


async def resolve(host: str, port: int) -> Sequence[str]:
    """Every address of `host`, by the system's resolver."""
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(info[4][0]) for info in infos]


class _Checked(AbstractResolver):
    """What aiohttp asks for addresses: all that it gets were checked, and it connects to those."""

    def __init__(self, find: Resolve, allowed: Callable[[str], bool]) -> None:
        self._find, self._allowed = find, allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        addresses = await self._find(host, port)
        # All or none: a name with one address inside and one outside is a trap.
        if not addresses or not all(map(self._allowed, addresses)):
            raise OSError("an address that may not be fetched from")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        pass


class Fetcher:
    """Fetches images by address, as `settings` allow; use it in one event loop."""

    def __init__(
        self,
        settings: RemoteImages,
        max_bytes: int,
        *,
        find: Resolve = resolve,
        allowed: Callable[[str], bool] = is_public,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._settings, self._max_bytes = settings, max_bytes
        self._hosts = [host.lower().rstrip(".") for host in settings.hosts]
        self._find, self._allowed, self._context = find, allowed, context
        self._session: aiohttp.ClientSession | None = None

    async def fetch(self, url: str, param: str) -> bytes:
        """The bytes of the image at `url`.

        Raises:
            ApiError: 400 the address is not allowed, cannot be reached in time, or holds no image; 413 more
                than the bytes that an image may have.
        """
        if not self._settings.enabled:
            raise ApiError(
                400,
                f"{param}: this server fetches no images; send the image itself as data:image/...;base64,...",
                param=param,
                code="remote_images_off",
            )
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                content = await self._follow(url, param)
        except TimeoutError as error:
            raise _unreachable(f"it took longer than {self._settings.timeout_s:g} s", param) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # Why is not said: it would tell which addresses and ports inside answer.
            raise _unreachable("its host could not be reached, or may not be fetched from", param) from error
        return checked(content, max_bytes=self._max_bytes, param=param)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _follow(self, url: str, param: str) -> bytes:
        target = self._target(url, param)
        for _ in range(self._settings.max_redirects + 1):
            async with self._opened().get(target, allow_redirects=False) as response:
                if response.status in _REDIRECTS and "Location" in response.headers:
                    # Relative ones are allowed; joined by the parser that the connection uses too.
                    joined = target.join(URL(response.headers["Location"]))
                    target = self._target(str(joined), param)
                    continue
                if response.status != 200:
                    raise _unreachable(f"its host answered with status {response.status}", param)
                if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                    raise _unreachable("it is compressed by its host", param)
                return await self._read(response, param)
        raise _unreachable(f"it redirects more than {self._settings.max_redirects} times", param)

    def _target(self, url: str, param: str) -> URL:
        """
        Raises:
            ApiError: not https, or a host that is not named in the settings.
        """
        try:
            target = URL(url)
            host, port = (target.raw_host or "").lower().rstrip("."), target.port
        except ValueError:
            target, host, port = URL(), "", None
        if target.scheme != "https" or target.user is not None or target.password is not None:
            raise _refused("expected an https address without a user name", param)
        if not any(self._matches(allowed, host, port) for allowed in self._hosts):
            raise _refused("its host is not one that this server fetches from", param)
        if _is_address(host) and not self._allowed(host):
            # aiohttp asks no resolver about these.
            raise _refused("its host is not one that this server fetches from", param)
        return target.with_fragment(None)

    @staticmethod
    def _matches(allowed: str, host: str, port: int | None) -> bool:
        """`allowed` is example.org, .example.org (every host below it), or one of them with :port."""
        name, _, given = allowed.partition(":") if allowed.count(":") == 1 else (allowed, "", "")
        if port != (int(given) if given else 443):
            return False
        return host.endswith(name) and len(host) > len(name) if name.startswith(".") else host == name

    async def _read(self, response: aiohttp.ClientResponse, param: str) -> bytes:
        if (response.content_length or 0) > self._max_bytes:
            raise too_large(self._max_bytes, param)
        content = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK):
            content += chunk
            if len(content) > self._max_bytes:
                raise too_large(self._max_bytes, param)
        return bytes(content)

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            connector = aiohttp.TCPConnector(
                resolver=_Checked(self._find, self._allowed),
                use_dns_cache=False,
                ssl=self._context or True,
                limit_per_host=8,
                # A connection that is kept was checked when it was made; not for longer than a moment.
                keepalive_timeout=5,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "revision_ray"},
            )
        return self._session


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _refused(why: str, param: str) -> ApiError:
    return ApiError(
        400,
        f"{param}: {why}; send the image itself as data:image/...;base64,...",
        param=param,
        code="invalid_image_url",
    )


def _unreachable(why: str, param: str) -> ApiError:
    return ApiError(
        400,
        f"{param}: the image could not be fetched: {why}; send it as data:image/...;base64,...",
        param=param,
        code="image_not_fetched",
    )
