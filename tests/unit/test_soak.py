"""The soak suite's own parts that need no server."""

import random

from tests.soak.__main__ import noise


def test_noise_is_bytes_of_which_it_is_known_whether_a_request_ends():
    """A kind without that ended the whole suite."""
    numbers = random.Random(2)
    for data, ends in (noise(numbers) for _ in range(500)):
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.rsplit(b"content-length: ", 1)[1].split(b"\r\n")[0]) if head.startswith(b"POST ") else 1 << 20
        assert ends == (len(body) < length)
