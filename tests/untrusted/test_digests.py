"""Digests that came with a download, found through the links of the cache."""

import os

import pytest
from rigs.fake_hub import COMMIT

from sae.base.errors import DataError
from sae.untrusted import digests


def test_a_blob_that_several_repositories_share_is_compared_by_the_name_of_its_link(tmp_path):
    good, shared = b"good", tmp_path / "blobs" / "ab" / ("c" * 64)
    shared.parent.mkdir(parents=True)
    shared.write_bytes(good)
    import hashlib

    blob = tmp_path / "models--a--b" / "blobs" / hashlib.sha256(good).hexdigest()
    link = tmp_path / "models--a--b" / "snapshots" / COMMIT / "x" / "w.safetensors"
    for path, target in ((blob, shared), (link, blob)):
        path.parent.mkdir(parents=True)
        path.symlink_to(os.path.relpath(target, path.parent))
    digests.verify(link)
    shared.write_bytes(b"bad!")
    with pytest.raises(DataError, match=f"delete {blob}"):
        digests.verify(link)
