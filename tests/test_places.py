"""What is passed on names no folder of the machine that made it."""

import pytest

from dydit_jax.checkpoints import without_places


@pytest.mark.parametrize(
    "text, kept",
    [
        ("/home/me/flowers", "flowers"),
        ("/home/me/flowers/", "flowers"),
        ("~/flowers", "flowers"),
        ("~me/flowers", "flowers"),
        (r"C:\Users\me\flowers", "flowers"),
        (r"\\server\share\flowers", "flowers"),
        ("file:///home/me/flowers", "flowers"),
        ("gs://bucket/flowers", "flowers"),
        ("https://me:word@server/w.pt?token=1#sha256=2", "https://server/w.pt#sha256=2"),
        ("runs/flowers", "runs/flowers"),
        ("hf://me/flowers", "hf://me/flowers"),
        ("dit-xl2-256", "dit-xl2-256"),
        ("0:207,1:360", "0:207,1:360"),
        ("", ""),
    ],
)
def test_paths_are_reduced_to_their_last_name(text, kept):
    assert without_places(dict(a=[text], b=(1, None, True))) == dict(a=[kept], b=[1, None, True])


def test_names_of_classes_are_no_paths():
    assert without_places(dict(class_names=["/r/pics", "~ou/x"])) == dict(class_names=["/r/pics", "~ou/x"])
