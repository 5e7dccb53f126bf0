"""Whether the Julia package server can be reached, through the proxies that Julia would use."""

from __future__ import annotations

import http.client
import os
import ssl
import threading
import urllib.error
import urllib.request

PUBLIC = "https://pkg.julialang.org"
PROBE_SECONDS = 4.0


def address() -> str:
    """The address of the Julia package server, JULIA_PKG_SERVER or the public one; empty if it is disabled."""
    server = os.environ.get("JULIA_PKG_SERVER", PUBLIC).rstrip("/")
    return server if not server or "://" in server else f"https://{server}"


def is_reachable() -> bool:
    """Whether the package server answers in any way: Julia handles certificates and passwords."""
    server, proxies = address(), _proxies()
    if not server or any(proxy.startswith("socks") for proxy in proxies.values()):
        return True  # packages come from elsewhere, or in a way that Python cannot check
    open_url = urllib.request.build_opener(urllib.request.ProxyHandler(proxies)).open
    # In a separate thread, since name look-ups have no time-out.
    reached = threading.Event()

    def probe() -> None:
        try:
            open_url(f"{server}/registries", timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLError):
                return
        except (OSError, ValueError, http.client.HTTPException):
            return
        reached.set()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return reached.is_set()


def _proxies() -> dict[str, str]:
    """Proxies by scheme; for schemes without one that of ALL_PROXY, which Julia uses and Python does not."""
    proxies = urllib.request.getproxies()
    if common := proxies.get("all"):
        proxies = {"http": common, "https": common} | proxies
    return proxies
