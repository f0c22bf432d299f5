"""Images on their way into the server: what is taken, what is refused, and from where."""

import asyncio
import base64
import datetime
import io
import ssl
import struct
import zlib

import numpy as np
import pytest
import torch
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image
from tiny_model import picture, tiny_model, unit_rows

from revision_ray.core.errors import ConfigError
from revision_ray.data.images import UndecodableImage
from revision_ray.serve.images import Fetcher, bytes_of_data_uri, checked, embedding_row, is_public
from revision_ray.serve.protocol import ApiError, ImageEmbedding
from revision_ray.serve.settings import ImageSettings, RemoteImageSettings

PNG = picture(0)


def data_uri(content: bytes, declared: str = "image/png", parameters: str = ";base64") -> str:
    return f"data:{declared}{parameters},{base64.b64encode(content).decode()}"


def of_uri(uri: str, max_bytes: int = 1 << 20) -> bytes:
    return bytes_of_data_uri(uri, max_bytes=max_bytes, param="here")


def refused(call, *arguments, **keywords) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(*arguments, **keywords)
    return caught.value


# --- data URIs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        data_uri(PNG),
        data_uri(PNG, "image/jpeg"),  # what is declared is not believed
        data_uri(PNG, ""),
        data_uri(PNG, "IMAGE/PNG", ";charset=utf-8;base64"),
        "DATA:image/png;BASE64," + base64.b64encode(PNG).decode(),
        "data:image/png;base64," + base64.urlsafe_b64encode(PNG).decode().rstrip("="),
        "data:image/png;base64," + base64.encodebytes(PNG).decode(),  # with line breaks
        "data:image/png;base64," + base64.b64encode(PNG).decode().replace("+", "%2B").replace("/", "%2F"),
        "data:image/png," + "".join(f"%{byte:02X}" for byte in PNG),
    ],
)
def test_a_data_uri_gives_its_bytes(uri):
    assert of_uri(uri) == PNG


@pytest.mark.parametrize(
    "uri",
    ["", "data:", "data:image/png;base64", "image/png;base64,AAAA", "data:image/png;base64,####", "x" * 999],
)
def test_what_is_no_data_uri_is_refused(uri):
    error = refused(of_uri, uri)
    assert error.status_code == 400
    assert error.param == "here"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        b"<!DOCTYPE html><img src=x>",
        b"%PDF-1.7",
        b"PK\x03\x04",
        b"RIFF\x00\x00\x00\x00AVI ",
        b"\x7fELF",
        b"hello",
        PNG[:4],
    ],
)
def test_what_does_not_begin_as_an_image_is_refused_whatever_it_says(content):
    error = refused(of_uri, data_uri(content, "image/png"))
    assert (error.status_code, error.code) == (400, "invalid_image")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_every_format_is_known_by_its_content(kind):
    content = picture(1, kind=kind)
    assert checked(content, max_bytes=len(content), param="here") == content
    assert refused(checked, content, max_bytes=len(content) - 1, param="here").status_code == 413


def test_a_large_data_uri_is_refused_before_it_is_decoded(monkeypatch):
    uri = data_uri(PNG + bytes(100_000))
    monkeypatch.setattr(base64, "b64decode", None)
    assert refused(of_uri, uri, max_bytes=50_000).status_code == 413
    assert refused(of_uri, "data:image/png," + "a" * 300_004, max_bytes=100_000).status_code == 413


def test_no_refusal_quotes_what_was_sent():
    secret = "c2VjcmV0IHByb21wdA"
    for uri in (f"data:image/png;base64,{secret}", f"data:{secret}", secret, f"data:image/png,{secret}"):
        assert secret not in str(refused(of_uri, uri).body())


# --- precomputed embeddings ---------------------------------------------------------------------------------


def row_of(embedding, dim: int = 4, fingerprint: str | None = "f" * 64, given: str = "f" * 64) -> np.ndarray:
    part = ImageEmbedding(embedding=embedding, encoder_fingerprint=given)
    return embedding_row(part, dim=dim, fingerprint=fingerprint, param="here")


