"""A server's address, key and proxy, and one request to it outside any measurement."""

from __future__ import annotations

import base64
import http.client
import os
import ssl
from dataclasses import dataclass, field, replace
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from unshot.errors import InputError
from unshot.secret import remember, without_credentials

# What `--proxy` says for the proxy that the environment names.
ENVIRONMENT = "env"


def bracketed(host: str) -> str:
    """The host as a URL has it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy, and what it is told of who asks."""

    host: str
    port: int
    authorization: str | None = field(default=None, repr=False)

    @property
    def base(self) -> str:
        """Its URL without credentials."""
        return f"http://{bracketed(self.host)}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """What goes to the proxy alone."""
        return {"Proxy-Authorization": self.authorization} if self.authorization else {}


@dataclass(frozen=True)
class Address:
    """Where a server is: the parts of its base URL."""

    host: str
    port: int
    tls: bool
    path: str
    # TLS: a file of certificate authorities instead of the system's, or no check of the certificate at all.
    authorities: str | None = None
    verify: bool = True
    proxy: Proxy | None = None

    @property
    def hop(self) -> tuple[str, int]:
        """Host and port that a connection is opened to: the proxy's where there is one."""
        return (self.proxy.host, self.proxy.port) if self.proxy else (self.host, self.port)

    @property
    def way(self) -> str:
        """For a report: the proxy's URL, or `none`."""
        return self.proxy.base if self.proxy else "none"

    @property
    def base(self) -> str:
        """The URL that was given, in its shortest form."""
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.path}"

    def context(self) -> ssl.SSLContext | None:
        """How TLS is spoken; None for plain HTTP. Raises `InputError` for a file that holds no certificates."""
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.authorities)
        except (OSError, ssl.SSLError) as error:
            raise InputError(
                f"{self.authorities}: not a file of certificates in PEM form ({error})"
            ) from None
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    @property
    def authority(self) -> str:
        """The Host header's value."""
        host = bracketed(self.host)
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


def parse_url(url: str, *, authorities: str | None = None, verify: bool = True) -> Address:
    """Split `http(s)://host[:port][/path]`; `InputError` for anything else, and for credentials in it.

    A query or fragment has no place in a base URL. `authorities` and `verify` are for TLS, see `Address`.
    """
    # In messages without what may be a key: servers take it as a user, a password or in the query.
    shown = without_credentials(url)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InputError(f"{shown}: not a URL ({error})") from None
    if parts.username is not None or parts.password is not None:
        raise InputError(
            "the URL holds credentials; name the environment variable that holds the key (--key-env)"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{shown}: not a server's address; give http://HOST:PORT/v1")
    if "?" in url or "#" in url or any(c.isspace() or not c.isprintable() for c in url):
        raise InputError(
            f"{shown}: a base URL has no query, fragment or blanks; give http://HOST:PORT/v1, and a key by its "
            "environment variable (--key-env)"
        )
    if port == 0:
        raise InputError(f"{shown}: port 0 is no server's; give http://HOST:PORT/v1")
    tls = parts.scheme == "https"
    path = parts.path.rstrip("/")
    return Address(parts.hostname, port or (443 if tls else 80), tls, path, authorities, verify)


def through_proxy(address: Address, given: str | None) -> Address:
    """The address as it is reached by `--proxy`: an HTTP proxy's URL, `env` for the environment's, None for none.

    The environment's are HTTP_PROXY, HTTPS_PROXY and NO_PROXY, as urllib reads them; only there may a proxy's URL hold
    user and password. Raises `InputError`.
    """
    if given is None:
        return address
    url: str | None = given
    if given == ENVIRONMENT:
        scheme = "https" if address.tls else "http"
        url = None if proxy_bypass(address.host) else getproxies().get(scheme)
    if not url:
        return address
    name = f"--proxy {without_credentials(url)}"
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port or 80
    except ValueError as error:
        raise InputError(f"{name}: not a URL ({error})") from None
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or parts.query:
        raise InputError(f"{name}: not an HTTP proxy's address; give http://HOST:PORT")
    if parts.username is None:
        return replace(address, proxy=Proxy(parts.hostname, port))
    if given != ENVIRONMENT:
        raise InputError(
            "the proxy's URL holds credentials; set it as HTTP_PROXY or HTTPS_PROXY and say --proxy env"
        )
    said = f"{unquote(parts.username)}:{remember(unquote(parts.password or ''))}"
    coded = remember(base64.b64encode(said.encode()).decode())
    return replace(address, proxy=Proxy(parts.hostname, port, f"Basic {coded}"))


def call(
    address: Address, path: str, *, body: bytes | None = None, key: str | None = None, timeout: float = 10.0
) -> tuple[int, bytes]:
    """`(status, body)` of one request outside any measurement: GET, or POST of a JSON `body`.

    Raises `OSError` where no answer came.
    """
    status, _, answer = request_once(address, path, body=body, key=key, timeout=timeout)
    return status, answer


def request_once(
    address: Address, path: str, *, body: bytes | None = None, key: str | None = None, timeout: float = 10.0
) -> tuple[int, dict[str, str], bytes]:
    """As `call`, with the answer's headers (names in lower case)."""
    headers = {"Accept": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    if body is not None:
        headers["Content-Type"] = "application/json"
    context = address.context()
    connection: http.client.HTTPConnection
    target = address.path + path
    if context is None:
        connection = http.client.HTTPConnection(*address.hop, timeout=timeout)
        if address.proxy:
            target, headers = f"{address.base}{path}", {**headers, **address.proxy.headers}
    else:
        connection = http.client.HTTPSConnection(*address.hop, timeout=timeout, context=context)
        if address.proxy:
            connection.set_tunnel(address.host, address.port, address.proxy.headers)
    try:
        connection.request("GET" if body is None else "POST", target, body, headers)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, found, response.read()
    except http.client.HTTPException as error:
        raise OSError(f"not an HTTP answer ({type(error).__name__})") from None
    finally:
        connection.close()


def read_key(variable: str | None, flag: str = "--key-env") -> str | None:
    """The API key in the environment variable that the user names by `flag`; it is never logged or written.

    There is no default variable: a key is only sent to a server for which somebody asked for that.
    """
    if variable is None:
        return None
    value = os.environ.get(variable)
    if not value:
        raise InputError(f"{flag} names {variable}, which is not set")
    if not value.isprintable():
        raise InputError(f"the key in {variable} holds a line break or another control character")
    return remember(value)
