"""The chat page: one file, no network but the server that sent it."""

import base64
import functools
import hashlib
import re
from pathlib import Path


@functools.cache
def page() -> tuple[bytes, str]:
    """(HTML, value of its Content-Security-Policy header).

    The policy lets the browser run the page's own script and style, known by their hashes, and speak to
    nobody but this server: text that a model makes up can load and run nothing.
    """
    html = Path(__file__).with_name("index.html").read_bytes()
    policy = [
        "default-src 'none'",
        f"script-src {_hashes(html, b'script')}",
        f"style-src {_hashes(html, b'style')}",
        "img-src data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return html, "; ".join(policy)


def _hashes(html: bytes, tag: bytes) -> str:
    """CSP sources of the inline blocks of this tag: hashes of exactly what stands between the tags."""
    blocks = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), html, re.DOTALL)
    assert blocks, f"index.html has no inline {tag.decode()}"
    return " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(block).digest()).decode()}'" for block in blocks
    )
