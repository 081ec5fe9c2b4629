"""One weight file behind an https URL, signed or not."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from projaudit.hub.link import Link
from projaudit.refs import Ref
from projaudit.remote.transfer import Item, look
from projaudit.source import RepoFile

ACCOUNT = "check the URL; signed ones expire"


def find_file(ref: Ref, link: Link) -> tuple[dict[str, Item], bool]:
    """The file of a URL by its name, and True: it is one file; raises as `transfer.look`.

    Its state is its ETag, or else its time of change; a server that names neither is told of, as
    only its size says then that a file is still the same.
    """
    assert ref.uri is not None
    url = ref.uri
    name = unquote(urlsplit(url).path.rpartition("/")[2])
    size, state = look(link, (url, {}), ref.text, ACCOUNT, ("etag", "last-modified"))
    if not state:
        link.notify(
            f"{ref.text}: the server names neither ETag nor time of change, so a change "
            "during the audit would show only by the file's size"
        )
    item = Item(RepoFile(name, size), ref.text, lambda: (url, {}), state[:1])
    return {name: item}, True