def test_an_embedding_comes_as_numbers_or_base64_and_is_brought_to_length_one():
    row_D = np.array([3.0, 0, 4, 0])
    for embedding in (row_D.tolist(), base64.b64encode(row_D.astype("<f4").tobytes()).decode()):
        got_D = row_of(embedding)
        assert got_D.dtype == np.float32
        np.testing.assert_allclose(got_D, row_D / 5, rtol=1e-6)
    # The squares of these are beyond float64.
    np.testing.assert_allclose(row_of([1e300, 0, 1e300, 0]), np.array([1, 0, 1, 0]) / 2**0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("embedding", "code"),
    [
        ([1.0, 2.0], None),
        ([0.0] * 4, None),
        (base64.b64encode(np.full(4, np.nan, "<f4").tobytes()).decode(), None),
        (base64.b64encode(b"123").decode(), None),
        ("not base64!", None),
        ("", None),
    ],
)
def test_an_embedding_without_direction_or_of_another_size_is_refused(embedding, code):
    error = refused(row_of, embedding)
    assert (error.status_code, error.param) == (400, "here.embedding")


def test_an_embedding_of_another_encoder_is_refused():
    error = refused(row_of, [1.0, 0, 0, 0], given="e" * 64)
    assert (error.status_code, error.code) == (400, "wrong_encoder")
    row_of([1.0, 0, 0, 0], fingerprint=None, given="e" * 64)  # this model knows none


# --- the image encoder, outside Serve -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def encoder(folder):
    from revision_ray.serve.replicas import ImageEncoder

    return ImageEncoder(str(folder), ImageSettings(max_pixels=10_000))


def embedding(encoder, content: bytes) -> np.ndarray:
    return encoder._compute([encoder._prepare(content)])[0]


def test_the_tower_alone_gives_the_rows_of_the_whole_model(folder, encoder):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    images = [Image.open(io.BytesIO(picture(seed, size=(50, 30)))) for seed in range(3)]
    pixels = AutoProcessor.from_pretrained(folder)(images=images, return_tensors="pt")["pixel_values"]
    expected = model.encode_images(pixels).numpy()
    got = encoder._compute([encoder._prepare(picture(seed, size=(50, 30))) for seed in range(3)])
    np.testing.assert_array_equal(got, expected)
    # A batch changes rounding alone: sums of some ten float32 products of entries below one.
    np.testing.assert_allclose(embedding(encoder, picture(1, size=(50, 30))), expected[1], atol=2e-6)


def test_a_model_without_tower_has_no_image_encoder(tmp_path):
    from revision_ray.serve.replicas import load_image_tower

    with pytest.raises(ConfigError, match="no image tower"):
        load_image_tower(str(tiny_model(tmp_path, tower=False)))


