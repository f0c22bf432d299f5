"""Read the images of a request from data URIs or allowed https hosts, check and embed them.

The first bytes decide what an image is, not the declared type of a data URI. Images are decoded, within their
limits on pixels, by the image encoder. A host name is resolved once, its addresses are checked, and the
connection goes to one of them, which prevents DNS rebinding. Redirects are followed here, and each target
passes the same checks.

Shapes: I images, D embedding_dim.
"""

import asyncio
import base64
import binascii
import hashlib
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiohttp
import numpy as np
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from revision_ray.data.images import (
    FORMATS,
    HEAD_BYTES,
    ImageTooLarge,
    UndecodableImage,
    data_uri_content,
    is_image,
)
from revision_ray.serve.calls import patiently, rejected, together
from revision_ray.serve.drift import DriftReporter
from revision_ray.serve.prompt import ImagePartPlace, ModelFacts
from revision_ray.serve.protocol import ApiError, ImageEmbedding, ImageUrlPart
from revision_ray.serve.settings import ImageSettings, RemoteImageSettings, RequestLimits

_SHORTEST_NORM = 1e-8


def bytes_of_data_uri(uri: str, *, max_bytes: int, param: str) -> bytes:
    """Return the bytes of an image's data URI, base64 or percent-encoded.

    Raises:
        ApiError: 400 not a data URI, or not of an image; 413 more than `max_bytes`.
    """
    try:
        content = data_uri_content(uri, max_bytes=max_bytes)
    except ImageTooLarge as error:
        raise too_large(max_bytes, param) from error
    except UndecodableImage as error:
        raise ApiError(400, f"{param}: {error}", param=param) from error
    return checked(content, max_bytes=max_bytes, param=param)


def checked(content: bytes, *, max_bytes: int, param: str) -> bytes:
    """Check that `content` begins like an image and has at most `max_bytes`, and return it.

    Raises:
        ApiError: 400 empty or not an image; 413 too large.
    """
    if len(content) > max_bytes:
        raise too_large(max_bytes, param)
    if not content:
        raise ApiError(400, f"{param}: the image has 0 bytes", param=param, code="invalid_image")
    if not is_image(content[:HEAD_BYTES]):
        raise ApiError(
            400,
            f"{param}: the data is no {FORMATS} image, whatever it is declared as; send one of these",
            param=param,
            code="invalid_image",
        )
    return content


def too_large(max_bytes: int, param: str) -> ApiError:
    return ApiError(
        413, f"{param}: the image has more than {max_bytes} bytes; send a smaller one", param=param
    )


def digest(content: bytes) -> bytes:
    """Return the SHA-256 of an image's bytes, which identifies it."""
    return hashlib.sha256(content).digest()


def embedding_row(part: ImageEmbedding, *, dim: int, fingerprint: str | None, param: str) -> np.ndarray:
    """Return the embedding of a request as a unit row, float32 (dim,).

    `fingerprint` is that of the model's image encoder; None accepts any encoder.

    Raises:
        ApiError: 400, it is of another encoder or dimension, not finite, or zero.
    """
    if fingerprint and part.encoder_fingerprint != fingerprint:
        raise ApiError(
            400,
            f"{param}.encoder_fingerprint: the model was trained on the space of another encoder "
            f"({fingerprint[:12]}...), where the same picture has another embedding; embed it with that one",
            param=f"{param}.encoder_fingerprint",
            code="wrong_encoder",
        )
    param = f"{param}.embedding"
    if isinstance(part.embedding, str):
        try:
            content = base64.b64decode(part.embedding, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ApiError(400, f"{param}: not base64; encode it again", param=param) from error
        if len(content) % 4:
            raise ApiError(400, f"{param}: {len(content)} bytes are no whole float32", param=param)
        row_D = np.frombuffer(content, "<f4").astype(np.float64)
    else:
        row_D = np.asarray(part.embedding, np.float64)
    if len(row_D) != dim:
        raise ApiError(400, f"{param}: has {len(row_D)} numbers, the model takes {dim}", param=param)
    # Scaled first: the square of a large float64 would overflow.
    largest = float(np.abs(row_D).max())
    if not np.isfinite(largest):
        raise ApiError(400, f"{param}: holds a number that is not finite (NaN or infinity)", param=param)
    if largest < _SHORTEST_NORM:
        raise ApiError(400, f"{param}: is zero, and so has no direction", param=param)
    row_D = row_D / largest
    return (row_D / np.linalg.norm(row_D)).astype(np.float32)


# host, port -> addresses, as text.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Translation to and from addresses that only the operator of the network knows.
_LOCAL_NAT64 = ipaddress.ip_network("64:ff9b:1::/48")
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 64 * 1024


def is_public(address: str) -> bool:
    """Return whether an address is on the public internet; an IPv4 address inside IPv6 is checked too."""
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
    """Return all addresses of `host`, from the system's resolver."""
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(info[4][0]) for info in infos]


