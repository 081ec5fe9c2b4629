"""Repositories on a Hub: pinned first, then read by exact byte ranges that are checked and cached.

From the bottom up: `guard` (the HTTP client), `failures` (what answers mean as errors), `link`
(every request), `listing` and `offline` (which commit, which files), `ranges` (what to ask for),
`cache` and `copies` (what is on disk), `transfer` (bytes by HTTP), `source` (`open_hub`).

huggingface_hub supplies the session, the token, the endpoint, the offline switch, the URLs and the
standard cache. Its own listing and download functions are not used: they retry without a bound,
fall back to stale files, follow `Link` headers with the token, and raise what their models raise.
"""

from projaudit.hub.guard import Limits, guarded_client
from projaudit.hub.source import HubSource, open_hub

__all__ = ["HubSource", "Limits", "guarded_client", "open_hub"]