def bomb(width: int, height: int) -> bytes:
    """A PNG that states a huge size, in 70 bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "content",
    [PNG[:200], bomb(101, 100), bomb(60_000, 60_000), b"\xff\xd8\xff" + bytes(50), b"BM" + bytes(60)],
)
def test_truncated_images_and_bombs_are_refused_without_a_word_of_their_content(encoder, content):
    checked(content, max_bytes=1000, param="here")  # they pass for images at first sight
    with pytest.raises(UndecodableImage) as caught:
        encoder._prepare(content)
    assert "\\x" not in str(caught.value)


def test_of_an_animation_the_first_frame_counts(encoder):
    frames = [Image.open(io.BytesIO(picture(seed))).convert("P") for seed in range(3)]
    one, all_of_them = io.BytesIO(), io.BytesIO()
    frames[0].save(one, "GIF")
    frames[0].save(all_of_them, "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(
        embedding(encoder, one.getvalue()), embedding(encoder, all_of_them.getvalue())
    )


def test_a_rotated_photograph_is_seen_upright(encoder):
    image = Image.open(io.BytesIO(picture(4, size=(40, 20))))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned, upright = io.BytesIO(), io.BytesIO()
    image.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    image.save(upright, "PNG")
    assert torch.equal(encoder._prepare(turned.getvalue()), encoder._prepare(upright.getvalue()))


# --- addresses ----------------------------------------------------------------------------------------------


INSIDE = """
    0.0.0.0 10.0.0.1 127.0.0.1 127.8.8.8 100.64.0.1 169.254.169.254 172.16.0.1 172.31.255.255 192.168.1.1
    192.0.0.1 192.0.2.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255
    :: ::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:a9fe:a9fe ::7f00:1 fe80::1 fe80::1%eth0 fec0::1 fc00::1
    fd12:3456::1 ff02::1 64:ff9b::7f00:1 64:ff9b::a00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::808:808 100::1
    2001:db8::1 2002:7f00:1:: 2002:a00:1:: 2001:0:4136:e378:8000:63bf:80ff:fffe nonsense 1 127.1"""
OUTSIDE = "8.8.8.8 93.184.216.34 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::"


@pytest.mark.parametrize("address", INSIDE.split())
def test_an_address_inside_is_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", OUTSIDE.split())
def test_an_address_outside_is_public(address):
    assert is_public(address)


# --- fetching, from a real https server on loopback ---------------------------------------------------------

NAMES = ["pictures.example", "other.example", "deep.inside.example", "localhost"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(server's context, client's context) for NAMES."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(each) for each in NAMES]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path_factory.mktemp("tls") / "server.pem"
    pem.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem)
    return server, ssl.create_default_context(cafile=pem)


class Site:
    """The server that is asked, and the resolver that says where names are."""

    def __init__(self) -> None:
        self.port = 0
        self.asked: list[str] = []
        self.resolved: list[str] = []
        self.addresses = {name: ["127.0.0.1"] for name in [*NAMES, "uncertified.example"]} | {
            "private.example": ["10.0.0.5"],
            "metadata.example": ["169.254.169.254"],
            "mixed.example": ["127.0.0.1", "192.168.0.7"],
            "mapped.example": ["::ffff:10.0.0.5"],
            "translated.example": ["64:ff9b::a00:5"],
            "nowhere.example": [],
        }

    async def find(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        return self.addresses[host]

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(f"{request.host.partition(':')[0]}{request.path}")
        path, query = request.path, request.query
        if path == "/redirect":
            return web.Response(status=302, headers={"Location": query["to"]})
        if path == "/round":
            raise web.HTTPFound("/round")
        if path == "/slow":
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(PNG[:20])
            await asyncio.sleep(5)
            return response
        if path == "/endless":
            response = web.StreamResponse()
            response.enable_chunked_encoding()
            await response.prepare(request)
            for _ in range(1000):
                await response.write(PNG)
            return response
        contents = {"/picture": PNG, "/large": PNG + bytes(100_000), "/page": b"<html></html>"}
        if path in contents:
            return web.Response(body=contents[path], content_type="image/png")
        if path == "/packed":
            return web.Response(body=zlib.compress(PNG), headers={"Content-Encoding": "deflate"})
        raise web.HTTPNotFound

    def url(self, host: str, path: str = "/picture") -> str:
        return f"https://{host}:{self.port}{path}"


def fetched(
    certificate, url_of, *, hosts=None, timeout_s: float = 5.0, max_bytes: int = 50_000, allowed=None
):
    """(bytes or ApiError, site) of fetching `url_of(site)`."""

    async def main():
        site = Site()
        app = web.Application()
        app.router.add_get("/{path:.*}", site.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        listener = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=certificate[0])
        await listener.start()
        site.port = runner.addresses[0][1]
        names = hosts if hosts is not None else list(site.addresses)
        settings = RemoteImageSettings(
            enabled=True, hosts=[f"{name}:{site.port}" for name in names], timeout_s=timeout_s
        )
        fetcher = Fetcher(
            settings,
            max_bytes,
            find=site.find,
            # The server is on loopback: for these tests that address, and no other inside, is outside.
            allowed=allowed or (lambda address: address == "127.0.0.1" or is_public(address)),
            context=certificate[1],
        )
        try:
            return await fetcher.fetch(url_of(site), "here"), site
        except ApiError as error:
            return error, site
        finally:
            await fetcher.close()
            await runner.cleanup()

    return asyncio.run(main())


def test_a_picture_is_fetched_and_the_name_resolved_once(certificate):
    content, site = fetched(certificate, lambda site: site.url("pictures.example"))
    assert content == PNG
    assert site.resolved == ["pictures.example"], "a second look could see another address"


def test_redirects_are_followed_a_few_times(certificate):
    def through(site: Site) -> str:
        return site.url("pictures.example", f"/redirect?to={site.url('other.example')}")

    content, site = fetched(certificate, through)
    assert content == PNG
    assert site.resolved == ["pictures.example", "other.example"]
    error, site = fetched(certificate, lambda site: site.url("pictures.example", "/round"))
    assert error.status_code == 400
    assert len(site.asked) == 4


@pytest.mark.parametrize(
    "name", ["private", "metadata", "mixed", "mapped", "translated", "nowhere", "uncertified"]
)
def test_a_name_inside_is_refused_before_a_connection_also_after_a_redirect(certificate, name):
    host = f"{name}.example"
    error, site = fetched(certificate, lambda site: site.url(host))
    assert (error.status_code, error.code) == (400, "image_not_fetched")
    assert site.asked == []
    redirected, site = fetched(
        certificate, lambda site: site.url("pictures.example", f"/redirect?to={site.url(host)}")
    )
    assert redirected.body() == error.body(), "the reason would map what is inside"
    assert site.asked == ["pictures.example/redirect"]


def test_loopback_itself_is_refused_without_the_exception_made_for_these_tests(certificate):
    error, site = fetched(certificate, lambda site: site.url("localhost"), allowed=is_public)
    assert error.code == "image_not_fetched"
    assert site.asked == []


@pytest.mark.parametrize(
    "to",
    [
        "http://pictures.example/picture",
        "https://pictures.example/picture",  # port 443, which is not the one that is listed
        "https://unlisted.example/picture",
        "https://10.0.0.5/picture",
        "https://[::1]/picture",
        "https://2130706433/picture",
        "https://user:password@pictures.example/picture",
        "file:///etc/passwd",
        "ftp://pictures.example/picture",
        "data:image/png;base64,AAAA",
        "//[bad",
    ],
)
def test_other_hosts_and_schemes_are_refused_also_after_a_redirect(certificate, to):
    error, site = fetched(certificate, lambda site: to)
    assert error.status_code == 400
    assert site.resolved == []
    error, site = fetched(certificate, lambda site: site.url("pictures.example", f"/redirect?to={to}"))
    assert error.status_code == 400
    assert site.resolved == ["pictures.example"]


def test_an_address_that_the_list_names_is_checked_all_the_same(certificate):
    error, _ = fetched(certificate, lambda site: site.url("10.0.0.5"), hosts=["10.0.0.5"])
    assert error.status_code == 400


def test_a_dot_stands_for_every_host_below(certificate):
    content, _ = fetched(certificate, lambda site: site.url("deep.inside.example"), hosts=[".inside.example"])
    assert content == PNG
    for host in ("inside.example", "evilinside.example", "pictures.example"):
        error, site = fetched(certificate, lambda site, host=host: site.url(host), hosts=[".inside.example"])
        assert error.status_code == 400
        assert site.resolved == []


@pytest.mark.parametrize(
    ("path", "status"),
    [("/large", 413), ("/endless", 413), ("/slow", 400), ("/page", 400), ("/packed", 400), ("/none", 400)],
)
def test_size_time_and_content_are_bounded(certificate, path, status):
    error, _ = fetched(certificate, lambda site: site.url("pictures.example", path), timeout_s=1.0)
    assert error.status_code == status


def test_nothing_is_fetched_unless_it_is_turned_on():
    fetcher = Fetcher(RemoteImageSettings(), 1000)
    with pytest.raises(ApiError) as caught:
        asyncio.run(fetcher.fetch("https://pictures.example/picture", "here"))
    assert (caught.value.status_code, caught.value.code) == (400, "remote_images_off")
    with pytest.raises(ConfigError, match="hosts"):
        RemoteImageSettings(enabled=True)


def test_a_row_of_the_tiny_model_is_an_embedding_part():
    row_D = unit_rows(1)[0]
    np.testing.assert_allclose(row_of(row_D.tolist(), dim=len(row_D)), row_D, atol=1e-7)