class _Checked(AbstractResolver):
    """Resolver for aiohttp that returns only checked addresses."""

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
    """Client that fetches images from the hosts that `settings` allow; use it in one event loop."""

    def __init__(
        self,
        settings: RemoteImageSettings,
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
        """Return the bytes of the image at `url`.

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
            # The reason is not given, because it would reveal which internal addresses and ports answer.
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


class ServedImages:
    """Embeddings of the images of requests; `encoder` is the image encoder's handle, None without a tower."""

    def __init__(
        self,
        facts: ModelFacts,
        encoder: Any,
        fetcher: Fetcher,
        reporter: DriftReporter,
        settings: ImageSettings,
        limits: RequestLimits,
    ) -> None:
        self.facts = facts
        self._encoder, self._fetcher, self._reporter = encoder, fetcher, reporter
        self._settings, self._limits = settings, limits

    async def embeddings(self, shown: Sequence[ImagePartPlace]) -> np.ndarray:
        """Return embeddings float32 (I, D), in the order of `shown`.

        Raises:
            ApiError: an image is refused; the message names it.
        """
        most = self._settings.max_per_request
        if len(shown) > most:
            raise ApiError(
                400, f"{len(shown)} images in one request, at most {most}", param=shown[most].param
            )
        if not shown:
            return np.empty((0, self.facts.embedding_dim), np.float32)
        return np.stack(await together([self._embedding(each) for each in shown]))

    async def _embedding(self, shown: ImagePartPlace) -> np.ndarray:
        part = shown.part
        if not isinstance(part, ImageUrlPart):
            row_D = embedding_row(
                part.image_embedding,
                dim=self.facts.embedding_dim,
                fingerprint=self.facts.fingerprint,
                param=f"{shown.param}.image_embedding",
            )
            self._reporter.add(row_D)
            return row_D
        param = f"{shown.param}.image_url.url"
        if self._encoder is None:
            raise ApiError(
                400,
                f"{param}: this model holds no image tower; send an image_embedding part instead",
                param=param,
                code="no_image_tower",
            )
        content = await self._content(part.image_url.url, param)
        try:
            row_D = await patiently(
                lambda: self._encoder.encode.remote(content),
                "image encoder",
                timeout_s=self._limits.image_timeout_s,
                max_attempts=self._limits.max_attempts,
            )
        except ApiError as error:
            if error.status_code == 400:
                raise ApiError(400, f"{param}: {error.detail}", param=param, code=error.code) from error
            raise
        return row_D

    async def _content(self, url: str, param: str) -> bytes:
        try:
            if url[:5].lower() == "data:":
                # A large one takes milliseconds, which the event loop has not.
                return await asyncio.to_thread(
                    bytes_of_data_uri, url, max_bytes=self._settings.max_bytes, param=param
                )
            return await self._fetcher.fetch(url, param)
        except ApiError:
            rejected("image")
            raise
