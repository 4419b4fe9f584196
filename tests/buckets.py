"""Memory in the place of buckets."""

import contextlib
from unittest import mock

from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem


class HttpError(Exception):
    """As gcsfs has it: no error of the system, and no base but Exception."""

    __module__ = "gcsfs.retry"


class Bucket(MemoryFileSystem):
    """Objects as gcsfs shows them: a folder is there as long as an object lies in it, and none can be made."""

    def mkdir(self, path, **_):
        pass

    makedirs = mkdir


@contextlib.contextmanager
def memory_for_buckets():
    """Put memory in the place of every bucket; gives the store."""
    bucket, disk = Bucket(global_store=False, skip_instance_cache=True), LocalFileSystem()
    store_of = lambda self, path: bucket if "://" in str(path) else disk
    with mock.patch.object(type(backend.fsspec_backend), "fs", store_of):
        yield bucket
