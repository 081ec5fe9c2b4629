"""Models elsewhere than on this machine or a Hub: in buckets, behind a URL, in an MLflow registry.

From the bottom up: `transfer` (exact ranges of a file whose state is pinned), `source` (such files
as a `Source`), `web`, `buckets` and `registry` (what is there, and how each file is asked for),
`places` (`open_remote`).

fsspec's filesystems (s3fs, gcsfs) find the account, the endpoint and the region, list a bucket and
sign; mlflow resolves a model to the folder it lies in. They do not read: their reads neither check
which range came back nor bound what is sent.
"""

from projaudit.remote.places import open_remote

__all__ = ["open_remote"]
